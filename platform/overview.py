"""What runs there are: those of a cluster's jobs and those of a work folder, in one list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from insightedit.platform.errors import NotFoundError
from insightedit.platform.leases import is_owned, owner_of
from insightedit.platform.submission import Job
from insightedit.platform.trainer import PROGRESS_NAME, RUN_NAME, Progress, StageResult
from insightedit.platform.workdir import Workdir


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOverview:
    """How a run is doing."""

    run: str
    state: str
    """Of its newest job: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; without one RUNNING or ENDED."""
    at: str
    """How far it is, for people."""
    stages: Mapping[int, str]
    """What is known of each stage it has begun: `finished`, or the step it is at."""
    job: Job | None
    tries: int
    """Jobs of the run on the cluster."""
    started: datetime | None
    folder: Path | None
    """None where it cannot be seen from here."""


def overview(jobs: Sequence[Job], workdir: Workdir, run: str | None = None) -> list[RunOverview]:
    """Runs, the newest first.

    Args:
        jobs: of a cluster, the newest first.
        workdir: whose runs are listed too.
        run: only this one.

    Raises:
        NotFoundError: there is no such run.
    """
    folders = {path.name for path in workdir.runs.glob("*") if path.is_dir()}
    names = folders | {job.run for job in jobs}
    if run is not None and run not in names:
        known = ", ".join(sorted(names)) or "none"
        raise NotFoundError(f"There is no run {run} in {workdir.root} or on the cluster; the runs there are: {known}.")
    found = [
        _overview(name, [job for job in jobs if job.run == name], workdir) for name in names if run in (None, name)
    ]
    return sorted(found, key=lambda one: (one.started or datetime.min.replace(tzinfo=UTC), one.run), reverse=True)


def _overview(run: str, jobs: Sequence[Job], workdir: Workdir) -> RunOverview:
    folder = workdir.runs / run
    owner, job = owner_of(folder), next(iter(jobs), None)
    state = job.status if job else ("RUNNING" if is_owned(folder) else "ENDED")
    stages = _stages(folder)
    begun = job.started if job else (datetime.fromisoformat(owner.since) if owner else None)
    return RunOverview(
        run=run,
        state=state,
        at=", ".join(f"stage {number} {how}" for number, how in list(stages.items())[-1:]) or "-",
        stages=stages,
        job=job,
        tries=len(jobs),
        started=begun,
        folder=folder if folder.is_dir() else None,
    )


def _stages(folder: Path) -> dict[int, str]:
    """How far each stage is that was begun."""
    results = {int(path.name.removeprefix("stage-")): StageResult.read(path) for path in folder.glob("stage-[0-9]")}
    stages = {number: "finished" if result else "begun" for number, result in sorted(results.items())}
    path = folder / PROGRESS_NAME
    if path.is_file():
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        if stages.get(progress.stage) == "begun":
            stages[progress.stage] = f"at step {progress.step} of {progress.steps}"
    return stages


def version_of(run: str, workdir: Workdir) -> str | None:
    """The newest model version that came out of a run."""
    path = workdir.runs / run / RUN_NAME
    if not path.is_file():
        return None
    # MLflow takes seconds to import.
    from insightedit.platform.registry import Registry  # noqa: PLC0415

    run_id = json.loads(path.read_text(encoding="utf-8"))["run_id"]
    return next((one.version for one in Registry(workdir).versions() if one.tags.get("run") == run_id), None)
