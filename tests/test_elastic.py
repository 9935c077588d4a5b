"""Fewer and more workers on the way: the same samples, the same weights but for the order of sums."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import toy_training as toy
from elastic_ranks import BATCH, ZEROS, ranked
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from test_chaos import Machines
from test_faults import curve
from test_training import plan, reference
from torch import multiprocessing

from insightedit.platform import elastic as elastic_scaling
from insightedit.platform import surveillance
from insightedit.platform.capacity import Nodes
from insightedit.platform.cluster import connected
from insightedit.platform.elastic import CarefulScaling
from insightedit.platform.errors import InsightEditError
from insightedit.platform.surveillance import Notices
from insightedit.platform.trainer import TrainingPlan, stage_weights, train_stages
from insightedit.platform.universal import make_universal

TOLERANCE = 2e-6
"""Largest difference of a weight or a loss: other numbers of ranks add the same numbers in another order."""
WAIT_SECONDS = 240.0


# -- the state, between numbers of ranks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved, and what one and three made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (2, 1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_RANK", "0")
            multiprocessing.spawn(ranked, (world, str(folder), world != 2), nprocs=world)  # pyright: ignore[reportPrivateImportUsage]
        if world == 2:
            before = sorted((folder / "zero-2").rglob("*"))
            for zero in ZEROS:
                (folder / f"universal-{zero}").mkdir()
                make_universal(folder / f"zero-{zero}", folder / f"universal-{zero}", 2)
            assert sorted((folder / "zero-2").rglob("*")) == before
    return folder


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks_has_the_same_state(states: Path, zero: int, world: int) -> None:
    saved = torch.load(states / f"saved-{zero}-0")
    for rank in range(world):
        loaded = torch.load(states / f"loaded-{zero}-{world}-{rank}")
        assert loaded.keys() == saved.keys()
        same = {name for name in saved if torch.equal(saved[name], loaded[name])}
        # To the bit; and ranks that there were before draw on where they stood.
        assert saved.keys() - same == (set() if rank == 0 else {"random"})
    drawn = [torch.load(states / f"loaded-{zero}-{world}-{rank}")["random"].tolist() for rank in range(world)]
    before = [torch.load(states / f"saved-{zero}-{rank}")["random"].tolist() for rank in range(2)]
    assert drawn[:2] == before[:world]
    assert len({tuple(numbers) for numbers in drawn}) == world


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks_goes_on_alike(states: Path, zero: int, world: int) -> None:
    one, other = (torch.load(states / f"done-{zero}-{number}-0") for number in (2, world))
    start = torch.load(states / f"saved-{zero}-0")
    for name, value in one.items():
        if name != "random":
            assert (value - other[name]).abs().max() <= TOLERANCE, name
            assert not torch.equal(value, start[name])


def test_a_missing_part_is_told(states: Path, tmp_path: Path) -> None:
    with pytest.raises(InsightEditError, match=r"has the optimiser's parts of ranks \[0, 1\], not of all 3; delete it"):
        make_universal(states / "zero-2", tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


# -- when Ray starts a group again ----------------------------------------------------------------------------------


class Room(CarefulScaling):
    """Our policy in a cluster that has room for so many workers."""

    def __init__(self, room: int, place: dict[str, str] | None = None) -> None:
        each: Any = {"CPU": 1.0}
        super().__init__(
            ScalingConfig(
                num_workers=(2, 4),
                resources_per_worker=each,
                label_selector=place,
                elastic_resize_monitor_interval_s=0.0,
            )
        )
        self.room = room

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        return {"node": {"CPU": float(self.room)}}


class Worker:
    """Stands in for Ray's, in this process."""

    def execute_async(self, function: Callable[[], object]) -> object:
        return function()


@pytest.mark.parametrize(("room", "size"), [(3, 3), (9, 4), (2, None), (1, None)])
def test_a_group_that_trains_makes_a_checkpoint_before_it_grows(
    monkeypatch: pytest.MonkeyPatch, room: int, size: int | None
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(elastic_scaling.ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(surveillance, "get_train_context", lambda: Mock(preemption_context=Mock(preemption_info=None)))
    monkeypatch.setattr(surveillance, "requests", surveillance.Requests())
    monkeypatch.setattr(surveillance.time, "monotonic", lambda: clock[0])
    policy, notices = Room(2), Notices()
    group = Mock(workers=[Worker()], num_workers=2, start_time=0.0)

    def decide() -> int | None:
        decision = policy.make_decision_for_running_worker_group(group, None)
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    assert decide() is None
    assert not notices.pending()
    # The second time, after the room was gone again or not, is like the first.
    for _ in range(2):
        policy.room = 3
        assert [decide(), decide()] == [None, None]
        assert notices.pending()
        notices.heed()
        assert not notices.pending()
        policy.room = room
        assert decide() == size
        clock[0] += 600


def test_a_group_that_ended_starts_with_what_there_is_room_for() -> None:
    policy = Room(1)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    policy.room = 3
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 3


def test_room_on_nodes_for_other_work_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        Nodes(resources={"CPU": 16.0}, labels={"group": "data"}),
        Nodes(resources={"CPU": 2.0}, labels={"group": "train"}),
        Nodes(resources={"CPU": 1.5}, labels={"group": "train"}),
    ]
    monkeypatch.setattr(elastic_scaling, "nodes_alive", lambda: nodes)
    policy = Room(16, {"group": "train"})
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 3
    del nodes[1]
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)


# -- whole runs -------------------------------------------------------------------------------------------------------


def elastic(tmp_path: Path, name: str, count: tuple[int, int], stage: dict[str, Any], **settings: Any) -> TrainingPlan:
    """A run of one stage whose workers may be fewer or more; `settings` with `cpus` of each of them."""
    cpus = settings.pop("cpus", 2.0)
    failures = settings.pop("max_failures", 0)
    config = toy.toy_config(
        {1: {"global_batch": BATCH, **stage}}, count=count, cpus=cpus, max_failures=failures, resize_seconds=1.0
    )
    return plan(tmp_path, config, name, **settings)


def check_samples(training: TrainingPlan, seeds: Path, worlds: list[int]) -> list[int]:
    """Check the numbers of workers, and that the weights were made of each sample once.

    Returns:
        The step that each group of workers began at.
    """
    groups = toy.groups(seeds, training.stream(1))
    assert [len(group) for group in groups] == worlds
    began = [min(itertools.chain.from_iterable(group)) // BATCH for group in groups]
    # What a group did behind the checkpoint that the next one began at was done again.
    made: list[int] = []
    for group, first in zip(groups, began, strict=True):
        made = [position for position in made if position < first * BATCH] + list(itertools.chain.from_iterable(group))
    assert sorted(made) == list(range(training.config.stages[1].steps * BATCH))
    return began


@pytest.mark.slow
def test_a_run_goes_on_with_more_workers(tmp_path: Path) -> None:
    mark, seeds = tmp_path / "killed", tmp_path / "seeds"
    stage = {"steps": 8, "checkpoint_every": 2, "zero": 3}
    with connected(cpus=8):
        # Two workers take three micro-batches each of a step: rank 1 dies in the sixth step, behind a checkpoint.
        few = elastic(tmp_path, "run", (2, 3), stage, cpus=3.0, die_at=(1, 17, str(mark)), record=str(seeds))
        with pytest.raises(InsightEditError, match="Training failed"):
            train_stages(few)
        assert mark.exists()
        more = elastic(tmp_path, "run", (2, 3), stage, cpus=2.0, record=str(seeds))
        train_stages(more)
    began = check_samples(more, seeds, [2, 3])
    assert began[1] in (2, 4)
    for name, value in reference(more)[1].items():
        if name in (weights := stage_weights(more, 1)):
            assert (value - weights[name]).abs().max() <= TOLERANCE, name


@pytest.fixture
def machines() -> Iterator[Machines]:
    machines = Machines({"data": 1, "left": 4, "right": 4})
    try:
        machines.start()
        yield machines
    finally:
        machines.stop()


@pytest.mark.slow
def test_four_workers_become_two_and_then_three(tmp_path: Path, machines: Machines) -> None:
    stage = {"steps": 400, "checkpoint_every": 10, "log_every": 4, "ema_decay": 0.99}
    whole = elastic(tmp_path, "whole", (4, 4), stage)
    train_stages(whole)
    calm, seeds = tmp_path / "calm", tmp_path / "seeds"
    pauses = {"pause": 0.04, "pause_until": str(calm)}
    disturbed = elastic(tmp_path, "disturbed", (2, 4), stage, max_failures=1, record=str(seeds), **pauses)
    thread = threading.Thread(target=lambda: train_stages(disturbed), daemon=True)
    thread.start()
    checkpoints = disturbed.stage_folder(1) / "checkpoints"
    until(lambda: any(checkpoints.glob("step-*/COMMITTED")))
    machines.lose_node("right")
    until(lambda: len(list(seeds.iterdir())) == 6)
    machines.add("right", 2)
    until(lambda: len(list(seeds.iterdir())) == 9)
    calm.touch()
    thread.join(WAIT_SECONDS)
    began = check_samples(disturbed, seeds, [4, 2, 3])
    assert 0 < began[1] < began[2]
    same, other = curve(whole, 1), curve(disturbed, 1)
    assert [point["step"] for point in same] == [point["step"] for point in other]
    for one, two in zip(same, other, strict=True):
        assert one["losses"] == pytest.approx(two["losses"], abs=TOLERANCE, rel=0)
    # The averages too went from one number of workers to the other.
    weights = stage_weights(disturbed, 1)
    for name, value in stage_weights(whole, 1).items():
        assert (value - weights[name]).abs().max() <= TOLERANCE, name


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.05)
