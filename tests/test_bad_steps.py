"""Steps that are left out: what is not finite and what leaps, and what is said about it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import toy_training as toy
from test_training import plan, reference
from torch import Tensor

from insightedit.platform.bad_steps import BadStep, BadStepError, StepGuard, check_bad_step, samples_of
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig, StageConfig
from insightedit.platform.errors import InsightEditError
from insightedit.platform.journals import append_entry, keep_entries, read_entries
from insightedit.platform.shards import add_features, write_shard
from insightedit.platform.storage import Store
from insightedit.platform.trainer import stage_weights, train_stages
from insightedit.platform.workdir import Workdir


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connected(cpus=8):
        yield


def stage_config(**settings: Any) -> StageConfig:
    weights = {"L_LLM": 2.0, "L_IB": 1.0, "L_TB": 0.5}
    return toy.toy_config({1: {"steps": 4, "losses": weights, **settings}}).stages[1]


def judged(guard: StepGuard, loss: float, norm: float, step: int = 0) -> bool:
    guard.expect(step, {"L_LLM": loss, "L_TB": 2.0})
    return guard.admits(norm)


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "L_LLM is nan"),
        (math.inf, math.inf, "L_LLM is inf"),
        (1.0, math.inf, "the gradients' norm is not finite"),
        (1.0, math.nan, "the gradients' norm is not finite"),
    ],
)
def test_what_is_not_finite_is_bad(loss: float, norm: float, reason: str) -> None:
    guard = StepGuard(stage_config())
    assert not judged(guard, loss, norm, step=7)
    assert guard.bad is not None
    assert (guard.bad.step, guard.bad.reason, guard.bad.in_a_row) == (7, reason, 1)
    assert judged(guard, 1.0, 1e6)
    assert guard.bad is None


def test_leaps_are_bad_where_a_limit_is_set() -> None:
    guard = StepGuard(stage_config(spike=3.0))
    norms = [1.0, 5.0, 1.2, 0.8, 1.1, 0.9, 1.0, 1.0]
    # Nothing leaps while there is little to compare with.
    assert all(judged(guard, 1.0, norm) for norm in norms)
    assert judged(guard, 1.0, 3.0)
    assert not judged(guard, 1.0, 3.1)
    assert guard.bad is not None
    assert guard.bad.reason == "the gradients' norm is 3.1, more than 3 times the usual 1"
    # A usual loss is 2 * 1 + 0.5 * 2 = 3.
    assert judged(guard, 4.0, 1.0)
    assert not judged(guard, 4.1, 1.0)
    assert guard.bad.reason == "the loss is 9.2, more than 3 times the usual 3"
    free = StepGuard(stage_config())
    assert all(judged(free, 1.0, norm) for norm in [*norms, 1e9])


def test_a_guard_that_goes_on_judges_as_one_that_was_not_interrupted() -> None:
    rng = np.random.default_rng(0)
    figures = [(float(a), float(b)) for a, b in rng.lognormal(0, 1.5, (400, 2))]
    whole = StepGuard(stage_config(spike=4.0))
    expected = [judged(whole, *pair) for pair in figures]
    guard = StepGuard(stage_config(spike=4.0))
    found: list[bool] = []
    for pair in figures:
        state = json.loads(json.dumps(guard.state()))
        guard = StepGuard(stage_config(spike=4.0))
        guard.restore(state)
        found.append(judged(guard, *pair))
    assert found == expected
    assert 50 < sum(expected) < 400


def bad_step(in_a_row: int) -> BadStep:
    return BadStep(step=7, reason="L_LLM is nan", losses={}, norm=1.0, in_a_row=in_a_row)


def test_stopping_and_skipping_are_as_configured(tmp_path: Path) -> None:
    listed = tmp_path / "bad_steps.jsonl"
    with pytest.raises(BadStepError, match=r"step 7 of stage 2, where L_LLM is nan.*bad_steps\.jsonl.*stages\.2\.bad"):
        check_bad_step(bad_step(1), stage_config(), 2, listed)
    skip = stage_config(bad_steps="skip", max_bad_steps=3)
    check_bad_step(bad_step(2), skip, 2, listed)
    with pytest.raises(BadStepError, match=r"was bad as were all of the last 3;.*stages\.2\.max_bad_steps"):
        check_bad_step(bad_step(3), skip, 2, listed)


def test_what_is_done_about_bad_steps_may_change_within_a_run() -> None:
    prints = {
        toy.toy_config({1: {"steps": 4, **settings}}).fingerprint(1)
        for settings in ({}, {"bad_steps": "skip"}, {"spike": 3.0}, {"max_bad_steps": 2})
    }
    assert len(prints) == 1


def test_journals_lose_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    keep_entries(path, lambda entry: True)
    assert read_entries(path) == []
    for step in range(4):
        append_entry(path, {"step": step})
    with path.open("a") as stream:
        stream.write('{"step": 4, "cut o')
    keep_entries(path, lambda entry: entry["step"] < 2)
    append_entry(path, {"step": 2})
    assert read_entries(path) == [{"step": 0}, {"step": 1}, {"step": 2}]


# -- a training that meets a record which is not finite -------------------------------------------------------------

SHARDS, BAD = (24, 24), (1, 5)
"""Rows of each shard; shard and row of the record that is not finite."""


def poisoned_data(workdir: Workdir) -> None:
    """The dataset `a` with one record that is not finite."""
    store = Store.at(workdir.data / "a")
    (workdir.data / "a").mkdir(parents=True)
    shards: list[Any] = []
    for number, rows in enumerate(SHARDS):
        arrays = toy.toy_arrays(rows, number)
        if number == BAD[0]:
            arrays["x"][BAD[1], 3] = np.nan
        table = pa.table({"key": [f"a-{number}-{row}" for row in range(rows)]})
        shards.append(write_shard(add_features(table, arrays), store, f"shard-{number:05d}"))
    toy.write_manifest(workdir.data / "a", tuple(shards))


def poisoned_config(zero: int, **settings: Any) -> RunConfig:
    stage = {"steps": 6, "micro_batch": 2, "zero": zero, "checkpoint_every": 2, "log_every": 3}
    return toy.toy_config({1: {**stage, **settings}}, max_failures=2)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_step_that_is_left_out_changes_nothing(tmp_path: Path, ray_cluster: None, zero: int) -> None:
    poisoned_data(Workdir.open(tmp_path))
    # Neither the weights nor their averages.
    training = plan(tmp_path, poisoned_config(zero, bad_steps="skip", ema_decay=0.5 if zero == 3 else None))
    stream = training.stream(1)
    # One pass over 48 samples: the bad record is in one step.
    (bad,) = [step for step in range(6) if any(s["key"] == "a-1-5" for s in samples_of(stream, step))]
    train_stages(training)
    expected = reference(training, without=(bad,))[1]
    for name, value in stage_weights(training, 1).items():
        assert (value - expected[name]).abs().max().item() <= 1e-6, name
    (entry,) = read_entries(training.folder / "bad_steps.jsonl")
    assert (entry["stage"], entry["step"]) == (1, bad)
    assert "nan" in entry["reason"]
    assert entry["losses"]["L_LLM"] == "nan"
    assert entry["samples"] == samples_of(stream, bad)
    assert {(s["dataset"], s["shard"][:11], s["row"]) for s in entry["samples"] if s["key"] == "a-1-5"} == {
        ("a", "shard-00001", 5)
    }
    points = read_entries(training.stage_folder(1) / "curve.jsonl")
    assert [point["step"] for point in points] == [3, 6]
    assert sum(point["figures"]["skipped_steps"] for point in points) == 1
    assert all(math.isfinite(value) for point in points for value in point["losses"].values())


def test_samples_are_those_of_the_batch(tmp_path: Path) -> None:
    training = plan(tmp_path, toy.toy_config({1: {"steps": 6, "datasets": {"a": 2, "bb": 1}}}, datasets=("a", "bb")))
    stream = training.stream(1)
    for step in (0, 5):
        samples = samples_of(stream, step)
        assert [sample["position"] for sample in samples] == list(range(8 * step, 8 * step + 8))
        rows = stream.rows(step, 0, 1).slice(0, 8)
        assert [sample["key"] for sample in samples] == rows.column("key").to_pylist()


def test_a_run_that_stops_says_where_and_is_not_tried_again(tmp_path: Path, ray_cluster: None) -> None:
    poisoned_data(Workdir.open(tmp_path))
    training = plan(tmp_path, poisoned_config(2), record=str(tmp_path / "seeds"))
    with pytest.raises(InsightEditError, match=r"^Training failed: Training diverged at step \d of stage 1") as caught:
        train_stages(training)
    (entry,) = read_entries(training.folder / "bad_steps.jsonl")
    assert str(training.folder / "bad_steps.jsonl") in str(caught.value)
    assert f"step {entry['step']} of stage 1, where {entry['reason']};" in str(caught.value)
    # One process for each rank has ever trained.
    assert len(list((tmp_path / "seeds").iterdir())) == 2
    # The same run goes on, told to leave the batch out.
    train_stages(plan(tmp_path, poisoned_config(2, bad_steps="skip")))
    again: dict[str, Tensor] = stage_weights(training, 1)
    expected = reference(training, without=(entry["step"],))[1]
    assert all((value - expected[name]).abs().max().item() <= 1e-6 for name, value in again.items())
    assert len(read_entries(training.folder / "bad_steps.jsonl")) == 1
