"""A gateway's part of a rollout: which edits a new version makes, what is seen of them, and the table that says so.

The server that leads the rollout (`follower`) and the gateways meet in the gateways' shared store: it writes the table
of versions there, they write what they have seen, and pairs of the same edit by both versions, for it to judge.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError

from insightedit.serve.backend import Backend, EditJob, VersionTable
from insightedit.serve.logs import LOGGER
from insightedit.serve.meters import Meters
from insightedit.serve.rollout import Evidence, Tally
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import RolloutSettings
from insightedit.serve.state_store import Entry, StateStore, StoreFullError, StoreUnreachableError
from insightedit.serve.uploads import Pixels, encode_image

logger = logging.getLogger(LOGGER)

REFRESH_SECONDS = 0.25
"""How often a gateway looks for another table, and writes down what it has seen."""
EVIDENCE_SECONDS = 3600.0
"""How long what a gateway has seen is kept beyond the longest rollout, from the last time that it wrote it."""
TABLE_SECONDS = 10 * 365 * 86400.0
"""How long a table holds: as long as its server, whose name is in its own."""
SHADOWS_AT_ONCE = 2
"""Edits that one gateway has the old version make for comparison at a time; others are left out."""
SHADOW_PRIORITY = -1000
"""Below whatever a key may have."""
SHADOWS_PART = 0.25
"""Of the store that pairs of edits may fill."""
_STORE_ERRORS = (StoreFullError, StoreUnreachableError)


@dataclass(frozen=True, slots=True)
class Channel:
    """Where a server and its gateways meet: names in the store, which no other server uses."""

    name: str

    @property
    def table(self) -> str:
        """Of the table of versions."""
        return f"rollout/{self.name}/table"

    def seen(self, entry: int) -> str:
        """What the names begin with of what gateways have seen of the rollout of an audit entry."""
        return f"rollout/{self.name}/{entry}/seen/"

    def shadows(self, entry: int) -> str:
        """What the names of its pairs of edits begin with."""
        return f"rollout/{self.name}/{entry}/shadow/"


class Shadow(BaseModel):
    """The same edit by both versions; images are PNG files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    seed: int
    source: Base64Bytes
    new: Base64Bytes
    old: Base64Bytes
    new_version: str
    old_version: str


class Trials:
    """What a gateway does for rollouts."""

    def __init__(
        self, backend: Backend, settings: RolloutSettings, store: StateStore, channel: str | None, meters: Meters
    ) -> None:
        """Begin with the table that the backend has.

        Args:
            backend: whose table follows the store's.
            settings: how rollouts go.
            store: shared with the server.
            channel: the name of the server's channel; None where nobody leads rollouts.
            meters: where to count.
        """
        self._backend = backend
        self._settings = settings
        self._store = store
        self._meters = meters
        self._channel = None if channel is None else Channel(channel)
        self._name = uuid.uuid4().hex
        self._table = b""
        self._evidence = Evidence()
        self._written = Evidence()
        self._shadows: set[asyncio.Task[None]] = set()
        self._meeting: dict[str, asyncio.Task[None]] = {}

    # -- which version -------------------------------------------------------------------------------------------

    def draw(self, caller: str, user: str | None) -> float:
        """A request's number from 0 to 1, which decides whether the canary gets it.

        Args:
            caller: the name of its API key; "" where keys are off.
            user: whom the caller asks for.
        """
        canary = self._backend.table.canary
        if canary is None or not canary.sticky or (not caller and user is None):
            return random.random()
        # Another version, another choice: it is not always the same people who go first.
        digest = hashlib.sha256(f"{canary.version}/{caller}/{user}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def on_trial(self, version: str) -> bool:
        """Whether another version must stand in for this one when it fails."""
        return version in self._backend.table.others

    def limit(self, left: float) -> float:
        """Seconds that a version on trial has for an edit before the old one makes it.

        Args:
            left: until the request is given up.
        """
        old = self._evidence.old.seconds
        if len(old) < self._settings.min_timed:
            return left / 2
        return min(left / 2, 2 * self._settings.max_slowdown * max(old) + 1.0)

    # -- what is seen --------------------------------------------------------------------------------------------

    def answered(self, version: str, seconds: float) -> None:
        """Count an edit that a version has made."""
        self._count(version, lambda tally: tally.answered(seconds))

    def failed(self, version: str) -> None:
        """Count an edit that a version has failed at, and the old one not."""
        self._count(version, Tally.failed)

    def said(self, version: str, accepted: bool) -> None:
        """Count what a user says of an edit."""
        self._count(version, lambda tally: tally.judged(accepted))

    def _count(self, version: str, change: Callable[[Tally], Tally]) -> None:
        table = self._backend.table
        if table.canary is None:
            return
        if version == table.canary.version:
            self._evidence = self._evidence.model_copy(update={"new": change(self._evidence.new)})
        elif version == table.default:
            self._evidence = self._evidence.model_copy(update={"old": change(self._evidence.old)})

    def shadow(self, job: EditJob, pixels: Pixels) -> None:
        """Have the old version make an edit too that the canary has made, when nobody else wants it.

        Args:
            job: the edit.
            pixels: what the canary made of it.
        """
        rollout = self._backend.table.rollout
        if self._channel is None or rollout is None or len(self._shadows) >= SHADOWS_AT_ONCE:
            return
        if random.random() < self._settings.shadow_share:
            name = f"{self._channel.shadows(rollout.entry)}{time.time():020.6f}-{self._name}"
            task = asyncio.ensure_future(self._make_shadow(name, job, pixels, rollout.version, rollout.old))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _make_shadow(self, name: str, job: EditJob, pixels: Pixels, new: str, old: str) -> None:
        job = replace(job, priority=SHADOW_PRIORITY, partials=0)
        try:
            outcome = await self._backend.edit(old, job)
            images = [await asyncio.to_thread(encode_image, one, "png") for one in (job.pixels, pixels, outcome.pixels)]
            source, by_new, by_old = map(base64.b64encode, images)
            pair = Shadow(
                prompt=job.prompt,
                seed=job.seed,
                source=source,
                new=by_new,
                old=by_old,
                new_version=new,
                old_version=old,
            )
            entry = Entry(pair.model_dump_json().encode(), time.time() + self._settings.shadow_seconds)
            await self._store.change({}, {name: entry}, SHADOWS_PART)
        except Exception as error:  # noqa: BLE001  (nobody waits for it, and it is the old version's failure)
            logger.warning("an edit of version %s is not compared with version %s: %s", new, old, type(error).__name__)

    # -- the store -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def following(self) -> AsyncGenerator[None]:
        """Take every new table, and write down what is seen, while the block runs."""
        if self._channel is None:
            yield
            return
        # Before the first request: the table that a replica is born with may be an old one.
        await self.refresh()
        task = asyncio.ensure_future(self._refresh_for_ever())
        try:
            yield
        finally:
            for one in (task, *self._shadows, *self._meeting.values()):
                one.cancel()
                with suppress(asyncio.CancelledError):
                    await one

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except Exception:
                # Who stops following would send edits to versions that are gone.
                logger.exception("the table of versions cannot be followed")

    async def refresh(self) -> None:
        """Take the store's table, if it is another one, and write down what was seen since the last time."""
        if self._channel is None:
            return
        try:
            found = await self._store.get(self._channel.table)
            if found is not None and found != self._table:
                self._take(found)
            await self._write()
        except (*_STORE_ERRORS, ValidationError) as error:
            logger.warning("the table of versions cannot be followed: %s", error)

    def _take(self, found: bytes) -> None:
        table = VersionTable.model_validate_json(found)
        if _trial_of(table) != _trial_of(self._backend.table):
            self._evidence = self._written = Evidence()
        self._backend.table, self._table = table, found
        for version in [version for version in self._meeting if table.entry(version) is None]:
            self._meeting.pop(version).cancel()
        for version in table.others:
            if version not in self._meeting:
                self._meeting[version] = asyncio.ensure_future(self._meet(version))
        rollout = table.rollout
        if rollout is not None and rollout.quality is not None and rollout.old_quality is not None:
            self._meters.quality.labels(rollout.version).set(rollout.quality)
            self._meters.quality.labels(rollout.old).set(rollout.old_quality)

    async def _meet(self, version: str) -> None:
        """Find the way to a version's replicas before there is an edit for them."""
        while version in self._backend.table.others:
            try:
                await self._backend.describe(version)
            except ApiError:
                await asyncio.sleep(REFRESH_SECONDS)  # They are not there yet.
            else:
                return

    async def _write(self) -> None:
        rollout, seen = self._backend.table.rollout, self._evidence
        if self._channel is None or rollout is None or seen == self._written:
            return
        end = time.time() + self._settings.max_seconds + EVIDENCE_SECONDS
        entry = Entry(seen.model_dump_json().encode(), end)
        await self._store.change({}, {f"{self._channel.seen(rollout.entry)}{self._name}": entry})
        self._written = seen


def _trial_of(table: VersionTable) -> int | None:
    """The audit entry of the rollout that a table is about."""
    return None if table.rollout is None else table.rollout.entry
