"""`insightedit evaluate`: judge an editor on held-out scenes, in parallel, and keep figures and pictures in MLflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from numpy.typing import NDArray
from PIL import Image
from ray.exceptions import RayTaskError
from ray.util import ActorPool
from torch import Tensor
from torch.nn import functional as F

from insightedit.model.pipeline import InsightEditPipeline, load_pipeline
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig
from insightedit.platform.errors import InsightEditError
from insightedit.platform.evaluation import (
    EditCase,
    Evaluation,
    Figures,
    JudgedEdit,
    Pixels,
    case_results,
    evaluation_cases,
    figures,
    judge,
    shuffled,
    summarise,
    write_cases,
)
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.reports import sheet_rows, write_sheet
from insightedit.platform.results import RESULTS_FILE, write_results
from insightedit.platform.tracking import ensure_experiment, environment_tags
from insightedit.platform.workdir import Workdir

CONTROL_SCENES = 50
"""Scenes of the control with shuffled instructions: enough for a mean that must be close to 0."""
SHEET_ROWS = 20

Progress = Callable[[int, int], None]
"""Is told how many edits of how many are made."""


class Editor(Protocol):
    """Whatever makes edits for an evaluation: an `EditorPool`, or a stand-in for one."""

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Pixels]:
        """Make every case's edit (H, W, 3) with the pipeline in a folder."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """An evaluation, where it is kept, and its edits."""

    evaluation: Evaluation
    run_id: str
    judged: Sequence[JudgedEdit]


class PipelineActor:
    """A process that edits, with one pipeline at a time."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._folder: str | None = None
        self._pipeline: InsightEditPipeline | None = None

    def edit(
        self, folder: str, instructions: Sequence[str], sources: Sequence[NDArray[np.uint8]], seeds: Sequence[int]
    ) -> NDArray[np.float32]:
        """Edit one batch.

        Returns:
            The pipeline's raw output (B, H, W, 3) in [0, 1].
        """
        if self._pipeline is None or self._folder != folder:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._pipeline, self._folder = load_pipeline(folder).to(device), folder
        images = [Image.fromarray(source) for source in sources]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output: Any = self._pipeline(list(instructions), images, generator=generators, output_type="pt")
        edits: Tensor = output.images
        if edits.shape[2:] != sources[0].shape[:2]:  # the model's own size; a picture is judged at its own
            edits = F.interpolate(edits, sources[0].shape[:2], mode="bicubic", antialias=True).clamp(0, 1)
        return edits.permute(0, 2, 3, 1).numpy()


class EditorPool:
    """Processes that edit for one evaluation after the other: starting them takes longer than editing.

    Batches are the same whatever the number of processes, so the figures are too.
    """

    def __init__(self, config: RunConfig) -> None:
        workers = config.workers
        self._batch = config.evaluation.batch
        actor: Any = ray.remote(num_cpus=0.5, num_gpus=workers.gpus, max_restarts=1, max_task_retries=1)(PipelineActor)
        self._actors: list[Any] = [actor.remote(workers.threads) for _ in range(workers.sizes[0])]

    def __enter__(self) -> EditorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Pixels]:
        """Make every case's edit (H, W, 3) with the pipeline in a folder.

        Raises:
            InsightEditError: a process failed.
        """

        def submit(actor: Any, batch: Sequence[EditCase]) -> Any:
            columns = zip(*((case.instruction, case.source, case.seed) for case in batch), strict=True)
            return actor.edit.remote(str(folder), *(list(column) for column in columns))

        batches = [cases[start : start + self._batch] for start in range(0, len(cases), self._batch)]
        edits: list[Pixels] = []
        pool: Any = ActorPool(self._actors)
        try:
            for images in pool.map(submit, batches):
                edits.extend(images)
                if progress is not None:
                    progress(len(edits), len(cases))
        except RayTaskError as error:
            raise InsightEditError(f"The edits of {folder} failed: {str(error.cause).rstrip('.')}.") from error
        return edits


@contextmanager
def editor_pool(config: RunConfig) -> Generator[EditorPool]:
    """An `EditorPool` on the Ray that there is, or on a local one of its own."""
    with connected(), EditorPool(config) as pool:
        yield pool


def evaluate(
    model: Path | ModelVersion,
    config: RunConfig,
    workdir: Workdir,
    *,
    editor: Editor | None = None,
    parent_run: str | None = None,
    before_training: Figures | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Judge a pipeline folder, or a model version, whose tags then name the figures.

    Args:
        model: a folder, or a version of the registry.
        config: its `evaluation` says on what.
        workdir: whose MLflow keeps figures, scores and pictures, as a run of its own.
        editor: processes that are up already.
        parent_run: the run that made the model.
        before_training: figures of the untrained model, to be kept beside.
        progress: is told how far it is.

    Raises:
        InsightEditError: the version is damaged, or editing failed.
    """
    registry = Registry(workdir)
    folder = registry.fetch(model) if isinstance(model, ModelVersion) else model
    cases = evaluation_cases(config.evaluation)
    control = shuffled(cases[: 2 * CONTROL_SCENES])  # two instructions each
    if editor is None:
        with editor_pool(config) as pool:
            edits = pool.edit(folder, [*cases, *control], progress)
    else:
        edits = editor.edit(folder, [*cases, *control], progress)
    judged = judge(cases, edits[: len(cases)])
    evaluation = summarise(judged, judge(control, edits[len(cases) :]))
    evaluation = replace(evaluation, before_training=before_training)
    name = f"version {model.version}" if isinstance(model, ModelVersion) else folder.name
    parent = model.run_id if isinstance(model, ModelVersion) else parent_run
    run_id = _track(registry.client, workdir, f"evaluate/{name}", parent, evaluation, judged)
    if isinstance(model, ModelVersion):
        registry.set_tags(model.version, {**evaluation.tags(), "evaluation.run": run_id})
    return EvaluationResult(evaluation=evaluation, run_id=run_id, judged=judged)


def evaluate_quickly(
    folder: Path, config: RunConfig, scenes: int, editor: Editor, progress: Progress | None = None
) -> Figures:
    """The overall figures on the first scenes alone, without controls; nothing is kept."""
    cases = evaluation_cases(config.evaluation, scenes)
    return figures(judge(cases, editor.edit(folder, cases, progress)))


def _track(
    client: MlflowClient,
    workdir: Workdir,
    name: str,
    parent: str | None,
    evaluation: Evaluation,
    judged: Sequence[JudgedEdit],
) -> str:
    """Keep an evaluation as an MLflow run with metrics and files, and return the run's id."""
    tags = environment_tags() | {"evaluation.cases": evaluation.cases}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    run = client.create_run(ensure_experiment(client, workdir), tags=tags, run_name=name)
    run_id = run.info.run_id
    metrics = [Metric(key, value, run.info.start_time, 0) for key, value in evaluation.metrics().items()]
    client.log_batch(run_id, metrics=metrics)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json(), indent=2) + "\n", encoding="utf-8")
        write_cases(folder / "cases.parquet", judged)
        write_results(folder / RESULTS_FILE, case_results(judged))
        write_sheet(folder / "sheet.png", sheet_rows(judged, SHEET_ROWS))
        client.log_artifacts(run_id, str(folder))
    client.set_terminated(run_id)
    return run_id
