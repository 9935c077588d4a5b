"""OpenAI's interface over a model that turns colours around: bodies, several images, masks, sizes, streams."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image
from test_serve_gateway import LIMITS, InvertingBackend, encoded, picture, refused

from insightedit.serve.backend import EditJob, EditOutcome, PartialTaker
from insightedit.serve.gateway import EDIT_PATH, build_app
from insightedit.serve.meters import Meters


class WatchedBackend(InvertingBackend):
    """Says when an edit is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    async def edit(self, version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        try:
            return await super().edit(version, job, on_partial)
        finally:
            self.ended.set()


@pytest.fixture
def backend() -> WatchedBackend:
    return WatchedBackend()


@pytest.fixture
def client(backend: WatchedBackend) -> Iterator[TestClient]:
    with TestClient(build_app(backend, LIMITS, Meters()), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def address(backend: WatchedBackend) -> Iterator[str]:
    with served(backend) as address:
        yield address


@contextmanager
def served(backend: InvertingBackend) -> Generator[str]:
    """The app behind a real server, for clients that open connections."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build_app(backend, LIMITS, Meters()), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def pixels_of(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def mask_of(hole: tuple[slice, slice], size: tuple[int, int] = (32, 32)) -> bytes:
    alpha = np.full(size, 255, np.uint8)
    alpha[hole] = 0
    return encoded(Image.fromarray(np.dstack([np.zeros((*size, 3), np.uint8), alpha])))


def test_several_images_and_seeds_come_in_order(client: TestClient, backend: WatchedBackend) -> None:
    files = [("image[]", ("a.png", encoded(picture(32, 32)))), ("image[]", ("b.png", encoded(picture(48, 16))))]
    body = client.post(EDIT_PATH, data={"prompt": "x", "n": "2", "seed": "7"}, files=files).json()
    assert [(one["seed"], one["size"]) for one in body["data"]] == [
        (7, "32x32"), (8, "32x32"), (7, "48x16"), (8, "48x16"),
    ]  # fmt: skip
    assert sorted(job.seed for job in backend.jobs) == [7, 7, 8, 8]
    assert np.array_equal(pixels_of(body["data"][2]["b64_json"]), 255 - picture(48, 16))


def test_json_is_as_good_as_a_form(client: TestClient) -> None:
    image = encoded(picture())
    form = client.post(EDIT_PATH, data={"prompt": "x", "seed": "3"}, files={"image": ("a", image)}).json()
    content = {"prompt": "x", "seed": 3, "images": [{"image_url": data_url(image)}]}
    body = client.post(EDIT_PATH, json=content).json()
    assert body["data"] == form["data"]
    for source, word in (({"image_url": "http://127.0.0.1/a.png"}, "data:"), ({"file_id": "file-1"}, "file_id")):
        message = client.post(EDIT_PATH, json={"prompt": "x", "images": [source]})
        assert message.status_code == 400
        assert word in message.json()["error"]["message"]


def test_outside_the_mask_nothing_changes(client: TestClient) -> None:
    hole = (slice(4, 12), slice(8, 20))
    files = {"image": ("a.png", encoded(picture())), "mask": ("m.png", mask_of(hole))}
    edited = pixels_of(client.post(EDIT_PATH, data={"prompt": "x"}, files=files).json()["data"][0]["b64_json"])
    expected = picture().copy()
    expected[hole] = 255 - expected[hole]
    assert np.array_equal(edited, expected)
    files["mask"] = ("m.png", mask_of(hole, (32, 16)))
    refused(client.post(EDIT_PATH, data={"prompt": "x"}, files=files), 400, "mask")


@pytest.mark.parametrize(("size", "expected"), [("auto", (32, 48)), ("64x96", (64, 96)), ("20x20", (20, 20))])
def test_an_edit_has_the_size_that_is_asked_for(client: TestClient, size: str, expected: tuple[int, int]) -> None:
    files = {"image": ("a.png", encoded(picture(32, 48)))}
    body = client.post(EDIT_PATH, data={"prompt": "x", "size": size}, files=files).json()
    height, width = pixels_of(body["data"][0]["b64_json"]).shape[:2]
    assert (width, height) == expected
    assert body["size"] == f"{width}x{height}"


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def test_a_stream_has_partial_images_and_then_the_finished_one(client: TestClient) -> None:
    fields = {"prompt": "x", "seed": "5", "stream": "true", "partial_images": "2"}
    response = client.post(EDIT_PATH, data=fields, files={"image": ("a.png", encoded(picture()))})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert [name for name, _ in found] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [content["partial_image_index"] for _, content in found[:2]] == [0, 1]
    done = found[2][1]
    assert (done["type"], done["seed"], done["model_version"]) == ("image_edit.completed", 5, "3")
    assert np.array_equal(pixels_of(done["b64_json"]), 255 - picture())


def test_a_stream_that_fails_at_once_keeps_its_status(client: TestClient, backend: WatchedBackend) -> None:
    backend.failure = RuntimeError("broken")
    response = client.post(EDIT_PATH, data={"prompt": "x", "stream": "true"}, files={"image": encoded(picture())})
    refused(response, 500, None)


def test_who_leaves_has_the_edit_cancelled(address: str, backend: WatchedBackend) -> None:
    backend.gate = threading.Event()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}{EDIT_PATH}", data={"prompt": "x"}, files={"image": encoded(picture())}, timeout=0.5)
    assert backend.ended.wait(5)
    assert not backend.gate.is_set()


def test_openais_client_edits_streams_and_gets_typed_errors(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    image = ("a.png", encoded(picture()), "image/png")
    body = {"seed": 5, "num_inference_steps": 4}
    answer = client.images.edit(image=image, prompt="x", model="champion", n=2, extra_body=body)
    assert answer.data is not None
    first = answer.data[0].b64_json
    assert first is not None
    assert np.array_equal(pixels_of(first), 255 - picture())
    assert len(answer.data) == 2
    assert answer.usage is not None
    assert answer.usage.total_tokens == 270
    stream = client.images.edit(image=image, prompt="x", stream=True, partial_images=2, extra_body=body)
    found = list(stream)
    assert [event.type for event in found] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert found[-1].b64_json == first
    with pytest.raises(openai.NotFoundError, match="served are 3"):
        client.images.edit(image=image, prompt="x", model="gpt-image-1")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=image, prompt="x", input_fidelity="high")
    assert caught.value.param == "input_fidelity"
    same = httpx.post(
        f"{address}{EDIT_PATH}", data={"prompt": "x", "seed": "5", "num_inference_steps": "4"}, files={"image": image}
    )
    assert same.json()["data"][0]["b64_json"] == first
