"""`insightedit compare`: methods trained with the same samples, judged on the same cases, and what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from insightedit.jobs.evaluate import Editor, editor_pool
from insightedit.jobs.train import Watchers, train
from insightedit.platform.cases import EditCase
from insightedit.platform.cluster import connected
from insightedit.platform.comparison_report import (
    SheetCase,
    write_comparison_page,
    write_comparison_sheet,
    write_markdown,
    write_showcase,
)
from insightedit.platform.config import RunConfig
from insightedit.platform.errors import UsageError
from insightedit.platform.evaluation import (
    Pixels,
    case_results,
    cases_fingerprint,
    evaluation_cases,
    judge,
    measure,
    unit_range,
    write_cases,
)
from insightedit.platform.judges.choosing import build_judge
from insightedit.platform.manifests import sha256_file
from insightedit.platform.method_comparison import MethodComparison, Trained, answers, method_figures
from insightedit.platform.methods import ComparisonConfig, MethodConfig, method_config, samples_of
from insightedit.platform.metrics import Meter
from insightedit.platform.pages import in_turns
from insightedit.platform.records import decode_image
from insightedit.platform.results import CaseResult, read_results, write_results
from insightedit.platform.tracking import git_commit
from insightedit.platform.trainer import Progress, StageResult, write_json
from insightedit.platform.workdir import Workdir, run_name

SHEET_CASES = 12
SHOWN_EACH = 4
"""Edits of each task that the showcase has."""
_DONE, _RESULTS, _CASES = "done.json", "results.parquet", "cases.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One method with one seed: the part of a comparison that is done as a whole or not at all."""

    method: str
    config: MethodConfig
    seed: int
    training: RunConfig | None
    """None for what is not trained."""
    folder: Path
    """Where its results are kept."""
    run: str
    """Name of its training run."""
    key: str
    """sha256 over all that its results depend on."""

    @property
    def name(self) -> str:
        """As people are told of it."""
        return f"{self.method}, seed {self.seed}" if self.training else self.method


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCell:
    """What would be done for one method with one seed."""

    method: str
    seed: int
    done: bool
    samples: int
    """In all stages; 0 where nothing is trained."""
    steps: Mapping[int, int]
    """By stage."""
    seconds: float | None
    """Of its training, by what stages of this work folder took before; None where none was trained yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonResult:
    """A comparison and its files."""

    comparison: MethodComparison
    folder: Path
    report: Path
    """The page for people, one HTML file."""
    sheet: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareWatchers:
    """Who is told how far a comparison is."""

    cell: Callable[[str, int, int], None] = field(default=lambda _name, _done, _total: None)
    """A cell begins: its name, how many are done, of how many."""
    prepare: Callable[[str, int, int], None] | None = None
    train: Callable[[Progress], None] | None = None
    edit: Callable[[int, int], None] | None = None


class _Copying:
    """The editor that hands the source back."""

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Any = None) -> list[Pixels]:
        del folder, progress
        return [unit_range(case.source) for case in cases]


def compare(
    config: RunConfig,
    methods: ComparisonConfig,
    workdir: Workdir,
    *,
    name: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    watchers: CompareWatchers | None = None,
    editor: Editor | None = None,
) -> ComparisonResult:
    """Compare methods, or go on with a comparison that was interrupted: what is done is not done again.

    Args:
        config: the preset that methods change; its `evaluation` says what all are judged on.
        methods: what is compared.
        workdir: `comparisons/NAME` gets the results; runs and shards lie where those of `train` do.
        name: of the comparison; the preset's without it.
        seeds: of the trainings of each method.
        watchers: who is told how far it is.
        editor: what makes edits in place of processes started here.

    Raises:
        UsageError: the comparison was begun with other settings.
        InsightEditError: a training or an evaluation failed.
    """
    watchers = watchers or CompareWatchers()
    cells = _cells(config, methods, workdir, run_name(name or config.name, config.name), seeds)
    todo = [cell for cell in cells if not _is_done(cell)]
    needs_ray = any(cell.training or (cell.config.folder and editor is None) for cell in todo)
    with connected() if needs_ray else nullcontext():
        for number, cell in enumerate(todo, len(cells) - len(todo)):
            watchers.cell(cell.name, number, len(cells))
            _do(cell, config, workdir, watchers, editor)
            # After each, so that there is something to look at while the others train.
            write_reports(methods, cells)
    return write_reports(methods, cells)


def plan(
    config: RunConfig, methods: ComparisonConfig, workdir: Workdir, *, name: str | None = None, seeds: Sequence[int]
) -> list[PlannedCell]:
    """What `compare` would do, and about how long it would take. Arguments and errors as there."""
    cells = _cells(config, methods, workdir, run_name(name or config.name, config.name), seeds)
    pace = _seconds_per_sample(workdir)
    return [
        PlannedCell(
            method=cell.method,
            seed=cell.seed,
            done=_is_done(cell),
            samples=samples_of(cell.training) if cell.training else 0,
            steps={number: stage.steps for number, stage in cell.training.stages.items()} if cell.training else {},
            seconds=_expected_seconds(cell, pace),
        )
        for cell in cells
    ]


def write_reports(methods: ComparisonConfig, cells: Sequence[Cell]) -> ComparisonResult:
    """Put together what is done, as JSON, Markdown, HTML and PNG."""
    done = [cell for cell in cells if (cell.folder / _DONE).is_file()]
    notes = {(cell.method, cell.seed): json.loads((cell.folder / _DONE).read_text("utf-8")) for cell in done}
    rows: dict[str, dict[int, list[CaseResult]]] = {}
    for cell in done:
        rows.setdefault(cell.method, {})[cell.seed] = read_results(cell.folder / _RESULTS)
    first = next(iter(notes.values()))
    folder = cells[0].folder.parents[1]
    comparison = MethodComparison(
        name=folder.name,
        scenes=len({row.scene for row in next(iter(next(iter(rows.values())).values()))}),
        cases=first["cases"],
        judge=first["judge"],
        methods={name: method_figures(_trained(name, methods.methods[name], notes), one) for name, one in rows.items()},
        answers=answers(methods, rows),
        missing=first["missing"],
        pending=[cell.name for cell in cells if cell not in done],
    )
    sheet = _sheet(done, methods)
    write_json(folder / "comparison.json", comparison.to_json())
    write_markdown(folder / "comparison.md", comparison)
    write_comparison_sheet(folder / "sheet.png", sheet)
    shown = methods.questions[0].method if methods.questions else next(reversed(rows))
    if shown in rows:
        write_showcase(folder / "showcase.png", _showcase(next(one for one in done if one.method == shown), methods))
    entries = {"commit": git_commit() or "not a checkout", "judge": comparison.judge, "cases": comparison.cases}
    entries |= {f"run of {cell.name}": cell.run for cell in done if cell.training}
    write_comparison_page(folder / "comparison.html", comparison, sheet, entries)
    return ComparisonResult(
        comparison=comparison, folder=folder, report=folder / "comparison.html", sheet=folder / "sheet.png"
    )


# -- cells ------------------------------------------------------------------------------------------------------------


def _cells(
    config: RunConfig, methods: ComparisonConfig, workdir: Workdir, name: str, seeds: Sequence[int]
) -> list[Cell]:
    """Every method with every seed, all methods of one seed before the next seed's."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"The seeds are {', '.join(map(str, seeds)) or 'none'}; give different ones, one at least.")
    cells: list[Cell] = []
    for number, seed in enumerate(seeds):
        for method, one in methods.methods.items():
            if one.is_trained or number == 0:
                training = method_config(config, method, one, seed) if one.is_trained else None
                cells.append(_cell(config, workdir, name, method, one, seed if training else 0, training))
    return cells


def _cell(
    config: RunConfig,
    workdir: Workdir,
    name: str,
    method: str,
    one: MethodConfig,
    seed: int,
    training: RunConfig | None,
) -> Cell:
    known = {
        "training": training and training.fingerprint(max(training.stages)),
        "data": training and training.data.model_dump(mode="json", include={"datasets", "seed", "encode"}),
        "folder": one.folder and _folder_fingerprint(one.folder),
        "evaluation": config.evaluation.model_dump(mode="json"),
    }
    return Cell(
        method=method,
        config=one,
        seed=seed,
        training=training,
        folder=workdir.root / "comparisons" / name / method / f"seed-{seed}",
        run=f"compare-{name}-{method}-{seed}",
        key=hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest(),
    )


def _is_done(cell: Cell) -> bool:
    """Whether a cell's results are there.

    Raises:
        UsageError: they are of other settings.
    """
    note = cell.folder / _DONE
    if not note.is_file():
        return False
    if json.loads(note.read_text(encoding="utf-8"))["key"] != cell.key:
        raise UsageError(
            f"{cell.name} was compared with other settings; give this comparison another --name, or delete"
            f" {cell.folder}."
        )
    return True


def _do(cell: Cell, config: RunConfig, workdir: Workdir, watchers: CompareWatchers, editor: Editor | None) -> None:
    """Train a cell's model if it has one, have it edit all cases, judge, and keep what comes out."""
    folder, seconds = cell.config.folder or Path(), None
    if cell.training:
        told = Watchers(prepare=watchers.prepare, train=watchers.train)
        trained = train(cell.training, workdir, name=cell.run, watchers=told)
        folder = trained.folder
        seconds = sum(stage.result.figures["seconds"] for stage in trained.stages.values())
    cases = evaluation_cases(config.evaluation)
    by, meter = build_judge(config.evaluation.judge, workdir), Meter(config.evaluation.metrics)
    if cell.config.copies:
        edits = _Copying().edit(folder, cases)
    elif editor is not None:
        edits = editor.edit(folder, cases, watchers.edit)
    else:
        with editor_pool(cell.training or config, workdir) as pool:
            edits = pool.edit(folder, cases, watchers.edit)
    judged = measure(judge(cases, edits, by), meter)
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_results(cell.folder / _RESULTS, case_results(judged))
    write_cases(cell.folder / _CASES, judged)
    # Last, and whole: with it the cell is done.
    note = {
        "key": cell.key,
        "cases": cases_fingerprint(cases, by.identity),
        "judge": by.identity,
        "missing": meter.missing([one.metrics for one in judged]),
        "samples": samples_of(cell.training) if cell.training else None,
        "seconds": seconds,
        "run": cell.run if cell.training else None,
    }
    write_json(cell.folder / _DONE, note)


def _folder_fingerprint(folder: Path) -> str:
    """A sha256 over a folder's files: weights that were trained further have the names and sizes of those before."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()


def _trained(name: str, method: MethodConfig, notes: Mapping[tuple[str, int], Mapping[str, Any]]) -> Trained:
    own = {seed: note for (other, seed), note in notes.items() if other == name}
    seconds = [note["seconds"] for note in own.values() if note["seconds"] is not None]
    return Trained(
        title=method.title,
        seeds=tuple(own),
        samples=next(iter(own.values()))["samples"],
        seconds=float(np.mean(seconds)) if seconds else None,
    )


# -- how long ---------------------------------------------------------------------------------------------------------


def _seconds_per_sample(workdir: Workdir) -> dict[tuple[str, int], float]:
    """What a sample of a stage took in the work folder's runs, by run and stage, the newest runs last."""
    found: dict[tuple[str, int], float] = {}
    for note in sorted(workdir.runs.glob("*/stage-*/stage.json"), key=lambda path: path.stat().st_mtime):
        result = StageResult.read(note.parent)
        if result is not None and result.figures.get("samples_per_second"):
            found[note.parents[1].name, result.stage] = 1 / result.figures["samples_per_second"]
    return found


def _expected_seconds(cell: Cell, pace: Mapping[tuple[str, int], float]) -> float | None:
    """The time of a cell's training, by runs of the same method or else by any."""
    if cell.training is None:
        return 0.0
    prefix = f"{cell.run.rpartition('-')[0]}-"
    total = 0.0
    for number in cell.training.stages:
        rates = [rate for (_, stage), rate in pace.items() if stage == number]
        own = [rate for (run, stage), rate in pace.items() if stage == number and run.startswith(prefix)]
        if not rates:
            return None
        total += samples_of(cell.training, number) * (own or rates)[-1]
    return total


# -- pictures ---------------------------------------------------------------------------------------------------------


def _sheet(done: Sequence[Cell], methods: ComparisonConfig) -> list[SheetCase]:
    """Advanced instructions of every task in turn, the first of each, with what each method's first seed made of it."""
    first = {cell.method: cell for cell in reversed(done)}
    tables = {name: _table(first[name]) for name in methods.methods if name in first}
    edits = {method: {row["key"]: row["edit"] for row in rows} for method, rows in tables.items()}
    advanced = _advanced(next(iter(tables.values())))
    shown = [advanced[place] for place in in_turns([row["task"] for row in advanced])[:SHEET_CASES]]
    return [
        _sheet_case(row, {methods.methods[name].title: own[row["key"]] for name, own in edits.items()})
        for row in shown
        if all(row["key"] in own for own in edits.values())
    ]


def _showcase(cell: Cell, methods: ComparisonConfig) -> dict[str, list[SheetCase]]:
    """The first edits of each task by advanced instructions, good or bad."""
    groups: dict[str, list[SheetCase]] = {}
    for row in _advanced(_table(cell)):
        own = groups.setdefault(row["task"] or "edit", [])
        if len(own) < SHOWN_EACH:
            own.append(_sheet_case(row, {methods.methods[cell.method].title: row["edit"]}))
    return groups


def _table(cell: Cell) -> list[dict[str, Any]]:
    """The cases of a cell with its edits."""
    columns = ["key", "task", "wording", "instruction", "source", "edit", "target"]
    return pq.read_table(cell.folder / _CASES, columns=columns).to_pylist()


def _advanced(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The cases with advanced instructions; all where the benchmark does not say."""
    return [row for row in rows if row["wording"] == "advanced"] or rows


def _sheet_case(row: Mapping[str, Any], edits: Mapping[str, bytes]) -> SheetCase:
    return SheetCase(
        instruction=row["instruction"],
        note=row["task"],
        source=decode_image(row["source"]),
        edits={title: decode_image(edit) for title, edit in edits.items()},
        target=None if row["target"] is None else decode_image(row["target"]),
    )
