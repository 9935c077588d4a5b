"""`insightedit data construct`: an editing dataset out of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from insightedit.console import Command, columns, dry_run_option, emit, json_option, open_workdir, set_option

if TYPE_CHECKING:
    from insightedit.jobs.construct import Constructed
    from insightedit.platform.config import RunConfig


@click.command("construct", cls=Command)
@click.argument("config", default="nano")
@click.option(
    "--images", metavar="PLACE", help="Folder or URI of pictures, in place of construction.images of the config."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the dataset; one that was begun is gone on with.  [default: constructed/NAME in the work folder]",
)
@set_option
@dry_run_option
@json_option
def construct(
    config: str, images: str | None, out: Path | None, overrides: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Turn pictures into edits with instructions, as the `construction` of a CONFIG says; AdvancedEdit's pipeline."""
    from insightedit.platform.config import load_preset

    placed = (f"construction.images.place={images}", "construction.images.reader=null") if images else ()
    run_config = load_preset(config, (*placed, *overrides))
    folder = (out or open_workdir().root / "constructed" / run_config.name).expanduser().absolute()
    if dry_run:
        from insightedit.platform.construction.sources import blocks_of

        plan = {"out": folder, "blocks": len(blocks_of(run_config.construction))}
        emit(
            {**plan, "construction": run_config.construction},
            as_json,
            lambda: _plan(run_config, folder, plan["blocks"]),
        )
        return
    from insightedit.display import Display
    from insightedit.jobs.construct import construct as run_construction

    with Display() as display:
        done = run_construction(run_config, folder, open_workdir(), base=config, progress=display.at)
    report = {"folder": done.folder, "report": done.report, **done.counts.to_json(), "shards": done.shards}
    emit(report, as_json, lambda: _show(done))


def _plan(config: RunConfig, folder: Path, blocks: object) -> Iterable[str]:
    from insightedit.platform.construction.steps import step_names

    images = config.construction.images
    yield f"Would construct pairs of {images.place or images.reader} in {blocks} blocks into {folder}."
    yield f"Steps: {', '.join(step_names(config.construction))}."


def _show(done: Constructed) -> Iterable[str]:
    counts = done.counts
    rows = [
        (
            name,
            str(step.photos or "-"),
            f"{step.spent.seconds / max(step.photos, 1):.3f}",
            str(sum(step.rejected.values())),
            ", ".join(f"{number} {reason}" for reason, number in list(step.rejected.items())[:3]),
        )
        for name, step in counts.steps.items()
    ]
    yield from columns([("STEP", "PICTURES", "SECONDS EACH", "TURNED DOWN", ""), *rows])
    by_task = ", ".join(f"{number} {task}" for task, number in counts.pairs.items()) or "none"
    pairs = sum(counts.pairs.values())
    yield f"{pairs} pairs ({by_task}) of {counts.photos} pictures, {counts.pairs_per_hour:,.0f} an hour"
    yield f"{done.folder}; report {done.report}"
    if done.shards is not None:
        yield f"{done.shards.rows} records in shards; train on them: `insightedit train {done.folder / 'train.yaml'}`"
