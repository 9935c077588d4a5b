"""A caller's list of jobs: their own and nobody else's, the newest first, page by page and by status."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import test_serve_store
from test_serve_gateway import LIMITS
from test_serve_idempotency import code
from test_serve_jobs import JOBS, JobSite, bearer, run
from test_serve_store import Clock, Opener, opened, redis_url

from insightedit import cli
from insightedit.platform.workdir import Workdir
from insightedit.serve import job_book
from insightedit.serve.answers import Job, JobList
from insightedit.serve.client import Patience
from insightedit.serve.door import Access
from insightedit.serve.forms import EditRequest
from insightedit.serve.job_book import JobBook, JobRecord
from insightedit.serve.job_client import JobClient
from insightedit.serve.keys import Allowance, KeyRing, KeyStore
from insightedit.serve.schema import EditFields
from insightedit.serve.settings import StateSettings
from insightedit.serve.state_store import Entry

__all__ = ["opened", "redis_url"]

SETTINGS = StateSettings(answer_seconds=100, key_seconds=1000, job_seconds=1000, lease_seconds=60)


async def asked(site: JobSite, api_key: str = "", **query: str) -> httpx.Response:
    return await site.client.get(JOBS, params=query, headers=bearer(api_key))


async def ids(site: JobSite, api_key: str = "", **query: str) -> list[str]:
    answer = await asked(site, api_key, **query)
    assert answer.status_code == 200, answer.text
    found = answer.json()["data"]
    assert all(job["result"] is None for job in found)
    return [job["id"] for job in found]


def test_the_newest_come_first_and_page_by_page(tmp_path: Path) -> None:
    clock = Clock()

    async def story(one: JobSite, other: JobSite) -> None:
        assert (await asked(one)).json() == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
        }  # fmt: skip
        for number in range(25):
            clock.now += 0.001
            assert (await one.put(f"job-{number}")).status_code == 202
        newest = [f"job-{number}" for number in reversed(range(25))]
        page = (await asked(other)).json()
        assert [job["id"] for job in page["data"]] == newest[:20]
        assert (page["first_id"], page["last_id"], page["has_more"]) == ("job-24", "job-5", True)
        assert page["data"][0] == (await one.get("job-24")).json()
        rest = (await asked(other, after=page["last_id"])).json()
        assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (newest[20:], False)
        assert await ids(one, limit="100") == newest
        assert (await asked(one, limit="25")).json()["has_more"] is False
        walked: list[str] = []
        while len(walked) < 25:
            walked += await ids(one, limit="7", **({"after": walked[-1]} if walked else {}))
        assert walked == newest
        assert await ids(one, after="job-0") == []

    run(story, tmp_path, SETTINGS, clock)


def test_a_status_is_shown_however_jobs_come_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_book, "_LINES", 2)

    async def story(one: JobSite, other: JobSite) -> None:
        await one.begin()
        for name in ("a", "b", "c"):
            await one.put(name)
            await one.until("completed", name)
        one.backend.failure = RuntimeError("broken")
        await one.put("d")
        await one.until("failed", "d")
        one.backend.failure = None
        await one.hold("e")
        await one.cancel("e")
        one.open()
        await one.until_idle()
        await one.hold("f")
        assert await ids(other, status="in_progress") == ["f"]
        await one.stop()
        one.open()
        await one.put("g")
        assert await ids(other) == ["g", "f", "e", "d", "c", "b", "a"]
        expected = {"completed": ["c", "b", "a"], "failed": ["d"], "cancelled": ["e"], "queued": ["g", "f"]}
        for status, names in {**expected, "in_progress": []}.items():
            assert await ids(other, status=status) == names
        assert (await asked(other, status="completed", limit="2")).json()["has_more"] is True
        assert await ids(other, status="completed", limit="2") == ["c", "b"]
        assert await ids(other, status="completed", after="b") == ["a"]
        assert await ids(other, status="completed", after="f") == ["c", "b", "a"]

    run(story, tmp_path, StateSettings(lease_seconds=0.5))


def test_nobody_sees_anothers_jobs(tmp_path: Path) -> None:
    store = KeyStore(Workdir.open(tmp_path / "work"))
    # One name begins with the other.
    anna, annabel = (store.create(name, Allowance())[0] for name in ("anna", "anna.bel"))

    async def story(one: JobSite, other: JobSite) -> None:
        for key, name in ((anna, "hers"), (annabel, "the others"), (anna, "both"), (annabel, "both")):
            assert (await one.put(name.replace(" ", "-"), api_key=key)).status_code == 202
        assert await ids(other, anna) == ["both", "hers"]
        assert await ids(other, annabel) == ["both", "the-others"]
        assert await ids(other, annabel, after="both") == ["the-others"]
        answer = await asked(other, annabel, after="hers")
        assert code(answer, 400) == code(await asked(other, annabel, after="nobodys"), 400) == "invalid_value"
        assert code(await asked(other), 401) == "missing_api_key"

    run(story, tmp_path, access=Access(KeyRing(store)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("limit", value) for value in ("0", "101", "-1", "x", "", "2.5")),
        *(("after", value) for value in ("", "a b", "../a", "a/b", "a" * 129, "none", "\u00e9")),
        *(("status", value) for value in ("", "done", "open", "Completed", "completed,failed")),
        ("order", "asc"),
    ],
)
def test_a_wrong_parameter_is_named(tmp_path: Path, name: str, value: str) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        answer = await asked(one, **{name: value})
        assert code(answer, 400) == "invalid_value"
        assert answer.json()["error"]["param"] == name
        assert answer.json()["error"]["message"].startswith(f"{name}:")

    run(story, tmp_path)


def test_a_path_with_a_slash_too_many_is_none(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        for method in ("GET", "PUT"):
            assert code(await one.client.request(method, f"{JOBS}/"), 404) == "not_found"

    run(story, tmp_path)


def test_jobs_leave_the_list_with_their_time_and_a_cursor_among_them_says_so(tmp_path: Path) -> None:
    clock = Clock()

    async def story(one: JobSite, other: JobSite) -> None:
        await one.put("open")
        await one.put("cancelled")
        await one.cancel("cancelled")
        clock.now += 1001
        assert await ids(other) == ["open"]
        answer = await asked(other, after="cancelled")
        assert code(answer, 400) == "invalid_value"
        assert "time is over" in answer.json()["error"]["message"]
        clock.now += 1000
        assert await ids(other) == []
        await one.store.change({}, {})
        assert await one.store.names("") == []

    run(story, tmp_path, SETTINGS, clock)


def test_a_job_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        for name in ("first", "broken", "last"):
            await one.put(name)
        record = f"job/{job_book.path_of('', 'broken')}"
        await one.store.change({}, {record: Entry(b"{}", time.time() + 100)})
        assert await ids(other) == ["last", "first"]
        assert await ids(other, status="queued") == ["last", "first"]

    run(story, tmp_path)


def test_without_the_store_there_is_no_list(tmp_path: Path) -> None:
    async def story(one: JobSite, other: JobSite) -> None:
        await one.put()
        one.store.dead = True
        assert code(await asked(one), 503) == code(await asked(one, after="one"), 503) == "unavailable"

    run(story, tmp_path)


def test_both_stores_list_alike(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_serve_store, "CAPACITY", 100_000)

    async def story() -> None:
        clock = Clock()
        store = opened(clock)
        book = JobBook(store, SETTINGS, LIMITS, clock)

        async def create(scope: str, name: str) -> JobRecord:
            clock.now += 1
            record = book.new(scope, name, fingerprint="", request_id="", images=1, seed=0)
            request = EditRequest(EditFields(prompt="x"), (), None)
            return (await book.create(record, request))[0]

        async def listed(*arguments: Any) -> tuple[list[str], bool]:
            found, more = await book.newest(*arguments)
            return [job.id for job in found], more

        first, second = await create("a", "first"), await create("a", "second")
        assert await listed("a", 1) == (["second"], True)
        assert await listed("a", 1, "second") == (["first"], False)
        assert await listed("a", 2) == (["second", "first"], False)
        assert await listed("", 2) == await listed("aa", 2) == ([], False)
        assert await book.end(first, "cancelled")
        assert await listed("a", 2) == (["second", "first"], False)
        for after in (None, "second"):
            assert await listed("a", 2, after, "cancelled") == (["first"], False)
        assert await listed("a", 2, None, "queued") == (["second"], False)
        assert await book.end(second, "cancelled")
        assert await listed("a", 1, None, "cancelled") == (["second"], True)
        clock.now += 2000
        assert await listed("a", 2) == ([], False)
        await store.close()

    asyncio.run(story())


def a_job(name: str) -> Job:
    return Job(
        id=name, status="queued", created_at=1, started_at=None, ended_at=None, expires_at=2, model_version=None,
        seed=3, error=None, result=None, webhook_status=None,
    )  # fmt: skip


def test_the_client_and_the_command_ask_for_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent: list[httpx.Request] = []

    def answer(_client: httpx.Client, request: httpx.Request, **_: Any) -> httpx.Response:
        sent.append(request)
        jobs = [a_job("two"), a_job("one")] if "status" not in request.url.params else []
        return httpx.Response(200, json=JobList.of(jobs, has_more=bool(jobs)).model_dump(), request=request)

    monkeypatch.setattr(httpx.Client, "send", answer)
    server = "http://127.0.0.1:9"
    found = JobClient(server, Patience(retries=0)).list_jobs(2, "three")
    assert ([job.id for job in found.data], found.last_id, found.has_more) == (["two", "one"], "one", True)
    assert (sent[0].method, str(sent[0].url)) == ("GET", f"{server}{JOBS}?limit=2&after=three")
    assert cli.run(["edit-job", "list", "--server", server]) == 0
    assert capfd.readouterr().out.splitlines() == ["two: queued", "one: queued", "There are more: --after one"]
    assert cli.run(["edit-job", "list", "--status", "failed", "--server", server]) == 0
    assert capfd.readouterr().out.splitlines() == ["There are none."]
    assert dict(sent[-1].url.params) == {"limit": "20", "status": "failed"}
    assert cli.run(["edit-job", "list", "--json", "--server", server]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert [(job["id"], "result" in job) for job in shown["data"]] == [("two", False), ("one", False)]
    assert cli.run(["edit-job", "list", "--limit", "101", "--server", server]) == 2
