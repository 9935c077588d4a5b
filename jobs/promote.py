"""`insightedit promote` and `rollback`: which model version is the champion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import GateRefusedError, InsightEditError, UsageError
from insightedit.platform.gates import Verdict, decide, latency_gate
from insightedit.platform.manifests import check_classes
from insightedit.platform.registry import CHAMPION, PREVIOUS, ModelVersion, Registry
from insightedit.platform.results import CaseResult, load_results
from insightedit.platform.workdir import Workdir

Evaluate = Callable[[ModelVersion], object]
"""Judges a version and leaves figures and run in its tags, as `insightedit.jobs.evaluate.evaluate` does."""
Measure = Callable[[Sequence[Path]], Sequence[float]]
"""Seconds of an edit with each of some pipeline folders, as `insightedit.jobs.latency.measure_latency` finds them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The figures that a promotion rests on."""

    viescore: float
    champion_viescore: float | None
    """None where there was no champion: then only minimum scores are asked for."""
    cases: str
    """sha256 of the cases on which both were judged."""
    evaluation_run: str
    champion_evaluation_run: str | None
    gates: tuple[Verdict, ...]

    @property
    def refusals(self) -> list[Verdict]:
        """The gates that refused."""
        return [verdict for verdict in self.gates if not verdict.passed]


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
    forced: bool = False
    """A gate had refused it."""
    entry: int | None = None
    """Its number in the audit log; None where nothing was moved."""
    told: tuple[str, ...] = ()
    """Aliases that somebody had moved without the audit log; they are put right."""


def promote(
    workdir: Workdir,
    reference: str,
    config: PromotionConfig,
    evaluate: Evaluate,
    measure: Measure,
    *,
    scenes: int = 0,
    reason: str = "",
    force: bool = False,
    dry_run: bool = False,
) -> Promotion:
    """Make a version the champion if all gates let it.

    Both versions must have been judged on the same cases and seeds; if they were not, they are judged now.
    Promoting the champion again changes nothing.

    Args:
        workdir: where the registry is.
        reference: the version, for example `3` or `challenger`.
        config: the gates.
        evaluate: judges a version and leaves figures and run in its tags.
        measure: how long an edit takes; asked only if everything else speaks for the version.
        scenes: an evaluation on fewer of them does not count, and is made again.
        reason: written down with it.
        force: make it champion even if a gate refuses, for that reason. A damaged version never becomes champion.
        dry_run: decide, and move nothing.

    Raises:
        UsageError: it is to be forced, and no reason is given.
        NotFoundError: there is no such version.
        GateRefusedError: a gate refused.
        ConflictError: another change came first.
        InsightEditError: the version's folder is damaged, or names code that is not ours.
    """
    if force and not reason:
        raise UsageError("A forced promotion needs a reason: say why a version goes live that a gate refuses.")
    registry = Registry(workdir)
    version = registry.resolve(reference)
    check_classes(registry.fetch(version))
    # What is decided here rests on the champion of this moment; if another one comes first, this is told.
    last, told = registry.audit.last(), tuple(registry.audit.astray())
    version, champion = _judge_alike(registry, version, evaluate, scenes)
    before = champion.version if champion else None
    if before == version.version:
        if not dry_run:
            registry.audit.reconcile()
        return Promotion(champion=version.version, before=before, evidence=None, dry_run=dry_run, told=told)
    evidence = _evidence(registry, version, champion, config, measure)
    if evidence.refusals and not force:
        raise GateRefusedError(_refusal(version, champion, evidence), asdict(evidence))
    done = Promotion(
        champion=version.version,
        before=before,
        evidence=evidence,
        dry_run=dry_run,
        forced=bool(evidence.refusals),
        told=told,
    )
    if dry_run:
        return done
    entry = registry.promote(version.version, asdict(evidence), reason=reason, forced=done.forced, expected=last)
    return replace(done, entry=entry.number)


def rollback(workdir: Workdir, reason: str = "", *, dry_run: bool = False) -> Promotion:
    """Make the previous champion the champion again.

    Args:
        workdir: where the registry is.
        reason: written down with it.
        dry_run: say what would happen, and change nothing.

    Raises:
        NotFoundError: there is no champion, or none before it.
        ConflictError: another change came first.
        InsightEditError: the previous version's folder is damaged.
    """
    registry = Registry(workdir)
    last, told = registry.audit.last(), tuple(registry.audit.astray())
    champion, target = registry.resolve(CHAMPION), registry.resolve(PREVIOUS)
    registry.fetch(target)
    done = Promotion(champion=target.version, before=champion.version, evidence=None, dry_run=dry_run, told=told)
    if dry_run:
        return done
    return replace(done, entry=registry.rollback(reason=reason, expected=last).number)


def _judge_alike(
    registry: Registry, version: ModelVersion, evaluate: Evaluate, scenes: int
) -> tuple[ModelVersion, ModelVersion | None]:
    """The version and the champion, as they are once both have results on the same cases."""
    version, champion = registry.resolve(version.version), registry.find(CHAMPION)
    contenders = [version] if champion is None else [version, champion]
    cases = {one.tags.get("evaluation.cases") for one in contenders}
    enough = all(int(one.tags.get("evaluation.scenes", 0)) >= scenes for one in contenders)
    alike = None not in cases and len(cases) == 1 and enough
    if alike and all(_results(registry, one) is not None for one in contenders):
        return version, champion
    for one in contenders:
        evaluate(one)
    return registry.resolve(version.version), registry.find(CHAMPION)


def _results(registry: Registry, version: ModelVersion) -> list[CaseResult] | None:
    run = version.tags.get("evaluation.run")
    return load_results(registry.client, run) if run else None


def _evidence(
    registry: Registry, version: ModelVersion, champion: ModelVersion | None, config: PromotionConfig, measure: Measure
) -> Evidence:
    own = _results(registry, version)
    its = None if champion is None else _results(registry, champion)
    if own is None or (champion is not None and its is None):
        raise InsightEditError("The evaluation has left no results.parquet with its run: evaluate the version again.")
    verdicts = decide(own, its, config)
    most = config.max_latency_ratio
    if champion is not None and most and all(verdict.passed for verdict in verdicts):
        verdicts.append(_timed(registry, version, champion, most, measure))
    return Evidence(
        viescore=float(version.tags["viescore"]),
        champion_viescore=float(champion.tags["viescore"]) if champion else None,
        cases=version.tags["evaluation.cases"],
        evaluation_run=version.tags["evaluation.run"],
        champion_evaluation_run=champion.tags["evaluation.run"] if champion else None,
        gates=tuple(verdicts),
    )


def _timed(registry: Registry, version: ModelVersion, champion: ModelVersion, most: float, measure: Measure) -> Verdict:
    """The gate of latency. A champion that is damaged on disk is no reason to keep it."""
    try:
        theirs = registry.fetch(champion)
    except InsightEditError as error:
        return Verdict(gate="latency", passed=True, found=f"not measured, since the champion is damaged: {error}")
    own, its = measure([registry.fetch(version), theirs])
    return latency_gate(own, its, most)


def _refusal(version: ModelVersion, champion: ModelVersion | None, evidence: Evidence) -> str:
    """One sentence: the version, and what each gate that refused has found."""
    against = f" in place of version {champion.version}" if champion else ""
    found = "; ".join(_found(verdict) for verdict in evidence.refusals)
    way_out = "train it further, or use --force with a --reason"
    return f"Version {version.version} is not promoted{against}: {found}; {way_out}."


def _found(verdict: Verdict) -> str:
    cases = f" (most by {', '.join(verdict.cases)})" if verdict.cases else ""
    return f"[{verdict.gate}] {verdict.found}{cases}"
