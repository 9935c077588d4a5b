"""`insightedit promote` and `rollback`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from insightedit.console import Command, config_option, dry_run_option, emit, json_option, open_workdir, set_option
from insightedit.platform.errors import GateRefusedError, UsageError

if TYPE_CHECKING:
    from insightedit.jobs.promote import Promotion
    from insightedit.platform.config import RunConfig
    from insightedit.platform.registry import ModelVersion


@click.command(cls=Command)
@click.argument("version", default="challenger")
@click.option("--force", is_flag=True, help="Promote it even if a gate refuses; needs --reason.")
@click.option("--reason", default="", help="Written into the audit log.")
@config_option
@set_option
@dry_run_option
@json_option
def promote(
    version: str, force: bool, reason: str, config: str, overrides: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Make a VERSION, the challenger unless given, the champion if all gates let it. Exit code 3 if one does not."""
    from insightedit.platform.config import load_preset

    if force and not reason.strip():
        raise UsageError("--force needs --reason: why a version goes live that a gate refuses.")
    try:
        done = _promote(version, load_preset(config, overrides), reason.strip(), force=force, dry_run=dry_run)
    except GateRefusedError as refusal:
        if as_json:
            emit({"refused": str(refusal), "evidence": refusal.evidence}, as_json, list)
        raise
    emit(done, as_json, lambda: _said(done))


def _promote(version: str, config: RunConfig, reason: str, *, force: bool, dry_run: bool) -> Promotion:
    from insightedit.display import Display
    from insightedit.jobs.evaluate import evaluate
    from insightedit.jobs.latency import measure_latency
    from insightedit.jobs.promote import promote
    from insightedit.platform.evaluation import least_scenes

    workdir = open_workdir()

    def judge(one: ModelVersion) -> None:
        named = f"version {one.version}"
        with Display() as display:
            evaluate(
                one,
                config,
                workdir,
                progress=lambda done, total: display.at("Evaluation", done, total, named),
                judging=lambda done, total: display.at("Judging", done, total, named),
            )

    return promote(
        workdir,
        version,
        config.promotion,
        judge,
        lambda folders: measure_latency(folders, config),
        scenes=least_scenes(config.evaluation),
        reason=reason,
        force=force,
        dry_run=dry_run,
    )


@click.command(cls=Command)
@click.option("--reason", default="", help="Written into the audit log.")
@dry_run_option
@json_option
def rollback(reason: str, dry_run: bool, as_json: bool) -> None:
    """Make the champion before this one the champion again."""
    from insightedit.jobs.promote import rollback as run_rollback

    done = run_rollback(open_workdir(), reason, dry_run=dry_run)
    emit(done, as_json, lambda: _said(done))


def _said(done: Promotion) -> Iterable[str]:
    """One move of the champion in words."""
    yield from done.told
    if done.before == done.champion:
        yield f"Version {done.champion} is the champion already."
        return
    move = f"champion {done.before or '-'} -> {done.champion}"
    score = f", VIEScore {done.evidence.viescore:.3f}" if done.evidence else ""
    yield f"{'Would move ' if done.dry_run else ''}{move}{score}"
    for gate in done.evidence.gates if done.evidence else ():
        yield f"  {'passed ' if gate.passed else 'REFUSED'} {gate.gate}: {gate.found}"
