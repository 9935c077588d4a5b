"""How fast 512-pixel JPEGs become normalised 256-pixel tensors in training batches: our stream and its peers.

Every loader reads the same pictures on the same two cores, in turn, several times over; what counts are the ratios. The
peers run in an environment of their own (`--peers`), as they pin other versions.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import io
import subprocess
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from figures import Row, report, row
from PIL import Image, ImageFilter

from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.pictures import decode_squares
from insightedit.platform.sharding import Sharding, write_shards
from insightedit.platform.storage import Store
from insightedit.platform.streams import Arrays, StageStream, stream_dataset

SIDE, FULL, BATCH, CORES = 256, 512, 64, 2
ROWS_PER_GROUP = 100
PEERS = ("dataloader", "dataloader_draft", "hf_datasets", "mosaic_streaming")


def main() -> None:
    """Make the pictures, time every loader in turn, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="Where the pictures and shards go.")
    parser.add_argument("--peers", type=Path, help="Python of the environment that has the peers.")
    parser.add_argument("--pictures", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, help="Also stream so many rows, and watch the memory.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = make_pictures(arguments.folder, arguments.pictures)
    store = make_shards(arguments.folder)
    loaders: dict[str, Callable[[], float]] = {
        "ours": functools.partial(ours, store, arguments.pictures),
        "decode_limit": functools.partial(decode_limit, names),
    }
    if arguments.peers:
        folder = str(arguments.folder)
        run_peer(arguments.peers, "prepare", folder)
        for name in PEERS:
            loaders[name] = functools.partial(peer, arguments.peers, name, folder)
    with connected(cpus=8):
        ours(store, BATCH * 8)
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(arguments.rounds):
            for name, load in loaders.items():
                rates[name].append(load())
                print(f"{name}: {rates[name][-1]:.0f} pictures/s", flush=True)
        memory = watch_memory(store, arguments.rows) if arguments.rows else []
    rows = {name: row(name, "pictures/s", values) for name, values in rates.items()}
    ratios = {f"vs_{name}": rows["ours"].value / one.value for name, one in rows.items() if name != "ours"}
    report("data", [*rows.values(), *memory], ratios)


def make_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs with the detail of photographs: noise of several scales, quality 90."""
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    names = [pictures / f"{number:09d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        if not name.exists():
            name.write_bytes(_picture(number))
    # As CC12M comes: a list of addresses with captions, and a folder of pictures.
    (folder / "cc12m.tsv").write_text("".join(f"address\tpicture {n}\n" for n in range(count)), encoding="utf-8")
    if not (folder / "pictures.parquet").exists():
        table = pa.table({"image": [name.read_bytes() for name in names]})
        pq.write_table(table, folder / "pictures.parquet", row_group_size=ROWS_PER_GROUP)
    return names


def _picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    total = np.zeros((FULL, FULL, 3))
    for side, weight in ((4, 90), (16, 45), (64, 22), (256, 9)):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        total += weight / 128 * (np.asarray(noise.resize((FULL, FULL), Image.Resampling.BICUBIC), np.float64) - 128)
    image = Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8)).filter(ImageFilter.SMOOTH)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_shards(folder: Path) -> Store:
    """The pictures as they are, in shards."""
    store = Store.at(folder / "shards")
    sharding = Sharding(
        name="pictures",
        dataset=DatasetConfig(reader="cc12m", options={"root": str(folder)}),
        seed=0,
        rows_per_shard=256,
        quarantine_limit=0.0,
        pictures=PictureConfig(),
        resolution=SIDE,
        tasks=2,
        encoder=None,
    )
    with connected(cpus=8):
        write_shards(sharding, store)
    return store


def collate(table: Any) -> Arrays:
    """The stream's own decoding."""
    return {"pixels": decode_squares(table.column("source").to_pylist(), SIDE)}


def stream_of(store: Store, rows: int) -> StageStream:
    return StageStream(
        key="bench",
        make_collate=lambda: collate,
        datasets={"pictures": (1.0, store)},
        seed=0,
        stage=1,
        steps=rows // BATCH,
        global_batch=BATCH,
        steps_per_block=8,
        shuffle_shards=4,
        tasks=CORES + 1,
        cpus=0.5,
    )


def ours(store: Store, rows: int) -> float:
    """Pictures a second of our stream."""
    batches = stream_dataset(stream_of(store, rows), 0, 1).iter_batches(batch_size=BATCH, batch_format="numpy")
    normalised = Normaliser()
    return rate_of(normalised(batch["pixels"]) for batch in batches)


class Normaliser:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], into one buffer, as a loop copies to pinned memory."""

    def __init__(self) -> None:
        self._buffer = torch.empty((BATCH, SIDE, SIDE, 3))

    def __call__(self, pixels: Any) -> torch.Tensor:
        # Picture by picture, as each fits a core's cache.
        for out, picture in zip(self._buffer, torch.from_numpy(pixels), strict=True):
            out.copy_(picture).div_(127.5).sub_(1)
        return self._buffer.permute(0, 3, 1, 2)


def rate_of(batches: Any) -> float:
    """Pictures a second over the last three quarters: what was made while the processes started is not counted."""
    marks = [(time.perf_counter(), len(batch)) for batch in batches]
    first = len(marks) // 4
    return sum(size for _, size in marks[first + 1 :]) / (marks[-1][0] - marks[first][0])


def decode_limit(names: list[Path]) -> float:
    """Pictures a second of two processes that do nothing but decode."""
    halves = [names[number::CORES] for number in range(CORES)]
    with concurrent.futures.ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(_decode_all, halves))


def _decode_all(names: list[Path]) -> float:
    files = [name.read_bytes() for name in names]
    began = time.perf_counter()
    for start in range(0, len(files), BATCH):
        decode_squares(files[start : start + BATCH], SIDE)
    return len(files) / (time.perf_counter() - began)


def run_peer(python: Path, *arguments: str) -> str:
    script = Path(__file__).with_name("data_peers.py")
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The peer {arguments[0]} failed:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def peer(python: Path, name: str, folder: str) -> float:
    return float(run_peer(python, name, folder))


def watch_memory(store: Store, rows: int) -> list[Row]:
    """MiB that the tree of processes holds for itself, early and late in a long stream."""
    batches = stream_dataset(stream_of(store, rows), 0, 1).iter_batches(batch_size=BATCH, batch_format="numpy")
    normalised = Normaliser()
    seen: list[float] = []
    for number, batch in enumerate(batches):
        normalised(batch["pixels"])
        if number % 20 == 10:
            seen.append(_resident())
    tenth = max(len(seen) // 10, 1)
    parts = {"second_tenth": seen[tenth : 2 * tenth], "last_tenth": seen[-tenth:]}
    return [row(f"memory_{name}_of_{rows}_rows", "MiB", values) for name, values in parts.items()]


def _resident() -> float:
    """MiB that this process and its workers hold for themselves; pages of the shared object store are counted once."""
    here = psutil.Process()
    total = 0
    for process in (here, *here.children(recursive=True)):
        try:
            info = process.memory_info()
            total += info.rss - info.shared
        except psutil.Error:
            continue
    return total / 2**20


if __name__ == "__main__":
    main()
