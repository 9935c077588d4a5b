"""`insightedit compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from insightedit.console import Command, columns, dry_run_option, emit, json_option, open_workdir, set_option
from insightedit.platform.errors import UsageError

if TYPE_CHECKING:
    from insightedit.jobs.compare import CompareWatchers, ComparisonResult, PlannedCell
    from insightedit.platform.trainer import Progress


@click.command(cls=Command)
@click.option(
    "--preset", default="nano", show_default=True, metavar="CONFIG", help="What methods change: a preset, or a file."
)
@click.option(
    "--methods", default="shapes", show_default=True, metavar="COMPARISON", help="A comparison, or a YAML file of one."
)
@click.option("--method", "only", multiple=True, metavar="NAME", help="Only this method; repeatable.")
@click.option(
    "--add", "added", multiple=True, metavar="NAME=FOLDER", help="A diffusers folder that edits, as it is; repeatable."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Trainings of each method.")
@click.option("--name", help="Of the comparison; the preset's without it. A name that exists is gone on with.")
@set_option
@dry_run_option
@json_option
def compare(
    preset: str,
    methods: str,
    only: tuple[str, ...],
    added: tuple[str, ...],
    seeds: int,
    name: str | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train several methods with the same samples, judge them on the same edits, and say what differs."""
    from insightedit.jobs.compare import compare as run_comparison
    from insightedit.jobs.compare import plan
    from insightedit.platform.config import load_preset
    from insightedit.platform.methods import load_comparison

    config = load_preset(preset, overrides)
    compared = load_comparison(methods).narrowed(only, dict(_named_folder(one) for one in added))
    if dry_run:
        config.model_sources()
        planned = plan(config, compared, open_workdir(), name=name, seeds=range(seeds))
        emit(planned, as_json, lambda: _show_plan(planned))
        return
    from insightedit.display import Display

    with Display() as display:
        watchers = _watchers(display.at)
        result = run_comparison(config, compared, open_workdir(), name=name, seeds=range(seeds), watchers=watchers)
    report = result.comparison.to_json() | {"folder": result.folder, "report": result.report, "sheet": result.sheet}
    emit(report, as_json, lambda: _show_comparison(result))


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not folder:
        raise UsageError(f"--add {text} is not of the form NAME=FOLDER.")
    return name, Path(folder).expanduser().absolute()


def _watchers(at: Callable[..., None]) -> CompareWatchers:
    """Progress of the cell that is being done."""
    from insightedit.jobs.compare import CompareWatchers

    current = ""

    def on_cell(name: str, done: int, total: int) -> None:
        nonlocal current
        current = f"{name} ({done + 1} of {total})"
        at(current)

    def on_train(progress: Progress) -> None:
        at(current, progress.step, progress.steps, f"stage {progress.stage}, step {progress.step} of {progress.steps}")

    return CompareWatchers(
        cell=on_cell,
        prepare=lambda what, done, total: at(current, done, total, f"data {what}, {done} of {total}"),
        train=on_train,
        edit=lambda done, total: at(current, done, total, f"{done} of {total} edits"),
    )


def _show_plan(planned: Sequence[PlannedCell]) -> Iterable[str]:
    rows = [("METHOD", "SEED", "SAMPLES", "STEPS BY STAGE", "MINUTES", "")]
    for one in planned:
        steps = ", ".join(f"{stage}: {steps}" for stage, steps in one.steps.items()) or "-"
        minutes = "?" if one.seconds is None else f"{one.seconds / 60:.1f}"
        seed = str(one.seed) if one.samples else "-"
        rows.append((one.method, seed, f"{one.samples:,}" if one.samples else "-", steps, minutes, "done" * one.done))
    yield from columns(rows)
    left = [one.seconds for one in planned if not one.done]
    known = [seconds for seconds in left if seconds is not None]
    if len(known) == len(left):
        yield f"about {sum(known) / 3600:.1f} hours of training, by what stages took in this work folder"
    else:
        yield "How long is not known: no run of this work folder has finished these stages yet."


def _show_comparison(result: ComparisonResult) -> Iterable[str]:
    from insightedit.platform.comparison_report import answer_lines, table_rows

    yield from columns(table_rows(result.comparison))
    yield ""
    yield from answer_lines(result.comparison)
    yield f"report: {result.report}"
    yield f"sheet: {result.sheet}"
