"""What befalls workers on the way changes nothing: hanging, notices of an end, death."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_training as toy
from mlflow import MlflowClient
from ray.exceptions import OutOfMemoryError
from ray.train.v2.api.preemption import PreemptionInfo
from test_training import plan

from insightedit.platform import surveillance
from insightedit.platform.cluster import cause_of, connected
from insightedit.platform.journals import read_entries
from insightedit.platform.manifests import sha256_file
from insightedit.platform.mixtures import step_positions
from insightedit.platform.surveillance import Notices
from insightedit.platform.tracking import StageTracker, start_run
from insightedit.platform.trainer import TrainingPlan, train_stages
from insightedit.platform.workdir import Workdir


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connected(cpus=8):
        yield


def curve(training: TrainingPlan, stage: int) -> list[dict[str, Any]]:
    """The points of a stage without what depends on the clock."""
    timed = {"samples_per_second", "data_wait_seconds", "data_wait_share"}
    timed |= {"checkpoint_stall_seconds", "checkpoint_stall_share", "goodput"}
    return [
        {
            "step": point["step"],
            "losses": point["losses"],
            "figures": {name: value for name, value in point["figures"].items() if name not in timed},
        }
        for point in read_entries(training.stage_folder(stage) / "curve.jsonl")
    ]


def check_the_same(whole: TrainingPlan, disturbed: TrainingPlan, stage: int, seeds: Path) -> None:
    """Weights, curves and the order of samples are those of the undisturbed run, to the bit."""
    weights = [sha256_file(one.stage_folder(stage) / "weights.safetensors") for one in (whole, disturbed)]
    assert weights[0] == weights[1]
    assert curve(whole, stage) == curve(disturbed, stage)
    config = whole.config.stages[stage]
    (world,) = whole.config.workers.sizes
    for rank in range(world):
        shape = {"global_batch": config.global_batch, "world": world, "rank": rank}
        expected = [position for step in range(config.steps) for position in step_positions(step, **shape).tolist()]
        assert toy.consumed(seeds, disturbed.stream(stage), rank) == expected


def test_hanging_notices_and_death_change_nothing(tmp_path: Path, ray_cluster: None) -> None:
    # Between checkpoints lie points of the curves, and between points checkpoints.
    stages = {1: {"steps": 9, "checkpoint_every": 4, "log_every": 3}, 2: {"steps": 11, "checkpoint_every": 9}}
    config = toy.toy_config(stages, max_failures=2, hang_seconds=8.0)
    whole = plan(tmp_path, config, "whole", dropout=0.3)
    train_stages(whole)
    marks = {name: tmp_path / name for name in ("hang", "notice", "die")}
    disturbed = plan(
        tmp_path,
        config,
        "disturbed",
        dropout=0.3,
        hang_at=(1, 7, str(marks["hang"])),
        notice_at=(2, 5, str(marks["notice"])),
        die_at=(2, 8, str(marks["die"])),
        record=str(tmp_path / "seeds"),
    )
    train_stages(disturbed)
    assert all(mark.exists() for mark in marks.values())
    for number in (1, 2):
        check_the_same(whole, disturbed, number, tmp_path / "seeds")
    # Stage 1 went on from its checkpoint at step 4; stage 2 from the one made for the notice in its fifth step.
    for number, resumed in ((1, 4), (2, 5)):
        for rank in (0, 1):
            _, second = toy.processes(tmp_path / "seeds", disturbed.stream(number), rank)[-2:]
            assert second[0] == 8 * resumed + 4 * rank


def test_the_watchdog_ends_what_holds_the_interpreter(tmp_path: Path) -> None:
    # A regular expression that backtracks forever never lets another thread run.
    code = (
        "import re; from insightedit.platform.surveillance import Watchdog; dog = Watchdog(0.5)\n"
        "for _ in range(4): dog.progress(); __import__('time').sleep(0.3)\n"
        "print('alive', flush=True); dog.progress(); re.match(r'(a+)+$', 'a' * 64 + 'b')"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert "Timeout" in done.stderr
    assert "re/__init__.py" in done.stderr
    assert time.monotonic() - began < 60


class Context:
    """Stands in for what Ray Train tells a worker."""

    def __init__(self) -> None:
        self.preemption_context = self
        self.preemption_info: PreemptionInfo | None = None


def test_one_notice_makes_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    context, clock = Context(), [1000.0]
    monkeypatch.setattr(surveillance, "get_train_context", lambda: context)
    monkeypatch.setattr(surveillance.time, "monotonic", lambda: clock[0])
    near, far = Notices(), Notices()
    assert not near.pending()
    context.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]})
    assert near.pending()
    for notices in (near, far):
        notices.heed()
        assert not notices.pending()
    # A rank that hears of the same later does not ask for another checkpoint, but for the next notice it does.
    clock[0] += 5
    context.preemption_info = PreemptionInfo(deadline_ms=7, preempted_node_to_ranks={"a": [0]})
    assert not far.pending()
    clock[0] += 600
    assert not far.pending()
    context.preemption_info = PreemptionInfo(deadline_ms=9, preempted_node_to_ranks={"b": [1]})
    assert far.pending()
    assert near.pending()


def test_the_first_sigterm_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        surveillance.terminated.clear()
        surveillance.HeedTermination().after_init_train_context()
        signal.raise_signal(signal.SIGTERM)
        assert surveillance.terminated.is_set()
        assert got == []
        signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        surveillance.terminated.clear()
        signal.signal(signal.SIGTERM, before)


def test_a_step_is_tracked_once(tmp_path: Path) -> None:
    workdir = Workdir.open(tmp_path)
    run = start_run(workdir, "run", toy.toy_config({1: {"steps": 8}}), {})
    for first, value in ((0, 1.0), (3, 2.0)):
        tracker = StageTracker(run, 1)
        for step in range(first, first + 5):
            tracker.metrics(step, {"L_LLM": value, "learning_rate": 0.1})
        tracker.close("FINISHED")
    history = MlflowClient(workdir.tracking_uri).get_metric_history(run.stage_runs[1], "L_LLM")
    assert [(metric.step, metric.value) for metric in history] == [
        *((step, 1.0) for step in range(5)),
        *((step, 2.0) for step in range(5, 8)),
    ]


def test_a_machine_without_memory_is_named() -> None:
    # The beginning and the end of what Ray 2.60 says.
    error = OutOfMemoryError(
        "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: ce1a) was"
        " 22.84GB used / 23.54GB limit (0.970263)\nOOM kill reason: ...\n\nRefer to the documentation on how to address"
        " the out of memory issue: https://docs.ray.io/"
    )
    assert cause_of(error).startswith("machine 10.0.0.7 ran out of memory (22.84GB of 23.54GB were in use), and ")
