"""The peers of `data.py`, each at its best number of workers on two cores. Runs in an environment of its own.

Usage: `data_peers.py prepare|dataloader|dataloader_draft|hf_datasets|mosaic_streaming FOLDER`.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

SIDE, BATCH = 256, 64
WORKERS = (1, 2, 3, 4)


def pixels(data: bytes, draft: bool) -> torch.Tensor:
    """A JPEG to float32 (3, 256, 256) in [-1, 1], as training scripts do it."""
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft("RGB", (SIDE, SIDE))
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)


class Files(Dataset):
    """Files of a folder."""

    def __init__(self, folder: Path, draft: bool) -> None:
        self.names = sorted((folder / "images").iterdir())
        self.draft = draft

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> torch.Tensor:
        return pixels(self.names[number].read_bytes(), self.draft)


def loader(dataset: Dataset, workers: int, shuffle: bool = True) -> DataLoader:
    return DataLoader(dataset, BATCH, shuffle=shuffle, num_workers=workers, drop_last=True, prefetch_factor=4)


def rate(batches: DataLoader) -> float:
    """Pictures a second over the last three quarters: what was made while the workers started is not counted."""
    marks = [(time.perf_counter(), len(batch)) for batch in batches]
    first = len(marks) // 4
    return sum(size for _, size in marks[first + 1 :]) / (marks[-1][0] - marks[first][0])


def hf_dataset(folder: Path) -> Dataset:
    import datasets  # noqa: PLC0415 - the others do without

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "parquet", data_files=str(folder / "pictures.parquet"), split="train", cache_dir=str(folder / "hf-cache")
    )
    loaded = loaded.cast_column("image", datasets.Value("binary"))
    return loaded.with_transform(lambda rows: {"image": [pixels(data, True) for data in rows["image"]]})


def collate_column(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([row["image"] for row in rows])


def import_streaming() -> types.ModuleType:
    """MosaicML streaming without torchvision, which only its own vision datasets use and of which no CPU build fits."""
    import transformers.utils  # noqa: F401, PLC0415 - looks for torchvision itself, and must not find these

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.transforms.functional"].to_tensor = None
    sys.modules["torchvision.datasets"].VisionDataset = object
    sys.modules["torchvision.datasets.folder"] = types.ModuleType("torchvision.datasets.folder")
    import streaming  # noqa: PLC0415 - only after the modules above

    return streaming


def prepare(folder: Path) -> None:
    """Write MosaicML's shards, the JPEGs as they are."""
    streaming = import_streaming()
    out = folder / "mds"
    if (out / "index.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    with streaming.MDSWriter(out=str(out), columns={"image": "bytes"}) as writer:
        for name in sorted((folder / "images").iterdir()):
            writer.write({"image": name.read_bytes()})


def mosaicml(folder: Path) -> Dataset:
    streaming = import_streaming()

    class Shards(streaming.StreamingDataset):
        def __getitem__(self, number: int) -> torch.Tensor:
            return pixels(super().__getitem__(number)["image"], True)

    return Shards(local=str(folder / "mds"), shuffle=True, batch_size=BATCH, predownload=1024)


def best(make: object) -> float:
    """The best rate over numbers of workers."""
    return max(rate(make(workers)) for workers in WORKERS)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if name == "prepare":
        prepare(folder)
        return
    if name == "hf_datasets":
        data = hf_dataset(folder)
        found = best(
            lambda workers: DataLoader(
                data,
                BATCH,
                shuffle=True,
                num_workers=workers,
                drop_last=True,
                prefetch_factor=4,
                collate_fn=collate_column,
            )
        )
    elif name == "mosaic_streaming":
        found = best(lambda workers: loader(mosaicml(folder), workers, shuffle=False))
    else:
        data = Files(folder, draft=name == "dataloader_draft")
        found = best(lambda workers: loader(data, workers))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
