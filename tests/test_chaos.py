"""A storm over a training on a cluster of three nodes: whatever is killed, the run ends as if nothing was."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray
import toy_training as toy
from figures import report_part
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from test_faults import curve
from test_training import plan

from insightedit.platform.cluster import started
from insightedit.platform.config import RunConfig
from insightedit.platform.journals import read_entries
from insightedit.platform.manifests import sha256_file
from insightedit.platform.mixtures import step_positions
from insightedit.platform.trainer import StageResult, TrainingPlan, train_stages

WAIT_SECONDS = 240.0
"""Longest time without a new checkpoint."""
PAUSE_SECONDS = 0.04
"""Of each step, so that there is time to kill something in it."""
CHECKPOINT_EVERY = 5
EPOCH = 8
"""Steps of an epoch: 64 rows in batches of 8."""


# The two workers fill the training node, and one does not fit on the data node: each kind of work has its place.
NODE_CPUS = {"data": 2, "train": 5}
WORKER_CPUS = 2.5


@dataclass
class Machines:
    """A head without work and nodes, such as one for data and one for training, each with its own processes."""

    cpus: Mapping[str, int] = field(default_factory=lambda: NODE_CPUS)
    """Of each node."""
    cluster: Any = field(default_factory=lambda: Cluster())  # noqa: PLW0108 - its type is not known
    nodes: dict[str, Any] = field(default_factory=dict[str, Any])

    def start(self) -> None:
        started(lambda: self.cluster.add_node(num_cpus=0))
        for name in self.cpus:
            self.add(name, self.cpus[name])
        ray.init(address=self.cluster.address, logging_level=logging.ERROR, log_to_driver=False)

    def add(self, name: str, cpus: int) -> None:
        self.nodes[name] = started(lambda: self.cluster.add_node(num_cpus=cpus, resources={name: 100}))

    def kill_node(self, name: str) -> None:
        """A node is lost, and started again."""
        self.lose_node(name)
        self.add(name, self.cpus[name])

    def lose_node(self, name: str) -> None:
        """As when a machine loses its power."""
        node = self.nodes.pop(name)
        raylet = node.all_processes["raylet"][0].process
        below = psutil.Process(raylet.pid).children(recursive=True)
        self.cluster.remove_node(node, allow_graceful=False)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def drain_node(self, name: str, seconds: float) -> None:
        """Tell Ray that a node will be taken away, with another one like it there already."""
        node = self.nodes.pop(name)
        self.add(name, self.cpus[name])
        deadline = int((time.time() + seconds) * 1000)
        reason = cast(Any, autoscaler_pb2).DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = node.get_gcs_client().drain_node(node.node_id, reason, "a test", deadline)
        assert accepted, why

    def kill_worker(self, chance: random.Random) -> bool:
        """One of the two training processes dies."""
        workers = [process for process in psutil.Process().children(recursive=True) if _trains(process)]
        if not workers:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            chance.choice(sorted(workers, key=lambda process: process.pid)).kill()
            return True
        return False

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def _trains(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return any("RayTrainWorker" in word for word in process.cmdline()[:1])
    return False


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    machines = Machines()
    try:
        machines.start()
        yield machines
    finally:
        machines.stop()


@dataclass
class Storm:
    """Kills something again and again, each time after a new checkpoint."""

    machines: Machines
    training: TrainingPlan
    kinds: tuple[str, ...]
    kills: int
    """For each stage."""
    calm: Path
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    done: Counter[tuple[int, str]] = field(default_factory=Counter[tuple[int, str]])
    missed: int = 0
    """Kills that a stage ended before."""
    errors: list[BaseException] = field(default_factory=list[BaseException])
    """What ended the training."""

    def rage(self) -> None:
        for stage in self.training.stages:
            known: set[str] = set()
            for number in range(self.kills):
                kind = self.kinds[number % len(self.kinds)]
                known = self._after_new_checkpoint(stage, known)
                if self._finished(stage):
                    self.missed += self.kills - number
                    break
                self._strike(stage, kind)
                self.done[stage, kind] += 1
        self.calm.touch()

    def _strike(self, stage: int, kind: str) -> None:
        folder = self.training.stage_folder(stage)
        if kind in {"data", "train"}:
            time.sleep(self.chance.uniform(0, 0.3))
            self.machines.kill_node(kind)
            return
        if kind == "save":
            # In the middle of writing and sealing.
            self.until(lambda: self._finished(stage) or any((folder / "checkpoints").glob("tmp-*")), 0.001)
        elif kind == "epoch":
            steps = lambda: [point["step"] for point in read_entries(folder / "curve.jsonl")][-1:] or [1]  # noqa: E731
            self.until(lambda: self._finished(stage) or steps()[0] % EPOCH == 0, 0.005)
        else:
            time.sleep(self.chance.uniform(0, 0.3))
        self.until(lambda: self._finished(stage) or self.machines.kill_worker(self.chance), 0.05)

    def _after_new_checkpoint(self, stage: int, known: set[str]) -> set[str]:
        """Wait until the stage has a checkpoint that it had not before the last kill, or is finished."""
        folder = self.training.stage_folder(stage) / "checkpoints"

        def committed() -> set[str]:
            return {path.parent.name for path in folder.glob("step-*/COMMITTED")}

        self.until(lambda: self._finished(stage) or bool(committed() - known), 0.01)
        return known | committed()

    def _finished(self, stage: int) -> bool:
        return StageResult.read(self.training.stage_folder(stage)) is not None

    def until(self, condition: Callable[[], bool], pause: float) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if self.errors:
                raise self.errors[0]
            assert time.monotonic() < deadline, "the run does not go on"
            time.sleep(pause)


def stormy(machines: Machines, training: TrainingPlan, kinds: tuple[str, ...], kills: int, calm: Path) -> Storm:
    """Train while the storm is on."""
    storm = Storm(machines, training, kinds, kills, calm)

    def train() -> None:
        try:
            train_stages(training)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            storm.errors.append(error)

    # Ray adds nodes from the main thread only.
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    storm.rage()
    thread.join()
    if storm.errors:
        raise storm.errors[0]
    return storm


def compare(whole: TrainingPlan, disturbed: TrainingPlan, seeds: Path) -> dict[str, int]:
    """What differs from the undisturbed run."""
    counts = {"lost": 0, "doubled": 0, "mismatched": 0}
    for stage, config in whole.config.stages.items():
        files = [sha256_file(one.stage_folder(stage) / "weights.safetensors") for one in (whole, disturbed)]
        results = [StageResult.read(one.stage_folder(stage)) for one in (whole, disturbed)]
        pairs = [(result.first, result.last) for result in results if result is not None]
        counts["mismatched"] += (files[0] != files[1]) + (pairs[0] != pairs[1])
        counts["mismatched"] += curve(whole, stage) != curve(disturbed, stage)
        (world,) = whole.config.workers.sizes
        for rank in range(world):
            shape = {"global_batch": config.global_batch, "world": world, "rank": rank}
            expected = [position for step in range(config.steps) for position in step_positions(step, **shape).tolist()]
            found = toy.consumed(seeds, disturbed.stream(stage), rank)
            counts["lost"] += len(set(expected) - set(found))
            counts["doubled"] += len(found) - len(set(found))
            counts["mismatched"] += sorted(found) == sorted(expected) and found != expected
    return counts


def stages(
    steps: int, zeros: dict[int, int], checkpoint_every: int = CHECKPOINT_EVERY, max_failures: int = -1
) -> RunConfig:
    every = {"steps": steps, "checkpoint_every": checkpoint_every, "log_every": 4}
    numbers = {number: {**every, "zero": zero} for number, zero in zeros.items()}
    config = toy.toy_config(numbers, max_failures=max_failures)
    return config.model_copy(update={"workers": config.workers.model_copy(update={"cpus": WORKER_CPUS})})


def run(tmp_path: Path, machines: Machines, config: RunConfig, kinds: tuple[str, ...], kills: int) -> dict[str, int]:
    """An undisturbed run, a disturbed one, and what differs."""
    calm = tmp_path / "calm"
    seeds = str(tmp_path / "seeds")
    disturbed = plan(
        tmp_path, config, "disturbed", dropout=0.3, record=seeds, pause=PAUSE_SECONDS, pause_until=str(calm)
    )
    storm = stormy(machines, disturbed, kinds, kills, calm)
    whole = plan(tmp_path, config, "whole", dropout=0.3)
    train_stages(whole)
    return {
        "kills": sum(storm.done.values()),
        **compare(whole, disturbed, Path(seeds)),
        "failed": storm.missed,
    }


def test_a_short_storm_changes_nothing(tmp_path: Path, machines: Machines) -> None:
    counts = run(tmp_path, machines, stages(60, {1: 2}), ("save", "train"), 2)
    assert counts == {"kills": 2, "lost": 0, "doubled": 0, "mismatched": 0, "failed": 0}


@pytest.mark.slow
def test_a_node_that_is_drained_leaves_a_checkpoint_just_in_time(tmp_path: Path, machines: Machines) -> None:
    # No checkpoint is due by itself, and no failure allowed.
    config = stages(900, {1: 2}, checkpoint_every=10_000, max_failures=0)
    calm, seeds = tmp_path / "calm", tmp_path / "seeds"
    settings = {"dropout": 0.3, "record": str(seeds), "pause": PAUSE_SECONDS, "pause_until": str(calm)}
    disturbed = plan(tmp_path, config, "disturbed", **settings)
    storm = Storm(machines, disturbed, (), 0, calm)
    thread = threading.Thread(target=lambda: train_stages(disturbed), daemon=True)
    thread.start()
    storm.until(lambda: bool(read_entries(disturbed.stage_folder(1) / "curve.jsonl")), 0.1)
    machines.drain_node("train", 20.0)
    storm.until(lambda: len(list(seeds.glob("1-*"))) == 4, 0.1)
    calm.touch()
    thread.join(WAIT_SECONDS)
    whole = plan(tmp_path, config, "whole", dropout=0.3)
    train_stages(whole)
    assert compare(whole, disturbed, seeds) == {"lost": 0, "doubled": 0, "mismatched": 0}
    for rank in (0, 1):
        first, second = toy.processes(seeds, disturbed.stream(1), rank)
        assert 0 < second[0] <= first[-1]


@pytest.mark.chaos
@pytest.mark.timeout(6 * 3600)
def test_a_long_storm_over_all_stages_changes_nothing(tmp_path: Path, machines: Machines) -> None:
    kills = int(os.environ.get("INSIGHTEDIT_CHAOS_KILLS", "25"))
    kinds = ("save", "data", "epoch", "train", "worker")
    counts = run(tmp_path, machines, stages(24 * kills + 24, {1: 2, 2: 2, 3: 3}), kinds, kills)
    report_part("chaos", "training", counts)
    assert counts == {"kills": 3 * kills, "lost": 0, "doubled": 0, "mismatched": 0, "failed": 0}
