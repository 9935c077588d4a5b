"""The client of `insightedit edit --server`: what it sends, when it tries again, and how it says why it gave up."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from insightedit.platform.errors import ClusterError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.processes import began
from insightedit.platform.workdir import Workdir
from insightedit.serve import client
from insightedit.serve.client import Patience, edit_over_http
from insightedit.serve.deployment import status
from insightedit.serve.fleet import FleetStatus
from insightedit.serve.job_client import JobClient, images_of
from insightedit.serve.state import ServeState, write_state

GOOD = (
    b'{"created": 1, "data": [{"b64_json": "aGk=", "seed": 5, "size": "1x1"}, {"b64_json": "aG8=", "seed": 6,'
    b'"size": "1x1"}], "request_id": "r", "output_format": "png", "size": "1x1", "model_version": "2",'
    b'"seed": 5, "timing": {"queue": 0, "condition": 0, "edit": 0, "total": 0}, "usage": {"input_tokens": 1,'
    b'"input_tokens_details": {"text_tokens": 1, "image_tokens": 0}, "output_tokens": 1, "total_tokens": 2}}'
)


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    retry_after: str | None = None
    cut: bool = False
    """Whether the connection breaks in the middle of the body."""


class OtherServer(HTTPServer):
    """Answers what it is told to, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.asked: list[str] = []
        self.keys: list[str] = []
        self.shown: list[str | None] = []
        """API keys."""
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        other = cast(OtherServer, self.server)
        other.asked.append(f"{self.command} {self.path}")
        other.keys.append(self.headers["idempotency-key"])
        other.shown.append(self.headers["authorization"])
        other.bodies.append(self.rfile.read(int(self.headers["content-length"] or 0)))
        answer = other.answers.pop(0)
        self.send_response(answer.status)
        self.send_header("content-length", str(len(answer.body) + answer.cut))
        if answer.retry_after is not None:
            self.send_header("retry-after", answer.retry_after)
        self.send_header("content-type", "application/json" if answer.body.startswith(b"{") else "text/plain")
        self.end_headers()
        self.wfile.write(answer.body)

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class names it so)
        """Keep quiet."""


@pytest.fixture
def other() -> Iterator[OtherServer]:
    server = OtherServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have slept."""
    taken: list[float] = []
    monkeypatch.setattr(client.time, "sleep", taken.append)
    return taken


def test_it_tries_again_under_one_key(other: OtherServer, pauses: list[float]) -> None:
    other.answers = [
        Answer(429, b"busy"), Answer(503), Answer(500, b"actor died"), Answer(502), Answer(408, b"{}"),
        Answer(200, GOOD[:40], cut=True), Answer(409, b"{}", "1"), Answer(200, GOOD),
    ]  # fmt: skip
    edited = edit_over_http(other.url, b"image", "x")
    assert (edited.image, edited.seed, edited.images, edited.seeds) == (b"hi", 5, (b"hi", b"ho"), (5, 6))
    assert edited.model_version == "2"
    assert len(pauses) == 7
    assert len(set(other.bodies)) == 1
    (key,) = set(other.keys)
    other.answers = [Answer(200, GOOD)]
    edit_over_http(other.url, b"image", "x")
    assert other.keys[-1] != key, "another request is another key"


def test_a_status_shows_the_key_that_the_replicas_are_told_for(
    other: OtherServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, pid = Workdir.open(tmp_path), os.getpid()
    write_state(
        workdir,
        ServeState(
            state="up", url=other.url, model_version="1", aliases=(), pid=pid, began=began(pid), log=tmp_path / "log"
        ),
    )
    monkeypatch.setenv(client.KEY_VARIABLE, "ie-1")
    fleet = FleetStatus(versions=(), deployments=())
    other.answers = [Answer(200, b"{}"), Answer(200, fleet.model_dump_json().encode())]
    assert status(workdir).fleet == fleet
    assert other.asked == ["GET /healthz", "GET /v1/status"]
    assert other.shown[1] == "Bearer ie-1"


def test_it_waits_as_long_as_the_server_asks(other: OtherServer, pauses: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    asked = ["7", "0.5", soon, "-3", "9999999", "nonsense", None]
    other.answers = [*(Answer(429, b"busy", one) for one in asked), Answer(200, GOOD)]
    edit_over_http(other.url, b"image", "x")
    assert pauses[:2] == [7, 0.5]
    assert 30 < pauses[2] <= 60
    assert pauses[3:5] == [0, 120]
    assert all(0 < pause <= 8 for pause in pauses[5:])


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        ([Answer(400, b'{"error": {"message": "n: no."}}')], UsageError, "400: n: no"),
        ([Answer(404, b'{"error": {"message": "not served."}}')], NotFoundError, "not served"),
        ([Answer(409, b'{"error": {"message": "another body."}}')], UsageError, "409: another body"),
        ([Answer(401, b'{"error": {"message": "No key."}}')], UsageError, "No key. Put it into INSIGHTEDIT_API_KEY"),
        ([Answer(500, b'{"error": {"message": "bad luck."}}')], InsightEditError, "500: bad luck"),
        ([Answer(504, b'{"error": {"message": "too long."}}')], InsightEditError, "504: too long"),
        ([Answer(429, b"so\n busy")] * 2, InsightEditError, "429: so busy"),
        ([Answer(301)], UsageError, "301: Moved Permanently"),
        ([Answer(200, b"<html>")], InsightEditError, "is no InsightEdit server"),
        ([Answer(200, GOOD[:40], cut=True)] * 2, ClusterError, "broke: "),
    ],
)
def test_it_says_why(other: OtherServer, answers: list[Answer], error: type[InsightEditError], said: str) -> None:
    other.answers = list(answers)
    with pytest.raises(error, match=said) as raised:
        edit_over_http(other.url, b"image", "x", patience=Patience(retries=1))
    assert other.answers == []
    assert "\n" not in str(raised.value)


def test_what_is_asked_for_is_sent_and_nothing_else(other: OtherServer) -> None:
    other.answers = [Answer(200, GOOD)]
    edit_over_http(other.url, b"image", "x", mask=b"mask", n=2, size="8x8", image_branch_scale=0.5, seed=None)
    sent = other.bodies[0]
    for name, value in {"prompt": "x", "n": "2", "size": "8x8", "image_branch_scale": "0.5"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in sent
    assert b'name="mask"; filename="mask"' in sent
    assert b"seed" not in sent


def test_without_a_server_or_an_image(tmp_path: Path, pauses: list[float]) -> None:
    with pytest.raises(ClusterError, match=r"No server answers at http://127\.0\.0\.1:9/"):
        edit_over_http("http://127.0.0.1:9", b"image", "x")
    assert len(pauses) == 2
    for url in ("127.0.0.1:8000", "ftp://x", "http://", "nonsense"):
        with pytest.raises(UsageError, match="is no address of a server"):
            edit_over_http(url, b"image", "x")
    with pytest.raises(NotFoundError, match="There is no image"):
        edit_over_http("http://127.0.0.1:9", tmp_path / "none.png", "x")
    with pytest.raises(UsageError, match="cannot be read"):
        edit_over_http("http://127.0.0.1:9", tmp_path, "x")


def job(status: str, **more: object) -> Answer:
    known: dict[str, object] = {"started_at": 2, "ended_at": None, "model_version": "2", "error": None, "result": None}
    fixed = {"id": "a/b", "status": status, "created_at": 1, "expires_at": 9, "seed": 5, "webhook_status": None}
    return Answer(200, json.dumps({**fixed, **known, **more}).encode())


def test_a_job_is_sent_waited_for_and_cancelled(other: OtherServer, pauses: list[float]) -> None:
    jobs = JobClient(other.url)
    other.answers = [Answer(429, b"busy"), job("queued")]
    assert jobs.submit(b"image", "x", job_id="a/b", n=2).status == "queued"
    assert other.asked == ["PUT /v1/images/edits/jobs/a%2Fb"] * 2
    assert b'name="n"\r\n\r\n2' in other.bodies[1]
    other.answers = [job("queued"), job("in_progress"), job("completed", result=json.loads(GOOD))]
    del pauses[:]
    assert images_of(jobs.wait("a/b", every=0.5)) == (b"hi", b"ho")
    assert pauses == [0.5, 0.5]
    assert other.asked[-1] == "GET /v1/images/edits/jobs/a%2Fb"
    other.answers = [job("in_progress")]
    assert jobs.wait("a/b", seconds=0).status == "in_progress"
    other.answers = [job("cancelled")]
    assert jobs.cancel("a/b").status == "cancelled"
    assert other.asked[-1] == "POST /v1/images/edits/jobs/a%2Fb/cancel"
    other.answers = [Answer(409, b'{"error": {"message": "There is another."}}')]
    with pytest.raises(UsageError, match="There is another"):
        jobs.submit(b"image", "x", job_id="a/b")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (job("queued"), "has no images: it is queued"),
        (job("cancelled"), "it is cancelled"),
        (job("completed"), "not kept any more"),
        (job("failed", error={"message": "n: no.", "type": "t", "param": None, "code": None}), "failed: n: no"),
    ],
)
def test_a_job_without_images_says_why(other: OtherServer, answer: Answer, said: str) -> None:
    other.answers = [answer]
    with pytest.raises(InsightEditError, match=said):
        images_of(JobClient(other.url).poll("a/b"))
