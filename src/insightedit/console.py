"""What the commands share: where results go, options that many have, and the work folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from insightedit.platform.errors import UsageError
from insightedit.platform.workdir import Workdir


@dataclass
class Session:
    """What one call of the program knows: the folder from --workdir, and where results go."""

    folder: Path | None = None
    results: TextIO | None = None
    """The real stdout, while libraries find stderr in its place."""


def _remember_workdir(context: click.Context, _option: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(Session).folder = value


def workdir_option() -> click.Option:
    """The option --workdir."""
    return click.Option(
        ["--workdir"],
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=_remember_workdir,
        help="Folder of registry, runs, shards and logs; INSIGHTEDIT_WORKDIR or ./insightedit-work without it.",
    )


class Command(click.Command):
    """A command that knows --workdir, so that it may stand before or after the command's name."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(workdir_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _results_apart(ctx.ensure_object(Session)):
            return super().invoke(ctx)


@contextmanager
def _results_apart(session: Session) -> Generator[None]:
    """Keep stdout for results: what libraries write there, in this process or below it, goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:
        session.results = results
        os.dup2(2, 1)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            session.results = None
            os.dup2(results.fileno(), 1)


class Group(click.Group):
    """Commands of the kind above."""

    command_class = Command
    group_class = type  # Groups in this group are of this class.


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would happen and do nothing.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one value of the config; repeatable."
)

config_option = click.option(
    "--config", default="nano", show_default=True, metavar="CONFIG", help="A preset, or a file that extends one."
)


def open_workdir() -> Workdir:
    """The work folder of this call."""
    return Workdir.open(click.get_current_context().ensure_object(Session).folder)


def work_folder() -> str:
    """Where the work folder of this call is; it need not be seen from this machine."""
    return str(Workdir.place(click.get_current_context().ensure_object(Session).folder))


def emit(value: object, as_json: bool, show: Callable[[], Iterable[str]]) -> None:
    """Print a result: as JSON, or the lines that `show` makes of it for people."""
    results = click.get_current_context().ensure_object(Session).results
    if as_json:
        from pydantic import TypeAdapter

        click.echo(TypeAdapter(Any).dump_json(value, indent=2).decode(), file=results)
    else:
        for line in show():
            click.echo(line, file=results)


def emit_manifests(manifests: Sequence[dict[str, Any]], out: Path | None, as_json: bool, dry_run: bool) -> None:
    """Write objects of Kubernetes as YAML to a file, or print them."""
    from insightedit.platform.kube import to_yaml

    text = to_yaml(manifests)
    if out is None:
        emit(manifests, as_json, lambda: [text.rstrip()])
        return
    objects = [f"{one['kind']} {one['metadata']['name']}" for one in manifests]
    said = f"{'would write' if dry_run else 'wrote'} {' and '.join(objects)} to {out}: `kubectl apply -f {out}`"
    if not dry_run:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written: {error.strerror}.") from None
    emit({"out": out, "objects": objects}, as_json, lambda: [said])


def columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Rows as lines with aligned columns, the first row as their heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
