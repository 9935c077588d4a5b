"""`insightedit promote` and `rollback`: which model version is the champion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import GateRefusedError
from insightedit.platform.registry import CHAMPION, PREVIOUS, ModelVersion, Registry
from insightedit.platform.workdir import Workdir

Evaluate = Callable[[ModelVersion], object]
"""Judges a version and leaves the figures in its tags, as `insightedit.jobs.evaluate.evaluate` does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The figures that a promotion rests on."""

    viescore: float
    threshold: float
    """What the version's VIEScore must exceed."""
    champion_viescore: float | None
    """None where there was no champion: then an editor that copies its source is what must be beaten."""
    cases: str
    """sha256 of the cases on which both were judged."""
    evaluation_run: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """What `promote` or `rollback` did, or would do with --dry-run."""

    champion: str
    """The champion after."""
    before: str | None
    """The champion before."""
    evidence: Evidence | None
    """None for a rollback, and where the version was the champion already."""
    dry_run: bool


def promote(
    workdir: Workdir, reference: str, config: PromotionConfig, evaluate: Evaluate, *, dry_run: bool = False
) -> Promotion:
    """Make a version the champion if it is better.

    Both versions must have been judged on the same cases and seeds; if they were not, they are judged now.
    Promoting the champion again changes nothing.

    Args:
        workdir: where the registry is.
        reference: the version, for example `3` or `challenger`.
        config: the gate.
        evaluate: judges a version and leaves the figures in its tags.
        dry_run: decide, and move nothing.

    Raises:
        NotFoundError: there is no such version.
        GateRefusedError: it is not better.
        InsightEditError: the version's folder is damaged.
    """
    registry = Registry(workdir)
    version = registry.resolve(reference)
    registry.fetch(version)
    # What is decided here rests on the champion of this moment; if another one comes first, this is told.
    last = registry.audit.last()
    version, champion = _judge_alike(registry, version, evaluate)
    if champion is not None and champion.version == version.version:
        return Promotion(champion=version.version, before=version.version, evidence=None, dry_run=dry_run)
    evidence = _evidence(version, champion, config)
    if evidence.viescore <= evidence.threshold:
        raise GateRefusedError(_refusal(version, champion, evidence, config))
    if not dry_run:
        registry.promote(version.version, asdict(evidence), expected=last)
    before = champion.version if champion else None
    return Promotion(champion=version.version, before=before, evidence=evidence, dry_run=dry_run)


def rollback(workdir: Workdir, reason: str = "", *, dry_run: bool = False) -> Promotion:
    """Make the previous champion the champion again.

    Args:
        workdir: where the registry is.
        reason: written down with it.
        dry_run: say what would happen, and change nothing.

    Raises:
        NotFoundError: there is no champion, or none before it.
        InsightEditError: the previous version's folder is damaged.
    """
    registry = Registry(workdir)
    last = registry.audit.last()
    champion, target = registry.resolve(CHAMPION), registry.resolve(PREVIOUS)
    registry.fetch(target)
    if not dry_run:
        registry.rollback(reason=reason, expected=last)
    return Promotion(champion=target.version, before=champion.version, evidence=None, dry_run=dry_run)


def _judge_alike(
    registry: Registry, version: ModelVersion, evaluate: Evaluate
) -> tuple[ModelVersion, ModelVersion | None]:
    """The version and the champion, as they are once both have figures on the same cases."""
    version, champion = registry.resolve(version.version), registry.find(CHAMPION)
    contenders = [version] if champion is None else [version, champion]
    cases = {one.tags.get("evaluation.cases") for one in contenders}
    if None in cases or len(cases) > 1:
        for one in contenders:
            evaluate(one)
        return registry.resolve(version.version), registry.find(CHAMPION)
    return version, champion


def _evidence(version: ModelVersion, champion: ModelVersion | None, config: PromotionConfig) -> Evidence:
    champion_viescore = float(champion.tags["viescore"]) if champion else None
    threshold = config.min_viescore if champion_viescore is None else champion_viescore + config.margin
    return Evidence(
        viescore=float(version.tags["viescore"]),
        threshold=max(threshold, config.min_viescore),
        champion_viescore=champion_viescore,
        cases=version.tags["evaluation.cases"],
        evaluation_run=version.tags.get("evaluation.run", ""),
    )


def _refusal(version: ModelVersion, champion: ModelVersion | None, evidence: Evidence, config: PromotionConfig) -> str:
    scored = f"Version {version.version} is not promoted: its VIEScore is {evidence.viescore:.3f}"
    if champion is None or evidence.champion_viescore is None or evidence.threshold == config.min_viescore:
        return f"{scored}, and a champion needs more than {config.min_viescore:.3f}; train it further."
    margin = f" by more than {config.margin:.3f}" if config.margin else ""
    return (
        f"{scored} and the champion's (version {champion.version}) {evidence.champion_viescore:.3f} on the same"
        f" {version.tags.get('evaluation.scenes', '')} scenes, and it must be higher{margin}; train it further."
    )
