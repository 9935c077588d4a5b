"""Images that a body names by their addresses: fetched from where the config allows, and from nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from test_serve_api import data_url, mask_of
from test_serve_gateway import LIMITS, InvertingBackend, encoded, picture, refused

from insightedit.serve.gateway import EDIT_PATH, build_app
from insightedit.serve.meters import Meters
from insightedit.serve.settings import Destinations

FILES = {
    "/a.png": encoded(picture()),
    "/mask.png": mask_of((slice(4, 12), slice(8, 20))),
    "/text": b"hello",
    "/large": b"x" * (LIMITS.body_bytes + 1),
    "/half": encoded(picture()) + b"x" * (LIMITS.body_bytes // 2),
}


class Host(ThreadingHTTPServer):
    """Has files, and keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []

    def at(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Host  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(302 if self.path == "/moved" else 200 if self.path in FILES else 404)
        self.send_header("location", "/a.png")
        self.end_headers()
        with suppress(OSError):  # Who has heard enough leaves.
            self.wfile.write(FILES.get(self.path, b""))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class names it so)
        """Keep quiet."""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        thread = threading.Thread(target=host.serve_forever, args=(0.01,))
        thread.start()
        yield host
        host.shutdown()
        thread.join()


@pytest.fixture
def client(host: Host) -> Iterator[TestClient]:
    host.asked.clear()
    allowed = Destinations.model_validate({"origins": [host.at("")], "networks": ["127.0.0.0/8"], "seconds": 2})
    with TestClient(build_app(InvertingBackend(), LIMITS, Meters(), image_urls=allowed)) as client:
        yield client


def post(client: TestClient, *addresses: str, mask: str | None = None) -> Any:
    body: dict[str, Any] = {"prompt": "x", "seed": 3, "images": [{"image_url": one} for one in addresses]}
    return client.post(EDIT_PATH, json=body if mask is None else {**body, "mask": {"image_url": mask}})


def test_an_address_is_as_good_as_the_image_itself(client: TestClient, host: Host) -> None:
    by_address = post(client, host.at("/a.png"), data_url(FILES["/a.png"]), mask=host.at("/mask.png"))
    held = post(client, data_url(FILES["/a.png"]), data_url(FILES["/a.png"]), mask=data_url(FILES["/mask.png"]))
    assert by_address.status_code == 200, by_address.text
    assert by_address.json()["data"] == held.json()["data"]
    assert host.asked == ["/a.png", "/mask.png"]


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("/moved", "image_url_not_fetched", "302"),
        ("/missing", "image_url_not_fetched", "404"),
        ("/large", "image_url_not_allowed", "more than"),
        ("/text", "invalid_image", "is not a"),
    ],
)
def test_what_is_no_image_there_is_refused(client: TestClient, host: Host, path: str, code: str, said: str) -> None:
    answer = post(client, host.at(path))
    assert said in refused(answer, 400, "images[0].image_url")
    assert answer.json()["error"]["code"] == code


def test_what_is_fetched_is_counted_together(client: TestClient, host: Host) -> None:
    assert post(client, host.at("/half")).status_code == 200
    assert "more than" in refused(post(client, *[host.at("/half")] * 2), 400, "images[1].image_url")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:9/a.png", "https://example.com/a.png", "http://169.254.169.254/", "file:///etc/passwd", "x", ""],
)
def test_other_places_are_not_asked(client: TestClient, host: Host, address: str) -> None:
    refused(post(client, address), 400, "images[0].image_url")
    assert host.asked == []


def test_without_config_no_place_is_asked(host: Host) -> None:
    host.asked.clear()
    with TestClient(build_app(InvertingBackend(), LIMITS, Meters())) as client:
        assert "fetches nothing" in refused(post(client, host.at("/a.png")), 400, "images[0].image_url")
        files = {"image": ("a", b"")}
        answer = client.post(EDIT_PATH, data={"prompt": "x", "image": host.at("/a.png")}, files=files)
        refused(answer, 400, "image")
    assert host.asked == []


def test_a_job_is_fetched_when_it_is_sent(client: TestClient, host: Host) -> None:
    body = {"prompt": "x", "images": [{"image_url": host.at("/a.png")}]}
    assert client.put(f"{EDIT_PATH}/jobs/one", json=body).status_code == 202
    assert host.asked == ["/a.png"]
    assert client.put(
        f"{EDIT_PATH}/jobs/two", json={"prompt": "x", "images": [{"image_url": "http://[::1]/"}]}
    ).is_error
