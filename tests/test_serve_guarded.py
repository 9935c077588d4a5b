"""A real server that asks for API keys: who comes in, what it writes down, and hostile requests through its proxy."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from hostile_inputs import corpus, status_of
from test_serve_ray import PROMPT, Served, picture, png, register_champion

from insightedit.platform.errors import UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.client import KEY_VARIABLE, edit_over_http
from insightedit.serve.deployment import down, up
from insightedit.serve.keys import Allowance, KeyStore
from insightedit.serve.settings import Destinations, Limits, ServeSettings

pytestmark = pytest.mark.timeout(1200)


class Outside(ThreadingHTTPServer):
    """A host of somebody else's: has a picture, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told: list[tuple[dict[str, str], bytes]] = []

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Outside  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png(picture()))

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.told.append((headers, self.rfile.read(int(headers["content-length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class names it so)
        """Keep quiet."""


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    with Outside() as outside:
        thread = threading.Thread(target=outside.serve_forever, args=(0.05,))
        thread.start()
        yield outside
        outside.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, outside: Outside) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("guarded")
    workdir = Workdir.open(folder / "work")
    version_folder = register_champion(workdir, folder)
    KeyStore(workdir).create("first", Allowance())
    allowed = Destinations.model_validate({"origins": [outside.origin], "networks": ["127.0.0.0/8"]})
    settings = ServeSettings(require_keys=True, limits=Limits(body_seconds=1), image_urls=allowed, webhooks=allowed)
    yield Served(workdir, up(workdir, port=0, settings=settings), version_folder)
    down(workdir)


def ask(served: Served, key: str | None, request_id: str = "", **fields: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    if request_id:
        headers["x-request-id"] = request_id
    url = f"{served.status.url}/v1/images/edits"
    data = {"prompt": PROMPT, "num_inference_steps": "2", **fields}
    return httpx.post(url, data=data, files={"image": ("a", png(picture()))}, headers=headers, timeout=60)


def eventually(served: Served, key: str, status: int) -> httpx.Response:
    """The answer once the gateways have noticed a change of the keys."""
    tries = 50
    while (response := ask(served, key)).status_code != status and tries:
        tries -= 1
        time.sleep(0.1)
    assert response.status_code == status, response.text
    return response


def test_keys_come_and_go_while_the_server_runs(guarded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ask(guarded, None)
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="insightedit"')
    assert refused.json()["error"]["code"] == "missing_api_key"
    assert httpx.get(f"{guarded.status.url}/").status_code == 200
    store = KeyStore(guarded.workdir)
    key, _ = store.create("anna", Allowance(budget_per_minute=16 * 16 * 20))
    eventually(guarded, key, 200)
    assert "budget" in ask(guarded, key, num_inference_steps="21").json()["error"]["message"]
    monkeypatch.setenv(KEY_VARIABLE, key)
    assert edit_over_http(str(guarded.status.url), png(picture()), PROMPT, num_inference_steps=2).image
    store.revoke("anna")
    assert eventually(guarded, key, 401).json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(UsageError, match=KEY_VARIABLE):
        edit_over_http(str(guarded.status.url), png(picture()), PROMPT)


def wait_for(look: Callable[[], list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """What is found once there is enough of it, or five seconds have passed."""
    tries = 50
    while len(found := look()) < count and tries:
        tries -= 1
        time.sleep(0.1)
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    """What all replicas have written down."""
    files = sorted(folder.glob("*.log"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_request_is_found_in_every_log_and_its_prompt_in_none(guarded: Served) -> None:
    key, _ = KeyStore(guarded.workdir).create("logged", Allowance())
    eventually(guarded, key, 200)
    assert ask(guarded, key, "mine-7").status_code == 200
    folder = guarded.workdir.logs / "serve"
    found = wait_for(lambda: [line for line in lines(folder) if line.get("request_id") == "mine-7"], 4)
    # Serve puts the application's name before the deployment's.
    assert {line["deployment"].rpartition("_")[2] for line in found} == {"Gateway", "Conditioner", "Editor"}
    (told,) = [line for line in found if line["message"] == "edit"]
    assert (told["api_key"], told["status"], told["model_version"]) == ("logged", 200, "1")
    jobs = f"{guarded.status.url}/v1/images/edits/jobs/job-8"
    headers = {"authorization": f"Bearer {key}", "x-request-id": "mine-8"}
    fields = {"prompt": PROMPT, "num_inference_steps": "2"}
    assert httpx.put(jobs, data=fields, files={"image": ("a", png(picture()))}, headers=headers).status_code == 202
    found = wait_for(lambda: [line for line in lines(folder) if line.get("request_id") == "mine-8"], 4)
    assert {line["deployment"].rpartition("_")[2] for line in found} == {"Gateway", "Conditioner", "Editor"}
    (told,) = [line for line in found if line["message"] == "edit"]
    assert (told["job"], told["api_key"], told["status"]) == ("job-8", "logged", 200)
    everything = "".join(file.read_text() for file in guarded.workdir.logs.rglob("*") if file.is_file())
    assert PROMPT not in everything
    assert key not in everything


def test_a_job_by_address_is_told_where_it_was_asked_for(guarded: Served, outside: Outside) -> None:
    key, _ = KeyStore(guarded.workdir).create("outside", Allowance())
    eventually(guarded, key, 200)
    expected = ask(guarded, key, seed="7").json()["data"]
    headers = {"authorization": f"Bearer {key}"}
    images = [{"image_url": f"{outside.origin}/a.png"}]
    body = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 7, "images": images, "webhook_images": True}
    url = f"{guarded.status.url}/v1/images/edits/jobs/by-address"
    assert httpx.put(url, json={**body, "webhook": "http://127.0.0.1:9/"}, headers=headers).status_code == 400
    assert httpx.put(url, json={**body, "webhook": outside.origin}, headers=headers).status_code == 202
    end = time.monotonic() + 20
    while not outside.told and time.monotonic() < end:
        time.sleep(0.1)
    ((told, content),) = outside.told
    secret = httpx.get(f"{guarded.status.url}/v1/webhooks/secret", headers=headers).json()["key"]
    openai.OpenAI(api_key="any").webhooks.verify_signature(content, told, secret=secret)
    assert json.loads(content)["data"]["result"]["data"] == expected


def resident(served: Served) -> int:
    """Bytes that the server's processes hold together."""
    server = psutil.Process(served.status.pid)
    total = 0
    for process in [server, *server.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def test_hostile_requests_through_the_proxy(guarded: Served) -> None:
    key, _ = KeyStore(guarded.workdir).create("hostile", Allowance())
    eventually(guarded, key, 200)
    url = httpx.URL(str(guarded.status.url))
    address = (url.host, url.port or 80)
    before = resident(guarded)
    answers: dict[str, int] = {}
    for name, case in corpus().items():
        wire = case.wire().replace(b"\r\nhost: ", f"\r\nauthorization: Bearer {key}\r\nhost: ".encode(), 1)
        answers[name] = status_of(address, wire)
    wrong = {name: status for name, status in answers.items() if not 400 <= status < 500}
    assert not wrong
    assert (resident(guarded) - before) / 2**20 < 200
    assert ask(guarded, key).status_code == 200
