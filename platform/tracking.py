"""Runs in MLflow: a parent run for a training, and a child run for each of its stages.

The ids are made by whoever starts the training and survive restarts. Workers write natively to MLflow, in the
background, so that training never waits for the database.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from insightedit.platform.config import RunConfig, flattened
from insightedit.platform.errors import InsightEditError
from insightedit.platform.workdir import Workdir

EXPERIMENT = "insightedit"
_MAX_BATCH = 100
_MAX_PARAM = 6000
_EVERY_STEP = "learning_rate"
"""A figure that every point of a curve has."""
_PACKAGES = ("insightedit", "torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "mlflow", "numpy")

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """Where a training is tracked."""

    uri: str
    run_id: str
    """The parent run."""
    stage_runs: Mapping[int, str]
    """The child run of each stage."""


def ensure_experiment(client: MlflowClient, workdir: Workdir) -> str:
    """The id of the work folder's experiment, made if it is missing."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    root = workdir.artifact_root
    if root == workdir.artifacts.as_uri():
        workdir.artifacts.mkdir(parents=True, exist_ok=True)
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=root)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return ensure_experiment(client, workdir)  # somebody else was quicker


def start_run(
    workdir: Workdir, name: str, config: RunConfig, datasets: Mapping[str, str], continued: TrackedRun | None = None
) -> TrackedRun:
    """Open the runs of a training.

    Args:
        workdir: whose MLflow database is used.
        name: of the training.
        config: logged as parameters, flattened.
        datasets: fingerprint of each prepared dataset.
        continued: the runs of a training that goes on; they are opened again.
    """
    client = MlflowClient(workdir.tracking_uri)
    if continued is not None:
        for run_id in (continued.run_id, *continued.stage_runs.values()):
            client.update_run(run_id, status="RUNNING")
        return continued
    experiment = ensure_experiment(client, workdir)
    content = config.model_dump(mode="json")
    tags = environment_tags() | {f"dataset.{key}": value for key, value in datasets.items()}
    parent = _create_run(client, experiment, name, tags, content)
    stages = {
        number: _create_run(
            client,
            experiment,
            f"{name}/stage-{number}",
            tags | {"mlflow.parentRunId": parent, "stage": str(number), "fingerprint": config.fingerprint(number)},
            content["stages"][str(number)],
        )
        for number in config.stages
    }
    return TrackedRun(uri=workdir.tracking_uri, run_id=parent, stage_runs=stages)


def end_run(run: TrackedRun, status: Status) -> None:
    """Close the parent run, and the stages' runs that are still open."""
    client = MlflowClient(run.uri)
    for run_id in (*run.stage_runs.values(), run.run_id):
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status)


def environment_tags() -> dict[str, str]:
    """What a result depends on besides its config: versions, machine and git commit."""
    versions = {f"version.{name}": importlib.metadata.version(name) for name in _PACKAGES}
    machine = {
        "machine.system": platform.platform(),
        "machine.cpus": str(os.cpu_count()),
        "version.python": platform.python_version(),
    }
    commit = git_commit()
    return {**versions, **machine, **({"mlflow.source.git.commit": commit} if commit else {})}


def git_commit() -> str:
    """The commit of this package's source, with `-dirty` for changes; empty where it is not a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603 - fixed
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class StageTracker:
    """Writes one stage's figures and pictures to its run, in the order they come, without making the caller wait."""

    def __init__(self, run: TrackedRun, stage: int) -> None:
        self.run_id = run.stage_runs[stage]
        self._client = MlflowClient(run.uri)
        self._queue = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self._pending: list[Future[None]] = []
        self._logged: set[int] | None = None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a step, once: a run that resumes comes to the same steps again."""
        now = int(time.time() * 1000)
        entries = [Metric(name, value, now, step) for name, value in values.items()]
        self._submit(lambda: self._log_once(step, entries))

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Log pictures of a step by name."""
        for name, picture in pictures.items():
            self._submit(lambda n=name, p=picture: self._client.log_image(self.run_id, p, key=n, step=step))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        entries = [RunTag(name, value) for name, value in values.items()]
        self._submit(lambda: self._client.log_batch(self.run_id, tags=entries))

    def close(self, status: Status) -> None:
        """Write what is left and end the run.

        Raises:
            InsightEditError: something could not be written.
        """
        self._submit(lambda: self._client.set_terminated(self.run_id, status))
        self._queue.shutdown(wait=True)
        errors = [future.exception() for future in self._pending]
        if first := next(filter(None, errors), None):
            raise InsightEditError(f"MLflow refused what was logged: {first}.") from first

    def _log_once(self, step: int, entries: list[Metric]) -> None:
        if self._logged is None:
            self._logged = {metric.step for metric in self._client.get_metric_history(self.run_id, _EVERY_STEP)}
        if step not in self._logged:
            self._client.log_batch(self.run_id, metrics=entries)
            self._logged.add(step)

    def _submit(self, write: Any) -> None:
        # Finished writes are forgotten, failed ones kept for `close`.
        self._pending = [future for future in self._pending if not future.done() or future.exception()]
        self._pending.append(self._queue.submit(write))


def _create_run(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]
) -> str:
    run_id = client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id
    entries = [Param(key, str(value)[:_MAX_PARAM]) for key, value in flattened(params)]
    for some in (entries[start : start + _MAX_BATCH] for start in range(0, len(entries), _MAX_BATCH)):
        client.log_batch(run_id, params=some)
    return run_id
