"""Parts of the server by themselves: settings, version names, a stuck lane, the client's patience, the state file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from insightedit.platform.errors import ClusterError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import VersionEntry, VersionTable
from insightedit.serve.client import Patience, edit_over_http
from insightedit.serve.replicas import Lane
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Limits, ServeSettings
from insightedit.serve.state import ServeState, read_state, write_state


def test_the_deployer_and_the_gateway_need_no_torch() -> None:
    code = "import sys, insightedit.serve.server, insightedit.serve.gateway; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="body_byte"):
        Limits.model_validate({"body_byte": 5})
    with pytest.raises(ValidationError, match="side"):
        Limits(side=20_000)
    assert ServeSettings().host == "127.0.0.1"


def test_version_names() -> None:
    entries = {version: VersionEntry(application=f"a{version}") for version in ("3", "4")}
    entries["4"] = VersionEntry(application="a4", aliases=("champion",))
    table = VersionTable(default="3", versions=entries)
    assert [table.resolve(name) for name in (None, "", "insightedit", "4", "insightedit@champion")] == [
        "3", "3", "3", "4", "4",
    ]  # fmt: skip
    for name in ("5", "latest", "../3", "insightedit@challenger"):
        with pytest.raises(ApiError, match="served are 3, 4"):
            table.resolve(name)


def test_a_stuck_lane_says_so() -> None:
    release = threading.Event()

    async def story() -> None:
        lane = Lane(0.05, lambda: None)
        lane.check()
        work = asyncio.wrap_future(lane.submit(lambda: release.wait(10)))
        await asyncio.sleep(0.15)
        with pytest.raises(RuntimeError, match=r"more than 0\.05 seconds"):
            lane.check()
        release.set()
        assert await work
        lane.check()

    asyncio.run(story())


def test_state_of_a_dead_process_is_no_state(tmp_path: Path) -> None:
    workdir = Workdir.open(tmp_path)
    assert read_state(workdir) is None
    alive = ServeState(
        state="up",
        url="http://127.0.0.1:1",
        model_version="1",
        aliases=(),
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        log=tmp_path / "log",
    )
    write_state(workdir, alive)
    assert read_state(workdir) == alive
    write_state(workdir, alive.model_copy(update={"created": alive.created - 100}))
    assert read_state(workdir) is None
    workdir.serve_state.write_text("{broken")
    assert read_state(workdir) is None


class _Answers(BaseHTTPRequestHandler):
    answers: list[tuple[int, bytes]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, body = self.answers.pop(0)
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after", "0")
        self.send_header("content-type", "application/json" if body.startswith(b"{") else "text/plain")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class names it so)
        """Keep quiet."""


@pytest.fixture
def other_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = (
    b'{"created": 1, "data": [{"b64_json": "aGk=", "seed": 5, "size": "1x1"}], "request_id": "r",'
    b'"output_format": "png", "size": "1x1", "model_version": "2",'
    b'"seed": 5, "timing": {"queue": 0, "condition": 0, "edit": 0, "total": 0}, "usage": {"input_tokens": 1,'
    b'"input_tokens_details": {"text_tokens": 1, "image_tokens": 0}, "output_tokens": 1, "total_tokens": 2}}'
)


def test_the_client_tries_again_and_then_says_why(other_server: str) -> None:
    _Answers.answers = [(429, b"busy"), (503, b""), (500, b"actor died"), (200, GOOD)]
    edited = edit_over_http(other_server, b"image", "x")
    assert (edited.image, edited.model_version, edited.seed) == (b"hi", "2", 5)
    _Answers.answers = [(400, b'{"error": {"message": "n: no."}}')]
    with pytest.raises(UsageError, match="400: n: no"):
        edit_over_http(other_server, b"image", "x")
    _Answers.answers = [(404, b'{"error": {"message": "model is not served."}}')]
    with pytest.raises(NotFoundError, match="not served"):
        edit_over_http(other_server, b"image", "x")
    _Answers.answers = [(500, b'{"error": {"message": "bad luck."}}')] + [(429, b"busy")] * 2
    with pytest.raises(InsightEditError, match="500: bad luck"):
        edit_over_http(other_server, b"image", "x")
    with pytest.raises(InsightEditError, match="429: busy"):
        edit_over_http(other_server, b"image", "x", patience=Patience(retries=1))


def test_the_client_without_a_server_or_an_image(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ClusterError, match="No server answers"):
        edit_over_http("http://127.0.0.1:9", b"image", "x", patience=Patience(retries=1))
    assert time.monotonic() - begun < 5
    with pytest.raises(NotFoundError, match="There is no image"):
        edit_over_http("http://127.0.0.1:9", tmp_path / "none.png", "x")
    with pytest.raises(UsageError, match="cannot be read"):
        edit_over_http("http://127.0.0.1:9", tmp_path, "x")
