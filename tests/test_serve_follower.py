"""The leader of rollouts over a log, a fleet and a backend that do as they are told; only the store is real."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from insightedit.platform.audit import Action, AuditEntry, Change, ConflictError
from insightedit.platform.errors import InsightEditError
from insightedit.serve.backend import EditJob, EditOutcome, PartialTaker, VersionEntry, VersionInfo, VersionTable
from insightedit.serve.follower import Follower, Loading, Place, steady_clock
from insightedit.serve.quality import PixelQuality
from insightedit.serve.rollout import Evidence, Tally
from insightedit.serve.settings import RolloutSettings
from insightedit.serve.state_store import Entry, SqliteStore
from insightedit.serve.trials import Channel, Shadow
from insightedit.serve.uploads import encode_image

SETTINGS = RolloutSettings(min_requests=10, min_seconds=60, keep_seconds=1000, load_seconds=100, warm_edits=4)
DRAIN = 50.0


class Log:
    """The registry, as far as the follower knows it."""

    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []
        self.damaged: set[str] = set()
        self.tags: dict[str, str] = {}
        self.down = False
        self.meanwhile: Callable[[], None] | None = None
        self.audit = SimpleNamespace(entries=self._read)
        self.add("promote", "1", None)

    def _read(self) -> list[AuditEntry]:
        if self.down:
            raise InsightEditError("The registry does not answer.")
        return list(self.entries)

    def add(self, action: Action, to: str, from_: str | None = "1", reason: str = "") -> AuditEntry:
        number = len(self.entries) + 1
        change = Change(action=action, to_version=to, from_version=from_, reason=reason)
        fields = {name: getattr(change, name) for name in Change.__slots__}
        self.entries.append(AuditEntry(number=number, when="", **fields))
        return self.entries[-1]

    def set_tags(self, version: str, tags: dict[str, str]) -> None:
        if self.down:
            raise InsightEditError("The registry does not answer.")
        self.tags[version] = tags["rollout"]

    def fetch(self, version: str) -> Path:
        if version in self.damaged:
            raise InsightEditError("unet/model.safetensors is not what it was.")
        return Path(version)

    def rollback(self, *, version: str, reason: str, evidence: object, expected: int) -> AuditEntry:
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
        if expected != len(self.entries):
            raise ConflictError("Another change came first.")
        return self.add("rollback", version, self.entries[-1].to_version, reason)


@dataclass
class World:
    """Everything around a follower."""

    folder: Path
    log: Log = field(default_factory=Log)
    now: float = field(default_factory=time.time)
    states: dict[str, tuple[Loading, str]] = field(default_factory=dict[str, tuple[Loading, str]])
    loaded: list[str] = field(default_factory=lambda: ["insightedit-v1"])
    failing: set[str] = field(default_factory=set[str])
    shades: dict[str, int] = field(default_factory=dict[str, int])
    served: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        entry = VersionEntry(application="insightedit-v1", aliases=("champion",))
        self.table = VersionTable(default="1", versions={"1": entry})
        self.store = SqliteStore(self.folder / "state.db", 2**24)
        self.channel = Channel("test")
        place = Place(
            registry=cast(Any, self.log),
            fleet=self,
            backend=self,
            store=self.store,
            channel=self.channel,
            quality=PixelQuality(),
            drain_seconds=DRAIN,
            on_full=lambda version, _: self.served.append(version),
            clock=lambda: self.now,
        )
        self.follower = Follower(place, SETTINGS)

    # the fleet

    def deploy(self, version: str, entry: int, folder: Path, like: str) -> VersionEntry:
        assert folder == Path(version)
        assert like in self.loaded
        name = f"v{version}-{entry}"
        self.loaded.append(name)
        self.states.setdefault(name, ("loading", ""))
        return VersionEntry(application=name)

    def loading(self, application: str) -> tuple[Loading, str]:
        return self.states[application]

    def remove(self, application: str) -> None:
        self.loaded.remove(application)

    # the backend

    async def edit(self, version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        assert self.table.entry(version) is not None
        if version in self.failing:
            raise RuntimeError("ray's traceback\nArithmeticError: not numbers")
        pixels = np.full_like(job.pixels, self.shades[version]) if version in self.shades else job.pixels
        return EditOutcome(
            pixels=pixels, steps=1, queue_seconds=0, condition_seconds=0, edit_seconds=0,
            text_tokens=0, image_tokens=0, output_tokens=0,
        )  # fmt: skip

    async def describe(self, version: str) -> VersionInfo:
        raise AssertionError(version)

    # what happens

    async def steps(self, count: int = 4, seconds: float = 0.0) -> None:
        for _ in range(count):
            self.now += seconds
            await self.follower.step()
            await asyncio.sleep(0.02)  # First edits are made beside the steps.

    async def promoted(self, version: str, entry: int) -> None:
        """A version as far as its share."""
        self.log.add("promote", version)
        self.states[f"v{version}-{entry}"] = ("running", "")
        await self.steps()
        assert self.told().canary is not None, self.told()

    async def seen(self, evidence: Evidence, entry: int = 2, gateway: str = "a") -> None:
        value = Entry(evidence.model_dump_json().encode(), 10**11)
        await self.store.change({}, {f"{self.channel.seen(entry)}{gateway}": value})

    async def published(self) -> VersionTable:
        return VersionTable.model_validate_json(await self.store.get(self.channel.table) or b"")

    def told(self) -> VersionTable:
        return self.table

    def state(self) -> str:
        return "" if self.follower.rollout is None else self.follower.rollout.state


WELL = Evidence(new=Tally(answers=10, seconds=(0.5,) * 10), old=Tally(answers=90, seconds=(0.5,) * 90))
BAD = Evidence(new=Tally(answers=1, failures=5), old=Tally(answers=9))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def play(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(story)


def test_a_promotion_goes_all_the_way(world: World) -> None:
    async def story() -> None:
        await world.steps(1)
        assert (await world.published()).rollout is None
        world.log.add("promote", "2")
        await world.steps(2)
        assert world.loaded == ["insightedit-v1", "v2-2"]
        table = await world.published()
        assert (table.default, list(table.versions), list(table.others), table.canary) == ("1", ["1"], ["2"], None)
        world.states["v2-2"] = ("running", "")
        await world.steps(3)
        table = await world.published()
        assert table.canary is not None
        assert (table.default, table.canary.version, table.canary.share) == ("1", "2", 0.1)
        assert table.rollout is not None
        assert (table.rollout.pairs, table.rollout.quality, table.rollout.old_quality) == (4, 1.0, 1.0)
        assert world.log.tags == {"2": "under way"}
        await world.seen(WELL)
        await world.steps(1, seconds=59)
        assert world.state() == "canary"
        await world.steps(1, seconds=1)
        table = await world.published()
        assert (table.default, table.canary, world.served) == ("2", None, ["2"])
        assert world.log.tags == {"2": "full"}
        assert {version: entry.aliases for version, entry in table.versions.items()} == {
            "2": ("champion",), "1": ("previous",),
        }  # fmt: skip
        assert len(world.log.entries) == 2
        # The version before stays for a while, and leaves slowly.
        await world.steps(1, seconds=999)
        assert "insightedit-v1" in world.loaded
        await world.steps(1, seconds=1)
        assert (list(world.told().versions), list(world.told().others)) == (["2"], ["1"])
        await world.steps(1, seconds=DRAIN - 1)
        assert "insightedit-v1" in world.loaded
        await world.steps(1, seconds=1)
        assert world.loaded == ["v2-2"]
        assert world.told().others == {}

    play(story())


def test_a_worse_version_is_rolled_back_and_the_log_knows(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        await world.seen(BAD)
        await world.steps(1)
        table = await world.published()
        assert (table.default, table.canary, list(table.versions), list(table.others)) == ("1", None, ["1"], ["2"])
        last = world.log.entries[-1]
        assert (last.action, last.to_version, last.from_version) == ("rollback", "1", "2")
        assert last.reason == "5 of 6 edits failed by it and not by the old version"
        await world.steps(1, seconds=DRAIN)
        assert (world.loaded, world.state(), len(world.log.entries)) == (["insightedit-v1"], "rolled_back", 3)
        # The next one has a fair start.
        await world.promoted("3", 4)
        assert world.told().rollout is not None

    play(story())


def test_gateways_are_added_up(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        half = Evidence(new=Tally(answers=5))
        for gateway in ("a", "b"):
            await world.seen(half, gateway=gateway)
        await world.steps(1, seconds=60)
        assert world.state() == "full"

    play(story())


@pytest.mark.parametrize("broken", ["damaged", "does not start", "hangs", "fails", "gives noise"])
def test_what_is_broken_from_the_start_never_gets_an_edit(world: World, broken: str) -> None:
    shares: list[float] = []

    async def story() -> None:
        states: dict[str, tuple[Loading, str]] = {
            "does not start": ("failed", "KeyError: 'unet'"),
            "hangs": ("loading", ""),
        }
        world.states["v2-2"] = states.get(broken, ("running", ""))
        world.log.damaged = {"2"} if broken == "damaged" else set()
        world.failing = {"2"} if broken == "fails" else set()
        world.shades = {"2": 255} if broken == "gives noise" else {}
        world.log.add("promote", "2")
        for _ in range(5):
            await world.steps(1, seconds=30)
            shares.append(0.0 if world.told().canary is None else 1.0)

    play(story())
    assert set(shares) == {0.0}
    last = world.log.entries[-1]
    assert (last.action, last.to_version, len(world.log.entries)) == ("rollback", "1", 3)
    assert {
        "damaged": "unet/model.safetensors is not what it was",
        "does not start": "it does not load: KeyError: 'unet'",
        "hangs": "did not load within 100 seconds",
        "fails": "its first edits fail: ArithmeticError: not numbers",
        "gives noise": "its quality is",
    }[broken] in last.reason
    assert world.loaded == ["insightedit-v1"]


def test_shadows_are_judged_once(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        source = np.full((8, 8, 3), 100, np.uint8)
        files = [encode_image(np.full_like(source, shade), "png") for shade in (100, 255, 105)]
        for number in range(6):
            pair = Shadow.model_validate(
                {"prompt": "x", "seed": 1, "new_version": "2", "old_version": "1"}
                | dict(zip(("source", "new", "old"), map(base64.b64encode, files), strict=True))
            )
            value = Entry(pair.model_dump_json().encode(), 10**11)
            await world.store.change({}, {f"{world.channel.shadows(2)}{number}": value})
        await world.steps(3)

    play(story())
    last = world.log.entries[-1]
    assert last.reason == "its quality is 0.64 and the old version's 0.99, on the same 10 edits"


def test_a_rollback_by_hand_takes_one_step(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        await world.seen(WELL)
        await world.steps(1, seconds=60)
        assert world.told().default == "2"
        world.log.add("rollback", "1", "2")
        await world.steps(1)
        assert (world.told().default, world.served) == ("1", ["2", "1"])
        assert len(world.log.entries) == 3
        await world.steps(1, seconds=DRAIN)
        assert world.loaded == ["insightedit-v1"]

    play(story())


def test_a_rollback_to_what_is_not_loaded_needs_no_share(world: World) -> None:
    async def story() -> None:
        world.log.add("rollback", "0")
        world.states["v0-2"] = ("running", "")
        await world.steps(3)
        assert world.told().default == "0"

    play(story())


def test_a_rollback_while_it_has_its_share(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        world.log.add("rollback", "1", "2")
        await world.steps(1)
        assert (world.told().default, world.told().canary, world.state()) == ("1", None, "rolled_back")
        assert len(world.log.entries) == 3
        assert world.log.tags == {"2": "rolled back"}

    play(story())


def test_what_fails_for_a_moment_is_done_again(world: World) -> None:
    async def story() -> None:
        deploy = world.deploy

        def busy(version: str, entry: int, folder: Path, like: str) -> VersionEntry:
            raise RuntimeError("Serve's controller does not answer")

        world.deploy = busy
        world.log.add("promote", "2")
        world.states["v2-2"] = ("running", "")
        with pytest.raises(ExceptionGroup):
            await world.steps(1)
        world.deploy = deploy
        await world.steps(4)
        assert world.told().canary is not None

    play(story())


def test_a_lost_replica_at_the_first_edit_rules_nobody_out(world: World) -> None:
    async def story() -> None:
        edit, lost = world.edit, ["2", "1", "1"]

        async def once(version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
            if version in lost:
                lost.remove(version)
                raise RuntimeError("lost")
            return await edit(version, job, on_partial)

        world.edit = once
        await world.promoted("2", 2)
        assert lost == []
        assert world.told().rollout is not None

    play(story())


def test_another_promotion_in_between(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        await world.promoted("3", 3)
        canary = world.told().canary
        assert canary is not None
        assert canary.version == "3"
        # It goes back to the one that serves, not to the one before it in the log.
        await world.seen(BAD, entry=3)
        await world.steps(1)
        assert (world.told().default, world.log.entries[-1].to_version) == ("1", "1")

    play(story())


def test_somebody_elses_change_counts_before_a_rollback(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        world.log.meanwhile = lambda: cast(None, world.log.add("promote", "3", "2"))
        world.states["v3-3"] = ("running", "")
        await world.seen(BAD)
        await world.steps(4)
        assert [one.to_version for one in world.log.entries] == ["1", "2", "3"]
        assert world.told().canary is not None
        assert world.told().rollout is not None

    play(story())


def test_a_registry_that_is_away_for_a_while(world: World) -> None:
    async def story() -> None:
        task = asyncio.ensure_future(world.follower.run())
        world.log.down = True
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
        world.log.down = False
        await world.promoted("2", 2)

    play(story())


def test_a_bad_version_loses_its_share_though_the_registry_is_away(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        await world.seen(BAD)
        world.log.down = True
        with pytest.raises(ExceptionGroup):
            await world.steps(1)
        assert (await world.published()).canary is None
        world.log.down = False
        await world.steps(1)
        assert (world.log.entries[-1].action, world.log.tags) == ("rollback", {"2": "rolled back"})

    play(story())


def test_a_promotion_is_not_lost_over_the_one_before(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        set_tags = world.log.set_tags

        def once(version: str, tags: dict[str, str]) -> None:
            world.log.set_tags = set_tags
            raise InsightEditError("The registry does not answer.")

        world.log.set_tags = once
        world.log.add("promote", "3")
        world.states["v3-3"] = ("running", "")
        with pytest.raises(ExceptionGroup):
            await world.steps(1)
        await world.steps(4)
        canary = world.told().canary
        assert canary is not None
        assert canary.version == "3"
        assert world.log.tags == {"2": "rolled back", "3": "under way"}

    play(story())


def test_what_could_not_be_taken_away_is_taken_away_later(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        await world.seen(BAD)
        await world.steps(1)
        remove = world.remove

        def busy(application: str) -> None:
            world.remove = remove
            raise RuntimeError("Serve's controller does not answer")

        world.remove = busy
        with pytest.raises(ExceptionGroup):
            await world.steps(1, seconds=DRAIN)
        assert (world.loaded, world.told().others) == (["insightedit-v1", "v2-2"], {})
        await world.steps(1)
        assert world.loaded == ["insightedit-v1"]

    play(story())


def test_a_judge_that_fails_is_not_held_against_a_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("the judge's own trouble")

    monkeypatch.setattr(PixelQuality, "score", fails)
    play(world.promoted("2", 2))
    assert len(world.log.entries) == 2


def test_a_clock_that_is_set_moves_no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, before = steady_clock(), time.time()
    monkeypatch.setattr(time, "time", lambda: before + 10**6)
    assert abs(clock() - before) < 60


def test_the_version_before_can_be_promoted_again(world: World) -> None:
    async def story() -> None:
        await world.promoted("2", 2)
        await world.seen(WELL)
        await world.steps(1, seconds=60)
        world.log.add("promote", "1", "2")
        world.states["insightedit-v1"] = ("running", "")
        await world.steps(4)
        table = world.told()
        assert table.canary is not None
        assert (table.canary.version, list(table.versions), list(table.others)) == ("1", ["2"], ["1"])

    play(story())
