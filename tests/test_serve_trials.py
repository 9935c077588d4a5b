"""A gateway during a rollout: who gets the new version, who stands in for it, and what is written down."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from test_serve_gateway import INFO, encoded, picture, post

from insightedit.serve.backend import (
    Canary,
    EditJob,
    EditOutcome,
    PartialTaker,
    RolloutStatus,
    VersionEntry,
    VersionInfo,
    VersionTable,
)
from insightedit.serve.feedback import Feedback
from insightedit.serve.gateway import build_app
from insightedit.serve.meters import Meters
from insightedit.serve.rollout import Evidence
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Limits, RolloutSettings, StateSettings
from insightedit.serve.shared import Shared
from insightedit.serve.state_store import Entry, SqliteStore
from insightedit.serve.trials import REFRESH_SECONDS, Channel, Shadow, Trials

LIMITS = Limits(edit_seconds=5)
CHANNEL = Channel("test")
OLD, NEW, GONE = "1", "2", "0"


def table(share: float = 0.5, sticky: bool = False, state: Any = "canary", entry: int = 7) -> VersionTable:
    """Version 1 serves, version 2 has its share, version 0 is on its way out."""
    listed = {OLD: VersionEntry(application="a1", aliases=("champion",))}
    others = {version: VersionEntry(application=f"a{version}") for version in (NEW, GONE)}
    canary = Canary(version=NEW, share=share, sticky=sticky)
    seen: dict[str, Any] = {"quality": 0.9, "old_quality": 0.8}
    rollout = RolloutStatus(version=NEW, old=OLD, entry=entry, state=state, since=0, **seen)
    return VersionTable(default=OLD, versions=listed, others=others, canary=canary, rollout=rollout)


class TwoVersions:
    """Version 1 makes images dark, all others bright, and those fail as they are told."""

    def __init__(self, share: float = 0.5, **options: Any) -> None:
        self.table = table(share, **options)
        self.failure: Exception | None = None
        self.fail_at: set[int] | None = None
        """Seeds that it fails at; all if it is None."""
        self.hang = False
        self.jobs: list[tuple[str, EditJob]] = []

    async def edit(self, version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        self.jobs.append((version, job))
        if on_partial is not None:
            for index in range(job.partials):
                await on_partial(index, job.pixels)
        if version != OLD:
            if self.hang:
                await asyncio.sleep(60)
            if self.failure is not None and (self.fail_at is None or job.seed in self.fail_at):
                raise self.failure
        shade = 10 if version == OLD else 240
        return EditOutcome(
            pixels=np.full_like(job.pixels, shade),
            steps=1,
            queue_seconds=0,
            condition_seconds=0,
            edit_seconds=0.01,
            text_tokens=1,
            image_tokens=1,
            output_tokens=1,
        )

    async def describe(self, version: str) -> VersionInfo:
        return INFO


class Gateway:
    """A gateway, its store, and what came out of it."""

    def __init__(self, folder: Path, backend: TwoVersions, **settings: Any) -> None:
        self.backend = backend
        self.store = SqliteStore(folder / "state.db", 2**24)
        self.meters = Meters()
        self.trials = Trials(backend, RolloutSettings(**settings), self.store, CHANNEL.name, self.meters)
        self.shared = Shared.of(self.store, StateSettings(lease_seconds=0.5), LIMITS)
        self.feedback: Feedback | None = None

    def client(self) -> TestClient:
        app = build_app(
            self.backend, LIMITS, self.meters, shared=self.shared, trials=self.trials, feedback=self.feedback
        )
        return TestClient(app, raise_server_exceptions=False)

    def evidence(self) -> Evidence:
        """What it wrote down, after a moment."""
        time.sleep(3 * REFRESH_SECONDS)
        names = asyncio.run(self.store.names(CHANNEL.seen(7)))
        parts = [asyncio.run(self.store.get(name)) for name in names]
        return Evidence.total(Evidence.model_validate_json(part) for part in parts if part is not None)

    def shadows(self) -> list[Shadow]:
        names = asyncio.run(self.store.names(CHANNEL.shadows(7)))
        parts = [asyncio.run(self.store.get(name)) for name in names]
        return [Shadow.model_validate_json(part) for part in parts if part is not None]


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path, TwoVersions(share=1.0))


@pytest.fixture
def client(gateway: Gateway) -> Iterator[TestClient]:
    with gateway.client() as client:
        yield client


def test_a_gateway_goes_on_following_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TwoVersions()
    store = SqliteStore(tmp_path / "state.db", 2**24)
    trials = Trials(backend, RolloutSettings(), store, CHANNEL.name, Meters())
    get, fails = store.get, [False]

    async def getting(name: str) -> bytes | None:
        if fails.pop():
            raise RuntimeError("unforeseen")
        fails.append(False)
        return await get(name)

    monkeypatch.setattr(store, "get", getting)

    async def story() -> None:
        async with trials.following():
            fails[0] = True
            await asyncio.sleep(2 * REFRESH_SECONDS)
            assert fails == []
            fails.append(False)
            entry = Entry(table(entry=8).model_dump_json().encode(), 10**11)
            await store.change({}, {CHANNEL.table: entry})
            await asyncio.sleep(3 * REFRESH_SECONDS)
            assert backend.table.rollout is not None
            assert backend.table.rollout.entry == 8

    asyncio.run(story())


def test_what_was_seen_is_kept_as_long_as_a_rollout_may_take(tmp_path: Path) -> None:
    now = time.time()
    store = SqliteStore(tmp_path / "state.db", 2**24, lambda: now)
    trials = Trials(TwoVersions(), RolloutSettings(max_seconds=86_400), store, CHANNEL.name, Meters())

    async def story() -> None:
        nonlocal now
        trials.failed(NEW)
        await trials.refresh()
        now += 80_000
        assert len(await store.names(CHANNEL.seen(7))) == 1, "a gateway that saw nothing since"

    asyncio.run(story())


def shade(image: str) -> int:
    """10 by version 1, 240 by another."""
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))[0, 0, 0])


def answer(response: Any) -> tuple[str, set[int]]:
    """The version that an answer names, and the shades of its images."""
    assert response.status_code == 200, response.text
    body = response.json()
    assert response.headers["x-insightedit-model-version"] == body["model_version"]
    return body["model_version"], {shade(one["b64_json"]) for one in body["data"]}


def test_the_share_is_kept(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, TwoVersions(share=0.25), shadow_share=0)
    with gateway.client() as client:
        answers = [answer(post(client)) for _ in range(120)]
    count = sum(version == NEW for version, _ in answers)
    assert 12 <= count <= 50  # Chance is outside of it once in 10,000 times.
    assert {(version, *shades) for version, shades in answers} == {(OLD, 10), (NEW, 240)}


@pytest.mark.parametrize(("model", "version"), [("1", OLD), ("insightedit/1", OLD), ("champion", NEW), (None, NEW)])
def test_who_names_a_number_gets_it(client: TestClient, model: str | None, version: str) -> None:
    assert answer(post(client, model=model))[0] == version


def test_nobody_can_ask_for_a_canary(client: TestClient) -> None:
    response = post(client, model=NEW)
    assert response.status_code == 404
    assert "served are 1" in response.text
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [OLD]


@pytest.mark.parametrize(
    "failure", [RuntimeError("broken"), ApiError(400, "invalid_value", "too long"), ApiError(503, "unavailable", "no")]
)
def test_the_old_version_stands_in(gateway: Gateway, client: TestClient, failure: Exception) -> None:
    gateway.backend.failure = failure
    assert answer(post(client, seed="3")) == (OLD, {10})
    evidence = gateway.evidence()
    assert (evidence.new.answers, evidence.new.failures, evidence.old.answers) == (0, 1, 1)
    text = client.get("/metrics").text
    assert 'insightedit_edit_stood_in_total{model_version="2"} 1.0' in text
    assert 'code="200",model_version="1"} 1.0' in text


def test_what_both_refuse_is_refused_and_held_against_nobody(gateway: Gateway, client: TestClient) -> None:
    gateway.backend.failure = ApiError(400, "invalid_value", "too long", "prompt")

    async def refuse(*_: Any) -> EditOutcome:
        raise ApiError(400, "invalid_value", "too long", "prompt")

    gateway.backend.edit = refuse  # pyright: ignore[reportAttributeAccessIssue]
    assert post(client).status_code == 400
    assert gateway.evidence() == Evidence()


def test_a_version_that_is_full_is_not_one_that_fails(gateway: Gateway, client: TestClient) -> None:
    gateway.backend.failure = ApiError(429, "overloaded", "full")
    assert answer(post(client)) == (OLD, {10})
    assert gateway.evidence().new.failures == 0


def test_a_version_that_hangs_is_given_up_in_time(gateway: Gateway, client: TestClient) -> None:
    gateway.backend.hang = True
    begun = time.monotonic()
    assert answer(post(client, timeout="1")) == (OLD, {10})
    assert time.monotonic() - begun < 1


def test_no_answer_is_of_two_versions(gateway: Gateway, client: TestClient) -> None:
    gateway.backend.failure, gateway.backend.fail_at = RuntimeError("broken"), {6}
    assert answer(post(client, seed="5", n="3")) == (OLD, {10})
    assert answer(post(client, seed="7", n="3")) == (NEW, {240})


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_trial_is_streamed_before_all_of_it_is_there(
    gateway: Gateway, client: TestClient, fails: bool
) -> None:
    if fails:
        gateway.backend.failure, gateway.backend.fail_at = RuntimeError("broken"), {6}
    response = post(client, seed="5", n="2", stream="true", partial_images="2")
    assert response.status_code == 200
    version, value = (OLD, 10) if fails else (NEW, 240)
    assert response.headers["x-insightedit-model-version"] == version
    events = [line for line in response.text.splitlines() if line.startswith("event:")]
    assert events == ["event: image_edit.completed"] * 2
    assert response.text.count(f'"model_version": "{version}"') == 2
    assert {shade(part.partition('"')[0]) for part in response.text.split('"b64_json": "')[1:]} == {value}


@pytest.mark.parametrize("fails", [False, True])
def test_a_key_keeps_its_version(gateway: Gateway, client: TestClient, fails: bool) -> None:
    gateway.backend.failure = RuntimeError("broken") if fails else None
    files = {"image": ("a.png", encoded(picture()))}

    def send() -> Any:
        return client.post("/v1/images/edits", data={"prompt": "x"}, files=files, headers={"Idempotency-Key": "one"})

    first = send()
    assert answer(first)[0] == (OLD if fails else NEW)
    # The version is rolled back and gone; what was answered stays answered.
    gateway.backend.table = VersionTable(default=OLD, versions=table().versions)
    again = send()
    assert again.json()["data"] == first.json()["data"]
    assert again.headers["idempotent-replayed"] == "true"
    assert len([job for _, job in gateway.backend.jobs if job.priority == 0]) == (2 if fails else 1)


def test_a_key_whose_version_is_gone_without_an_image_gets_another(gateway: Gateway, client: TestClient) -> None:
    """Its gateway died while the canary was at it."""
    gateway.backend.hang = True
    fields, files = {"prompt": "x", "timeout": "1"}, {"image": ("a.png", encoded(picture()))}
    headers = {"Idempotency-Key": "two"}

    async def hang(*_: Any) -> EditOutcome:
        raise ApiError(503, "unavailable", "nobody is there")

    working = gateway.backend.edit
    gateway.backend.edit = hang  # pyright: ignore[reportAttributeAccessIssue]
    assert client.post("/v1/images/edits", data=fields, files=files, headers=headers).status_code == 503
    gateway.backend.edit = working  # pyright: ignore[reportAttributeAccessIssue]
    gateway.backend.table = VersionTable(default="9", versions={"9": VersionEntry(application="a9")})
    gateway.backend.hang = False
    response = client.post("/v1/images/edits", data=fields, files=files, headers=headers)
    assert answer(response)[0] == "9"


def test_the_old_version_makes_the_same_edit_behind_all_others(gateway: Gateway, client: TestClient) -> None:
    post(client, seed="3", prompt="make it bright")
    deadline = time.monotonic() + 5
    while not gateway.shadows():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (shadow,) = gateway.shadows()
    assert (shadow.prompt, shadow.seed, shadow.new_version, shadow.old_version) == ("make it bright", 3, NEW, OLD)
    shades = [np.asarray(Image.open(io.BytesIO(file)))[0, 0, 0] for file in (shadow.new, shadow.old)]
    assert shades == [240, 10]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shadow.source))), picture())
    (new, job), (old, compared) = gateway.backend.jobs
    assert (new, old, job.seed, job.prompt) == (NEW, OLD, compared.seed, compared.prompt)
    assert compared.priority < job.priority
    # It is no edit that anybody asked for.
    assert gateway.evidence().old.answers == 0


def test_shadows_are_few_and_keep_nobody_waiting(tmp_path: Path) -> None:
    backend = TwoVersions(share=1.0)
    gateway = Gateway(tmp_path, backend)
    gate = threading.Event()
    edit = backend.edit

    async def slow(version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        while version == OLD and not gate.is_set():
            await asyncio.sleep(0.01)
        return await edit(version, job, on_partial)

    backend.edit = slow  # pyright: ignore[reportAttributeAccessIssue]
    with gateway.client() as client:
        assert [answer(post(client))[0] for _ in range(5)] == [NEW] * 5
        gate.set()
        time.sleep(0.3)
        assert len(gateway.shadows()) == 2


def test_sticky_users_stay(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, TwoVersions(sticky=True), shadow_share=0)
    with gateway.client() as client:
        users = {user: {answer(post(client, user=user))[0] for _ in range(3)} for user in map(str, range(24))}
    assert all(len(versions) == 1 for versions in users.values())
    assert {version for versions in users.values() for version in versions} == {OLD, NEW}


def test_a_gateway_takes_the_stores_table(gateway: Gateway) -> None:
    async def write(value: VersionTable) -> None:
        entry = Entry(value.model_dump_json().encode(), time.time() + 60)
        await gateway.store.change({}, {CHANNEL.table: entry})

    def until(version: str) -> None:
        deadline = time.monotonic() + 5
        while answer(post(client))[0] != version:
            assert time.monotonic() < deadline

    asyncio.run(write(table(share=0.5).model_copy(update={"canary": None})))
    with gateway.client() as client:
        # From the first request on, whatever it was started with.
        assert answer(post(client))[0] == OLD
        entries = {NEW: VersionEntry(application="a2", aliases=("champion",))}
        asyncio.run(write(VersionTable(default=NEW, versions=entries)))
        until(NEW)
        # What cannot be read changes nothing.
        asyncio.run(gateway.store.change({}, {CHANNEL.table: Entry(b"{", time.time() + 60)}))
        time.sleep(2 * REFRESH_SECONDS)
        assert answer(post(client))[0] == NEW


def test_another_rollout_begins_with_nothing_seen(gateway: Gateway) -> None:
    with gateway.client() as client:
        post(client)
        assert gateway.evidence().new.answers == 1
        later = table(share=1.0, entry=8)
        entry = Entry(later.model_dump_json().encode(), time.time() + 60)
        asyncio.run(gateway.store.change({}, {CHANNEL.table: entry}))
        time.sleep(3 * REFRESH_SECONDS)
        assert 'insightedit_rollout_quality{model_version="2"} 0.9' in client.get("/metrics").text
        post(client)
        time.sleep(3 * REFRESH_SECONDS)
    names = asyncio.run(gateway.store.names(CHANNEL.seen(8)))
    (value,) = [asyncio.run(gateway.store.get(name)) for name in names]
    assert Evidence.model_validate_json(value or b"").new.answers == 1
    assert gateway.evidence().new.answers == 1


def test_how_long_a_trial_may_take(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, TwoVersions(), min_timed=2, max_slowdown=1.5)
    assert gateway.trials.limit(60) == 30
    for seconds in (1.0, 2.0):
        gateway.trials.answered(OLD, seconds)
    assert gateway.trials.limit(60) == 7.0
    assert gateway.trials.limit(4) == 2
