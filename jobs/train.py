"""`insightedit train`: prepared data, the stages one after the other, the model after each as a pipeline folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from insightedit.jobs.prepare import PreparedDataset, prepare
from insightedit.jobs.prepare import Progress as PrepareProgress
from insightedit.model.insightedit import InsightEditModel, build_pipeline
from insightedit.platform.capacity import needs_of, wait_for_room
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig
from insightedit.platform.editing import EditingTask
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.leases import claimed
from insightedit.platform.storage import Store
from insightedit.platform.tracking import TrackedRun, end_run, start_run
from insightedit.platform.trainer import (
    RUN_NAME,
    Progress,
    StageResult,
    TrainingPlan,
    load_weights,
    stage_weights,
    train_stages,
    write_json,
)
from insightedit.platform.workdir import Workdir, run_name


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStage:
    """A finished stage."""

    number: int
    run_id: str
    """Its run in MLflow."""
    folder: Path
    """The model after it, as a pipeline folder."""
    result: StageResult


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """A finished training."""

    name: str
    run_id: str
    """The parent run in MLflow."""
    stages: Mapping[int, TrainedStage]
    datasets: Mapping[str, PreparedDataset]
    folder: Path
    """The model after the last stage, as a pipeline folder."""
    seconds: Mapping[str, float]
    """Of `prepare`, `train` and `export`."""

    def lineage(self, config: RunConfig) -> dict[str, str]:
        """What a model version says about where it comes from."""
        last = max(self.stages)
        return {
            "run": self.run_id,
            **{f"stage_run.{number}": stage.run_id for number, stage in self.stages.items()},
            **{f"dataset.{name}": dataset.fingerprint for name, dataset in self.datasets.items()},
            "config": config.fingerprint(last),
            "weights": self.stages[last].result.weights,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Watchers:
    """Who is told how far a training is."""

    prepare: PrepareProgress | None = None
    train: Callable[[Progress], None] | None = None


def train(
    config: RunConfig,
    workdir: Workdir,
    *,
    name: str | None = None,
    stages: Sequence[int] | None = None,
    watchers: Watchers | None = None,
) -> TrainingResult:
    """Train a config's stages, or go on with a run that was interrupted.

    Args:
        config: what to train.
        workdir: where everything goes.
        name: of the run. A name that exists goes on with that run; without one the run is a new one.
        stages: which stages; all of the config without it.
        watchers: who is told how far it is.

    Raises:
        UsageError: a stage is unknown, the run exists with another config or is being trained by somebody else, or
            the cluster has no room for it.
        InsightEditError: preparing or training failed.
    """
    watchers = watchers or Watchers()
    numbers = stage_numbers(config, stages)
    name = run_name(name, config.name)
    clock = _Clock()
    with claimed(workdir.runs / name, config.fingerprint(max(config.stages))) as lease:
        with connected():
            wait_for_room(needs_of(config))
            datasets = prepare(config, workdir, progress=watchers.prepare)
            clock.lap("prepare")
            plan = replace(training_plan(config, workdir, name, numbers, datasets), lease=lease)
            try:
                results = train_stages(plan, watchers.train)
            except BaseException:
                _end(plan, "FAILED")
                raise
            clock.lap("train")
        trained = {
            result.stage: TrainedStage(
                number=result.stage,
                run_id=_tracked(plan).stage_runs[result.stage],
                folder=export_stage(plan, result.stage),
                result=result,
            )
            for result in results
        }
        _end(plan, "FINISHED")
        clock.lap("export")
    return TrainingResult(
        name=name,
        run_id=_tracked(plan).run_id,
        stages=trained,
        datasets=datasets,
        folder=trained[max(trained)].folder,
        seconds=clock.laps,
    )


def training_plan(
    config: RunConfig, workdir: Workdir, name: str, stages: Sequence[int], datasets: Mapping[str, PreparedDataset]
) -> TrainingPlan:
    """Open a run and say what its workers do.

    Raises:
        InsightEditError: the datasets were encoded by different encoders.
    """
    encoders = {dataset.encoders for dataset in datasets.values()}
    if len(encoders) > 1:
        raise InsightEditError("The datasets were encoded by different encoders; make them again with --rebuild NAME.")
    task = EditingTask(
        key=config.fingerprint(0),
        model=config.model_sources(),
        encoders=encoders.pop(),
        validation=config.data.validation,
    )
    folder = workdir.runs / name
    continued = _read_run(folder)
    fingerprints = {dataset.name: dataset.fingerprint for dataset in datasets.values()}
    tracked = start_run(workdir, name, config, fingerprints, continued)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_NAME, asdict(tracked))
    return TrainingPlan(
        name=name,
        workdir=workdir,
        config=config,
        task=task,
        stages=tuple(stages),
        datasets={key: Store.at(dataset.store) for key, dataset in datasets.items()},
        tracking=tracked,
    )


def export_stage(plan: TrainingPlan, number: int) -> Path:
    """The model after a finished stage as a pipeline folder, made if it is not there yet."""
    folder = plan.stage_folder(number) / "pipeline"
    if not folder.is_dir():
        temporary = folder.with_name("pipeline.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model = build_model(plan.config)
        load_weights(model, stage_weights(plan, number))
        model.save_pipeline(temporary, image_branch=number == 3)
        temporary.replace(folder)
    return folder


def export_untrained(config: RunConfig, folder: Path) -> Path:
    """The model before stage 1 as a pipeline folder."""
    build_model(config).save_pipeline(folder, image_branch=False)
    return folder


def build_model(config: RunConfig) -> InsightEditModel:
    """The untrained model, as the workers build it."""
    torch.manual_seed(config.seed)
    model = config.model_sources()
    return InsightEditModel(build_pipeline(model), model.lora, model.diffusion)


def stage_numbers(config: RunConfig, stages: Sequence[int] | None) -> list[int]:
    """The stages to train, in order; all of the config if None.

    Raises:
        UsageError: the config has no such stage.
    """
    known = sorted(config.stages)
    wanted = known if stages is None else sorted(set(stages))
    if unknown := [number for number in wanted if number not in known]:
        listed = ", ".join(map(str, known))
        raise UsageError(f"{config.name} has no stage {unknown[0]}; its stages are {listed}.")
    return wanted


def _read_run(folder: Path) -> TrackedRun | None:
    """The MLflow runs of a training that was begun before."""
    path = folder / RUN_NAME
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    stage_runs = {int(number): run_id for number, run_id in content["stage_runs"].items()}
    return TrackedRun(uri=content["uri"], run_id=content["run_id"], stage_runs=stage_runs)


def _tracked(plan: TrainingPlan) -> TrackedRun:
    if plan.tracking is None:
        raise InsightEditError(f"Run {plan.name} is not tracked; start it with `insightedit train`.")
    return plan.tracking


def _end(plan: TrainingPlan, status: str) -> None:
    end_run(_tracked(plan), "FINISHED" if status == "FINISHED" else "FAILED")


class _Clock:
    """Seconds of one part after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
