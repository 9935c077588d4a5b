"""Training on Ray Train: from prepared shards to the weights of every stage.

The stages run one after the other in one group of workers, each from the weights of the one before. A run has a name
and a folder. Starting it again under the same name goes on where it was: stages that are done are kept, the one that
was running resumes from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from insightedit.model.stages import STAGES
from insightedit.platform.bad_steps import BadStepError
from insightedit.platform.cluster import cause_of
from insightedit.platform.config import RunConfig
from insightedit.platform.elastic import CarefulScaling
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.leases import Lease
from insightedit.platform.manifests import hashed_on_disk, sha256_file, sync_folder
from insightedit.platform.shards import ShardManifest
from insightedit.platform.storage import Store, write_file
from insightedit.platform.streams import StageStream, StageStreams
from insightedit.platform.surveillance import START_SECONDS, HeedTermination
from insightedit.platform.tasks import TrainingTask
from insightedit.platform.tracking import TrackedRun
from insightedit.platform.workdir import Workdir

WEIGHTS_NAME = "weights.safetensors"
RESULT_NAME = "stage.json"
RUN_NAME = "run.json"
"""In a run's folder: its runs in MLflow."""
PROGRESS_NAME = "progress.json"
_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """All that workers need to train; pickled to them."""

    name: str
    """Of the run."""
    workdir: Workdir
    config: RunConfig
    task: TrainingTask
    stages: tuple[int, ...]
    datasets: Mapping[str, Store]
    """Prepared shards of each dataset."""
    tracking: TrackedRun | None = None
    lease: Lease | None = None
    """What makes the run this job's alone."""

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.workdir.runs / self.name

    def stage_folder(self, number: int) -> Path:
        """Where a stage leaves its weights and, unless the config says otherwise, keeps its checkpoints."""
        return self.folder / f"stage-{number}"

    def checkpoint_place(self, number: int) -> Store:
        """Where a stage keeps its checkpoints.

        Raises:
            UsageError: the config names no storage that is known.
        """
        store = self.config.checkpoints.store
        if store is None:
            return Store.at(self.stage_folder(number) / "checkpoints")
        return Store.at(store).child(self.name).child(f"stage-{number}")

    @property
    def starts(self) -> Path:
        """Where rank 0 says at which step a stage resumes."""
        return self.folder / "starts.json"

    @property
    def beginning(self) -> Path:
        """Where it says when the run began, whatever happened since."""
        return self.folder / "beginning.json"

    @property
    def progress(self) -> Path:
        """Where rank 0 says how far it is."""
        return self.folder / PROGRESS_NAME

    def fingerprint(self, number: int) -> str:
        """A sha256 over all that the weights after a stage depend on; a run goes on only under the same."""
        stages = [self.config.stages[stage] for stage in sorted(self.config.stages) if stage <= number]
        names = sorted({name for stage in stages for name in stage.datasets})
        shards = [ShardManifest.read(self.datasets[name]).fingerprint for name in names]
        return hashlib.sha256(json.dumps([self.config.fingerprint(number), names, shards]).encode()).hexdigest()

    def stream(self, number: int) -> StageStream:
        """A stage's samples."""
        stage, workers, data = self.config.stages[number], self.config.workers, self.config.data
        return StageStream(
            key=self.task.key,
            make_collate=self.task.make_collate,
            make_encoder=self.task.make_encoder if data.encode == "while_training" else None,
            encoder_workers=data.encoder_workers,
            encoder_gpus=data.encoder_gpus,
            datasets={name: (weight, self.datasets[name]) for name, weight in stage.datasets.items()},
            seed=self.config.seed,
            stage=number,
            steps=stage.steps,
            global_batch=stage.global_batch,
            steps_per_block=workers.steps_per_block,
            shuffle_shards=data.shuffle_shards,
            cache_bytes=int(data.cache_gib * 2**30),
            tasks=workers.data_tasks,
            cpus=workers.data_cpus,
            place=data.place,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a finished stage left."""

    stage: int
    steps: int
    fingerprint: str
    """Of the config that its weights depend on."""
    weights: str
    """sha256 of its weights file."""
    first: dict[str, float]
    """The first point of each loss's curve, by its name in the seed."""
    last: dict[str, float]
    """The last point."""
    figures: dict[str, float]
    """Means over the stage: `samples_per_second`, `data_wait_share`, `checkpoint_stall_share`; and `seconds` of its
    steps, each as it was done last."""

    @classmethod
    def read(cls, folder: Path) -> StageResult | None:
        """The result in a stage's folder; None while the stage is not finished."""
        path = folder / RESULT_NAME
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    stage: int
    step: int
    steps: int
    losses: dict[str, float]
    samples_per_second: float
    goodput: float
    """Useful time of the run so far over all time since it began."""


def train_stages(plan: TrainingPlan, on_progress: Callable[[Progress], None] | None = None) -> list[StageResult]:
    """Train the plan's stages and wait for them. Ray must be connected.

    Args:
        plan: what to train.
        on_progress: called from another thread when there is news.

    Raises:
        UsageError: the run exists with another config, or a stage that must come before is not finished.
        InsightEditError: training failed.
    """
    todo = [number for number in plan.stages if not _is_done(plan, number)]
    if todo:
        check_start(plan, todo[0])
        plan.checkpoint_place(todo[0])
        plan.folder.mkdir(parents=True, exist_ok=True)
        if not plan.beginning.is_file():
            write_json(plan.beginning, {"at": time.time()})
        with _watched(plan.progress, on_progress):
            _fit(plan, todo)
    return [_result(plan, number) for number in plan.stages]


def check_start(plan: TrainingPlan, number: int) -> None:
    """Check that the stage before is finished, or runs first.

    Raises:
        UsageError: it is not.
    """
    before = plan.config.stage_before(number)
    if before is not None and before not in plan.stages and StageResult.read(plan.stage_folder(before)) is None:
        raise UsageError(
            f"Stage {number} starts from stage {before}, which run {plan.name} has not finished; train that first."
        )


def _is_done(plan: TrainingPlan, number: int) -> bool:
    result = StageResult.read(plan.stage_folder(number))
    if result is not None and result.fingerprint != plan.fingerprint(number):
        raise UsageError(
            f"Run {plan.name} finished stage {number} with another config or other shards; give the new run another"
            " name."
        )
    return result is not None


def _result(plan: TrainingPlan, number: int) -> StageResult:
    result = StageResult.read(plan.stage_folder(number))
    if result is None:
        raise InsightEditError(f"Training ended without finishing stage {number}; start run {plan.name} again.")
    return result


def _train_worker(settings: Mapping[str, Any]) -> None:
    # Imported by the workers alone: who starts a training has no use for DeepSpeed.
    from insightedit.platform.worker import train_worker  # noqa: PLC0415

    train_worker(settings)


class _Policy(DefaultFailurePolicy):
    """Ray's, but for errors that would come again: those are told at once."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = cast(Mapping[int, BaseException], getattr(training_failed_error, "worker_failures", {}))
        if any(isinstance(error, UsageError | NotFoundError | BadStepError) for error in failures.values()):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Trainer(TorchTrainer):
    """Ray's trainer with our policies: it has no setting for them."""

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["failure_policy"] = _Policy(cast(Any, self.run_config.failure_config))
        if self.scaling_config.elasticity_enabled:
            settings["scaling_policy"] = CarefulScaling(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


def _fit(plan: TrainingPlan, stages: list[int]) -> None:
    """Run the worker group."""
    streams = StageStreams({f"stage-{number}": plan.stream(number) for number in stages}, plan.starts)
    workers = plan.config.workers
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    trainer = _Trainer(
        _train_worker,
        train_loop_config={"plan": plan, "stages": stages},
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=cast(Any, resources),
            label_selector=workers.place or None,
            elastic_resize_monitor_interval_s=workers.resize_seconds,
        ),
        run_config=RayRunConfig(
            name=plan.name,
            storage_path=str(plan.workdir.root / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures, max_preemption_failures=-1),
            callbacks=cast(Any, [HeedTermination()]),
        ),
        torch_config=TorchConfig(
            # Who waits for a rank that hangs has a watchdog of its own; this is for what it does not see.
            backend="nccl" if workers.gpus else "gloo",
            timeout_s=math.ceil(workers.hang_seconds + START_SECONDS),
        ),
        datasets=streams.placeholders(),
        dataset_config=streams,
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise InsightEditError(f"Training failed: {_cause(error)}") from error


def _cause(error: TrainingFailedError) -> str:
    """What went wrong in the worker that failed first, in one line."""
    failures = cast(Mapping[int, BaseException], getattr(error, "worker_failures", {}))
    first = next(iter(failures.values()), error)
    return cause_of(getattr(first, "_base_exc", first))


def stage_weights(plan: TrainingPlan, number: int) -> dict[str, Tensor]:
    """All that stages 1 to `number` trained, verified.

    Raises:
        NotFoundError: the stage is not finished.
        InsightEditError: its file is damaged.
    """
    folder = plan.stage_folder(number)
    result = StageResult.read(folder)
    if result is None:
        raise NotFoundError(f"Run {plan.name} has not finished stage {number}; train it first.")
    path = folder / WEIGHTS_NAME
    if not path.is_file() or sha256_file(path) != result.weights:
        raise InsightEditError(f"{path} is damaged; delete {folder} and train stage {number} again.")
    return load_file(path)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the weights of earlier stages into a fresh model.

    Raises:
        InsightEditError: the model has no such parameter.
    """
    if unknown := model.load_state_dict(weights, strict=False).unexpected_keys:
        raise InsightEditError(f"The weights have a parameter {unknown[0]} that the model has not; train again.")


def finish_stage(plan: TrainingPlan, weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
    """Leave a stage's weights and, last, its result."""
    folder = plan.stage_folder(int(result["stage"]))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WEIGHTS_NAME}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    done = StageResult(**result, weights=hashed_on_disk(temporary).sha256)
    temporary.replace(folder / WEIGHTS_NAME)
    sync_folder(folder)
    write_json(folder / RESULT_NAME, asdict(done))


def write_json(path: Path, content: object) -> None:
    """Write a file so that readers see the old or the new one, never half of it; the new one is on the disk then."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())
    sync_folder(path.parent)


def loss_names(number: int) -> tuple[str, ...]:
    """A stage's losses, in its equation's order."""
    return STAGES[number].losses


@contextmanager
def _watched(path: Path, callback: Callable[[Progress], None] | None) -> Generator[None]:
    """Report what a file says whenever it changes."""
    stop = threading.Event()

    def watch() -> None:
        seen, ended = "", False
        while not ended:
            ended = stop.wait(_PROGRESS_SECONDS)  # Then once more: the last news is that it is done.
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if callback is not None and text and text != seen:
                seen = text
                callback(Progress(**json.loads(text)))

    thread = threading.Thread(target=watch, daemon=True)
    if callback is not None:
        path.unlink(missing_ok=True)
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if callback is not None:
            thread.join()
