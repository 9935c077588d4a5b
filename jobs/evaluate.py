"""`insightedit evaluate`: judge an editor on held-out scenes, in parallel, and keep figures and pictures in MLflow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import ray
import torch
from ray.exceptions import RayError

from insightedit.model.editors import Picture, PictureEditor, load_editor_of
from insightedit.platform.cases import Unmade
from insightedit.platform.cluster import cause_of, connected
from insightedit.platform.config import RunConfig
from insightedit.platform.edit_cache import EditCache
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

RESTARTS = 3
"""Times that an editing process that died is started again, in a whole evaluation."""

Progress = Callable[[int, int], None]
"""Is told how many edits of how many are made."""


class Editor(Protocol):
    """Whatever makes edits for an evaluation: an `EditorPool`, or a stand-in for one."""

    def edit(
        self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None
    ) -> Sequence[Pixels | Unmade]:
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
        self._editor: PictureEditor | None = None

    def edit(
        self, folder: str, instructions: Sequence[str], sources: Sequence[Picture], seeds: Sequence[int]
    ) -> list[Picture]:
        """Edit one batch of pictures of one size.

        Returns:
            The edits (H, W, 3), of the sources' size.
        """
        return self._open(folder).edit(instructions, sources, seeds)

    def try_edit(
        self, folder: str, instructions: Sequence[str], sources: Sequence[Picture], seeds: Sequence[int]
    ) -> list[Picture | Unmade]:
        """Edit one batch as `edit` does; if that fails, each by itself, so that only what cannot be made is lost.

        Raises:
            ValueError: the pipeline cannot be loaded; likewise OSError.
        """
        editor = self._open(folder)
        try:
            return [*editor.edit(instructions, sources, seeds)]
        except (ValueError, RuntimeError) as error:  # too long for the model, or too large for the memory
            if len(instructions) == 1:
                return [Unmade(" ".join(str(error).split()) or type(error).__name__)]
        return [
            edit
            for instruction, source, seed in zip(instructions, sources, seeds, strict=True)
            for edit in self.try_edit(folder, [instruction], [source], [seed])
        ]

    def _open(self, folder: str) -> PictureEditor:
        if self._editor is None or self._folder != folder:
            # The old one's memory first: two may not fit.
            self._editor = None
            self._editor, self._folder = load_editor_of(folder), folder
        return self._editor


class EditorPool:
    """Processes that edit for one evaluation after the other: starting them takes longer than editing.

    Batches are the same whatever the number of processes, and whatever of them was made before; so the figures are too.
    """

    def __init__(self, config: RunConfig, workdir: Workdir | None = None) -> None:
        """Start nothing yet.

        Args:
            config: how many processes edit, and on what.
            workdir: where edits are kept, so that an evaluation that was killed goes on; nowhere if None.
        """
        self._config = config
        self._kept = workdir and workdir.edited
        self._actors: list[Any] = []

    def __enter__(self) -> EditorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Picture | Unmade]:
        """Make every case's edit (H, W, 3) with the pipeline in a folder.

        Raises:
            InsightEditError: a process failed, or no edit at all could be made.
        """
        device = "gpu" if self._config.workers.gpus else "cpu"
        cache = EditCache(self._kept, folder, device) if self._kept else None
        edits: dict[int, Picture | Unmade] = {}

        def take(batch: Sequence[int], made: Sequence[Picture | Unmade]) -> None:
            edits.update(zip(batch, made, strict=True))
            if progress is not None:
                progress(len(edits), len(cases))

        missing: list[list[int]] = []
        for batch in _batches(cases, self._config.evaluation.batch):
            kept = cache.get([cases[place] for place in batch]) if cache else None
            if kept is None:
                missing.append(batch)
            else:
                take(batch, kept)
        for batch, made in self._made(folder, cases, missing):
            whole = [edit for edit in made if not isinstance(edit, Unmade)]
            if cache is not None and len(whole) == len(batch):
                cache.put([cases[place] for place in batch], whole)
            take(batch, made)
        lost = [edit for edit in edits.values() if isinstance(edit, Unmade)]
        if lost and len(lost) == len(edits):
            raise InsightEditError(f"The edits of {folder} failed: {lost[0].why.rstrip('.')}.")
        return [edits[place] for place in range(len(cases))]

    def _made(
        self, folder: Path, cases: Sequence[EditCase], batches: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], list[Picture | Unmade]]]:
        """Batches as they are made, in any order. A process that dies is started again, and with it what it was at."""
        waiting, running = deque(batches), dict[Any, tuple[Any, list[int]]]()
        idle = list(self._started(len(batches)))
        try:
            while waiting or running:
                while waiting and idle:
                    actor, batch = idle.pop(), waiting.popleft()
                    asked = zip(
                        *((one.instruction, one.source, one.seed) for one in map(cases.__getitem__, batch)), strict=True
                    )
                    running[actor.try_edit.remote(str(folder), *(list(column) for column in asked))] = actor, batch
                ready, _ = ray.wait(list(running), num_returns=1)
                actor, batch = running.pop(ready[0])
                idle.append(actor)
                yield batch, ray.get(ready[0])
        except RayError as error:
            raise InsightEditError(f"The edits of {folder} failed: {cause_of(error).rstrip('.')}.") from error

    def _started(self, most: int) -> Sequence[Any]:
        """The processes, as many as are wanted and there is work for."""
        workers, wanted = self._config.workers, self._config.evaluation.replicas
        options: dict[str, Any] = {"num_cpus": 0.5, "num_gpus": workers.gpus}
        actor: Any = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **options)(PipelineActor)
        while len(self._actors) < min(most, wanted or workers.sizes[0]):
            self._actors.append(actor.remote(workers.threads))
        return self._actors


def _batches(cases: Sequence[EditCase], size: int) -> list[list[int]]:
    """The places of cases whose pictures have one size, some at a time, in their order."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, case in enumerate(cases):
        alike.setdefault(case.source.shape, []).append(place)
    return [places[start : start + size] for places in alike.values() for start in range(0, len(places), size)]


@contextmanager
def editor_pool(config: RunConfig, workdir: Workdir | None = None) -> Generator[EditorPool]:
    """An `EditorPool` on the Ray that there is, or on a local one of its own."""
    with connected(), EditorPool(config, workdir) as pool:
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
        with editor_pool(config, workdir) as pool:
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
