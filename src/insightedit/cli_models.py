"""The commands about model versions: `insightedit models ...`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from insightedit.console import Group, columns, dry_run_option, emit, json_option, open_workdir

if TYPE_CHECKING:
    from insightedit.platform.audit import AuditEntry
    from insightedit.platform.exchange import Contents
    from insightedit.platform.lineage import Difference, Lineage
    from insightedit.platform.registry import ModelVersion
    from insightedit.platform.retention import Pruned


@click.group(cls=Group)
def models() -> None:
    """Model versions of the registry."""


def _scored(version: ModelVersion) -> str:
    score = version.tags.get("viescore")
    return f"{float(score):.3f}" if score else "-"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


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
    """Show one VERSION and where it comes from: a number, as every answer names it, or an alias."""
    from insightedit.platform.lineage import lineage
    from insightedit.platform.registry import Registry

    workdir = open_workdir()
    registry = Registry(workdir)
    found = registry.resolve(version)
    back = lineage(registry, found, workdir.runs)
    content = asdict(back)
    emit({**content.pop("version"), "lineage": content}, as_json, lambda: _show_lineage(back))


def _show_lineage(back: Lineage) -> Iterable[str]:
    version = back.version
    yield f"{version.name} {version.version}"
    yield f"aliases     {', '.join(version.aliases) or '-'}"
    yield f"created     {version.created.astimezone():%Y-%m-%d %H:%M:%S}"
    yield f"folder      {version.folder}"
    yield f"manifest    {back.manifest}"
    if back.imported_from:
        yield f"imported    {back.imported_from}"
    if back.run:
        yield f"run         {back.run.name or '-'} {back.run.run_id} {back.run.status}"
    yield f"commit      {back.git_commit or (back.run.git_commit if back.run else '') or '-'}"
    if back.config:
        yield f"config      {back.config}"
    for stage in back.stages:
        yield f"stage {stage.number}     run {stage.run.run_id}, {stage.checkpoints or 'its checkpoints are gone'}"
    yield from (f"dataset     {name} {fingerprint}" for name, fingerprint in back.datasets.items())
    if back.evaluation:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in back.figures.items())
        yield f"evaluation  run {back.evaluation.run_id}: {figures}"
    yield from (f"decision    {_decision(entry)}" for entry in back.decisions)


def _decision(entry: AuditEntry) -> str:
    why = f": {entry.reason}" if entry.reason else ""
    return (
        f"{entry.number} {entry.when} {entry.who} {entry.action} {entry.from_version or '-'} -> {entry.to_version}{why}"
    )


@models.command("card")
@click.argument("version", default="champion")
@json_option
def models_card(version: str, as_json: bool) -> None:
    """Print the card of a VERSION as it is now: the hub's metadata, and a page in Markdown."""
    from insightedit.platform.model_cards import model_card
    from insightedit.platform.registry import Registry

    registry = Registry(open_workdir())
    found = registry.resolve(version)
    registry.fetch(found)
    card = model_card(registry, found)
    emit({"version": found.version, "card": card}, as_json, lambda: [card.rstrip()])


@models.command("log")
@json_option
def models_log(as_json: bool) -> None:
    """Show who made which version the champion, when and why, the last change first."""
    from insightedit.platform.registry import Registry

    registry = Registry(open_workdir())
    entries = registry.audit.entries()[::-1]
    for sentence in registry.audit.astray():
        click.echo(sentence, err=True)
    if not entries and not as_json:
        click.echo("No version was promoted yet.", err=True)
    emit(entries, as_json, lambda: [_decision(entry) for entry in entries])


@models.command("diff")
@click.argument("first")
@click.argument("second")
@json_option
def models_diff(first: str, second: str, as_json: bool) -> None:
    """Show in what the version SECOND differs from the version FIRST."""
    from insightedit.platform.lineage import difference
    from insightedit.platform.registry import Registry

    registry = Registry(open_workdir())
    found = difference(registry, registry.resolve(first), registry.resolve(second))
    emit(found, as_json, lambda: _show_difference(found))


def _show_difference(found: Difference) -> Iterable[str]:
    yield f"version {found.versions[0]} -> version {found.versions[1]}"
    for name, (before, after) in sorted(found.figures.items()):
        yield f"figure   {name}: {_figure(before)} -> {_figure(after)}"
    if found.gain:
        gain = found.gain
        yield (
            f"gain     {gain.gain:+.3f} (95% interval {gain.low:+.3f} to {gain.high:+.3f}) on {gain.cases} cases of"
            f" {gain.scenes} scenes, p = {gain.p:.4f}"
        )
    yield from _show_changes("param", found.params)
    yield from _show_changes("tag", found.lineage)
    yield from (f"file     {name} {word}" for name, word in found.files.items())
    yield f"size     {_mib(found.bytes[0])} -> {_mib(found.bytes[1])}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show_changes(what: str, changes: Mapping[str, tuple[str, str]]) -> Iterable[str]:
    for name, (before, after) in changes.items():
        yield f"{what:<8} {name}: {before or '-'} -> {after or '-'}"


@models.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--reason", default="", help="Where it comes from; kept with the version.")
@dry_run_option
@json_option
def models_import(folder: Path, reason: str, dry_run: bool, as_json: bool) -> None:
    """Make a version, the challenger, of a FOLDER: InsightEdit's, or a plain InstructPix2Pix as diffusers saves it."""
    from insightedit.platform.exchange import examine, import_folder

    folder = folder.expanduser().absolute()
    if dry_run:
        contents = examine(folder)
        emit(contents, as_json, lambda: [f"Would import {folder}", *_show_contents(contents)])
        return
    made = import_folder(open_workdir(), folder, reason)

    def show() -> Iterable[str]:
        number = made.version.version
        yield f"version {number} is {folder}"
        yield from _show_contents(made.contents)
        yield f"try it: `insightedit edit PICTURE INSTRUCTION --out FILE --model {number}`"
        yield f"serve it: `insightedit serve up --model {number}`"

    emit({**asdict(made.version), "contents": made.contents}, as_json, show)


def _show_contents(contents: Contents) -> Iterable[str]:
    yield f"  {contents.kind}, {len(contents.files)} files, {_mib(contents.size)}"
    yield from (f"  left out: {name}" for name in contents.left_out)


@models.command("export")
@click.argument("version")
@click.argument("folder", type=click.Path(path_type=Path))
@dry_run_option
@json_option
def models_export(version: str, folder: Path, dry_run: bool, as_json: bool) -> None:
    """Copy a VERSION, verified, and its card into a new FOLDER, and print the lines of Python that open it."""
    from insightedit.platform.exchange import export_version, how_to_load
    from insightedit.platform.registry import Registry

    registry = Registry(open_workdir())
    found = registry.resolve(version)
    folder = folder.expanduser().absolute()
    if not dry_run:
        export_version(registry, found, folder)
    content: dict[str, Any] = {"version": found.version, "folder": folder, "manifest": found.tags.get("manifest")}
    content |= {"load": how_to_load(found, folder), "dry_run": dry_run}
    verb = "Would copy" if dry_run else "Copied"
    emit(content, as_json, lambda: [f"{verb} version {found.version} to {folder}", content["load"]])


@models.command("prune")
@click.option("--keep", type=click.IntRange(min=0), default=10, show_default=True, help="So many newest ones stay.")
@click.option("--days", type=click.FloatRange(min=0), default=0.0, help="And those younger than this.")
@click.option("--line", type=click.IntRange(min=0), default=3, show_default=True, help="And so many former champions.")
@dry_run_option
@json_option
def models_prune(keep: int, days: float, line: int, dry_run: bool, as_json: bool) -> None:
    """Delete old versions; never one that an alias or a deployment holds, or that `models hold` keeps."""
    from insightedit.platform.registry import Registry
    from insightedit.platform.retention import prune
    from insightedit.serve import deployment

    workdir = open_workdir()
    status = deployment.status(workdir)
    deployed = {one.version for one in status.fleet.versions} if status.fleet else set[str]()
    if status.model_version is not None:
        deployed.add(status.model_version)
    done = prune(Registry(workdir), deployed, keep=keep, days=days, line=line, dry_run=dry_run)
    emit(done, as_json, lambda: _show_pruned(done))


def _show_pruned(done: Pruned) -> Iterable[str]:
    verb = "Would delete" if done.dry_run else "Deleted"
    yield f"{verb} {len(done.deleted)} versions, {_mib(done.bytes)}: {', '.join(done.deleted) or '-'}"
    yield from (f"  kept {version}: {why}" for version, why in done.kept.items())


@models.command("hold")
@click.argument("version")
@click.argument("name")
@click.option("--reason", default="", help="Why it must stay.")
@click.option("--release", is_flag=True, help="Take NAME's hold away instead.")
@json_option
def models_hold(version: str, name: str, reason: str, release: bool, as_json: bool) -> None:
    """Keep a VERSION from being pruned, for NAME: a server on a cluster, a figure in print."""
    from insightedit.platform import retention
    from insightedit.platform.registry import Registry

    registry = Registry(open_workdir())
    found = registry.resolve(version)
    if release:
        retention.release(registry, found, name)
    else:
        retention.hold(registry, found.version, name, reason)
    held = retention.held_by(registry, found.version)
    emit({"version": found.version, "held": held}, as_json, lambda: [f"version {found.version}: {held or 'not held'}"])
