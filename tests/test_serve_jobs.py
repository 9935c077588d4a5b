"""Jobs at gateways that share a store: done once, by whoever is there, and told to nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_serve_gateway import LIMITS, encoded, picture
from test_serve_idempotency import Site, code, images
from test_serve_store import Clock

from insightedit.platform.workdir import Workdir
from insightedit.serve import crew, edit_jobs
from insightedit.serve.backend import VersionEntry, VersionTable
from insightedit.serve.door import Access
from insightedit.serve.edit_jobs import MOST_LOSSES
from insightedit.serve.gateway import EDIT_PATH
from insightedit.serve.job_book import OpenJob
from insightedit.serve.keys import Allowance, KeyRing, KeyStore
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import StateSettings
from insightedit.serve.state_store import Entry, StoreFullError, StoreUnreachableError

SETTINGS = StateSettings(lease_seconds=0.5)
JOBS = f"{EDIT_PATH}/jobs"


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways that look around more often."""
    monkeypatch.setattr(edit_jobs, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(crew, "LOOK_SECONDS", 0.05)


class JobSite(Site):
    """A gateway that does jobs between `begin` and `stop`."""

    _block: AbstractAsyncContextManager[Any] | None = None

    async def begin(self) -> None:
        self._block = self.app.router.lifespan_context(self.app)
        await self._block.__aenter__()

    async def stop(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            await block.__aexit__(None, None, None)

    async def die(self) -> None:
        """Say nothing any more, and lose all work."""
        self.store.dead = True
        await self.stop()

    async def put(self, job_id: str = "one", api_key: str = "", image: Any = None, **fields: str) -> httpx.Response:
        files = {"image": ("a", encoded(picture()) if image is None else image)}
        data = {"prompt": "x", **fields}
        return await self.client.put(f"{JOBS}/{job_id}", data=data, files=files, headers=bearer(api_key))

    async def get(self, job_id: str = "one", api_key: str = "") -> httpx.Response:
        return await self.client.get(f"{JOBS}/{job_id}", headers=bearer(api_key))

    async def cancel(self, job_id: str = "one", api_key: str = "") -> httpx.Response:
        return await self.client.post(f"{JOBS}/{job_id}/cancel", headers=bearer(api_key))

    async def until(self, status: str, job_id: str = "one", api_key: str = "") -> Any:
        """A job once it has a status."""
        async with asyncio.timeout(60):
            while (job := (await self.get(job_id, api_key)).json())["status"] != status:
                assert job["status"] in ("queued", "in_progress"), job
                await asyncio.sleep(0.02)
        return job

    async def hold(self, job_id: str = "one", **fields: str) -> None:
        """A job under way, whose edit has begun and waits for the gate."""
        self.backend.gate = threading.Event()
        begun = len(self.backend.jobs)
        assert (await self.put(job_id, **fields)).status_code == 202
        async with asyncio.timeout(60):
            while len(self.backend.jobs) == begun:
                await asyncio.sleep(0.01)

    async def until_idle(self) -> None:
        """Nothing is being edited."""
        async with asyncio.timeout(60):
            while "insightedit_edit_in_flight 0.0" not in (await self.client.get("/metrics")).text:
                await asyncio.sleep(0.02)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def run(
    story: Callable[[JobSite, JobSite], Awaitable[None]],
    folder: Path,
    settings: StateSettings = SETTINGS,
    clock: Callable[[], float] = time.time,
    access: Access | None = None,
) -> None:
    """Have two gateways over one store; the story says when they do jobs."""

    async def tell() -> None:
        sites = [JobSite(folder / "state.db", settings, clock, access) for _ in range(2)]
        await story(*sites)
        for site in sites:
            await site.stop()
            await site.client.aclose()
            await site.store.close()

    asyncio.run(tell())


def made(job: Any) -> list[str]:
    return [one["b64_json"] for one in job["result"]["data"]]


def test_a_job_has_the_images_of_an_edit_and_is_found_at_every_gateway(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        sent = await one.put(n="2", seed="7")
        assert sent.status_code == 202
        assert (sent.json()["id"], sent.json()["status"], sent.json()["result"]) == ("one", "queued", None)
        job = await other.until("completed")
        assert made(job) == images(await one.post(None, n="2", seed="7"))
        assert (job["seed"], job["model_version"], job["error"]) == (7, "3", None)
        assert job["created_at"] <= job["started_at"] <= job["ended_at"] < job["expires_at"]
        assert [job.seed for job in one.backend.jobs] == [7, 8, 7, 8]
        assert 'insightedit_edit_jobs_total{status="completed"} 1.0' in (await one.client.get("/metrics")).text
        assert await one.store.names("job-open/") == await one.store.names("job-request/") == []

    run(story, tmp_path)


def test_the_same_id_is_the_same_job_or_a_conflict(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        first = await one.put()
        again = await other.put(timeout="3")
        assert (first.status_code, again.status_code) == (202, 200)
        assert again.json()["seed"] == first.json()["seed"]
        for fields in ({"prompt": "y"}, {"seed": "4"}, {"n": "2"}):
            assert code(await other.put(**fields), 409) == "job_id_taken"
        assert code(await other.put(image=encoded(picture(16, 16))), 409) == "job_id_taken"
        await one.begin()
        done = await one.until("completed")
        assert (await other.put()).json() == done
        assert len(one.backend.jobs) == 1

    run(story, tmp_path)


def test_a_cancelled_job_is_ended_wherever_it_is_cancelled(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        for name, site in (("here", one), ("elsewhere", other)):
            await one.hold(name)
            assert (await site.cancel(name)).json()["status"] == "cancelled"
            await one.until_idle()
            assert (await site.cancel(name)).json()["status"] == "cancelled"
            assert (await site.put(name)).json()["status"] == "cancelled"
        assert await one.store.names("job-open/") == await one.store.names("job-request/") == []
        assert code(await other.cancel("none"), 404) == "job_not_found"
        one.open()
        await one.put("done")
        await one.until("completed", "done")
        assert (await other.cancel("done")).json()["status"] == "completed"

    run(story, tmp_path)


def test_a_job_survives_the_death_of_its_gateway(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        await one.hold()
        await one.die()
        await other.begin()
        job = await other.until("completed")
        assert job["seed"] == one.backend.jobs[0].seed == other.backend.jobs[0].seed

    run(story, tmp_path)


def test_a_gateway_that_was_only_slow_is_not_heard(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        one.backend.shift = 1  # As if other bytes came out, as they may where edits are batched.
        await one.hold()
        one.store.dead = True
        await other.begin()
        job = await other.until("completed")
        one.store.dead = False
        one.open()
        await one.until_idle()
        assert made((await one.get()).json()) == made(job)
        assert len(one.backend.jobs) == len(other.backend.jobs) == 1

    run(story, tmp_path)


def test_a_gateway_that_stops_hands_its_jobs_over_at_once(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        await one.hold()
        await one.stop()
        assert (await other.get()).json()["status"] == "queued"
        await other.begin()
        assert (await other.until("completed"))["seed"] == one.backend.jobs[0].seed

    run(story, tmp_path, StateSettings(lease_seconds=60))


def test_a_record_that_cannot_be_read_holds_no_other_up(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.put("broken")
        (name,) = await one.store.names("job/")
        await one.store.change({}, {name: Entry(b'{"status": "of another release"}', time.time() + 60)})
        await one.put("two")
        await one.begin()
        await one.until("completed", "two")

    run(story, tmp_path)


def test_a_job_that_gateways_die_of_is_given_up(tmp_path: Path) -> None:
    clock = Clock()

    async def story(one: JobSite, other: JobSite) -> None:
        await one.put()
        book = one.shared.book
        for _ in range(MOST_LOSSES + 1):
            (waiting,) = await book.open()
            assert await book.take(waiting.path)
            assert await book.take(waiting.path) is None
            clock.now += 1
        await other.begin()
        job = await other.until("failed")
        assert job["error"]["code"] == "job_lost"
        assert other.backend.jobs == []

    run(story, tmp_path, clock=clock)


def test_what_cannot_be_a_job_is_refused(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        assert code(await one.put(stream="true"), 400) == "invalid_value"
        assert code(await one.put(n="50"), 400) == "invalid_value"
        assert code(await one.put(image=b"none"), 400) == "invalid_image"
        assert code(await one.put(model="none"), 404) == "model_not_found"
        for name in ("a" * 129, ".hidden", "a%20b", "%00", "a%0A", "caf%C3%A9"):
            assert code(await one.put(name), 400) == "invalid_value"
            assert code(await one.get(name), 400) == "invalid_value"
        assert code(await one.get("none"), 404) == "job_not_found"
        assert await one.store.names("job") == []
        assert (await one.put("A-1_2.3:4~")).status_code == 202

    run(story, tmp_path)


def test_jobs_of_other_callers_are_not_there(tmp_path: Path) -> None:
    store = KeyStore(Workdir.open(tmp_path / "work"))
    anna, ben = (store.create(name, Allowance(requests_per_minute=2))[0] for name in ("anna", "ben"))

    async def story(one: JobSite, other: JobSite) -> None:
        await one.put(api_key=anna)
        for answer in (await other.get(api_key=ben), await other.cancel(api_key=ben)):
            assert code(answer, 404) == "job_not_found"
        assert (await other.put(api_key=ben, prompt="another")).status_code == 202
        assert code(await other.get(), 401) == "missing_api_key"
        await one.begin()
        for key in (anna, ben):
            await one.until("completed", api_key=key)
        # Their being done is no request of the minute's.
        assert (await one.put("two", api_key=anna)).status_code == 202
        assert code(await one.put("three", api_key=anna), 429) == "rate_limit_exceeded"

    run(story, tmp_path, access=Access(KeyRing(store)))


def test_a_revoked_key_has_nothing_done_any_more(tmp_path: Path) -> None:
    store = KeyStore(Workdir.open(tmp_path / "work"))
    anna, _ = store.create("anna", Allowance())

    async def story(one: JobSite, other: JobSite) -> None:
        await one.put(api_key=anna)
        store.revoke("anna")
        async with asyncio.timeout(60):
            while (await one.get(api_key=anna)).status_code != 401:
                await asyncio.sleep(0.1)
            await one.begin()
            while await one.store.names("job-open/"):
                await asyncio.sleep(0.02)
        assert one.backend.jobs == []
        (kept,) = await one.store.names("job/")
        assert b'"invalid_api_key"' in (await one.store.get(kept) or b"")

    run(story, tmp_path, access=Access(KeyRing(store)))


@pytest.mark.parametrize("status", [429, 503])
def test_what_passes_is_tried_again(tmp_path: Path, status: int) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        one.backend.failure = ApiError(status, "unavailable", "Not now.")
        await one.begin()
        await one.put()
        async with asyncio.timeout(60):
            while not one.backend.jobs or (await one.get()).json()["status"] != "queued":
                await asyncio.sleep(0.02)
        one.backend.failure = None
        assert (await one.until("completed"))["seed"] == one.backend.jobs[0].seed

    run(story, tmp_path)


@pytest.mark.parametrize("name", ["job-request/", "job-image/"])
def test_a_store_that_is_away_for_a_moment_fails_no_job(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        get, change, left = one.store.get, one.store.change, [name]

        def away(names: Iterable[str]) -> None:
            if left and any(one.startswith(name) for one in names):
                left.clear()
                raise StoreUnreachableError("for a moment")

        async def getting(name: str) -> bytes | None:
            away([name])
            return await get(name)

        async def changing(expected: Any, writes: Any, part: float = 1.0) -> bool:
            away(writes if name == "job-image/" else ())
            return await change(expected, writes, part)

        assert (await one.put(seed="7")).status_code == 202
        monkeypatch.setattr(one.store, "get", getting)
        monkeypatch.setattr(one.store, "change", changing)
        await one.begin()
        assert made(await one.until("completed")) == images(await one.post(None, seed="7"))
        assert left == []

    run(story, tmp_path, StateSettings(lease_seconds=60))


def test_a_store_without_room_for_a_lease_takes_no_job_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        await one.hold()
        change, full = one.store.change, asyncio.Event()

        async def once(expected: Any, writes: Any, part: float = 1.0) -> bool:
            if not full.is_set():
                full.set()
                raise StoreFullError("by one digit")
            return await change(expected, writes, part)

        monkeypatch.setattr(one.store, "change", once)
        await asyncio.wait_for(full.wait(), 5)
        await asyncio.sleep(0.05)
        one.open()
        await one.until("completed")
        assert len(one.backend.jobs) == 1

    run(story, tmp_path)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ApiError(400, "invalid_value", "The model cannot read this.", "prompt"), "The model cannot read this."),
        (RuntimeError("secret"), "The server failed at this job; its log says why."),
    ],
)
def test_what_fails_says_why(tmp_path: Path, failure: Exception, expected: str) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        one.backend.failure = failure
        await one.begin()
        await one.put()
        job = await one.until("failed")
        assert job["error"]["message"] == expected
        assert set(job["error"]) == {"message", "type", "param", "code"}
        assert job["result"] is None

    run(story, tmp_path)


def test_where_a_version_is_gone_the_default_one_does_the_job(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        await one.hold()
        await one.stop()
        assert (await one.put("later")).status_code == 202
        other.backend.table = VersionTable(default="4", versions={"4": VersionEntry(application="insightedit-v4")})
        assert (await one.get()).json()["model_version"] == "3"
        await other.begin()
        for name in ("one", "later"):
            assert (await other.until("completed", name))["model_version"] == "4"

    run(story, tmp_path)


def test_there_is_no_room_for_any_number(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        sent = [await one.put(f"job-{number}") for number in range(LIMITS.jobs + 1)]
        assert [answer.status_code for answer in sent[:-1]] == [202] * LIMITS.jobs
        assert code(sent[-1], 429) == "overloaded"
        assert sent[-1].headers["retry-after"] == "2"

    run(story, tmp_path)


def test_a_full_store_takes_no_job_and_says_what_became_of_images(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        assert (await one.put(n="4")).status_code == 202
        assert code(await one.put("two", image=encoded(picture(64, 64))), 429) == "overloaded"
        await one.begin()
        job = await one.until("failed")
        assert job["error"]["code"] == "no_room"
        assert "fewer or smaller" in job["error"]["message"]

    run(story, tmp_path, StateSettings(bytes=16_000, lease_seconds=60))


def test_jobs_and_their_images_have_an_end(tmp_path: Path) -> None:
    clock = Clock()

    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        await one.put()
        job = await one.until("completed")
        assert job["expires_at"] == 1000 + 1000
        clock.now += 200
        assert (await one.get()).json() == {**job, "result": None}
        await one.stop()
        await one.put("late")
        clock.now += 900
        assert code(await one.get(), 404) == "job_not_found"
        clock.now += 200
        await other.begin()
        assert (await other.until("failed", "late"))["error"]["code"] == "timeout"
        clock.now += 3000
        await one.store.change({}, {})
        assert await one.store.names("") == []

    run(story, tmp_path, StateSettings(answer_seconds=100, key_seconds=1000, job_seconds=1000), clock)


def test_without_the_store_there_are_no_jobs_and_edits_go_on(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        one.store.dead = True
        assert code(await one.put(), 503) == "unavailable"
        images(await one.post(None))
        one.store.dead = False
        await one.put()
        await one.until("completed")

    run(story, tmp_path)


def test_a_gateway_does_some_at_a_time_and_the_callers_in_turn(tmp_path: Path) -> None:
    waiting = [OpenJob(scope, f"{scope}/{at}", at) for scope, times in (("a", "126"), ("b", "35")) for at in times]
    order = edit_jobs._in_turn(waiting)  # pyright: ignore[reportPrivateUsage]
    assert [one.path for one in order] == ["a/1", "b/3", "a/2", "b/5", "a/6"]

    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        await one.hold()
        for number in range(5):
            assert (await one.put(f"job-{number}")).status_code == 202
        await asyncio.sleep(0.2)
        assert len(one.backend.jobs) == LIMITS.in_flight // 2
        one.open()
        for number in range(5):
            await one.until("completed", f"job-{number}")

    run(story, tmp_path)
