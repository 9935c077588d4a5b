"""What each training worker does: build, resume, loop, checkpoint, hand over, stage after stage."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from insightedit.model.attention import use_plain_attention
from insightedit.model.precision import multiplies_bf16
from insightedit.platform import leases
from insightedit.platform.averages import Averages, averages_name
from insightedit.platform.bad_steps import BadStep, bad_step_entry, check_bad_step
from insightedit.platform.checkpoints import (
    Checkpoint,
    CheckpointInfo,
    CheckpointStore,
    Found,
    Retention,
    checkpoint_key,
    run_key,
)
from insightedit.platform.config import StageConfig
from insightedit.platform.efficiency import Efficiency, FlopMeter
from insightedit.platform.engine import (
    StageLosses,
    gathered_weights,
    load_resized_state,
    load_state,
    parameter_shape,
    snapshot_state,
    start_engine,
    trained_parameters,
)
from insightedit.platform.errors import UsageError
from insightedit.platform.journals import append_entry, keep_entries, read_entries
from insightedit.platform.loop import Curve, Layout, Point, StageLoop
from insightedit.platform.mixtures import micro_batch_size
from insightedit.platform.saving import CheckpointSaver
from insightedit.platform.streams import write_start
from insightedit.platform.surveillance import Notices, Watchdog
from insightedit.platform.tracking import StageTracker
from insightedit.platform.train_metrics import TrainMetrics
from insightedit.platform.trainer import (
    RESULT_NAME,
    Progress,
    StageResult,
    TrainingPlan,
    finish_stage,
    load_weights,
    loss_names,
    stage_weights,
    write_json,
)
from insightedit.platform.universal import make_universal

CURVE_NAME = "curve.jsonl"
"""Every point of a stage's curves, in its folder."""
BAD_STEPS_NAME = "bad_steps.jsonl"
"""The steps that a run left out, with their samples, in its folder."""
_PREFETCH = 4
"""Micro-batches that are fetched ahead."""

T = TypeVar("T")


def train_worker(settings: Mapping[str, Any]) -> None:
    """What Ray Train runs in each worker: the plan's stages that are not done yet."""
    plan: TrainingPlan = settings["plan"]
    if plan.lease is not None:
        plan.lease.check(plan.name)
        leases.watch(plan.lease)
    os.environ["OMP_NUM_THREADS"] = str(plan.config.workers.threads)
    torch.set_num_threads(plan.config.workers.threads)
    for number in settings["stages"]:
        # After a restart, earlier stages may be done already. All ranks must see the same.
        if not _from_first([plan.stage_folder(number).joinpath(RESULT_NAME).is_file()]):
            watchdog = Watchdog(plan.config.workers.hang_seconds)
            watchdog.start()
            StageWorker(plan, number, watchdog).run()
            watchdog.stop()


class StageWorker:
    """One rank's part in one stage."""

    def __init__(self, plan: TrainingPlan, number: int, watchdog: Watchdog) -> None:
        self.plan = plan
        self.watchdog = watchdog
        self.notices = Notices()
        self.number = number
        self.layout = _layout(plan.config.stages[number])
        self.config = plan.config.stages[number].settled(bf16=_every_multiplies_bf16(self.layout.device))
        self.names = loss_names(number)
        self.fingerprint = plan.fingerprint(number)
        self.store = checkpoint_store(plan, number)
        self.saver = CheckpointSaver(
            self.store, self.layout.rank, self.layout.world, wait=plan.config.checkpoints.upload == "wait"
        )
        self.checkpoint = self._newest_checkpoint()
        self.start = self.checkpoint.info.step if self.checkpoint else 0
        self.progress = self.checkpoint.progress() if self.checkpoint else {}
        # The stream's processes start up while the model is built.
        self.arrays = _begun(self._arrays())
        self.model = self._build()
        self.averages: Averages | None = None
        self.engine = self._engine()
        self.flops = FlopMeter() if plan.config.workers.peak_tflops else None
        self.loop = StageLoop(
            self.engine,
            self.config,
            self.names,
            self.layout,
            self.arrays,
            self._count,
            self.notices.pending,
            self.flops,
        )
        self.efficiency = self._efficiency()
        self.curve = Curve()
        self.tracker = StageTracker(plan.tracking, number) if plan.tracking and self._is_first else None
        self.metrics = TrainMetrics(plan.name, number) if self._is_first else None
        self._restore_loop()

    @property
    def _is_first(self) -> bool:
        return self.layout.rank == 0

    def run(self) -> None:
        """Train the stage to its end."""
        with self._tracked(), self._saving():
            for step in range(self.start, self.config.steps):
                if bad := self.loop.step(step):
                    self._report(bad)
                elif self.averages:
                    self.averages.update()
                self.watchdog.progress()
                self._after(step + 1)
            self.saver.finish()
            self._finish()
        self.engine.destroy()

    def _after(self, step: int) -> None:
        """What is due after a number of steps."""
        config, last = self.config, step == self.config.steps
        self.saver.check()
        if last or step % config.log_every == 0:
            self._log(self.loop.point(step))
        if not last and (step % config.checkpoint_every == 0 or self.loop.noticed):
            self._save(step)
            self.watchdog.progress()
        if self.loop.noticed:
            self.saver.finish()
            self.notices.heed()
        if last or (config.validate_every and step % config.validate_every == 0):
            self._validate(step)
            self.watchdog.progress()

    # -- beginning ----------------------------------------------------------------------------------------------

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, the same on every rank, on each one's machine."""
        found = [Found(None)]
        if self._is_first:
            self.store.clean()
            found[0] = self.store.newest()
        checkpoint = _from_first(found).checkpoint
        return checkpoint if checkpoint is None or self._is_first else self.store.copy_of(checkpoint)

    def _arrays(self) -> Iterator[Mapping[str, Any]]:
        """This rank's micro-batches from the first step on."""
        name = f"stage-{self.number}"
        if self._is_first:
            write_start(self.plan.starts, name, self.start)
        shard: Any = ray.train.get_dataset_shard(name)
        size = self.layout.micro_batch
        return iter(shard.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=_PREFETCH))

    def _build(self) -> nn.Module:
        """The model as the stage begins, on the CPU: equal on every rank."""
        torch.manual_seed(self.plan.config.seed)
        model = self.plan.task.build_model(halved=self.config.frozen == "bf16")
        before = self.plan.config.stage_before(self.number)
        if before is not None:
            load_weights(model, stage_weights(self.plan, before))
        model.begin_stage(self.number)  # pyright: ignore[reportCallIssue] - see TrainingTask.build_model
        if self.layout.device.type == "cpu":
            use_plain_attention(model)
        model.train()
        # Dropout differs between ranks; everything else that is random follows from the samples' own seeds.
        torch.manual_seed(self._seed())
        return model

    def _seed(self) -> int:
        """This rank's own, at the step it begins with."""
        key = (self.plan.config.seed, self.number, self.layout.rank, self.start)
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def _engine(self) -> Any:
        """DeepSpeed's engine, in the state of the checkpoint, as are the averages beside it."""
        layout, checkpoint = self.layout, self.checkpoint
        if checkpoint is not None:
            check_resumable(checkpoint.info, self._info(self.start), self.plan.name, self.plan.config.workers.sizes)
        scale = float(layout.world * layout.accumulation)
        engine = start_engine(
            StageLosses(self.model, self.number, self.config, self.names, scale),
            self.config,
            self.plan.task.part_of,
            micro_batch=layout.micro_batch,
            accumulation=layout.accumulation,
            device=layout.device,
        )
        if self.config.ema_decay is not None:
            self.averages = Averages(self.model, self.config.ema_decay, layout)
        if checkpoint is not None:
            if self.averages:
                self.averages.load(checkpoint.folder)
            if checkpoint.info.world_size == layout.world:
                load_state(engine, checkpoint.folder, layout.rank)
                dist.barrier()
            else:
                self._load_resized(engine, checkpoint)
            self.store.release()
        return engine

    def _load_resized(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Take over what another number of workers left."""

        def convert(folder: Path) -> None:
            make_universal(checkpoint.folder, folder, checkpoint.info.world_size)

        with self.store.derived(checkpoint, convert) as folder:
            load_resized_state(engine, checkpoint.folder, folder, self.layout.rank, self._seed())
            dist.barrier()

    def _restore_loop(self) -> None:
        """Take the loop, and the files that it adds to, back to where the checkpoint is."""
        if self.progress:
            self.loop.restore(self.progress["loop"])
            self.curve = Curve(**self.progress["curve"])
        if self._is_first:
            done = self.start
            self._stage_file(CURVE_NAME).parent.mkdir(parents=True, exist_ok=True)
            keep_entries(self._stage_file(CURVE_NAME), lambda entry: entry["step"] <= done)
            keep_entries(self._bad_steps, lambda entry: (entry["stage"], entry["step"]) < (self.number, done))
            for entry in read_entries(self._stage_file(CURVE_NAME)):
                # The tracker writes in the background: what it had not written yet when its process died.
                self._track(entry)

    def _efficiency(self) -> Efficiency:
        """What the stage's points are told of its use of time and machines."""
        done = (StageResult.read(self.plan.stage_folder(number)) for number in range(1, self.number))
        return Efficiency(
            started=json.loads(self.plan.beginning.read_text(encoding="utf-8"))["at"],
            before=sum(result.figures["seconds"] for result in done if result),
            flops=self.flops,
            peak=(self.plan.config.workers.peak_tflops or 0.0) * 1e12 * self.layout.world,
        )

    def _stage_file(self, name: str) -> Path:
        return self.plan.stage_folder(self.number) / name

    @property
    def _bad_steps(self) -> Path:
        return self.plan.folder / BAD_STEPS_NAME

    def _count(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.plan.task.loss_weights(batch, self.number)

    # -- on the way -----------------------------------------------------------------------------------------------

    def _report(self, bad: BadStep) -> None:
        """Say which step was left out and why, with its samples.

        Raises:
            BadStepError: training stops here.
        """
        if self._is_first:
            append_entry(self._bad_steps, bad_step_entry(bad, self.number, self.plan.stream(self.number)))
        # Where it stops, nobody may go before the file is written: the first one to fail ends them all.
        dist.barrier()
        check_bad_step(bad, self.config, self.number, self._bad_steps)

    def _log(self, point: Point) -> None:
        """Add a point to the curves."""
        if self.metrics is None:
            return
        point.figures.update(
            self.efficiency.figures(
                samples_per_second=point.figures["samples_per_second"],
                seconds=point.seconds,
                stalled=self.efficiency.stalled(self.saver.stalled),
                useful=self.curve.seconds + point.seconds,
            )
        )
        self.metrics.show(point.step, self.config.steps, point.losses, point.figures)
        self.curve.add(point)
        entry = asdict(point)
        entry["figures"] |= self.plan.task.diagnostics(self.model)
        append_entry(self._stage_file(CURVE_NAME), entry)
        progress = Progress(
            stage=self.number,
            step=point.step,
            steps=self.config.steps,
            losses=point.losses,
            samples_per_second=point.figures["samples_per_second"],
            goodput=point.figures["goodput"],
        )
        write_json(self.plan.progress, asdict(progress))
        self._track(entry)

    def _track(self, entry: Mapping[str, Any]) -> None:
        """Log a point of the curves, if it is not there already."""
        if self.tracker:
            self.tracker.metrics(entry["step"], {**entry["losses"], **entry["figures"]})

    def _save(self, step: int) -> None:
        """Begin a checkpoint with all ranks."""
        name = _from_first([self.store.new_name(step) if self._is_first else ""])
        self.saver.save(
            name,
            self._info(step),
            self._snapshot,
            losses=self.curve.last,
            progress={"loop": self.loop.state(), "curve": asdict(self.curve)},
        )

    def _snapshot(self) -> Callable[[Path], None]:
        """What a checkpoint holds of this rank, copied."""
        rank = self.layout.rank
        return snapshot_state(self.engine, rank, {averages_name(rank): self.averages.state()} if self.averages else {})

    def _info(self, step: int) -> CheckpointInfo:
        """What a checkpoint of this stage is of."""
        shapes = {name: parameter_shape(parameter) for name, parameter in trained_parameters(self.model).items()}
        return CheckpointInfo(
            stage=self.number,
            step=step,
            position=step * self.config.global_batch,
            world_size=self.layout.world,
            fingerprint=self.fingerprint,
            trained=hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        )

    def _validate(self, step: int) -> None:
        """Make and track pictures of validation edits, by the averages where there are some."""
        if self.config.zero == 3:
            return
        with self.averages.shown() if self.averages else nullcontext():
            if self.tracker:
                self.tracker.pictures(step, self._pictures())

    def _pictures(self) -> dict[str, Image.Image]:
        """Pictures of validation edits, leaving the random states as they were."""
        devices = [self.layout.device] if self.layout.device.type == "cuda" else []
        self.model.eval()
        autocast = torch.autocast(self.layout.device.type, torch.bfloat16, enabled=self.config.frozen == "bf16")
        with torch.random.fork_rng(devices), torch.no_grad(), autocast:
            pictures = self.plan.task.pictures(self.model, self.number)
        self.model.train()
        return pictures

    # -- the end ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Leave the weights of this stage and of those before."""
        weights = self.averages.gathered() if self.averages else gathered_weights(self.model, self.layout.rank)
        if self._is_first:
            # The last checkpoint was waited for after the last point.
            self.curve.stalled += self.efficiency.stalled(self.saver.stalled)
            number = self.plan.config.stage_before(self.number)
            before = {} if number is None else stage_weights(self.plan, number)
            result = {
                "stage": self.number,
                "steps": self.config.steps,
                "fingerprint": self.fingerprint,
                "first": self.curve.first,
                "last": self.curve.last,
                "figures": self.curve.figures(),
            }
            finish_stage(self.plan, before | weights, result)
        dist.barrier()

    @contextmanager
    def _saving(self) -> Generator[None]:
        """End the thread that writes checkpoints in any case."""
        try:
            yield
        except BaseException:
            self.saver.abandon()
            raise

    @contextmanager
    def _tracked(self) -> Generator[None]:
        """End the stage's run in MLflow in any case."""
        if self.tracker is None:
            yield
            return
        try:
            yield
        except BaseException:
            self.tracker.close("FAILED")
            raise
        self.tracker.close("FINISHED")


def checkpoint_store(plan: TrainingPlan, number: int) -> CheckpointStore:
    """Where a stage's checkpoints are."""
    config = plan.config.checkpoints
    return CheckpointStore(
        plan.checkpoint_place(number),
        run_key(checkpoint_key(plan.workdir.root), plan.name, number),
        Retention(keep=config.keep, keep_best=config.keep_best, best_by=config.best_by),
        scratch=Path(config.scratch) if config.scratch else None,
        retry_seconds=config.retry_seconds,
    )


def check_resumable(found: CheckpointInfo, own: CheckpointInfo, run: str, sizes: range) -> None:
    """Check that a checkpoint is one that this run would have written.

    Args:
        found: what it is of.
        own: what one of this worker group would be of.
        run: its name.
        sizes: the numbers of workers that it may have.

    Raises:
        UsageError: it is of another config, or of a number of workers that the run may not have.
    """
    if found.world_size not in sizes:
        raise UsageError(
            f"Run {run} began stage {own.stage} with {found.world_size} workers and cannot go on with"
            f" {own.world_size}; set workers.count to {found.world_size}, or to a range that holds both."
        )
    if replace(found, world_size=own.world_size) != own:
        raise UsageError(f"Run {run} began stage {own.stage} with another config; name the new run otherwise.")


def _begun(items: Iterator[T]) -> Iterator[T]:
    """An iterator whose first item is being made already."""
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, items, None)
    pool.shutdown(wait=False)

    def rest() -> Iterator[T]:
        item = first.result()
        if item is not None:
            yield item
            yield from items

    return rest()


# -- between ranks --------------------------------------------------------------------------------------------------


def _layout(config: StageConfig) -> Layout:
    """How a stage's global batch is spread over the workers there are."""
    world = dist.get_world_size()
    size = micro_batch_size(config.global_batch, world, config.micro_batch)
    return Layout(
        rank=dist.get_rank(),
        world=world,
        micro_batch=size,
        accumulation=config.global_batch // world // size,
        device=ray.train.torch.get_device(),
    )


def _every_multiplies_bf16(device: torch.device) -> bool:
    """Whether the devices of all ranks do."""
    fewest = torch.tensor(int(multiplies_bf16(device)), device=device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return bool(fewest)


def _from_first(value: list[T]) -> T:
    """What rank 0 has, on every rank."""
    dist.broadcast_object_list(value, src=0)
    return value[0]
