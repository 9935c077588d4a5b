"""Requests under an `Idempotency-Key`, at gateways that share a store: edited once, answered with the same bytes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from test_serve_api import events
from test_serve_gateway import LIMITS, InvertingBackend, encoded, picture
from test_serve_store import Clock

from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import EditJob, EditOutcome, PartialTaker, VersionEntry, VersionTable
from insightedit.serve.door import Access
from insightedit.serve.gateway import EDIT_PATH, build_app
from insightedit.serve.keys import Allowance, KeyRing, KeyStore
from insightedit.serve.meters import Meters
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Destinations, StateSettings
from insightedit.serve.shared import Shared
from insightedit.serve.state_store import Entry, SqliteStore, StoreUnreachableError

SETTINGS = StateSettings(lease_seconds=0.5)


class MortalStore(SqliteStore):
    """Reaches nothing once its gateway is dead."""

    dead = False

    async def get(self, name: str) -> bytes | None:
        self._check()
        return await super().get(name)

    async def change(self, expected: Any, writes: Any, part: float = 1.0) -> bool:
        self._check()
        return await super().change(expected, writes, part)

    def _check(self) -> None:
        if self.dead:
            raise StoreUnreachableError("The gateway is dead.")


class SeededBackend(InvertingBackend):
    """Another image for another seed."""

    shift = 0

    async def edit(self, version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        outcome = await super().edit(version, job, on_partial)
        rng = np.random.default_rng(job.seed + self.shift)
        noise = rng.integers(0, 256, job.pixels.shape, dtype=np.uint8)
        return replace(outcome, pixels=noise)


class Site:
    """A gateway."""

    webhooks = Destinations()

    def __init__(self, file: Path, settings: StateSettings, clock: Callable[[], float], access: Access | None) -> None:
        self.backend = SeededBackend()
        self.store = MortalStore(file, settings.bytes, clock)
        self.shared = Shared.of(self.store, settings, LIMITS, self.webhooks, clock)
        self.app = build_app(self.backend, LIMITS, Meters(), access=access, shared=self.shared)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    async def post(self, key: str | None = "one", image: Any = None, api_key: str = "", **fields: str) -> Any:
        headers = {} if key is None else {"idempotency-key": key}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        files = {"image": ("a", encoded(picture()) if image is None else image)}
        return await self.client.post(EDIT_PATH, data={"prompt": "x", **fields}, files=files, headers=headers)

    async def busy(self) -> asyncio.Task[Any]:
        """A request under way, whose edit has begun and waits for the gate."""
        self.backend.gate = threading.Event()
        begun = len(self.backend.jobs)
        task = asyncio.create_task(self.post())
        while len(self.backend.jobs) == begun:
            await asyncio.sleep(0.01)
        return task

    def open(self) -> None:
        assert self.backend.gate is not None
        self.backend.gate.set()


def run(
    story: Callable[[Site, Site], Awaitable[None]],
    folder: Path,
    settings: StateSettings = SETTINGS,
    clock: Callable[[], float] | None = None,
    access: Access | None = None,
) -> None:
    """Have two gateways over one store."""

    async def tell() -> None:
        sites = [Site(folder / "state.db", settings, clock or time.time, access) for _ in range(2)]
        await story(*sites)
        for site in sites:
            await site.client.aclose()
            await site.store.close()

    asyncio.run(tell())


def images(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [one["b64_json"] for one in response.json()["data"]]


def code(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


def test_the_same_key_gives_the_same_bytes_though_no_seed_is_given(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        answers = [await site.post() for site in (one, other, one)]
        assert len({answer.content for answer in answers}) == 1
        assert [answer.headers.get("idempotent-replayed") for answer in answers] == [None, "true", "true"]
        assert {answer.headers["x-insightedit-seed"] for answer in answers} == {str(answers[0].json()["seed"])}
        assert len(one.backend.jobs) + len(other.backend.jobs) == 1
        assert images(await one.post("two")) != images(answers[0])
        assert images(await one.post(None)) != images(answers[0])
        assert "insightedit_edit_replayed_total 1.0" in (await other.client.get("/metrics")).text

    run(story, tmp_path)


def test_while_the_first_is_running_the_others_wait_for_it(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        first = await one.busy()
        joined = [asyncio.create_task(site.post()) for site in (one, other)]
        # Longer than a lease: it is renewed.
        await asyncio.sleep(1.2)
        assert not any(task.done() for task in joined)
        one.open()
        assert len({(await task).content for task in (first, *joined)}) == 1
        assert len(one.backend.jobs) + len(other.backend.jobs) == 1

    run(story, tmp_path)


def test_a_gateway_that_dies_has_its_edit_done_by_another_with_its_seed(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        first = await one.busy()
        one.store.dead = True
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        answer = await other.post()
        assert answer.json()["seed"] == one.backend.jobs[0].seed == other.backend.jobs[0].seed
        one.store.dead = False
        one.open()
        assert (await one.post()).content == answer.content

    run(story, tmp_path)


def test_a_gateway_that_was_only_slow_answers_with_what_the_other_made(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        one.backend.shift = 1  # As if other bytes came out, as they may where edits are batched.
        first = await one.busy()
        one.store.dead = True
        answer = await other.post()
        one.store.dead = False
        one.open()
        assert (await first).content == answer.content
        assert len(one.backend.jobs) == len(other.backend.jobs) == 1

    run(story, tmp_path)


def test_who_leaves_lets_the_next_one_begin_at_once(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        first = await one.busy()
        waiting = asyncio.create_task(other.post())
        await asyncio.sleep(0.1)
        first.cancel()
        answer = await asyncio.wait_for(waiting, 5)
        assert answer.json()["seed"] == one.backend.jobs[0].seed

    run(story, tmp_path, StateSettings(lease_seconds=60))


def test_a_key_belongs_to_its_request(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        await one.post(seed="3")
        for fields in ({"seed": "4"}, {}, {"seed": "3", "prompt": "y"}, {"seed": "3", "output_format": "jpeg"}):
            assert code(await other.post(**fields), 422) == "idempotency_key_reused"
        assert code(await other.post(image=encoded(picture(16, 16)), seed="3"), 422) == "idempotency_key_reused"
        same = await other.post(seed="3", n="1", timeout="3")
        assert same.headers["idempotent-replayed"] == "true"

    run(story, tmp_path)


def test_what_is_refused_for_its_fields_leaves_the_key_free(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        assert code(await one.post(n="50"), 400) == "invalid_value"
        assert code(await one.post(image=b"none"), 400) == "invalid_image"
        images(await other.post())

    run(story, tmp_path)


@pytest.mark.parametrize("key", ["", "x" * 256, "t\tb", "a b", "\u00e9"])
def test_what_cannot_be_a_key_is_named(tmp_path: Path, key: str) -> None:
    async def story(one: Site, other: Site) -> None:
        headers = [(b"idempotency-key", key.encode())]
        files = {"image": ("a", encoded(picture()))}
        answer = await one.client.post(EDIT_PATH, data={"prompt": "x"}, files=files, headers=headers)
        assert code(answer, 400) == "invalid_value"
        assert answer.json()["error"]["param"] == "Idempotency-Key"

    run(story, tmp_path)


def test_keys_of_different_callers_are_different(tmp_path: Path) -> None:
    store = KeyStore(Workdir.open(tmp_path / "work"))
    anna, ben = (store.create(name, Allowance())[0] for name in ("anna", "ben"))

    async def story(one: Site, other: Site) -> None:
        first = await one.post(api_key=anna)
        assert images(await other.post(api_key=ben, seed="8")) != images(first)
        assert (await other.post(api_key=anna)).content == first.content

    run(story, tmp_path, access=Access(KeyRing(store)))


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (ApiError(503, "unavailable", "Nobody is there."), 503),
        (ApiError(429, "overloaded", "Full.", retry_after=1), 429),
        (ApiError(400, "invalid_value", "The model cannot read this.", "prompt"), 400),
        (RuntimeError("broken"), 500),
    ],
)
def test_errors_are_not_kept_but_seed_and_version_are(tmp_path: Path, failure: Exception, status: int) -> None:
    async def story(one: Site, other: Site) -> None:
        one.backend.failure = failure
        assert (await one.post(num_inference_steps="3")).status_code == status
        answer = await asyncio.wait_for(other.post(num_inference_steps="3"), 5)
        assert answer.json()["seed"] == one.backend.jobs[0].seed

    run(story, tmp_path, StateSettings(lease_seconds=60))


def test_a_stream_keeps_and_joins(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        fields = {"n": "2", "stream": "true", "partial_images": "1"}
        begun = events((await one.post(**fields)).text)
        done = [content for name, content in begun if name == "image_edit.completed"]
        assert len(begun) == 4
        joined = await other.post(**fields)
        assert joined.headers["idempotent-replayed"] == "true"
        assert [content for _, content in events(joined.text)] == sorted(done, key=lambda one: one["image_index"])
        whole = await other.post(n="2")
        assert images(whole) == [one["b64_json"] for one in sorted(done, key=lambda one: one["image_index"])]
        assert whole.json()["usage"]["total_tokens"] == 270
        assert other.backend.jobs == []

    run(story, tmp_path)


def test_when_the_images_are_gone_they_are_made_again(tmp_path: Path) -> None:
    clock = Clock()
    settings = StateSettings(answer_seconds=100, key_seconds=1000)

    async def story(one: Site, other: Site) -> None:
        first = await one.post()
        clock.now += 200
        again = await other.post()
        assert images(again) == images(first)
        assert len(other.backend.jobs) == 1
        assert (await one.post()).content == again.content
        clock.now += 200
        other.backend.shift = 1
        assert code(await other.post(), 410) == "answer_gone"
        assert images(await one.post()) == images(first)
        clock.now += 200
        other.backend.table = VersionTable(default="4", versions={"4": VersionEntry(application="insightedit-v4")})
        assert code(await other.post(), 410) == "version_gone"
        clock.now += 2000
        assert images(await other.post()) != images(first)

    run(story, tmp_path, settings, clock)


def test_a_full_store_answers_and_has_retries_made_again(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        await one.store.change({}, {"filler": Entry(bytes(9_000), 4e9)})
        first = await one.post()
        second = await other.post()
        assert images(first) == images(second)
        assert len(other.backend.jobs) == 1
        other.backend.shift = 1
        assert code(await other.post(), 410) == "answer_gone"

    run(story, tmp_path, StateSettings(bytes=14_000, lease_seconds=60))


def test_without_the_store_a_key_is_not_served_and_others_are(tmp_path: Path) -> None:
    async def story(one: Site, other: Site) -> None:
        one.store.dead = True
        refusal = await one.post()
        assert code(refusal, 503) == "unavailable"
        assert refusal.headers["retry-after"] == "1"
        assert one.backend.jobs == []
        images(await one.post(None))

    run(story, tmp_path)
