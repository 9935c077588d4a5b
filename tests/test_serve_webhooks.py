"""The ends of jobs, told to whom their callers named: signed, again when not heard, and only where allowed."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from test_serve_gateway import encoded, picture
from test_serve_idempotency import code
from test_serve_jobs import JobSite, bearer, made, run

from insightedit.platform.workdir import Workdir
from insightedit.serve import crew, edit_jobs, webhooks
from insightedit.serve.door import Access
from insightedit.serve.keys import Allowance, KeyRing, KeyStore
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Destinations
from insightedit.serve.webhooks import shown, signed

KEY_PATH = "/v1/webhooks/secret"


class Receiver(ThreadingHTTPServer):
    """Answers with the statuses it is told to, then with 204, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses: list[int] = []
        self.told: list[tuple[dict[str, str], bytes]] = []

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.told.append((headers, self.rfile.read(int(headers["content-length"]))))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 204)
        self.send_header("location", "/elsewhere")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class names it so)
        """Keep quiet."""


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways that look around more often, and messages that are sent again sooner."""
    monkeypatch.setattr(edit_jobs, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(crew, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(webhooks, "PAUSES", (0.05, 0.05, 0.05))


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver() as receiver:
        allowed = Destinations.model_validate({"origins": [receiver.origin], "networks": ["127.0.0.0/8"], "seconds": 1})
        monkeypatch.setattr(JobSite, "webhooks", allowed)
        thread = threading.Thread(target=receiver.serve_forever, args=(0.01,))
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


async def told(site: JobSite, status: str, job_id: str = "one", api_key: str = "") -> Any:
    """A job once its end has been told, or never will be."""
    async with asyncio.timeout(60):
        while (job := (await site.get(job_id, api_key)).json())["webhook_status"] != status:
            assert job["webhook_status"] in (None, "pending"), job
            await asyncio.sleep(0.02)
    return job


def verified(secret: str, message: tuple[dict[str, str], bytes]) -> Any:
    """What a message says, its signature checked by OpenAI's client."""
    headers, body = message
    openai.OpenAI(api_key="any").webhooks.verify_signature(body, headers, secret=secret)
    return json.loads(body)


def test_a_signature_is_that_of_the_standard() -> None:
    # The example in Standard Webhooks' own tests.
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', 1614265330.5)
    assert headers["webhook-timestamp"] == "1614265330"
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert shown(key) == "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_an_end_is_told_once_signed_and_without_images(tmp_path: Path, receiver: Receiver) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        await other.begin()
        assert (await one.put(webhook=f"{receiver.origin}/hook?for=me")).json()["webhook_status"] is None
        job = await told(other, "delivered")
        answer = await other.client.get(KEY_PATH)
        assert answer.headers["cache-control"] == "no-store"
        (message,) = receiver.told
        said = verified(answer.json()["key"], message)
        assert said["type"] == "image_edit.job.completed"
        del job["webhook_status"]
        assert said["data"] == {**job, "result": None}
        with pytest.raises(openai.InvalidWebhookSignatureError):
            verified(answer.json()["key"], (message[0], message[1].replace(b"completed", b"cancelled")))
        await one.put("two", webhook=f"{receiver.origin}/hook", webhook_images="true")
        job = await told(one, "delivered", "two")
        assert made(verified(answer.json()["key"], receiver.told[1])["data"]) == made(job)
        assert receiver.told[1][0]["webhook-id"] != receiver.told[0][0]["webhook-id"]
        assert await one.store.names("job-untold/") == []

    run(story, tmp_path)


def test_failures_and_cancellations_are_told_too(tmp_path: Path, receiver: Receiver) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        one.backend.failure = ApiError(400, "invalid_value", "The model cannot read this.", "prompt")
        await one.put("bad", webhook=receiver.origin)
        await told(one, "delivered", "bad")
        one.backend.failure = None
        await one.hold("unwanted", webhook=receiver.origin)
        await other.cancel("unwanted")
        await told(one, "delivered", "unwanted")
        first, second = (json.loads(body) for _, body in receiver.told)
        assert (first["type"], first["data"]["error"]["code"]) == ("image_edit.job.failed", "invalid_value")
        assert (second["type"], second["data"]["id"]) == ("image_edit.job.cancelled", "unwanted")

    run(story, tmp_path)


def test_who_does_not_hear_is_told_again_and_not_for_ever(tmp_path: Path, receiver: Receiver) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        # A redirection is not followed.
        receiver.statuses = [500, 302, 429]
        await one.put(webhook=receiver.origin)
        await told(one, "delivered")
        assert len(receiver.told) == 4
        assert len({headers["webhook-id"] for headers, _ in receiver.told}) == 1
        assert len({body for _, body in receiver.told}) == 1
        receiver.statuses = [500] * 9
        await one.put("two", webhook=receiver.origin)
        await told(one, "failed", "two")
        assert len(receiver.told) == 8
        receiver.statuses = [410]
        await one.put("three", webhook=receiver.origin)
        await told(one, "failed", "three")
        assert len(receiver.told) == 9

    run(story, tmp_path)


def test_an_end_is_told_though_the_gateway_died(tmp_path: Path, receiver: Receiver) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.put(webhook=receiver.origin)
        await one.cancel()
        # It has it in hand, and says nothing more.
        book = one.shared.book
        (path,) = await book.untold()
        assert await book.take_untold(path, 0.2)
        assert await book.take_untold(path, 0.2) is None
        await other.begin()
        await told(other, "delivered")

    run(story, tmp_path)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/",
        "https://example.com/",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://user@127.0.0.1/",
        "x" * 3000,
        "",
    ],
)
def test_nobody_is_told_but_whom_the_config_allows(tmp_path: Path, receiver: Receiver, address: str) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        answer = await one.put(webhook=address)
        assert code(answer, 400) in ("webhook_not_allowed", "invalid_value")
        assert answer.json()["error"]["param"] == "webhook"
        assert await one.store.names("") == []

    run(story, tmp_path)


def test_without_config_nobody_is_told_and_an_edit_has_no_webhook(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        assert code(await one.put(webhook="https://example.com/"), 400) == "webhook_not_allowed"
        files = {"image": ("a", encoded(picture()))}
        data = {"prompt": "x", "webhook": "https://example.com/"}
        answer = await one.client.post("/v1/images/edits", data=data, files=files)
        assert code(answer, 400) == "unknown_parameter"

    run(story, tmp_path)


def test_a_webhook_is_part_of_what_a_job_is(tmp_path: Path, receiver: Receiver) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.put(webhook=receiver.origin)
        assert (await other.put(webhook=receiver.origin)).status_code == 200
        assert code(await other.put(), 409) == "job_id_taken"

    run(story, tmp_path)


def test_every_caller_has_a_key_of_its_own(tmp_path: Path) -> None:
    store = KeyStore(Workdir.open(tmp_path / "work"))
    anna, ben = (store.create(name, Allowance())[0] for name in ("anna", "ben"))

    async def story(one: JobSite, other: JobSite) -> None:
        asked = [await site.client.get(KEY_PATH, headers=bearer(key)) for site in (one, other) for key in (anna, ben)]
        keys = [answer.json()["key"] for answer in asked]
        assert keys[:2] == keys[2:]
        assert keys[0] != keys[1]
        assert len(base64.b64decode(keys[0].removeprefix("whsec_"))) == 32
        assert code(await one.client.get(KEY_PATH), 401) == "missing_api_key"

    run(story, tmp_path, access=Access(KeyRing(store)))
