"""A supervisor beside a cluster that answers as it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from insightedit.platform import submission
from insightedit.platform.capacity import Nodes
from insightedit.platform.config import load_preset
from insightedit.platform.errors import ClusterError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.submission import Job, Patience, Submission, supervise

Answer = ClusterError | tuple[str, int | None] | None
"""Of the cluster, asked for the run's newest job: silence, its status and exit code, or that it knows none."""
GONE = ClusterError("There is no Ray cluster at http://head:8265.")
KILLED, RUNNING, DONE = ("FAILED", -9), ("RUNNING", None), ("SUCCEEDED", 0)


class Script:
    """Stands for `Jobs`: each question gets the next answer, the last one again and again."""

    place = "http://head:8265"

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = list(answers)
        self.started = ["mine"]

    def all(self) -> list[Job]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, ClusterError):
            raise answer
        return [] if answer is None else [job(self.started[-1], *answer)]

    def of(self, run: str) -> list[Job]:
        return [job(name, "FAILED", None) for name in self.started if name.startswith(run)]

    def nodes(self) -> list[Nodes]:
        return [Nodes(resources={"CPU": 8}, labels={})]

    def start(self, what: Submission, tried: int) -> str:
        self.started.append(f"{what.run}.try{tried}")
        return self.started[-1]


def job(name: str, status: str, exit_code: int | None) -> Job:
    return Job(
        run="mine",
        job=name,
        status=status,
        started=None,
        ended=None,
        exit_code=exit_code,
        config="",
        workdir="/work",
        error="" if exit_code is not None else "JOB_SUPERVISOR_ACTOR_DIED",
        message="Job entrypoint command failed, last available logs:\nit begins\nError: it broke.\nand dies\n",
    )


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(submission, "_POLL_SECONDS", 0.0)

    def run(*answers: Answer, max_restarts: int = 2, seconds: float = 60.0) -> tuple[Script, Any, list[str]]:
        script, said = Script(answers), list[str]()
        monkeypatch.setattr(submission, "Jobs", lambda _address: script)  # pyright: ignore[reportUnknownLambdaType]
        what = Submission(run="mine", config=load_preset("nano"), workdir="/work")
        try:
            patience = Patience(max_restarts=max_restarts, seconds=seconds)
            return script, supervise(script.place, what, "mine", patience, said.append), said
        except InsightEditError as error:
            return script, error, said

    return run


def test_a_job_that_was_killed_is_submitted_again(supervised: Any) -> None:
    script, (end, restarts), said = supervised(RUNNING, KILLED, RUNNING, DONE)
    assert script.started == ["mine", "mine.try2"]
    assert (end.job, end.status, restarts) == ("mine.try2", "SUCCEEDED", 1)
    assert said == ["Job mine died: exit code -9. Submitting run mine again, restart 1."]


def test_a_cluster_that_went_and_came_back_empty_gets_the_run_again(supervised: Any) -> None:
    script, (end, restarts), said = supervised(RUNNING, GONE, GONE, GONE, None, RUNNING, DONE)
    assert (end.job, restarts) == (script.started[-1], 1)
    assert said[0] == f"Waiting: {GONE}"
    assert said[1].startswith("Job mine died: the cluster lost it.")
    assert len(said) == 2


def test_a_cluster_that_only_stuttered_still_has_the_job(supervised: Any) -> None:
    script, (end, restarts), _ = supervised(RUNNING, GONE, RUNNING, DONE)
    assert (script.started, end.job, restarts) == (["mine"], "mine", 0)


@pytest.mark.parametrize(
    ("exit_code", "kind"), [(1, InsightEditError), (2, UsageError), (4, NotFoundError)], ids=["1", "2", "4"]
)
def test_a_run_that_ended_by_itself_is_not_submitted_again(supervised: Any, exit_code: int, kind: type) -> None:
    script, error, _ = supervised(RUNNING, ("FAILED", exit_code))
    assert script.started == ["mine"]
    assert type(error) is kind
    assert (error.exit_code, str(error)) == (exit_code, "Run mine failed: it broke.")


def test_a_cancelled_run_ends_its_supervisor(supervised: Any) -> None:
    script, error, _ = supervised(RUNNING, ("STOPPED", None))
    assert script.started == ["mine"]
    assert str(error).startswith("Run mine was cancelled")


def test_a_run_that_dies_again_and_again_is_given_up(supervised: Any) -> None:
    script, error, _ = supervised(("FAILED", None))
    assert len(script.started) == 3
    assert str(error).startswith("Run mine died (JOB_SUPERVISOR_ACTOR_DIED) after 2 restarts")


def test_a_cluster_that_does_not_come_back_is_given_up(supervised: Any) -> None:
    _, error, said = supervised(RUNNING, GONE, seconds=0.0)
    assert error is GONE
    assert said == []
