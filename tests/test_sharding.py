"""Shards: equal in rows, the same on every run, resumable at any moment, on disks and in object stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_training as toy

from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.sharding import Sharding, prepared_manifest, write_shards
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


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_an_interrupted_run_is_finished_with_the_same_bytes(tmp_path: Path, kept: int) -> None:
    whole, torn = Store.at(tmp_path / "whole"), Store.at(tmp_path / "torn")
    write_shards(captions(), whole)
    names = [name for name in whole.sizes() if name.startswith("shard-")]
    # What a killed run leaves: the plan, shards up to some place, one beyond it, and half of a temporary file.
    for name in ["PLAN.json", *names[:kept], names[-1]]:
        torn.write(name, whole.read(name))
    (tmp_path / "torn" / ".tmp-shard").write_bytes(b"half")
    assert prepared_manifest(captions(), torn) is None
    before = {name: (tmp_path / "torn" / name).stat().st_mtime_ns for name in names[:kept]}
    write_shards(captions(), torn)
    assert contents(torn) == contents(whole)
    assert before == {name: (tmp_path / "torn" / name).stat().st_mtime_ns for name in names[:kept]}


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
        [batch for batch in stream_dataset(stream, 1, 2).iter_batches(batch_size=None, batch_format="numpy")]
        for stream in (ahead, online)
    ]
    assert [batch["position"].tolist() for batch in batches[0]] == [batch["position"].tolist() for batch in batches[1]]
    assert sum(len(batch["position"]) for batch in batches[0]) == 6 * 30
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
