"""What each rank does in the tests of elastic training; with few imports, as every process has its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import toy_training as toy
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from insightedit.platform.config import StageConfig
from insightedit.platform.engine import (
    StageLosses,
    load_resized_state,
    set_learning_rates,
    snapshot_state,
    start_engine,
    trained_parameters,
)
from insightedit.platform.loop import Layout
from insightedit.platform.mixtures import micro_batch_size

BATCH = 24
ZEROS = (2, 3)
SAVED, TOTAL = 4, 7
"""Steps until the state is saved, and in all."""


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
