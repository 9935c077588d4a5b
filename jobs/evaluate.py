"""`insightedit evaluate`: judge an editor on held-out scenes, in parallel, and keep figures and pictures in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import ray
import torch
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
    evaluation_cases,
    figures,
    judge,
    measure,
    shuffled,
    summarise,
    unit_range,
)
from insightedit.platform.evaluation_runs import keep_evaluation
from insightedit.platform.judges.choosing import build_judge
from insightedit.platform.metrics import Meter
from insightedit.platform.model_cards import keep_card
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.workdir import Workdir

CONTROL_SCENES = 50
"""Scenes of the control with shuffled instructions: enough for a mean that must be close to 0."""

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
    report: Path
    """The page for people, one HTML file."""
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
    judging: Progress | None = None,
) -> EvaluationResult:
    """Judge a pipeline folder, or a model version, whose tags then name the figures.

    Args:
        model: a folder, or a version of the registry.
        config: its `evaluation` says on what.
        workdir: whose MLflow keeps figures, scores and pictures, as a run of its own.
        editor: processes that are up already.
        parent_run: the run that made the model.
        before_training: figures of the untrained model, to be kept beside.
        progress: is told how far editing is.
        judging: is told how far the judge is.

    Raises:
        NotFoundError: weights of a metric are missing.
        InsightEditError: the version is damaged, editing failed, or no edit could be judged.
    """
    registry = Registry(workdir)
    folder = registry.fetch(model) if isinstance(model, ModelVersion) else model
    cases = evaluation_cases(config.evaluation)
    controls = cases[: 2 * CONTROL_SCENES]  # two instructions each
    by, meter = build_judge(config.evaluation.judge, workdir), Meter(config.evaluation.metrics)
    wanted = [*cases, *shuffled(controls)]
    if editor is None:
        with editor_pool(config) as pool:
            edits = pool.edit(folder, wanted, progress)
    else:
        edits = editor.edit(folder, wanted, progress)
    judged = measure(judge(cases, edits[: len(cases)], by, judging), meter)
    # What another instruction made of a scene is judged by the scene's own.
    control = judge(controls, edits[len(cases) :], by)
    copies = judge(controls, (unit_range(case.source) for case in controls), by)
    evaluation = summarise(judged, control, copies, by)
    missing = meter.missing([one.metrics for one in judged])
    evaluation = replace(evaluation, before_training=before_training, unmeasured=missing)
    parent = model.run_id if isinstance(model, ModelVersion) else parent_run
    kept = keep_evaluation(registry, workdir, model, evaluation, judged, parent)
    if isinstance(model, ModelVersion):
        judged_on = {"evaluation.run": kept.run_id, "evaluation.benchmark": config.evaluation.benchmark.reader}
        registry.set_tags(model.version, {**evaluation.tags(), **judged_on})
        keep_card(registry, registry.resolve(model.version))
    return EvaluationResult(evaluation=evaluation, run_id=kept.run_id, report=kept.report, judged=judged)


def evaluate_quickly(
    folder: Path,
    config: RunConfig,
    workdir: Workdir,
    scenes: int,
    editor: Editor,
    progress: Progress | None = None,
) -> Figures:
    """The overall figures on the first scenes alone, without controls; only a language model's answers are kept."""
    cases = evaluation_cases(config.evaluation, scenes)
    return figures(judge(cases, editor.edit(folder, cases, progress), build_judge(config.evaluation.judge, workdir)))
