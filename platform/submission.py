"""Runs as jobs of a Ray cluster: submit, list, read, cancel, and see them through the cluster's death.

A run's jobs carry its name in their metadata. The first one is called like the run, later ones `RUN.try2` and so on:
Ray accepts an id once, which makes the name a run's own among everybody who submits to the cluster. What travels is
this package as a wheel and the resolved config; the job does what `insightedit train` does on a laptop.
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from insightedit.platform.capacity import Nodes, NoRoomError, check_room, is_fixed, needs_of
from insightedit.platform.config import RunConfig, dump_config
from insightedit.platform.errors import ClusterError, GateRefusedError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.leases import JOB_VARIABLE, is_owned, owner_of
from insightedit.platform.wheels import write_wheel
from insightedit.platform.workdir import ENVIRONMENT_VARIABLE

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Ray's own name for where its dashboard, and so its jobs, are."""
CONFIG_NAME = "config.yaml"
_RUN, _CONFIG, _WORKDIR = "insightedit.run", "insightedit.config", "insightedit.workdir"
_TIMEOUT_SECONDS = 30.0
_POLL_SECONDS = 2.0
_READY_SECONDS = 60.0
_NOT_READY = "No available agent"
"""In Ray's answer while the head's part that starts jobs has not started itself."""
_ANSWERS = {1: InsightEditError, 2: UsageError, 3: GateRefusedError, 4: NotFoundError}
"""Exit codes with which `insightedit train` ends by itself; doing the same again would end the same."""
_NO_START = "RUNTIME_ENV_SETUP_FAILURE"
"""Ray's type of error where a node could not install what travels."""
_ERROR = "Error: "
_CHATTY = (
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
"""Loggers of Ray that tell every step of an upload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What is to be trained where."""

    run: str
    config: RunConfig
    workdir: str
    """The work folder, as the cluster's nodes know it."""

    def __post_init__(self) -> None:
        """Check what can be checked without the cluster.

        Raises:
            UsageError: the config names a path that is not absolute.
        """
        check_paths(self.config)

    @property
    def fingerprint(self) -> str:
        """Of the config: a run's name stands for one."""
        return self.config.fingerprint(max(self.config.stages))

    @property
    def entrypoint(self) -> str:
        """The job's command, in the folder that travels."""
        return f"python -m insightedit train {CONFIG_NAME} --name {shlex.quote(self.run)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job of a run."""

    run: str
    job: str
    status: str
    """As Ray says it: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    started: datetime | None
    ended: datetime | None
    exit_code: int | None
    config: str
    workdir: str
    error: str
    """Ray's type of what went wrong, where it was not the command."""
    message: str
    """What Ray says of it; of a command that failed the end of its log."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return JobStatus(self.status).is_terminal()

    @property
    def tried(self) -> int:
        """Its number among the jobs of its run, from 1."""
        number = self.job.removeprefix(f"{self.run}.try")
        return int(number) if number.isdecimal() else 1


class Jobs(JobSubmissionClient):
    """The jobs of one cluster.

    Every method raises ClusterError where the cluster does not answer or refuses the token.
    """

    def __init__(self, address: str) -> None:
        """Look for the cluster.

        Args:
            address: of its dashboard, such as `http://host:8265`.
        """
        self.place = address if "://" in address else f"http://{address}"
        # Ray lets its variables win over what it is told.
        os.environ[ADDRESS_VARIABLE] = self.place
        for chatty in _CHATTY:
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with _answering(self.place):
            try:
                super().__init__(self.place)
            except (KeyError, TypeError) as error:
                raise ClusterError(f"What answers at {self.place} is no Ray dashboard; check --address.") from error

    def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
        settings.setdefault("timeout", _TIMEOUT_SECONDS)
        return super()._do_request(method, endpoint, **settings)

    def _data(self, endpoint: str) -> Any:
        """What the dashboard answers."""
        reply = self._do_request("GET", endpoint).json()
        if not reply["result"]:
            raise RuntimeError(reply["msg"])
        return reply["data"]

    def all(self) -> list[Job]:
        """Every job of a run, the newest first."""
        with _answering(self.place):
            found = [_job(details) for details in self.list_jobs()]
        ours = [job for job in found if job is not None]
        return sorted(ours, key=lambda job: (job.started or datetime.max.replace(tzinfo=UTC), job.tried), reverse=True)

    def of(self, run: str) -> list[Job]:
        """A run's jobs, the newest first."""
        return [job for job in self.all() if job.run == run]

    def newest(self, run: str) -> Job:
        """A run's newest job.

        Raises:
            NotFoundError: there is none.
        """
        for job in self.of(run):
            return job
        names = ", ".join(dict.fromkeys(job.run for job in self.all())) or "there are none"
        raise NotFoundError(f"The cluster at {self.place} has no run {run}; its runs: {names}.")

    def text(self, job: Job) -> str:
        """What a job has printed."""
        with _answering(self.place):
            return self.get_job_logs(job.job)

    async def follow(self, job: Job) -> AsyncIterator[str]:
        """What a job prints, until it ends."""
        with _answering(self.place):
            async for text in self.tail_job_logs(job.job):
                yield text

    def cancel(self, job: Job) -> bool:
        """End a job; False where it has ended already."""
        with _answering(self.place):
            return not job.is_over and self.stop_job(job.job)

    def start(self, submission: Submission, tried: int) -> str:
        """Start a job for a run.

        Returns:
            The job's name.

        Raises:
            UsageError: somebody else has just submitted a run of that name.
        """
        job = submission.run if tried == 1 else f"{submission.run}.try{tried}"
        with tempfile.TemporaryDirectory(prefix="insightedit-") as folder, _answering(self.place):
            luggage = Path(folder) / "job"
            luggage.mkdir()
            (luggage / CONFIG_NAME).write_text(dump_config(submission.config), encoding="utf-8")
            environment = {
                "working_dir": str(luggage),
                "py_modules": [str(write_wheel(Path(folder)))],
                "env_vars": {ENVIRONMENT_VARIABLE: submission.workdir, JOB_VARIABLE: job},
            }
            request = {
                "entrypoint": submission.entrypoint,
                "submission_id": job,
                "runtime_env": environment,
                "metadata": {
                    _RUN: submission.run,
                    _CONFIG: submission.fingerprint,
                    _WORKDIR: submission.workdir,
                },
            }
            return self._submit_once_ready(submission.run, request)

    def _submit_once_ready(self, run: str, request: Mapping[str, Any]) -> str:
        """Submit a job; the head of a cluster that has just started takes none for some seconds."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                return self.submit_job(**request)
            except RuntimeError as error:
                if "already exists" in str(error):
                    why = f"job {request['submission_id']} of that name was just submitted"
                    raise UsageError(_taken(run, why)) from None
                if _NOT_READY not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def nodes(self) -> list[Nodes] | None:
        """The nodes that there are; None where an autoscaler may add others."""
        with _answering(self.place):
            status = self._data("/api/cluster_status")["clusterStatus"]
            listed = self._data("/api/v0/nodes?detail=1&limit=10000")["result"]["result"]
        report = (status or {}).get("autoscalerReport") or {}
        if not is_fixed(report.get("nodeTypeMapping")):
            return None
        alive = [node for node in listed if node["state"] == "ALIVE"]
        return [Nodes(resources=node["resources_total"], labels=node["labels"]) for node in alive]


def submit(jobs: Jobs, submission: Submission, *, dry_run: bool = False) -> str | None:
    """Submit a run, after everything that can be known to be wrong before.

    Returns:
        The name of its job; None for a dry run.

    Raises:
        UsageError: the run's name is taken, or the cluster has no room.
        ClusterError: the cluster does not answer or refuses the token.
    """
    before = jobs.of(submission.run)
    check_name(jobs, submission, before)
    nodes = jobs.nodes()
    if nodes is not None:
        check_room(needs_of(submission.config), nodes)
    return None if dry_run else jobs.start(submission, _next_try(before))


def check_name(jobs: Jobs, submission: Submission, before: Sequence[Job]) -> None:
    """Check that nobody trains a run of this name, and that it is not one of another config.

    Raises:
        UsageError: the name is taken.
    """
    run = submission.run
    if running := next((job for job in before if not job.is_over), None):
        follow = f"`insightedit logs {run} --address {jobs.place}` shows it"
        raise UsageError(_taken(run, f"job {running.job} is {running.status} ({follow})"))
    folder = Path(submission.workdir) / "runs" / run
    owner = owner_of(folder)
    if owner and is_owned(folder):
        raise UsageError(_taken(run, f"{owner} trains it"))
    known = {job.config for job in before} | ({owner.config} if owner else set[str]())
    if known - {"", submission.fingerprint}:
        raise UsageError(_taken(run, "it is a run of another config"))


def check_paths(config: RunConfig) -> None:
    """Check that what the config names means the same on every node.

    Raises:
        UsageError: a path depends on where this command runs.
    """
    sources = asdict(config.model.sources)
    paths = {f"model.sources.{part}": one for part, one in sources.items() if one and one.startswith((".", "~"))}
    roots = {name: dataset.options.get("root") for name, dataset in config.data.datasets.items()}
    paths |= {f"data.datasets.{name}.options.root": root for name, root in roots.items() if root is not None}
    stores = {"data.store": config.data.store, "checkpoints.store": config.checkpoints.store}
    paths |= {field: store for field, store in stores.items() if store is not None}
    for field, path in paths.items():
        if "://" not in str(path) and not Path(path).is_absolute():
            raise UsageError(f"{field} is {path}: on a cluster, name a folder that all nodes share by its whole path.")


# -- seeing a run through -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a supervisor goes on."""

    max_restarts: int
    seconds: float
    """For how long a cluster that does not answer, or has too few nodes, is waited for."""


def supervise(
    address: str, submission: Submission, job: str, patience: Patience, say: Callable[[str], None]
) -> tuple[Job, int]:
    """Wait for a run's end, and submit it again whenever its job or its cluster died.

    Args:
        address: of the cluster, also after its head was started anew.
        submission: what was submitted.
        job: as which job.
        patience: when to give up.
        say: is told what happens.

    Returns:
        The job that finished the run, and how often it was submitted again.

    Raises:
        InsightEditError: the run failed by itself, or was cancelled, with the exit code of its own command.
        ClusterError: the cluster did not come back in time.
    """
    restarts = 0
    fixed = _patiently(address, patience, say, lambda jobs: jobs.nodes() is not None)
    while True:
        end = _end_of(address, job, patience, say)
        if end is not None and end.status == JobStatus.SUCCEEDED:
            return end, restarts
        reason = "the cluster lost it" if end is None else _death_of(end)
        if restarts == patience.max_restarts:
            raise InsightEditError(
                f"Run {submission.run} died ({reason}) after {restarts} restarts; look at its log and submit it again,"
                " or allow more with --max-restarts."
            )
        restarts += 1
        say(f"Job {job} died: {reason}. Submitting run {submission.run} again, restart {restarts}.")
        job = _patiently(address, patience, say, lambda jobs: _resubmit(jobs, submission, fixed))


def _resubmit(jobs: Jobs, submission: Submission, fixed: bool) -> str:
    # Whoever still holds the run's lease is dead or will end; the job itself waits for that.
    nodes = jobs.nodes()
    if nodes is None and fixed:
        raise ClusterError(f"The cluster at {jobs.place} has not counted its nodes yet; wait a moment.")
    if nodes is not None:
        check_room(needs_of(submission.config), nodes)
    return jobs.start(submission, _next_try(jobs.of(submission.run)))


def _end_of(address: str, job: str, patience: Patience, say: Callable[[str], None]) -> Job | None:
    """A job when it is over; None if a cluster that came back does not know it."""
    while True:
        found = _patiently(
            address, patience, say, lambda jobs: next((one for one in jobs.all() if one.job == job), None)
        )
        if found is None or found.is_over:
            return found
        time.sleep(_POLL_SECONDS)


def _death_of(job: Job) -> str:
    """Why a job died.

    Raises:
        InsightEditError: it did not die: it was cancelled, or came to an end that it would come to again.
    """
    if job.status == JobStatus.STOPPED:
        raise InsightEditError(f"Run {job.run} was cancelled; submit it again to go on with it.")
    if job.exit_code not in _ANSWERS and job.error != _NO_START:
        return job.error if job.exit_code is None else f"exit code {job.exit_code}"
    raise _ANSWERS.get(job.exit_code or 1, InsightEditError)(f"Run {job.run} failed: {last_error(job.message)}")


def last_error(text: str) -> str:
    """The sentence with which a command ended, or its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    return (told or lines or ["it left no log."])[-1]


def _patiently(address: str, patience: Patience, say: Callable[[str], None], ask: Callable[[Jobs], Any]) -> Any:
    """Ask a cluster something, and again while it does not answer or has too few nodes."""
    began = time.monotonic()
    told = ""
    while True:
        try:
            return ask(Jobs(address))
        except (ClusterError, NoRoomError) as error:
            if time.monotonic() - began > patience.seconds:
                raise
            if str(error) != told:
                told = str(error)
                say(f"Waiting: {told}")
        time.sleep(_POLL_SECONDS)


# -- what Ray says ----------------------------------------------------------------------------------------------------


@contextmanager
def _answering(place: str) -> Generator[None]:
    """Say in our words what is wrong with a cluster."""
    try:
        yield
    except AuthenticationError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ClusterError(
            f"The cluster at {place} refuses us ({reason}); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or"
            " RAY_AUTH_TOKEN_PATH to its token."
        ) from None
    except RuntimeError as error:  # What Ray's client makes of any answer but the one it wants.
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise ClusterError(f"The cluster at {place} answers with an error: {reason}; try again.") from error
    except OSError as error:  # Those of requests are among them.
        raise ClusterError(
            f"There is no Ray cluster at {place} ({type(error).__name__}); check --address and that its head runs."
        ) from error


def _job(details: JobDetails) -> Job | None:
    """A job, if it is one of ours."""
    metadata: Mapping[str, str] = details.metadata or {}
    if _RUN not in metadata or details.submission_id is None:
        return None
    return Job(
        run=metadata[_RUN],
        job=details.submission_id,
        status=details.status.value,
        started=_time(details.start_time),
        ended=_time(details.end_time),
        exit_code=details.driver_exit_code,
        config=metadata.get(_CONFIG, ""),
        workdir=metadata.get(_WORKDIR, ""),
        error=details.error_type or "",
        message=details.message or "",
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _next_try(before: Sequence[Job]) -> int:
    return max((job.tried for job in before), default=0) + 1


def _taken(run: str, why: str) -> str:
    return f"The name {run} is taken: {why}; give the new run another --name."
