"""Shards: equal in rows, the same on every run, resumable at any moment, on disks and in object stores."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_training as toy
from PIL import Image

from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.records import encode_png
from insightedit.platform.sharding import QUARANTINE_NAME, Sharding, clear_shards, prepared_manifest, write_shards
from insightedit.platform.shards import MANIFEST_NAME, PreparedData, features_of
from insightedit.platform.storage import Store
from insightedit.platform.streams import StageStream, stream_dataset

ROWS = 1300


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with connected(cpus=4):
        yield


def captions(**settings: Any) -> Sharding:
    options = {"kind": "caption", "split": "train", "count": ROWS, "seed": 0}
    plain: dict[str, Any] = {
        "dataset": DatasetConfig(reader="shapes", options=options),
        "seed": 0,
        "rows_per_shard": 200,
        "quarantine_limit": 0.01,
        "pictures": PictureConfig(),
        "resolution": 32,
        "tasks": 2,
        "encoder": None,
    }
    return Sharding(name="captions", **plain | settings)


def keys(store: Store) -> list[str]:
    prepared = PreparedData.open(store)
    return [key for shard in range(len(prepared.shard_rows)) for key in prepared.read(shard)["key"].to_pylist()]


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.sizes()}


def test_shards_are_equal_and_hold_every_row_once_in_the_order_of_the_seed(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    stores = [Store.at(tmp_path / name) for name in ("first", "again", "other-seed")]
    first = write_shards(captions(), stores[0], lambda rows, total: told.append((rows, total)))
    again = write_shards(captions(), stores[1])
    write_shards(captions(seed=1), stores[2])
    assert [shard.rows for shard in first.shards] == [200] * 6 + [100]
    assert first == again
    assert contents(stores[0]) == contents(stores[1])
    assert told == [(min(200 * shard, ROWS), ROWS) for shard in range(1, 8)]
    expected = [f"train-0-{row:06d}-caption" for row in range(ROWS)]
    orders = [keys(store) for store in stores]
    assert orders[0] != expected
    assert orders[2] != orders[0]
    assert [sorted(order) for order in orders] == [expected] * 3


class KilledError(Exception):
    """Stands for whatever ends a run in its middle."""


def killed_after(shards: int, sharding: Sharding, store: Store) -> None:
    """Prepare a dataset, and end after some shards; others may be under way or written ahead."""

    def progress(rows: int, total: int) -> None:
        if rows >= shards * sharding.rows_per_shard:
            raise KilledError

    # What was under way may have ended with the last shard: then there is nothing left to be killed.
    with contextlib.suppress(KilledError):
        write_shards(sharding, store, progress)


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_an_interrupted_run_is_finished_with_the_same_bytes(tmp_path: Path, kept: int) -> None:
    whole, torn = Store.at(tmp_path / "whole"), Store.at(tmp_path / "torn")
    write_shards(captions(), whole)
    names = [name for name in whole.sizes() if name.startswith("shard-")]
    killed_after(kept, captions(), torn)
    (tmp_path / "torn" / ".tmp-shard").write_bytes(b"half")
    before = {name: (tmp_path / "torn" / name).stat().st_mtime_ns for name in names[:kept]}
    write_shards(captions(), torn)
    assert contents(torn) == contents(whole)
    assert before == {name: (tmp_path / "torn" / name).stat().st_mtime_ns for name in names[:kept]}


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_shard_is_made_again(tmp_path: Path, lost: int) -> None:
    store = Store.at(tmp_path / "captions")
    made = write_shards(captions(), store)
    before = contents(store)
    store.remove(made.shards[lost].file)
    assert prepared_manifest(captions(), store) is None
    assert write_shards(captions(), store) == made
    assert contents(store) == before


def write_pairs(root: Path, bad: set[int], rows: int = 1600) -> DatasetConfig:
    """Pairs, each with a picture of its own, of which some are no pictures."""
    picture = encode_png(np.zeros((2, 2, 3), np.uint8))
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number in range(rows):
        (root / f"pictures/{number}.png").write_bytes(b"x" * len(picture) if number in bad else picture)
        name = f"pictures/{number}.png"
        lines.append(json.dumps({"source": name, "target": name, "instruction": f"edit {number}"}))
    (root / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return DatasetConfig(reader="pairs", options={"root": str(root)})


def test_no_row_is_lost_or_doubled_where_rows_change_while_a_run_is_down(tmp_path: Path) -> None:
    root, store = tmp_path / "data", Store.at(tmp_path / "shards")
    # One part of the file has no good row at all, the others a few bad ones.
    dataset = write_pairs(root, {*range(500, 1000), *range(0, 1600, 9)})
    settings: dict[str, Any] = {"dataset": dataset, "quarantine_limit": 1.0, "rows_per_shard": 130}
    for shards in (1, 4, 6):
        killed_after(shards, captions(**settings), store)
        write_pairs(root, {*range(500, 1000), *range(shards, 1600, 7)})
    made = write_shards(captions(**settings), store)
    listed = [json.loads(line)["key"] for line in store.read(QUARANTINE_NAME).splitlines()]
    good = keys(store)
    assert len(good) == made.rows
    assert len(listed) == made.quarantined
    assert sorted([*good, *listed]) == sorted(f"pairs.jsonl:{number}" for number in range(1, 1601))
    assert {shard.rows for shard in made.shards[:-1]} == {130}


def test_a_chunk_without_good_rows_does_not_stop_a_run_from_going_on(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path / "data", set(range(500, 1000)))
    settings: dict[str, Any] = {"dataset": dataset, "quarantine_limit": 1.0, "rows_per_shard": 250}
    whole, torn = Store.at(tmp_path / "whole"), Store.at(tmp_path / "torn")
    write_shards(captions(**settings), whole)
    killed_after(4, captions(**settings), torn)
    names = [name for name in torn.sizes() if name.startswith("shard-")]
    before = {name: (tmp_path / "torn" / name).stat().st_mtime_ns for name in names[:4]}
    write_shards(captions(**settings), torn)
    assert before == {name: (tmp_path / "torn" / name).stat().st_mtime_ns for name in names[:4]}
    assert contents(torn) == contents(whole)


def test_a_dataset_of_bad_rows_stops_early(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path / "data", set(range(1600)))
    with pytest.raises(
        InsightEditError,
        match=r"500 of 500 rows of captions are bad.*quarantine\.jsonl lists.*first is pairs\.jsonl:\d+: ",
    ):
        write_shards(captions(dataset=dataset, tasks=1), Store.at(tmp_path / "shards"))
    assert len((tmp_path / "shards" / QUARANTINE_NAME).read_text(encoding="utf-8").splitlines()) >= 500


def test_shards_without_their_source_are_used_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    root, store = tmp_path / "data", Store.at(tmp_path / "shards")
    sharding = captions(dataset=write_pairs(root, set(), rows=40))
    with pytest.raises(UsageError, match="holds something else than shards"):
        prepared_manifest(sharding, Store.at(root))
    with pytest.raises(UsageError, match="holds something else than shards"):
        clear_shards(Store.at(root))
    made = write_shards(sharding, store)
    root.rename(tmp_path / "moved")
    assert prepared_manifest(sharding, store) == made
    with pytest.raises(UsageError, match="seed differs"):
        prepared_manifest(captions(dataset=sharding.dataset, seed=1), store)
    with pytest.raises(NotFoundError, match="There is no folder"):
        write_shards(sharding, Store.at(tmp_path / "nowhere"))
    clear_shards(store)
    assert store.sizes() == {}


def test_what_is_there_is_used_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "captions")
    assert prepared_manifest(captions(), store) is None
    made = write_shards(captions(), store)
    assert prepared_manifest(captions(tasks=7, quarantine_limit=1.0), store) == made
    for other in (captions(seed=3), captions(rows_per_shard=100), captions(pictures=PictureConfig(format="webp"))):
        with pytest.raises(UsageError, match=r"prepared with other settings.*--rebuild"):
            prepared_manifest(other, store)


def test_features_are_added_by_the_encoder_and_its_errors_are_said(tmp_path: Path) -> None:
    encoded = write_shards(captions(encoder=toy.ToyEncoder), Store.at(tmp_path / "encoded"))
    assert encoded.encoders == "toy"
    table = PreparedData.open(tmp_path / "encoded").read(2)
    sums = [float(sum(key.encode())) for key in table["key"].to_pylist()]
    assert features_of(table)["key_sum"].tolist() == sums
    with pytest.raises(InsightEditError, match=r"captions failed: the encoder says what is wrong$"):
        write_shards(captions(encoder=toy.FailingEncoder), Store.at(tmp_path / "failing"))
    assert MANIFEST_NAME not in Store.at(tmp_path / "failing").sizes()
    assert json.loads(Store.at(tmp_path / "failing").read("PLAN.json"))["dataset"] == "captions"


def test_encoding_while_training_gives_what_encoding_ahead_does(tmp_path: Path) -> None:
    plain, encoded = Store.at(tmp_path / "plain"), Store.at(tmp_path / "encoded")
    write_shards(captions(), plain)
    write_shards(captions(encoder=toy.ToyEncoder), encoded)
    settings: dict[str, Any] = {
        "make_collate": toy.ToyTask().make_collate,
        "seed": 0,
        "stage": 1,
        "steps": 7,
        "global_batch": 30,
        "steps_per_block": 2,
        "shuffle_shards": 2,
        "tasks": 2,
        "cpus": 0.25,
    }
    ahead = StageStream(key="ahead", datasets={"captions": (1.0, encoded)}, **settings)
    online = StageStream(
        key="online", datasets={"captions": (1.0, plain)}, make_encoder=toy.ToyTask().make_encoder, **settings
    )
    batches = [
        list(stream_dataset(stream, 1, 2).iter_batches(batch_size=None, batch_format="numpy"))
        for stream in (ahead, online)
    ]
    assert [batch["position"].tolist() for batch in batches[0]] == [batch["position"].tolist() for batch in batches[1]]
    assert sum(len(batch["position"]) for batch in batches[0]) == 6 * 30
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


BAD_KINDS = (
    "truncated_image",
    "not_an_image",
    "wrong_size",
    "decompression_bomb",
    "missing_file",
    "empty_instruction",
    "mask_size",
    "invalid_json",
)


def write_ten_thousand(root: Path) -> dict[str, int]:
    """10,000 pairs in JSON Lines, of which 500 are bad in eight ways; how many of each."""
    whole, other = (encode_png(np.full((8, side, 3), side, np.uint8)) for side in (8, 9))
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    files = {"whole": whole, "other": other, "torn": whole[:50], "text": b"hello", "bomb": bomb.getvalue()}
    (root / "pictures").mkdir(parents=True)
    for name, content in files.items():
        (root / f"pictures/{name}.png").write_bytes(content)
    changes = {
        "truncated_image": {"source": "pictures/torn.png"},
        "not_an_image": {"target": "pictures/text.png"},
        "wrong_size": {"target": "pictures/other.png"},
        "decompression_bomb": {"source": "pictures/bomb.png"},
        "missing_file": {"target": "pictures/lost.png"},
        "empty_instruction": {"instruction": "  "},
        "mask_size": {"mask": "pictures/other.png"},
    }
    counts: dict[str, int] = dict.fromkeys(BAD_KINDS, 0)
    lines: list[str] = []
    for number in range(10_000):
        row = {"source": "pictures/whole.png", "target": "pictures/whole.png", "mask": "pictures/whole.png"}
        row["instruction"] = f"edit {number}"
        kind = BAD_KINDS[number // 20 % 8] if number % 20 == 7 else None
        line = json.dumps(row | changes.get(kind or "", {}))
        lines.append(line[:-9] if kind == "invalid_json" else line)
        if kind is not None:
            counts[kind] += 1
    (root / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return counts


def test_of_ten_thousand_rows_every_bad_one_is_counted_and_too_many_stop_the_job(tmp_path: Path) -> None:
    root = tmp_path / "data"
    counts = write_ten_thousand(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    dataset = DatasetConfig(reader="pairs", options={"root": str(root)})
    store = Store.at(tmp_path / "shards")
    with pytest.raises(InsightEditError, match=r"of captions are bad, more than data\.quarantine_limit 0\.01 allows"):
        write_shards(captions(dataset=dataset, rows_per_shard=1000), store)
    # The limit is no part of what the shards are made from: with a higher one the job goes on.
    made = write_shards(captions(dataset=dataset, rows_per_shard=1000, quarantine_limit=0.1), store)
    assert [shard.rows for shard in made.shards] == [1000] * 9 + [500]
    assert (made.rows, made.quarantined) == (9500, 500)
    listed = [json.loads(line) for line in store.read(QUARANTINE_NAME).splitlines()]
    assert Counter(row["reason"] for row in listed) == counts
    assert len({row["key"] for row in listed}) == 500
    assert not {row["key"] for row in listed} & set(keys(store))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
