"""Streams: every position has its row, whatever the workers, and Ray delivers exactly that."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import toy_training as toy

from insightedit.platform import ingest as ingestion_module
from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig
from insightedit.platform.errors import InsightEditError, NotFoundError
from insightedit.platform.ingest import QUARANTINE_NAME, Ingestion, ingest
from insightedit.platform.mixtures import Mixture, micro_batch_size, step_positions
from insightedit.platform.records import Record, encode_png
from insightedit.platform.shards import PreparedData, add_features, features_of, write_shard
from insightedit.platform.streams import StageStream, StageStreams, stream_dataset, write_start

SHARDS = {"a": (1.0, (5, 7, 3)), "b": (3.0, (4, 4, 4, 4))}


def mixture(stage: int = 1, seed: int = 0) -> Mixture:
    return Mixture(SHARDS, seed=seed, stage=stage, window=2)


def triples(rows: Any) -> list[tuple[int, int, int]]:
    return list(zip(rows.dataset.tolist(), rows.shard.tolist(), rows.row.tolist(), strict=True))


def test_every_epoch_has_every_row_once() -> None:
    single = Mixture({"a": SHARDS["a"]}, seed=0, stage=1, window=2)
    epochs = [triples(single.rows(np.arange(15 * epoch, 15 * (epoch + 1)))) for epoch in range(3)]
    assert all(len(set(epoch)) == 15 for epoch in epochs)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1]


def test_rows_are_shuffled_within_windows_of_shards() -> None:
    single = Mixture({"a": (1.0, (10,) * 6)}, seed=0, stage=1, window=2)
    shards = [shard for _, shard, _ in triples(single.rows(np.arange(60)))]
    windows = [set(shards[start : start + 20]) for start in (0, 20, 40)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))


def test_mixtures_keep_their_weights_without_running_out() -> None:
    rows = mixture().rows(np.arange(4000))
    for start in range(0, 4000, 1000):
        assert Counter(rows.dataset[start : start + 1000].tolist()) == {0: 250, 1: 750}
    uses = Counter(triples(rows))
    assert {count for place, count in uses.items() if place[0] == 0} == {1000 // 15, 1000 // 15 + 1}
    assert {count for place, count in uses.items() if place[0] == 1} == {3000 // 16, 3000 // 16 + 1}


def test_small_weights_are_not_forgotten() -> None:
    rows = Mixture({"a": (1e-6, (5,)), "b": (1.0, (5,))}, seed=0, stage=1, window=1).rows(np.arange(1000))
    assert Counter(rows.dataset.tolist()) == {0: 1, 1: 999}


def test_positions_are_a_pure_function_of_seed_and_stage() -> None:
    positions = np.arange(300)
    expected = mixture().rows(positions)
    shuffled = np.random.default_rng(0).permutation(positions)
    for column, other in zip(expected, mixture().rows(shuffled), strict=True):
        assert np.array_equal(column[shuffled], other)
    assert triples(mixture(stage=2).rows(positions)) != triples(expected)
    assert triples(mixture(seed=1).rows(positions)) != triples(expected)
    assert len(set(expected.seed.tolist())) == 300
    assert expected.seed.min() >= 0


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_each_global_batch(world: int) -> None:
    for step in range(3):
        parts = [step_positions(step, global_batch=12, world=world, rank=rank) for rank in range(world)]
        assert np.concatenate(parts).tolist() == list(range(12 * step, 12 * (step + 1)))


def test_micro_batches_divide_the_share() -> None:
    assert micro_batch_size(32, 2, 16) == 16
    assert micro_batch_size(24, 2, 8) == 6
    assert micro_batch_size(4, 2, 8) == 2


def test_features_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = toy.toy_arrays(10, 0)
    table = add_features(pa.table({"key": [str(row) for row in range(10)]}), arrays)
    shard = write_shard(table, tmp_path / "shard.parquet")
    toy.ShardManifest("x", "", "", 8, (shard,), 0).write(tmp_path)
    read = PreparedData.open(tmp_path).read(0)
    order = pa.array([3, 1, 1, 9])
    for rows, expected in ((read, slice(None)), (read.take(order), [3, 1, 1, 9]), (read.slice(4, 3), slice(4, 7))):
        found = features_of(rows)
        assert all(np.array_equal(found[name], arrays[name][expected]) for name in arrays)
        assert all(found[name].dtype == arrays[name].dtype for name in arrays)


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    folder = toy.prepare_toy(tmp_path / "damaged")
    path = folder / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(InsightEditError, match="differs from its manifest"):
        PreparedData.open(folder).read(1)
    path.write_bytes(data[:-1])
    with pytest.raises(InsightEditError, match=r"shard-00001.* is missing or torn"):
        PreparedData.open(folder)
    with pytest.raises(NotFoundError, match="no prepared shards"):
        PreparedData.open(tmp_path / "nothing")


def stream(tmp_path: Path, steps: int = 7) -> StageStream:
    folders = {name: toy.prepare_toy(tmp_path / name) for name in ("a", "bb")}
    return StageStream(
        key=str(tmp_path),
        make_collate=toy.ToyTask().make_collate,
        datasets={name: (weight, folders[name]) for name, weight in (("a", 1.0), ("bb", 2.0))},
        seed=0,
        stage=1,
        steps=steps,
        global_batch=12,
        steps_per_block=2,
        shuffle_shards=2,
        tasks=2,
        cpus=0.5,
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_blocks_hold_their_ranks_positions(tmp_path: Path, world: int) -> None:
    plan = stream(tmp_path)
    whole = [plan.block(step, 0, 1) for step in (0, 2, 4, 6)]
    expected = {name: np.concatenate([block[name] for block in whole]) for name in whole[0]}
    assert expected["position"].tolist() == list(range(84))
    for first in (1, 3, 5):
        for rank in range(world):
            block = plan.block(first, rank, world)
            places = block["position"]
            assert all(np.array_equal(block[name], expected[name][places]) for name in expected)


def consumed(splits: list[Any], size: int) -> list[list[list[int]]]:
    """Positions of every batch of every split; all splits read at once."""

    def read(split: Any) -> list[list[int]]:
        return [batch["position"].tolist() for batch in split.iter_batches(batch_size=size, batch_format="numpy")]

    with ThreadPoolExecutor(len(splits)) as pool:
        return list(pool.map(read, splits))


def expected_batches(world: int, rank: int, start: int) -> list[list[int]]:
    steps = [step_positions(step, global_batch=12, world=world, rank=rank) for step in range(start, 7)]
    return [micro.tolist() for step in steps for micro in step.reshape(-1, 2)]


def test_ray_delivers_each_rank_its_positions_in_order(tmp_path: Path) -> None:
    plan = stream(tmp_path)
    with connected(cpus=4):
        for world, start in ((2, 0), (3, 4)):
            splits = stream_dataset(plan, start, world).streaming_split(world, equal=True)
            assert consumed(list(splits), 2) == [expected_batches(world, rank, start) for rank in range(world)]
        # As Ray Train asks for it, after a restart at step 3.
        starts = tmp_path / "starts.json"
        streams = StageStreams({"stage-1": plan}, starts)
        write_start(starts, "stage-1", 3)
        configured = streams.configure(streams.placeholders(), world_size=2)
        found = consumed([split["stage-1"] for split in configured], 2)
        assert found == [expected_batches(2, rank, 3) for rank in range(2)]


def captions(**settings: Any) -> Ingestion:
    options = {"kind": "caption", "split": "train", "count": 25, "seed": 0}
    plain: dict[str, Any] = {"quarantine_limit": 0.1, "resolution": 32, "rows_per_shard": 10, "encoder": None}
    return Ingestion(name="captions", dataset=DatasetConfig(reader="shapes", options=options), **plain | settings)


def test_ingesting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    with connected(cpus=4):
        told: list[int] = []
        first = ingest(captions(), tmp_path / "first", told.append)
        second = ingest(captions(), tmp_path / "second")
        with pytest.raises(InsightEditError, match=r"captions failed: the encoder says what is wrong$"):
            ingest(captions(encoder=toy.FailingEncoder), tmp_path / "third")
    assert first == second
    assert [shard.rows for shard in first.shards] == [10, 10, 5]
    assert sum(told) == 25
    keys = [key for shard in range(3) for key in PreparedData.open(tmp_path / "first").read(shard)["key"].to_pylist()]
    assert keys == [f"train-0-{row:06d}-caption" for row in range(25)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["first", "second"]


class BrokenReader:
    """Twenty records, of which some are bad."""

    name = "broken"
    needs = "nothing"

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def count(self, options: Any) -> int:
        return 20

    def fingerprint(self, options: Any) -> str:
        return "x"

    def records(self, options: Any, start: int = 0, stop: int | None = None) -> Any:
        picture = encode_png(np.zeros((4, 4, 3), np.uint8))
        wrong: list[dict[str, Any]] = [
            {"source": picture[:20]},
            {"source": None},
            {"target": None},
            {"instruction": " "},
        ]
        for number in range(start, min(stop or 20, 20)):
            fields: dict[str, Any] = {"source": picture, "target": picture, "instruction": "add"}
            fields |= wrong[number % len(wrong)] if number < self.bad else {}
            yield Record(key=str(number), dataset="broken", task="edit", **fields)


@pytest.mark.parametrize(("bad", "limit"), [(4, 0.2), (4, 0.1), (20, 1.0)])
def test_bad_rows_are_set_aside_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, limit: float
) -> None:
    monkeypatch.setattr(ingestion_module, "reader_named", lambda _: BrokenReader(bad))
    ingestion = captions(quarantine_limit=limit)
    summaries: list[dict[str, Any]] = []
    for shard in range(2):
        table = ingestion_module._read({"id": np.array([shard])}, ingestion)  # pyright: ignore[reportPrivateUsage]
        summaries += ingestion_module._write(table, tmp_path).to_pylist()  # pyright: ignore[reportPrivateUsage]

    def manifest() -> Any:
        return ingestion_module._manifest(ingestion, summaries, tmp_path)  # pyright: ignore[reportPrivateUsage]

    if limit == 0.2:
        assert (manifest().rows, manifest().quarantined) == (16, 4)
    else:
        with pytest.raises(InsightEditError, match=rf"{bad} of 20 rows .*quarantine_limit.*the first is 0"):
            manifest()
    listed = [json.loads(line) for line in (tmp_path / QUARANTINE_NAME).read_text().splitlines()]
    assert [row["key"] for row in listed] == [str(number) for number in range(bad)]
    assert len({row["reason"].split(":")[0] for row in listed}) == 4
