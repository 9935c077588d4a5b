"""What gateways share and what outlives them: small records and their files, each with an end to its time.

One SQLite file in the work folder serves all gateways of a machine; gateways of several machines share a Redis. Both
keep bytes under names and change any number of entries at once, or none: on that alone keys and jobs are built.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from insightedit.platform.errors import InsightEditError, UsageError

Clock = Callable[[], float]
"""Gives the time in seconds since the epoch. Gateways of several machines need clocks that agree to a second."""

ENTRY_BYTES = 256
"""What an entry counts beside its name and value, so that their number is bounded too. The schema below says it too."""


class StoreFullError(InsightEditError):
    """A change that the store has no room for."""


class StoreUnreachableError(InsightEditError):
    """A store that does not answer. Whether a change was made is then not known."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is written under a name."""

    value: bytes
    expires: float
    """When it is gone, in seconds since the epoch."""


class StateStore(Protocol):
    """Bytes under names. An entry that has expired is not there."""

    async def get(self, name: str) -> bytes | None:
        """What is under a name."""
        ...

    async def names(self, prefix: str, after: str = "", limit: int = 1000) -> list[str]:
        """The first names with a prefix, in the order of their UTF-8 bytes.

        Args:
            prefix: what they begin with.
            after: a name that all of them come after.
            limit: how many at most.
        """
        ...

    async def change(
        self, expected: Mapping[str, bytes | None], writes: Mapping[str, Entry | None], part: float = 1.0
    ) -> bool:
        """Write all entries if everything is as expected, else nothing. No other change comes in between.

        Args:
            expected: values by name; None for a name that must be free.
            writes: new entries by name; None takes one away.
            part: of the store that may be full afterwards, so that what can be spared leaves room for the rest.

        Returns:
            Whether everything was as expected.

        Raises:
            StoreFullError: there is no room for it. Changes that make nothing larger always have room.
            StoreUnreachableError: here and in the other methods, the store does not answer.
        """
        ...

    async def close(self) -> None:
        """Let go of files and connections."""
        ...


def open_store(url: str | None, file: Path, capacity: int, clock: Clock = time.time) -> StateStore:
    """The store that the settings ask for.

    Args:
        url: of a Redis, `redis://`, `rediss://` or `unix://`; None for the embedded one.
        file: of the embedded one.
        capacity: bytes that all entries together may take.
        clock: tells the time.

    Raises:
        UsageError: the URL is of another kind, or the package for it is missing.
    """
    if url is None:
        file.touch(mode=0o600)  # What people have edited is for nobody else to see; SQLite's other files follow it.
        return SqliteStore(file, capacity, clock)
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise UsageError("state.url must begin with redis://, rediss:// or unix://; leave it out for a file.")
    if find_spec("redis") is None:
        raise UsageError("state.url needs the package `redis`, which is missing; install insightedit[redis].")
    return RedisStore(url, capacity, clock)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (name TEXT PRIMARY KEY, value BLOB NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_by_end ON entries (expires);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON entries BEGIN
    UPDATE total SET bytes = bytes + 256 + length(CAST(new.name AS BLOB)) + length(new.value); END;
CREATE TRIGGER IF NOT EXISTS taken AFTER DELETE ON entries BEGIN
    UPDATE total SET bytes = bytes - 256 - length(CAST(old.name AS BLOB)) - length(old.value); END;
"""
_LOCK_SECONDS = 20.0
"""How long a change waits for those of other processes; each takes milliseconds."""


class SqliteStore:
    """A SQLite file that several processes of one machine have open, or `:memory:` for one process alone.

    The file must lie on a disk of the machine: SQLite's log for several writers needs memory that they share.
    """

    def __init__(self, file: Path | str, capacity: int, clock: Clock = time.time) -> None:
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._database = sqlite3.connect(file, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False)
        with self._lock:
            self._database.execute("PRAGMA journal_mode = WAL")
            # A process that is killed loses nothing. A machine that loses power may lose the last changes, and no more.
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")

    async def get(self, name: str) -> bytes | None:
        """See `StateStore.get`."""
        query = "SELECT value FROM entries WHERE name = ? AND expires > ?"
        rows = await asyncio.to_thread(self._rows, query, name, self._clock())
        return rows[0][0] if rows else None

    async def names(self, prefix: str, after: str = "", limit: int = 1000) -> list[str]:
        """See `StateStore.names`."""
        query = "SELECT name FROM entries WHERE name >= ? AND name < ? AND name > ? AND expires > ? ORDER BY 1 LIMIT ?"
        end = prefix + "\U0010ffff"
        return [row[0] for row in await asyncio.to_thread(self._rows, query, prefix, end, after, self._clock(), limit)]

    async def change(
        self, expected: Mapping[str, bytes | None], writes: Mapping[str, Entry | None], part: float = 1.0
    ) -> bool:
        """See `StateStore.change`."""
        # To the end even if the caller is cancelled: the thread cannot be, and the lock is its own.
        return await asyncio.to_thread(self._change, expected, writes, part)

    async def close(self) -> None:
        """See `StateStore.close`."""
        with self._lock:
            self._database.close()

    def _rows(self, query: str, *values: str | float) -> list[Any]:
        with self._lock, _reaching():
            return self._database.execute(query, values).fetchall()

    def _change(self, expected: Mapping[str, bytes | None], writes: Mapping[str, Entry | None], part: float) -> bool:
        with self._lock, _reaching():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                done = self._change_locked(expected, writes, part)
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
            return done

    def _change_locked(
        self, expected: Mapping[str, bytes | None], writes: Mapping[str, Entry | None], part: float
    ) -> bool:
        run = self._database.execute
        run("DELETE FROM entries WHERE expires <= ?", (self._clock(),))
        for name, value in expected.items():
            found = run("SELECT value FROM entries WHERE name = ?", (name,)).fetchone()
            if (found and found[0]) != value:
                return False
        before = run("SELECT bytes FROM total").fetchone()[0]
        for name, entry in writes.items():
            run("DELETE FROM entries WHERE name = ?", (name,))
            if entry is not None:
                run("INSERT INTO entries VALUES (?, ?, ?)", (name, entry.value, entry.expires))
        after = run("SELECT bytes FROM total").fetchone()[0]
        _check_room(before, after, self._capacity * part)
        return True


@contextmanager
def _reaching() -> Generator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:  # Locked for too long or damaged, or its disk is full or gone.
        raise StoreUnreachableError(f"The store's file cannot be used: {error}.") from None


def _check_room(before: int, after: int, capacity: float) -> None:
    if after > before and after > capacity:
        raise StoreFullError(f"The store of {capacity:.0f} bytes is full; raise state.bytes, or keep answers shorter.")


# KEYS: values, ends and names, all of one slot. ARGV: now, capacity, number of expectations, then of each its name, "1"
# and value or "0" and "", then of each write its name, end and value, or "" and "" to take it away.
_CHANGE_SCRIPT = f"""
local values, ends, names = KEYS[1], KEYS[2], KEYS[3]
local function take(name)
    redis.call('HDEL', values, name); redis.call('ZREM', ends, name); redis.call('ZREM', names, name)
end
local function cost(name)
    if redis.call('HEXISTS', values, name) == 0 then return 0 end
    return {ENTRY_BYTES} + #name + redis.call('HSTRLEN', values, name)
end
local total = tonumber(redis.call('HGET', values, '') or '0')
for _, name in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', ARGV[1])) do
    total = total - cost(name); take(name)
end
redis.call('HSET', values, '', total)
local at = 4
for _ = 1, tonumber(ARGV[3]) do
    local found = redis.call('HGET', values, ARGV[at])
    if (ARGV[at + 1] == '1') ~= (found ~= false) or (found and found ~= ARGV[at + 2]) then return 0 end
    at = at + 3
end
local after = total
for i = at, #ARGV, 3 do
    after = after - cost(ARGV[i])
    if ARGV[i + 1] ~= '' then after = after + {ENTRY_BYTES} + #ARGV[i] + #ARGV[i + 2] end
end
if after > total and after > tonumber(ARGV[2]) then return {{total, after}} end
for i = at, #ARGV, 3 do
    take(ARGV[i])
    if ARGV[i + 1] ~= '' then
        redis.call('HSET', values, ARGV[i], ARGV[i + 2])
        redis.call('ZADD', ends, ARGV[i + 1], ARGV[i]); redis.call('ZADD', names, 0, ARGV[i])
    end
end
redis.call('HSET', values, '', after)
return 1
"""
# In one script, so that an entry whose time ends is never half seen.
_GET_SCRIPT = """
local ends = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not ends or tonumber(ends) <= tonumber(ARGV[2]) then return false end
return redis.call('HGET', KEYS[1], ARGV[1])
"""
_NAMES_SCRIPT = """
local first = '[' .. ARGV[1]
if ARGV[2] >= ARGV[1] then first = '(' .. ARGV[2] end
local found = {}
for _, name in ipairs(redis.call('ZRANGEBYLEX', KEYS[3], first, '(' .. ARGV[1] .. '\\255')) do
    if #found == tonumber(ARGV[4]) then break end
    if tonumber(redis.call('ZSCORE', KEYS[2], name)) > tonumber(ARGV[3]) then found[#found + 1] = name end
end
return found
"""
_REDIS_KEYS = ["insightedit:{serve}:values", "insightedit:{serve}:ends", "insightedit:{serve}:names"]


class RedisStore:
    """A Redis that gateways of several machines share. What has expired is cleared at the next change."""

    def __init__(self, url: str, capacity: int, clock: Clock = time.time) -> None:
        # Optional: only who names a Redis has the package.
        import redis.asyncio as client  # noqa: PLC0415
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.exceptions import RedisError  # noqa: PLC0415

        self._capacity = capacity
        self._clock = clock
        self._errors = (RedisError, OSError)
        # A change sent again by itself could find its own traces and take them for somebody else's.
        once = Retry(NoBackoff(), 0)
        self._client: Any = client.Redis.from_url(url, retry=once, health_check_interval=10, socket_timeout=10)
        self._get, self._names, self._change = (
            self._client.register_script(script) for script in (_GET_SCRIPT, _NAMES_SCRIPT, _CHANGE_SCRIPT)
        )

    async def get(self, name: str) -> bytes | None:
        """See `StateStore.get`."""
        return await self._run(self._get, [name, self._clock()])

    async def names(self, prefix: str, after: str = "", limit: int = 1000) -> list[str]:
        """See `StateStore.names`."""
        found: list[bytes] = await self._run(self._names, [prefix, after, self._clock(), limit])
        return [name.decode() for name in found]

    async def change(
        self, expected: Mapping[str, bytes | None], writes: Mapping[str, Entry | None], part: float = 1.0
    ) -> bool:
        """See `StateStore.change`."""
        arguments: list[str | bytes | float] = [self._clock(), self._capacity * part, len(expected)]
        for name, value in expected.items():
            arguments += [name, "0" if value is None else "1", value or b""]
        for name, entry in writes.items():
            arguments += [name, entry.expires, entry.value] if entry is not None else [name, "", ""]
        answer: int | list[int] = await self._run(self._change, arguments)
        if isinstance(answer, list):
            _check_room(answer[0], answer[1], self._capacity * part)
        return answer == 1

    async def close(self) -> None:
        """See `StateStore.close`."""
        await self._client.aclose()

    async def _run(self, script: Callable[..., Awaitable[Any]], arguments: list[Any]) -> Any:
        try:
            return await script(_REDIS_KEYS, arguments)
        except self._errors as error:
            raise StoreUnreachableError(f"The store's Redis does not answer: {type(error).__name__}.") from None
