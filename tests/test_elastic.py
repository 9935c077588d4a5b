"""Fewer and more workers on the way: the same samples, the same weights but for the order of sums."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import toy_training as toy
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from test_chaos import Machines
from test_faults import curve
from test_training import plan, reference
from torch import Tensor, multiprocessing

from insightedit.platform.cluster import connected
from insightedit.platform.config import StageConfig
from insightedit.platform.engine import (
    StageLosses,
    load_resized_state,
    set_learning_rates,
    snapshot_state,
    start_engine,
    trained_parameters,
)
from insightedit.platform.errors import InsightEditError
from insightedit.platform.loop import Layout
from insightedit.platform.mixtures import micro_batch_size
from insightedit.platform.trainer import TrainingPlan, stage_weights, train_stages
from insightedit.platform.universal import make_universal

TOLERANCE = 2e-6
"""Largest difference of a weight or a loss: other numbers of ranks add the same numbers in another order."""
WAIT_SECONDS = 240.0
BATCH = 24
ZEROS = (2, 3)
SAVED, TOTAL = 4, 7
"""Steps until the state is saved, and in all."""


# -- the state, between numbers of ranks ------------------------------------------------------------------------------


def stage_config(zero: int) -> StageConfig:
    """A stage with two learning rates and two weight decays: four groups of parameters."""
    settings = {
        "steps": TOTAL,
        "zero": zero,
        "global_batch": BATCH,
        "learning_rates": {"bim": 0.03},
        "warmups": {"bim": 0.9},
        "weight_decay": 0.1,
    }
    return toy.toy_config({2: settings}).stages[2]


class Ranked:
    """One of several ranks that train the toy model under DeepSpeed."""

    def __init__(self, zero: int, rank: int, world: int) -> None:
        self.config = stage_config(zero)
        size = micro_batch_size(BATCH, world, self.config.micro_batch)
        self.layout = Layout(
            rank=rank,
            world=world,
            micro_batch=size,
            accumulation=BATCH // world // size,
            device=torch.device("cpu"),
        )
        torch.manual_seed(0)
        self.model = toy.ToyModel(0.0)
        self.seen = torch.zeros(1)
        self.model.register_buffer("seen", self.seen)
        self.model.begin_stage(2)
        self.engine: Any = start_engine(
            StageLosses(self.model, 2, self.config, ("L_MLLM", "L_IAA", "L_diff1"), float(BATCH // size)),
            self.config,
            toy.ToyTask().part_of,
            micro_batch=size,
            accumulation=self.layout.accumulation,
            device=self.layout.device,
        )
        torch.manual_seed(rank)

    def train(self, steps: range) -> None:
        for step in steps:
            set_learning_rates(self.engine, self.config, step)
            arrays = toy.toy_arrays(BATCH, step, 1.0)
            share = BATCH // self.layout.world
            for micro in range(self.layout.accumulation):
                first = self.layout.rank * share + micro * self.layout.micro_batch
                own = slice(first, first + self.layout.micro_batch)
                batch = {name: torch.from_numpy(array[own]).float() for name, array in arrays.items()}
                batch["seed"] = torch.arange(BATCH)[own] + BATCH * step
                loss, _ = self.engine(batch, torch.full((3,), float(BATCH)))
                self.engine.backward(loss)
                self.engine.step()
            self.seen += 1

    def state(self) -> dict[str, Tensor]:
        """Whole weights and moments, and what else there is."""
        if self.config.zero == 2:
            # DeepSpeed links them after the first group's first step, when the other groups have none yet.
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        found: dict[str, Tensor] = {"seen": self.seen.clone(), "random": torch.rand(3)}
        for name, parameter in trained_parameters(self.model).items():
            found[name] = cast(Tensor, safe_get_full_fp32_param(parameter)).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{key}"] = cast(Tensor, safe_get_full_optimizer_state(parameter, key)).clone()
        return found


def ranked(rank: int, world: int, folder: str, resume: bool) -> None:
    """What each process of a group of ranks does: train and save, or load what another group saved and go on."""
    place = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    for zero in ZEROS:
        one, kept = Ranked(zero, rank, world), place / f"zero-{zero}"
        if resume:
            load_resized_state(one.engine, kept, place / f"universal-{zero}", rank, 100 + rank)
            torch.save(one.state(), place / f"loaded-{zero}-{world}-{rank}")
        else:
            one.train(range(SAVED))
            snapshot_state(one.engine, rank)(kept)
            torch.save(one.state(), place / f"saved-{zero}-{rank}")
        one.train(range(SAVED, TOTAL))
        torch.save(one.state(), place / f"done-{zero}-{world}-{rank}")
        one.engine.destroy()
    dist.destroy_process_group()


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
    stage = {"steps": 400, "checkpoint_every": 10, "log_every": 4}
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
    # Growing lost nothing: a checkpoint was made for it.
    _, fewer, _ = toy.groups(seeds, disturbed.stream(1))
    assert began[2] == max(itertools.chain.from_iterable(fewer)) // BATCH + 1
    same, other = curve(whole, 1), curve(disturbed, 1)
    assert [point["step"] for point in same] == [point["step"] for point in other]
    for one, two in zip(same, other, strict=True):
        assert one["losses"] == pytest.approx(two["losses"], abs=TOLERANCE, rel=0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.05)
