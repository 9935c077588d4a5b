"""The commands about model versions: `insightedit models ...`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from insightedit.console import Group, columns, emit, json_option, open_workdir

if TYPE_CHECKING:
    from insightedit.platform.registry import ModelVersion


@click.group(cls=Group)
def models() -> None:
    """Model versions of the registry."""


def _scored(version: ModelVersion) -> str:
    score = version.tags.get("viescore")
    return f"{float(score):.3f}" if score else "-"


@models.command("list")
@json_option
def models_list(as_json: bool) -> None:
    """Show all model versions, newest first."""
    from insightedit.platform.registry import Registry

    versions = Registry(open_workdir()).versions()
    heading = ("VERSION", "ALIASES", "VIESCORE", "CREATED")
    rows = [
        (one.version, ", ".join(one.aliases) or "-", _scored(one), f"{one.created.astimezone():%Y-%m-%d %H:%M}")
        for one in versions
    ]
    if not versions and not as_json:
        click.echo("No model version yet: `insightedit quickstart` or `insightedit train nano` makes one.", err=True)
        return
    emit(versions, as_json, lambda: columns([heading, *rows]))


@models.command("show")
@click.argument("version", default="champion")
@json_option
def models_show(version: str, as_json: bool) -> None:
    """Show one VERSION: a number or an alias, the champion unless given."""
    from insightedit.platform.registry import Registry

    found = Registry(open_workdir()).resolve(version)

    def show() -> Iterable[str]:
        yield f"{found.name} {found.version}"
        yield f"aliases  {', '.join(found.aliases) or '-'}"
        yield f"created  {found.created.astimezone():%Y-%m-%d %H:%M:%S}"
        yield f"run      {found.run_id}"
        yield f"folder   {found.folder}"
        yield from (f"tag      {key} = {value}" for key, value in sorted(found.tags.items()))

    emit(found, as_json, show)
