"""Streams: every position has its row, whatever the workers, and Ray delivers exactly that."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import toy_training as toy

from insightedit.platform.cluster import connected
from insightedit.platform.errors import InsightEditError, NotFoundError
from insightedit.platform.mixtures import Mixture, micro_batch_size, step_positions
from insightedit.platform.shards import PreparedData, add_features, features_of, write_shard
from insightedit.platform.storage import Store
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


def test_any_two_thousand_positions_have_the_weights_shares() -> None:
    weights = {"a": 0.41, "b": 0.33, "c": 0.15, "d": 0.08, "e": 0.03}
    mixed = Mixture({name: (weight, (7, 5)) for name, weight in weights.items()}, seed=0, stage=2, window=2)
    datasets = mixed.rows(np.arange(40_000)).dataset
    running = np.cumsum(np.eye(len(weights))[datasets], axis=0)
    shares = (running[2000:] - running[:-2000]) / 2000
    assert np.abs(shares - list(weights.values())).max() < 0.005


def test_a_dataset_of_any_weight_is_drawn() -> None:
    sizes = {"huge": 12_000_000.0, "small": 8807.0, "tiny": 239.0}
    mixed = Mixture({name: (weight, (7,)) for name, weight in sizes.items()}, seed=0, stage=2, window=2)
    assert np.bincount(mixed.rows(np.arange(1000)).dataset).tolist() == [998, 1, 1]


def test_an_epoch_ends_when_the_largest_dataset_was_seen_once() -> None:
    mixed = Mixture({"small": (1.0, (30,)), "large": (3.0, (400, 200))}, seed=0, stage=2, window=2)
    assert mixed.epoch_length == 800
    rows = mixed.rows(np.arange(4000))
    large = [triple[1:] for triple in triples(rows)[:800] if triple[0] == 1]
    assert sorted(large) == [(shard, row) for shard, count in ((0, 400), (1, 200)) for row in range(count)]


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
    toy.write_manifest(tmp_path, (write_shard(table, Store.at(tmp_path), "shard"),))
    read = PreparedData.open(tmp_path).read(0)
    order = pa.array([3, 1, 1, 9])
    for rows, expected in ((read, slice(None)), (read.take(order), [3, 1, 1, 9]), (read.slice(4, 3), slice(4, 7))):
        found = features_of(rows)
        assert all(np.array_equal(found[name], arrays[name][expected]) for name in arrays)
        assert all(found[name].dtype == arrays[name].dtype for name in arrays)


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    folder = toy.prepare_toy(tmp_path / "damaged")
    path = next(folder.glob("shard-00001-*.parquet"))
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(InsightEditError, match=r"shard-00001-\w+\.parquet differs from its manifest"):
            PreparedData.open(folder).read(1)
    path.write_bytes(whole[:-1])
    with pytest.raises(InsightEditError, match=r"shard-00001.* is missing or torn"):
        PreparedData.open(folder)
    with pytest.raises(NotFoundError, match="no prepared shards"):
        PreparedData.open(tmp_path / "nothing")


def stream(tmp_path: Path, steps: int = 7) -> StageStream:
    folders = {name: Store.at(toy.prepare_toy(tmp_path / name)) for name in ("a", "bb")}
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
