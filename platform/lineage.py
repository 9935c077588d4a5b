"""Where a model version comes from, what was found out about it, and in what two versions differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from insightedit.platform.audit import AuditEntry
from insightedit.platform.gates import Comparison, compare, paired
from insightedit.platform.manifests import Manifest
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.results import load_results

_FIGURES = ("viescore", "instruction", "non_overedit")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """One MLflow run."""

    run_id: str
    name: str = ""
    status: str = "GONE"
    """`GONE` where it was deleted."""
    ended: str = ""
    """UTC, ISO 8601; empty for a run that goes on."""
    git_commit: str = ""
    params: Mapping[str, str]
    artifacts: str = ""
    """Where its files are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInfo:
    """One stage of the training that made a version."""

    number: int
    run: RunInfo
    fingerprint: str
    """Over all that its weights depend on: the same fingerprint means the same stage."""
    checkpoints: str
    """The folder of its weights and checkpoints; empty where it is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Everything that a version rests on."""

    version: ModelVersion
    run: RunInfo | None
    """The training, or the import."""
    stages: tuple[StageInfo, ...]
    datasets: Mapping[str, str]
    """The fingerprint of each dataset's shards."""
    config: str
    weights: str
    """sha256 of the last stage's weights."""
    manifest: str
    """sha256 over the version's files."""
    git_commit: str
    imported_from: str
    evaluation: RunInfo | None
    figures: Mapping[str, float]
    decisions: tuple[AuditEntry, ...]
    """The entries of the audit log that this version is in, the first one first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Two versions beside each other."""

    versions: tuple[str, str]
    files: Mapping[str, str]
    """`changed`, `added` or `removed`, by path."""
    bytes: tuple[int, int]
    lineage: Mapping[str, tuple[str, str]]
    """Tags that differ; empty for one that a version has not."""
    params: Mapping[str, tuple[str, str]]
    """Values of the trainings' configs that differ; empty where one of the two was not trained here."""
    figures: Mapping[str, tuple[float | None, float | None]]
    gain: Comparison | None
    """Of the second over the first, where both were judged on the same cases."""


def lineage(registry: Registry, version: ModelVersion, runs: Path) -> Lineage:
    """Follow a version back.

    Args:
        registry: where it is.
        version: for example the one that an answer names.
        runs: the work folder's `runs`.
    """
    tags = version.tags
    numbers = sorted(int(name.removeprefix("stage_run.")) for name in tags if name.startswith("stage_run."))
    run = _run(registry, version.run_id) if version.run_id else None
    own = runs / run.name if run and run.name else None
    return Lineage(
        version=version,
        run=run,
        stages=tuple(_stage(registry, number, tags[f"stage_run.{number}"], own) for number in numbers),
        datasets={
            name.removeprefix("dataset."): value for name, value in sorted(tags.items()) if name.startswith("dataset.")
        },
        config=tags.get("config", ""),
        weights=tags.get("weights", ""),
        manifest=tags.get("manifest", ""),
        git_commit=tags.get("git_commit", ""),
        imported_from=tags.get("imported_from", ""),
        evaluation=_run(registry, tags["evaluation.run"]) if "evaluation.run" in tags else None,
        figures=_figures(version),
        decisions=tuple(
            entry for entry in registry.audit.entries() if version.version in (entry.from_version, entry.to_version)
        ),
    )


def difference(registry: Registry, first: ModelVersion, second: ModelVersion) -> Difference:
    """Compare two versions: files, lineage, configs and scores.

    Raises:
        InsightEditError: the folder of one of them is damaged or gone.
    """
    manifests = [Manifest.read(registry.fetch(one)) for one in (first, second)]
    before, after = (one.files for one in manifests)
    words = {
        name: "removed" if name not in after else "added" if name not in before else "changed"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
    trained = [_run(registry, one.run_id).params if one.run_id else {} for one in (first, second)]
    figures = [_figures(one) for one in (first, second)]
    return Difference(
        versions=(first.version, second.version),
        files=words,
        bytes=(manifests[0].size, manifests[1].size),
        lineage=_unlike(first.tags, second.tags),
        params=_unlike(trained[0], trained[1]) if all(trained) else {},
        figures={name: (figures[0].get(name), figures[1].get(name)) for name in figures[0].keys() | figures[1].keys()},
        gain=_gain(registry, first, second),
    )


def _gain(registry: Registry, first: ModelVersion, second: ModelVersion) -> Comparison | None:
    cases = {one.tags.get("evaluation.cases") for one in (first, second)}
    if None in cases or len(cases) > 1:
        return None
    tables = [load_results(registry.client, one.tags.get("evaluation.run", "")) for one in (second, first)]
    if tables[0] is None or tables[1] is None:
        return None
    pairs = paired(tables[0], tables[1])
    return compare(pairs) if pairs.cases else None


def _unlike(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    both = {name: (first.get(name, ""), second.get(name, "")) for name in sorted(first.keys() | second.keys())}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def _figures(version: ModelVersion) -> dict[str, float]:
    return {name: float(version.tags[name]) for name in _FIGURES if name in version.tags}


def _stage(registry: Registry, number: int, run_id: str, runs: Path | None) -> StageInfo:
    run = _run(registry, run_id)
    folder = runs / f"stage-{number}" if runs else None
    return StageInfo(
        number=number,
        run=run,
        fingerprint=_tag(registry, run_id, "fingerprint"),
        checkpoints=str(folder) if folder and folder.is_dir() else "",
    )


def _run(registry: Registry, run_id: str) -> RunInfo:
    try:
        found: Any = registry.client.get_run(run_id)
    except MlflowException:
        return RunInfo(run_id=run_id, params={})
    ended = found.info.end_time
    return RunInfo(
        run_id=run_id,
        name=str(found.info.run_name or ""),
        status=str(found.info.status),
        ended=datetime.fromtimestamp(ended / 1000, UTC).isoformat(timespec="seconds") if ended else "",
        git_commit=str(found.data.tags.get("mlflow.source.git.commit", "")),
        params=dict(found.data.params),
        artifacts=str(found.info.artifact_uri),
    )


def _tag(registry: Registry, run_id: str, name: str) -> str:
    try:
        return str(registry.client.get_run(run_id).data.tags.get(name, ""))
    except MlflowException:
        return ""
