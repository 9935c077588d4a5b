"""A gateway that is being stopped: what it refuses, what it finishes, and when it has nothing in hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.serve.exceptions import RayServeException
from test_serve_gateway import LIMITS, InvertingBackend, post

from insightedit.serve.draining import Draining
from insightedit.serve.gateway import EDIT_PATH, build_app
from insightedit.serve.meters import Meters
from insightedit.serve.schema import ApiError
from insightedit.serve.server import in_hand


@pytest.fixture
def backend() -> InvertingBackend:
    return InvertingBackend()


@pytest.fixture
def meters() -> Meters:
    return Meters()


@pytest.fixture
def draining(meters: Meters) -> Draining:
    return Draining(LIMITS, meters)


@pytest.fixture
def client(backend: InvertingBackend, draining: Draining, meters: Meters) -> Iterator[TestClient]:
    with TestClient(build_app(backend, LIMITS, meters, draining=draining)) as client:
        yield client


def refusal(response: Any) -> str:
    assert response.status_code == 503
    assert response.headers["retry-after"] == str(LIMITS.retry_after)
    assert "x-request-id" in response.headers
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("server_error", None)
    return error["code"]


def test_new_edits_are_refused_and_the_rest_is_answered(client: TestClient, draining: Draining) -> None:
    assert post(client).status_code == 200
    assert client.get("/readyz").status_code == 200
    assert draining.begin() == 0
    assert refusal(post(client)) == "stopping"
    assert refusal(client.get("/readyz")) == "stopping"
    assert 'insightedit_edit_rejected_total{reason="stopping"} 1.0' in client.get("/metrics").text
    assert {client.get(path).status_code for path in ("/livez", "/", "/v1/models")} == {200}
    job = f"{EDIT_PATH}/jobs/a"
    assert client.get(job).status_code == 404
    assert client.put(job, data={"prompt": "x"}, files={"image": b"none"}).status_code == 400


@pytest.mark.parametrize("stream", [None, "true"])
def test_an_edit_that_is_in_hand_is_finished_to_its_last_byte(
    client: TestClient, backend: InvertingBackend, draining: Draining, stream: str | None
) -> None:
    backend.gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        edit = pool.submit(post, client, stream=stream)
        while not backend.jobs:
            time.sleep(0.01)
        assert draining.begin() == 1
        assert refusal(post(client)) == "stopping"
        assert draining.begin() == 1
        backend.gate.set()
        assert edit.result().status_code == 200
    assert draining.begin() == 0


def test_an_edit_that_fails_is_not_in_hand_any_more(
    client: TestClient, backend: InvertingBackend, draining: Draining
) -> None:
    backend.failure = ApiError(503, "unavailable", "nobody is there")
    assert post(client).status_code == 503
    assert draining.begin() == 0


class Gateways:
    """Stands in for Serve's handle of the gateways."""

    def __init__(self, *answers: int | Exception, failure: Exception | None = None) -> None:
        self.answers = list(answers)
        self.failure = failure

    def broadcast(self, method: str) -> Gateways:
        assert method == "drain"
        return self

    def results(self, **_: Any) -> list[int | Exception]:
        if self.failure is not None:
            raise self.failure
        return self.answers


def test_all_gateways_are_asked_and_one_that_does_not_say_may_have_something() -> None:
    assert in_hand(Gateways(0, 0)) == 0
    assert in_hand(Gateways(2, 1)) == 3
    assert in_hand(Gateways(0, RuntimeError("it died"))) == 1
    assert in_hand(Gateways(failure=TimeoutError())) == 1
    assert in_hand(Gateways(failure=RayServeException("there is none"))) == 0
