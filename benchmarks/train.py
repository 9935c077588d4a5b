"""What our training loop costs: stage 2 of nano on two workers, beside the same engine alone and plain torch DDP.

All three train the same model on the same samples with one thread each, in turn, several times over; what counts are
the ratios. Ours is all of it: Ray Train, the data stream, judging steps, curves, MLflow. The others have their batches
at hand.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from figures import report, row
from torch import Tensor, nn

from insightedit.jobs.prepare import PreparedDataset, prepare
from insightedit.jobs.train import training_plan
from insightedit.model.attention import use_plain_attention
from insightedit.model.precision import multiplies_bf16
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig, load_preset
from insightedit.platform.engine import StageLosses, set_learning_rates, start_engine
from insightedit.platform.journals import read_entries
from insightedit.platform.trainer import TrainingPlan, finish_stage, loss_names, train_stages
from insightedit.platform.workdir import Workdir

STAGE, WORLD = 2, 2
LOG_EVERY = 10
WARM = 10
"""Steps at the start that are not timed."""
REST = 20
"""Steps behind the timed ones, in which a checkpoint is written."""

Batch = dict[str, Tensor]


def main() -> None:
    """Prepare the data, train in three ways in turn, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="Steps that are timed; a multiple of ten.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=256, help="Of the data that is trained on.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(Path(folder), arguments.steps, arguments.scenes)
        rates: dict[str, list[float]] = {"ours": [], "bare_engine": [], "torch_ddp": []}
        stalls: list[float] = []
        for number in range(arguments.rounds):
            rate, stall = ours(bench, f"ours-{number}")
            rates["ours"].append(rate)
            stalls.append(stall)
            rates["bare_engine"].append(alone(bench, bare_engine))
            rates["torch_ddp"].append(alone(bench, torch_ddp))
            print({name: round(values[-1], 2) for name, values in rates.items()}, flush=True)
    config = bench.config.stages[STAGE]
    rows = {name: row(name, "samples/s", values) for name, values in rates.items()}
    stall = row("checkpoint_stall_seconds", "s", stalls)
    interval = load_preset("nano").stages[STAGE].checkpoint_every * config.global_batch / rows["ours"].value
    ratios = {f"vs_{name}": rows["ours"].value / one.value for name, one in rows.items() if name != "ours"}
    report("train", [*rows.values(), stall], {**ratios, "checkpoint_stall": stall.value / (interval + stall.value)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is trained."""

    config: RunConfig
    workdir: Workdir
    datasets: Mapping[str, PreparedDataset]
    steps: int
    """That are timed."""

    def plan(self, name: str) -> TrainingPlan:
        """A run of its own that goes on from an untrained stage 1: weights do not change how fast it is."""
        plan = training_plan(self.config, self.workdir, name, (STAGE,), self.datasets)
        result: dict[str, Any] = {"stage": 1, "steps": 0, "first": {}, "last": {}, "figures": {"seconds": 0.0}}
        finish_stage(plan, {}, {**result, "fingerprint": plan.fingerprint(1)})
        return plan


def prepared(folder: Path, steps: int, scenes: int) -> Bench:
    """The data of the stage, encoded."""
    config = load_preset(
        "nano",
        [
            f"data.datasets.edits.options.count={scenes}",
            "data.datasets.captions=null",
            "data.datasets.questions=null",
            "stages.1.datasets={edits: 1}",
            "stages.3=null",
            f"stages.{STAGE}.precision={'bf16' if multiplies_bf16(torch.device('cpu')) else 'fp32'}",
            f"stages.{STAGE}.steps={WARM + steps + REST}",
            f"stages.{STAGE}.log_every={LOG_EVERY}",
            f"stages.{STAGE}.checkpoint_every={WARM + steps}",
            f"stages.{STAGE}.validate_every=0",
            f"workers.count={WORLD}",
        ],
    )
    workdir = Workdir.open(folder)
    with connected(cpus=8):
        return Bench(config=config, workdir=workdir, datasets=prepare(config, workdir), steps=steps)


def ours(bench: Bench, name: str) -> tuple[float, float]:
    """Samples a second of a run, and seconds that it waited for its checkpoint."""
    plan = bench.plan(name)
    with connected(cpus=8):
        (result,) = train_stages(plan)
    elapsed: dict[int, float] = {}
    useful = 0.0
    for point in read_entries(plan.stage_folder(STAGE) / "curve.jsonl"):
        useful += point["seconds"]
        # Goodput is useful over all time: so this is all time, with what lies between the steps.
        elapsed[point["step"]] = useful / point["figures"]["goodput"]
    seconds = elapsed[WARM + bench.steps] - elapsed[WARM]
    share = result.figures["checkpoint_stall_share"]
    stalled = result.figures["seconds"] * share / (1 - share)
    return bench.steps * bench.config.stages[STAGE].global_batch / seconds, stalled


Step = Callable[[int, Batch, Tensor], None]
"""Trains on a step's batch, of which it is told the number and the losses' weights."""


def alone(bench: Bench, way: Callable[[TrainingPlan, StageLosses], Step]) -> float:
    """Samples a second of two processes that have their batches at hand."""
    with tempfile.TemporaryDirectory() as folder:
        spawn: Any = mp.spawn  # pyright: ignore[reportPrivateImportUsage]
        spawn(_rank, args=(bench.plan("alone"), bench.steps, way, Path(folder)), nprocs=WORLD)
        return float((Path(folder) / "rate").read_text(encoding="utf-8"))


def _rank(
    rank: int, plan: TrainingPlan, steps: int, way: Callable[[TrainingPlan, StageLosses], Step], folder: Path
) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    config = plan.config.stages[STAGE]
    batches = batches_of(plan, rank)
    names = loss_names(STAGE)
    totals = torch.full((len(names),), float(config.global_batch))
    step = way(plan, built(plan))
    for number in range(WARM):
        step(number, batches[number % len(batches)], totals)
    dist.barrier()
    began = time.perf_counter()
    for number in range(WARM, WARM + steps):
        step(number, batches[number % len(batches)], totals)
    dist.barrier()
    if rank == 0:
        rate = steps * config.global_batch / (time.perf_counter() - began)
        (folder / "rate").write_text(str(rate), encoding="utf-8")
    dist.destroy_process_group()


def batches_of(plan: TrainingPlan, rank: int) -> list[Batch]:
    """A rank's batches of the steps of one block."""
    stream, config = plan.stream(STAGE), plan.config.stages[STAGE]
    share = config.global_batch // WORLD
    block = {name: torch.from_numpy(np.array(array)) for name, array in stream.block(0, rank, WORLD).items()}
    block = {name: x.float() if x.dtype == torch.float16 else x for name, x in block.items() if name != "position"}
    count = len(block["seed"]) // share
    return [{name: x[at * share : (at + 1) * share] for name, x in block.items()} for at in range(count)]


def built(plan: TrainingPlan) -> StageLosses:
    """The model with its losses, as a worker builds it."""
    torch.manual_seed(plan.config.seed)
    model: Any = plan.task.build_model()
    model.begin_stage(STAGE)
    use_plain_attention(model)
    model.train()
    config = plan.config.stages[STAGE]
    # Both engines take the mean over ranks.
    return StageLosses(model, STAGE, config, loss_names(STAGE), float(WORLD))


def bare_engine(plan: TrainingPlan, losses: StageLosses) -> Step:
    """DeepSpeed's engine, as the loop has it."""
    config = plan.config.stages[STAGE]
    engine = start_engine(
        losses,
        config,
        plan.task.part_of,
        micro_batch=config.global_batch // WORLD,
        accumulation=1,
        device=torch.device("cpu"),
    )

    def step(number: int, batch: Batch, totals: Tensor) -> None:
        set_learning_rates(engine, config, number)
        loss, _ = engine(batch, totals)
        engine.backward(loss)
        engine.step()

    return step


def torch_ddp(plan: TrainingPlan, losses: StageLosses) -> Step:
    """Torch's own DistributedDataParallel and AdamW."""
    config = plan.config.stages[STAGE]
    trained = [parameter for parameter in losses.parameters() if parameter.requires_grad]
    model = nn.parallel.DistributedDataParallel(losses)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=config.betas, fused=True)

    def step(number: int, batch: Batch, totals: Tensor) -> None:
        del number
        optimizer.zero_grad()
        loss, _ = model(batch, totals)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
