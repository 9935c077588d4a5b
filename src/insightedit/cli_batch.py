"""The command `batch-edit`: many images at once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from insightedit.console import Command, columns, dry_run_option, emit, json_option, open_workdir
from insightedit.platform.errors import UsageError

if TYPE_CHECKING:
    from insightedit.serve.batch import BatchPlan, BatchResult

_SHOWN = 5
"""Bad rows that a dry run shows."""


@click.command("batch-edit", cls=Command)
@click.argument("asked", metavar="INPUT")
@click.option("--out", required=True, metavar="DIR", help="Folder or bucket for the edits; a second run goes on there.")
@click.option("--prompt", help="One instruction for all pictures of a folder, or all rows of a table.")
@click.option("--model", default="champion", show_default=True, metavar="VERSION", help="A number or an alias.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Each row's follows from it."
)
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; the model's own without it.")
@click.option("--guidance-scale", type=click.FloatRange(0, 100), help="Weight of the instruction.")
@click.option("--image-guidance-scale", type=click.FloatRange(0, 100), help="Weight of the source image.")
@click.option("--negative-prompt", help="What to keep away from.")
@click.option("--format", "output_format", type=click.Choice(["png", "jpeg", "webp"]), default="png", show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that edit.")
@click.option(
    "--cpus", type=click.FloatRange(min=0), default=1.0, show_default=True, help="That Ray sets aside for a worker."
)
@click.option(
    "--gpus", type=click.FloatRange(min=0), default=0.0, show_default=True, help="That Ray sets aside for a worker."
)
@click.option(
    "--quarantine-limit",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of bad rows above which the job stops.",
)
@dry_run_option
@json_option
def batch_edit(
    asked: str,
    out: str,
    prompt: str | None,
    model: str,
    workers: int,
    cpus: float,
    gpus: float,
    quarantine_limit: float,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Edit all of INPUT: a folder of images with --prompt, or CSV, JSONL or parquet with images and instructions."""
    from insightedit.platform.storage import Store
    from insightedit.serve.batch import BatchWorkers, plan_batch, run_batch
    from insightedit.serve.batch_rows import read_input
    from insightedit.serve.batch_worker import BatchSettings

    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty; say what to change in the images.")
    settings["num_inference_steps"] = settings.pop("steps")
    store = Store.at(out)
    plan = plan_batch(open_workdir(), read_input(asked, prompt, store), store, model, BatchSettings(**settings))
    if dry_run:
        emit(plan.summary(), as_json, lambda: _show_plan(plan))
        return
    from insightedit.display import Display

    with Display() as display:

        def on_progress(through: int, rows: int, rate: float | None) -> None:
            # Elsewhere than on a terminal nobody watches them change.
            display.at("Edit", through, rows, _pace(rows - through, rate) if rate and sys.stderr.isatty() else "")

        result = run_batch(plan, BatchWorkers(count=workers, cpus=cpus, gpus=gpus), quarantine_limit, on_progress)
    emit(result, as_json, lambda: _show_result(result))


def _pace(left: int, rate: float) -> str:
    minutes, seconds = divmod(round(left / rate), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{rate:.3g} edits/s, {hours}:{minutes:02d}:{seconds:02d} left"


def _show_plan(plan: BatchPlan) -> Iterable[str]:
    done = f"; {len(plan.done)} are done" if plan.done else ""
    yield f"Would edit {len(plan.todo)} of {plan.rows} rows by version {plan.version} into {plan.out}{done}."
    if plan.input.bad:
        yield f"{len(plan.input.bad)} are bad:"
        yield from columns([(f"  {bad.key}", bad.reason, bad.detail) for bad in plan.input.bad[:_SHOWN]])


def _show_result(result: BatchResult) -> Iterable[str]:
    before = f", {result.kept} were there" if result.kept else ""
    yield f"{result.edited} edits by version {result.model_version} in {result.seconds:.0f} s{before}: {result.results}"
    if result.quarantine:
        yield f"{result.quarantined} rows are bad: {result.quarantine}"
        yield from columns([(f"  {count}", reason) for reason, count in result.reasons.items()])
