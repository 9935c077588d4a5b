"""The server's part of a rollout: it goes after the audit log, and leads each new version in, or out again.

One step after the other: read the log, look how far the version under way has come, take away what nobody needs, write
the table of versions for the gateways, write down how rollouts have ended. Each part can be done again, so that one
which fails (the registry does not answer, say) is made up for by the next step, and holds none of the others up.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from insightedit.platform.audit import CHAMPION, AuditEntry, ConflictError, wanted_aliases
from insightedit.platform.datasets.shapes_world import draw_scene, render
from insightedit.platform.errors import InsightEditError
from insightedit.platform.registry import Registry
from insightedit.serve.backend import Backend, Canary, EditJob, EditOutcome, RolloutStatus, VersionEntry, VersionTable
from insightedit.serve.logs import LOGGER
from insightedit.serve.quality import Quality
from insightedit.serve.rollout import Evidence, Rollout
from insightedit.serve.settings import RolloutSettings
from insightedit.serve.state_store import Entry, StateStore
from insightedit.serve.trials import TABLE_SECONDS, Channel, Shadow
from insightedit.serve.uploads import Pixels

logger = logging.getLogger(LOGGER)

STATE_TAG, FROM_TAG = "rollout", "rollout.from"
"""Tags of a model version: how its last rollout stands, and which version it takes over from."""
UNDER_WAY = "under way"

Loading = Literal["loading", "running", "failed"]


def steady_clock() -> Callable[[], float]:
    """A clock of seconds since the epoch, by the machine's clock of now: setting that later moves nobody's rollout."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset


class Fleet(Protocol):
    """The versions' applications."""

    def deploy(self, version: str, entry: int, folder: Path, like: str) -> VersionEntry:
        """Begin to load a version beside the others.

        Args:
            version: of the model.
            entry: the audit entry that asks for it.
            folder: its verified one.
            like: the application that it is to have as many replicas as.
        """
        ...

    def loading(self, application: str) -> tuple[Loading, str]:
        """How far a version is, and why it failed."""
        ...

    def remove(self, application: str) -> None:
        """Begin to take a version away."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a follower stands on."""

    registry: Registry
    fleet: Fleet
    backend: Backend
    """Edits by any loaded version; its table is the follower's."""
    store: StateStore
    channel: Channel
    quality: Quality
    drain_seconds: float
    """How long a request that knows an older table may still come to a version."""
    on_full: Callable[[str, tuple[str, ...]], None]
    """Is told of each version that takes all edits, and its aliases."""
    clock: Callable[[], float] = field(default_factory=steady_clock)


class Follower:
    """Leads rollouts, for as long as it is asked to take steps."""

    def __init__(self, place: Place, settings: RolloutSettings, sleeps: bool = False) -> None:
        """Begin with what the backend's table says: one version, which has everything.

        Args:
            place: what it stands on.
            settings: how rollouts go.
            sleeps: whether versions may have no replicas for some time.
        """
        self._place = place
        self._settings = settings
        self._sleeps = sleeps
        self._served = place.backend.table.default
        self._previous: str | None = None
        self._previous_until = 0.0
        self._entries = dict(place.backend.table.versions)
        """Of every version that is loaded, or on its way in or out."""
        self._leaving: dict[str, float] = {}
        """Versions on their way out, and when nobody comes to them any more."""
        self._rollout: Rollout | None = None
        self._trusted = False
        """Whether the rollout's version served before, and takes all edits as soon as it is there."""
        self._evidence = Evidence()
        """Of the follower itself: first edits, and pairs that it has judged."""
        self._judged: set[str] = set()
        self._warming: asyncio.Task[str | None] | None = None
        self._judging: asyncio.Task[None] | None = None
        self._proven = {self._served}
        """Versions that have had all edits."""
        self._seen = Evidence()
        self._entry = 0
        self._unrecorded: list[Rollout] = []
        """Rollouts that have ended, and of which that is not written down yet."""
        self._going: set[str] = set()
        """Applications that are to be taken away, and that no gateway is told of."""
        self._published = b""

    @property
    def rollout(self) -> Rollout | None:
        """The last one."""
        return self._rollout

    async def run(self) -> None:
        """Take steps until cancelled."""
        while True:
            try:
                await self.step()
            except Exception:
                logger.exception("a step of the rollout has failed and is taken again")
            await asyncio.sleep(self._settings.poll_seconds)

    async def step(self) -> None:
        """Look once at everything, and do what is to be done.

        Raises:
            ExceptionGroup: some of it has failed, and nothing else for that.
        """
        failures: list[Exception] = []
        for part in (self._read_log, self._go_on, self._clear_away, self._publish, self._record_ends):
            try:
                await part()
            except Exception as error:  # noqa: BLE001  (raised below)
                failures.append(error)
        if failures:
            raise ExceptionGroup("parts of the step", failures)

    # -- what the log asks for -----------------------------------------------------------------------------------

    async def _read_log(self) -> None:
        entries = await asyncio.to_thread(self._place.registry.audit.entries)
        champion = wanted_aliases(entries).get(CHAMPION)
        if entries and entries[-1].number != self._entry and champion is not None:
            self._turn(champion, entries)

    def _turn(self, champion: str, entries: Sequence[AuditEntry]) -> None:
        """Go where the log points now."""
        last = entries[-1]
        self._entry = last.number
        under_way = self._rollout if self._rollout is not None and not self._rollout.over else None
        if champion == (self._served if under_way is None else under_way.version):
            return
        if under_way is not None:
            self._stop_tasks()
            self._rollout = under_way.failed(f"version {champion} came instead", self._place.clock())
            self._leave(under_way.version)
            self._unrecorded.append(self._rollout)
        if champion == self._served:
            return
        self._trusted = last.action == "rollback"
        rollout = Rollout.begun(champion, self._served, last.number, self._place.clock())
        self._rollout, self._evidence, self._seen, self._judged = rollout, Evidence(), Evidence(), set()
        if self._trusted and champion in self._entries and champion in self._proven:
            self._take_over(rollout)
            return
        logger.info("version %s is on its way, asked for by entry %d", rollout.version, rollout.entry)
        # No more than two versions at a time, beside those that only finish what they have.
        if self._previous is not None and self._previous != rollout.version:
            self._leave(self._previous)
        self._previous = None
        self._leaving.pop(rollout.version, None)

    async def _load(self, rollout: Rollout) -> Rollout:
        registry = self._place.registry
        # A server that starts before this is over begins with the old version again.
        under_way = {STATE_TAG: UNDER_WAY, FROM_TAG: rollout.old}
        self._unrecorded = [one for one in self._unrecorded if one.version != rollout.version]
        await asyncio.to_thread(registry.set_tags, rollout.version, under_way)
        try:
            folder = await asyncio.to_thread(registry.fetch, rollout.version)
        except InsightEditError as error:
            return rollout.failed(str(error), self._place.clock())
        like = self._entries[rollout.old].application
        deploy = self._place.fleet.deploy
        entry = await asyncio.to_thread(deploy, rollout.version, rollout.entry, folder, like)
        self._entries[rollout.version] = entry
        return rollout

    # -- the version under way -----------------------------------------------------------------------------------

    async def _go_on(self) -> None:
        if self._rollout is not None and not self._rollout.over:
            await self._advance(self._rollout)

    async def _advance(self, rollout: Rollout) -> None:
        now = self._place.clock()
        if rollout.state == "loading":
            after = rollout.waited(now, self._settings)
            if not after.over:
                loaded = rollout.version in self._entries
                after = await (self._loading(rollout) if loaded else self._load(rollout))
        else:
            if self._judging is None or self._judging.done():
                # Beside the steps: a judge may take its time.
                self._judging = asyncio.ensure_future(self._judge_shadows(rollout))
            self._seen = self._evidence + await self._gateways_evidence(rollout)
            after = rollout.seen(self._seen, self._place.clock(), self._settings)
        if after.state == "rolled_back":
            self._give_up(rollout, after.reason)
        elif after.state == "full" or (after.state == "canary" and self._trusted):
            self._take_over(rollout)
        else:
            self._rollout = after

    async def _loading(self, rollout: Rollout) -> Rollout:
        if self._warming is None:
            application = self._entries[rollout.version].application
            state, reason = await asyncio.to_thread(self._place.fleet.loading, application)
            if state == "failed":
                return rollout.failed(f"it does not load: {reason}", self._place.clock())
            if state == "running":
                await self._publish()  # The backend has to know it.
                # Beside the steps: a rollback by hand does not wait for it.
                self._warming = asyncio.ensure_future(self._warm_up(rollout))
            return rollout
        if not self._warming.done():
            return rollout
        warming, self._warming = self._warming, None
        reason = warming.result()
        if reason is not None:
            return rollout.failed(reason, self._place.clock())
        after = rollout.seen(self._evidence, self._place.clock(), self._settings)
        return after.loaded(self._place.clock())

    async def _warm_up(self, rollout: Rollout) -> str | None:
        """Have both versions make their first edits, which say already whether the new one can be let near users.

        Returns:
            Why it cannot.
        """
        for number in range(self._settings.warm_edits):
            job = _first_job(number)
            new = await self._tried_twice(rollout.version, job)
            if isinstance(new, Exception):
                text = str(new).strip().rpartition("\n")[2]
                return f"its first edits fail: {text[:300] or type(new).__name__}"
            # Where the old one has no place for this, or cannot do it either, nothing is compared.
            old = None if self._trusted else await self._tried_twice(rollout.old, job)
            if isinstance(old, EditOutcome):
                await self._compare(job.prompt, job.pixels, new.pixels, old.pixels)
        return None

    async def _tried_twice(self, version: str, job: EditJob) -> EditOutcome | Exception:
        """An edit, or why it failed twice: once may be a lost replica."""
        try:
            return await self._place.backend.edit(version, job)
        except Exception:
            logger.warning("version %s has failed at one of its first edits", version, exc_info=True)
        try:
            return await self._place.backend.edit(version, job)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the version's)
            return error

    def _stop_tasks(self) -> None:
        for task in (self._warming, self._judging):
            if task is not None:
                task.cancel()
        self._warming = self._judging = None

    async def _compare(self, prompt: str, source: Pixels, new: Pixels, old: Pixels) -> None:
        score = self._place.quality.score
        try:
            scores = [await asyncio.to_thread(score, prompt, source, edit) for edit in (new, old)]
        except Exception:  # Whatever it is, it is the judge's, and no version's.
            logger.exception("two edits cannot be compared")
            return
        if scores[0] is not None and scores[1] is not None:
            self._evidence += Evidence(pairs=((scores[0], scores[1]),))

    async def _judge_shadows(self, rollout: Rollout) -> None:
        for name in await self._place.store.names(self._place.channel.shadows(rollout.entry)):
            found = None if name in self._judged else await self._place.store.get(name)
            if found is not None:
                self._judged.add(name)
                pair = Shadow.model_validate_json(found)
                await self._compare(pair.prompt, *map(_pixels, (pair.source, pair.new, pair.old)))

    async def _gateways_evidence(self, rollout: Rollout) -> Evidence:
        names = await self._place.store.names(self._place.channel.seen(rollout.entry))
        found = [await self._place.store.get(name) for name in names]
        return Evidence.total(Evidence.model_validate_json(one) for one in found if one is not None)

    # -- how it ends ---------------------------------------------------------------------------------------------

    def _take_over(self, rollout: Rollout) -> None:
        """Give all edits to the rollout's version."""
        now = self._place.clock()
        logger.info("version %s takes all edits from version %s", rollout.version, rollout.old)
        self._rollout = Rollout.begun(rollout.version, rollout.old, rollout.entry, now).full(now)
        self._leaving.pop(rollout.version, None)
        self._served = rollout.version
        self._proven.add(rollout.version)
        if self._previous not in (None, rollout.version):
            self._leave(str(self._previous))
        self._previous = None
        if self._trusted:
            self._leave(rollout.old)
        else:
            self._previous, self._previous_until = rollout.old, now + self._settings.keep_seconds
        self._stop_tasks()
        self._unrecorded.append(self._rollout)
        self._place.on_full(self._served, self._aliases(self._served))

    def _give_up(self, rollout: Rollout, reason: str) -> None:
        """Let the old version keep all edits."""
        logger.error("version %s is rolled back: %s", rollout.version, reason)
        self._stop_tasks()
        self._rollout = rollout.failed(reason, self._place.clock())
        self._leave(rollout.version, at_once=rollout.state == "loading")
        self._unrecorded.append(self._rollout)

    async def _record_ends(self) -> None:
        while self._unrecorded:
            await self._record(self._unrecorded[0])
            del self._unrecorded[0]

    async def _record(self, rollout: Rollout) -> None:
        """Write down how a rollout has ended; in the log too, where the old version is the champion again by itself."""
        registry = self._place.registry
        ended = {STATE_TAG: rollout.state.replace("_", " "), FROM_TAG: rollout.old}
        await asyncio.to_thread(registry.set_tags, rollout.version, ended)
        # Somebody's rollback to a version that cannot be loaded is for somebody to look at.
        if rollout.state != "rolled_back" or self._trusted or rollout.entry != self._entry:
            return
        evidence = self._figures()
        try:
            entry = await asyncio.to_thread(
                registry.rollback, reason=rollout.reason, evidence=evidence, expected=self._entry, version=self._served
            )
        except ConflictError as error:
            logger.warning("the rollback of version %s is not recorded: %s", rollout.version, error)
        else:
            self._entry = entry.number

    def _leave(self, version: str, at_once: bool = False) -> None:
        """Let a version finish what it has; one that never had its share has nothing."""
        if version in self._entries:
            self._leaving[version] = self._place.clock() + (0.0 if at_once else self._place.drain_seconds)

    async def _clear_away(self) -> None:
        now = self._place.clock()
        if self._previous is not None and now >= self._previous_until:
            self._leave(self._previous)
            self._previous = None
        for version in [version for version, when in self._leaving.items() if now >= when]:
            del self._leaving[version]
            self._going.add(self._entries.pop(version).application)
        if self._going:
            await self._publish()
        for application in sorted(self._going):
            await asyncio.to_thread(self._place.fleet.remove, application)
            self._going.remove(application)

    # -- what gateways are told ----------------------------------------------------------------------------------

    def _aliases(self, version: str) -> tuple[str, ...]:
        return (CHAMPION,) if version == self._served else ("previous",)

    def _table(self) -> VersionTable:
        listed = [self._served, *([self._previous] if self._previous is not None else [])]
        entries = {
            version: entry.model_copy(update={"sleeps": self._sleeps}) for version, entry in self._entries.items()
        }
        rollout, canary = self._rollout, None
        if rollout is not None and rollout.state == "canary":
            share, sticky = self._settings.share, self._settings.sticky
            canary = Canary(version=rollout.version, share=share, sticky=sticky)
        return VersionTable(
            default=self._served,
            versions={
                version: entries[version].model_copy(update={"aliases": self._aliases(version)}) for version in listed
            },
            others={version: entry for version, entry in entries.items() if version not in listed},
            canary=canary,
            rollout=None if rollout is None else self._status(rollout),
        )

    def _status(self, rollout: Rollout) -> RolloutStatus:
        return RolloutStatus(
            version=rollout.version,
            old=rollout.old,
            entry=rollout.entry,
            state=rollout.state,
            since=rollout.since,
            reason=rollout.reason,
            **self._figures(),
        )

    def _figures(self) -> Mapping[str, Any]:
        """What was seen of the version under way, in numbers."""
        pairs, figures = self._seen.pairs or self._evidence.pairs, dict[str, Any]()
        if pairs:
            means = [round(float(np.mean(scores)), 4) for scores in zip(*pairs, strict=True)]
            figures = {"quality": means[0], "old_quality": means[1]}
        new = self._seen.new
        return {"answers": new.answers, "failures": new.failures, "pairs": len(pairs), **figures}

    async def _publish(self) -> None:
        table = self._table()
        self._place.backend.table = table
        value = table.model_dump_json().encode()
        if value != self._published:
            # An end in the far future: the store keeps nothing without one.
            entry = Entry(value, self._place.clock() + TABLE_SECONDS)
            await self._place.store.change({}, {self._place.channel.table: entry})
            self._published = value


def _first_job(number: int) -> EditJob:
    """An edit of a scene, the same for every version. The instruction is short: some models read little."""
    scene = draw_scene(random.Random(number), held_out=False)
    return EditJob(prompt="make it brighter", pixels=render(scene), seed=number)


def _pixels(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
