"""A hundred and eighty hostile requests against a gateway process: each a 4xx, little memory, the next edit fine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from hostile_inputs import BOUNDARY, FORM_TYPE, Hostile, corpus, form, status_of

from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Limits
from insightedit.serve.uploads import decode_upload

MEGABYTES = 2**20
SERVER = """
import sys
import uvicorn
from test_serve_gateway import InvertingBackend
from insightedit.serve.door import Access
from insightedit.serve.gateway import build_app
from insightedit.serve.meters import Meters
from insightedit.serve.settings import Limits
limits = Limits(body_seconds=0.5)
app = build_app(InvertingBackend(), limits, Meters(), access=Access(None))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


class Server(NamedTuple):
    address: tuple[str, int]
    process: psutil.Process
    log: Path

    def edits(self) -> bool:
        """Whether an edit works."""
        return status_of(self.address, Hostile(body=form()).wire()) == 200


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("hostile") / "log"
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)], cwd=Path(__file__).parent, stdout=output, stderr=output
        )
    found = Server(("127.0.0.1", port), psutil.Process(process.pid), log)
    for _ in range(300):
        try:
            if found.edits():
                break
        except OSError:
            assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    yield found
    process.terminate()
    process.wait()


def test_every_hostile_request_is_refused(server: Server) -> None:
    cases = corpus()
    assert len(cases) > 150
    before, most = server.process.memory_info().rss, 0
    answers: dict[str, int] = {}
    for name, case in cases.items():
        answers[name] = status_of(server.address, case.wire())
        most = max(most, server.process.memory_info().rss)
        if len(answers) % 20 == 0:
            assert server.edits(), f"no edit after {name}"
    wrong = {name: status for name, status in answers.items() if not 400 <= status < 500}
    said = f"{Counter(answers.values())}, memory grew by {(most - before) / MEGABYTES:.0f} MB"
    print(f"\n{said}")  # noqa: T201  (pytest -s shows it)
    assert not wrong
    assert (most - before) / MEGABYTES < 200, said
    assert server.edits()
    assert "Traceback" not in server.log.read_text()


def test_bombs_at_the_same_time_take_little_memory(server: Server) -> None:
    bombs = [case.wire() for name, case in corpus().items() if "bomb" in name or "claims" in name]
    before = server.process.memory_info().rss
    with ThreadPoolExecutor(16) as clients:
        statuses = list(clients.map(lambda wire: status_of(server.address, wire), bombs * 4))
    assert all(400 <= status < 500 for status in statuses), statuses
    assert (server.process.memory_info().rss - before) / MEGABYTES < 200
    assert server.edits()


def test_slow_bodies_are_given_up_and_let_others_through(server: Server) -> None:
    wire = Hostile(body=form()).wire()
    with ThreadPoolExecutor(8) as clients:
        slow = [clients.submit(status_of, server.address, wire, pause=1.0) for _ in range(8)]
        time.sleep(0.2)
        assert server.edits()
        assert {one.result() for one in slow} == {408}
    # Who only announces a body and then is silent is given up as well.
    silent = Hostile(length="5000").wire()
    assert status_of(server.address, silent) == 408
    assert status_of(server.address, Hostile(length="5000", headers={"expect": "100-continue"}).wire()) in (100, 408)


def test_who_hangs_up_leaves_nothing_behind(server: Server) -> None:
    import socket

    wire = Hostile(body=form()).wire()
    for share in (0.1, 0.5, 0.9):
        for _ in range(20):
            with socket.create_connection(server.address) as connection:
                connection.sendall(wire[: int(len(wire) * share)])
    time.sleep(0.2)
    assert server.edits()
    assert "Traceback" not in server.log.read_text()


def test_an_answer_to_a_wrong_request_tells_nothing_of_the_server(server: Server) -> None:
    import httpx

    url = f"http://127.0.0.1:{server.address[1]}"
    for path, body in (("/v1/images/edits", form(b"x")), ("/page/../x", b""), ("/nowhere", b"")):
        response = httpx.post(url + path, content=body, headers={"content-type": FORM_TYPE})
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert not any(word in response.text for word in ("Traceback", ".py", "site-packages", BOUNDARY))


def test_a_jpeg_of_many_scans_is_refused_unread() -> None:
    from hostile_inputs import encoded, many_scans, noise

    limits = Limits()
    assert decode_upload(encoded(noise(), "JPEG", progressive=True), limits).shape == (32, 32, 3)
    with pytest.raises(ApiError, match="scans"):
        decode_upload(many_scans(500), limits)
