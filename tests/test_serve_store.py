"""The state that gateways share: the same contract for the file and for Redis."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from insightedit.platform.errors import UsageError
from insightedit.serve.state_store import (
    Entry,
    RedisStore,
    SqliteStore,
    StateStore,
    StoreFullError,
    StoreUnreachableError,
    open_store,
)

CAPACITY = 4000


class Clock:
    """A time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    server = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "redis-server ended at once"
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


Opener = Callable[[Clock], StateStore]


@pytest.fixture(params=["file", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same store again and again, as several gateways do."""
    if request.param == "file":
        return lambda clock: SqliteStore(tmp_path / "state.db", CAPACITY, clock)
    pytest.importorskip("redis")
    import redis

    url = request.getfixturevalue("redis_url")
    redis.Redis.from_url(url).flushall()
    return lambda clock: RedisStore(url, CAPACITY, clock)


def entry(value: bytes, expires: float = 2000.0) -> Entry:
    return Entry(value, expires)


def test_a_damaged_file_is_a_store_that_is_not_to_be_had(tmp_path: Path) -> None:
    file = tmp_path / "state.db"

    async def story() -> None:
        store = SqliteStore(file, 2**24)
        for number in range(40):
            await store.change({}, {f"a{number:02}": Entry(bytes(3000), 10**11)})
        await store.close()
        content = file.read_bytes()
        file.write_bytes(content[: 4 * 4096] + b"\xff" * (len(content) - 4 * 4096))
        store = SqliteStore(file, 2**24)
        for work in (store.get("a30"), store.names("a"), store.change({}, {"a30": None})):
            with pytest.raises(StoreUnreachableError, match="malformed"):
                await work
        await store.close()

    asyncio.run(story())


def test_a_change_is_seen_by_everybody_and_made_only_as_expected(opened: Opener) -> None:
    async def story() -> None:
        clock = Clock()
        one, other = opened(clock), opened(clock)
        assert await one.get("a") is None
        assert await one.change({"a": None}, {"a": entry(b"1"), "b": entry(b"\x00\xff")})
        assert (await other.get("a"), await other.get("b")) == (b"1", b"\x00\xff")
        assert not await other.change({"a": None}, {"a": entry(b"2")})
        assert not await other.change({"a": b"1", "b": b"not this"}, {"a": entry(b"2"), "c": entry(b"3")})
        assert (await one.get("a"), await one.get("c")) == (b"1", None)
        assert await other.change({"a": b"1"}, {"a": None, "b": entry(b"")})
        assert (await one.get("a"), await one.get("b")) == (None, b"")
        assert await one.change({"b": b""}, {"b": entry(b"again")})
        await one.close()
        await other.close()

    asyncio.run(story())


def test_an_entry_is_gone_when_its_time_ends(opened: Opener) -> None:
    async def story() -> None:
        clock = Clock()
        store = opened(clock)
        await store.change({}, {"x/short": entry(b"1", 1010.0), "x/long": entry(b"2", 1020.0)})
        clock.now = 1009.9
        assert await store.names("x/") == ["x/long", "x/short"]
        clock.now = 1010.0
        assert await store.get("x/short") is None
        assert await store.names("x/") == ["x/long"]
        assert await store.change({"x/short": None}, {"x/short": entry(b"3", 1030.0)})
        clock.now = 1025.0
        assert await store.names("x/") == ["x/short"]
        await store.close()

    asyncio.run(story())


def test_names_come_in_order_and_in_pages(opened: Opener) -> None:
    async def story() -> None:
        store = opened(Clock())
        written = ["p/a", "p/b", "p/c", "p/\u00e9", "p", "q/a", "o"]
        await store.change({}, {name: entry(b"") for name in written})
        assert await store.names("p/") == ["p/a", "p/b", "p/c", "p/\u00e9"]
        assert await store.names("p/", limit=2) == ["p/a", "p/b"]
        assert await store.names("p/", after="p/b", limit=2) == ["p/c", "p/\u00e9"]
        assert await store.names("p/", after="p/\u00e9") == []
        assert await store.names("") == sorted(written)
        await store.close()

    asyncio.run(story())


def test_a_full_store_says_so_and_changes_nothing(opened: Opener) -> None:
    async def story() -> None:
        clock = Clock()
        store = opened(clock)
        await store.change({}, {"half": entry(bytes(1500), 1010.0)})
        with pytest.raises(StoreFullError, match="4000 bytes"):
            await store.change({}, {"half": None, "more": entry(bytes(4000))})
        assert await store.names("") == ["half"]
        with pytest.raises(StoreFullError):
            await store.change({}, {"spare": entry(bytes(500))}, part=0.5)
        assert await store.change({}, {"half": entry(bytes(1400), 1010.0)}, part=0.1)  # Smaller: always.
        assert await store.change({}, {"rest": entry(bytes(1500), 1030.0)})
        clock.now = 1010.0  # The first one makes room by its end.
        assert await store.change({}, {"next": entry(bytes(1500), 1030.0)})
        with pytest.raises(StoreFullError):
            await store.change({}, {f"{n}": entry(b"") for n in range(10)})  # Small ones count as well.
        assert await store.change({}, {"rest": None, "next": None, "new": entry(bytes(3500))})
        await store.close()

    asyncio.run(story())


def test_of_many_who_change_at_once_one_wins(opened: Opener) -> None:
    async def story() -> None:
        clock = Clock()
        stores = [opened(clock) for _ in range(4)]
        for turn in range(10):
            name = f"turn/{turn}"
            won = await asyncio.gather(
                *(s.change({name: None}, {name: entry(b"%d" % i)}) for i, s in enumerate(stores))
            )
            assert won.count(True) == 1
            assert await stores[0].get(name) == b"%d" % won.index(True)
        for store in stores:
            await store.close()

    asyncio.run(story())


_COUNTER = """
import asyncio, sys
from insightedit.serve.state_store import Entry, SqliteStore
async def count():
    store = SqliteStore(sys.argv[1], 10**6)
    print("ready", flush=True)
    while True:
        now = await store.get("count")
        following = str(int(now or b"0") + 1).encode()
        marks = {"count": Entry(following, 4e9), f"mark/{following.decode()}": Entry(b"", 4e9)}
        if await store.change({"count": now}, marks):
            print(following.decode(), flush=True)
asyncio.run(count())
"""


def test_what_was_written_outlives_processes_that_are_killed(tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    command = [sys.executable, "-c", _COUNTER, str(file)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said: list[int] = []
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        said += [int(writer.stdout.readline()) for _ in range(20) if writer.stdout]
        writer.kill()
    for writer in writers:
        # A line cut short by the kill is no number that was said.
        rest = (writer.communicate()[0] or "").rpartition("\n")[0]
        said += [int(line) for line in rest.split()]

    async def check() -> None:
        store = SqliteStore(file, 10**6)
        count = int(await store.get("count") or b"0")
        marks = await store.names("mark/", limit=10**6)
        assert sorted(int(mark.removeprefix("mark/")) for mark in marks) == list(range(1, count + 1))
        assert len(set(said)) == len(said)
        assert max(said) <= count <= max(said) + 1
        await store.close()

    asyncio.run(check())


def test_a_store_that_does_not_answer_says_so() -> None:
    pytest.importorskip("redis")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        store = RedisStore(f"redis://127.0.0.1:{unused.getsockname()[1]}/0", CAPACITY)
        with pytest.raises(StoreUnreachableError, match="Redis does not answer"):
            asyncio.run(store.get("a"))


def test_the_url_decides_which_store(tmp_path: Path) -> None:
    assert isinstance(open_store(None, tmp_path / "state.db", CAPACITY), SqliteStore)
    with pytest.raises(UsageError, match=r"state\.url must begin with redis://"):
        open_store("http://127.0.0.1", tmp_path / "state.db", CAPACITY)
