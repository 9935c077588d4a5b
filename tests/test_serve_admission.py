"""Admission: bounded, fair between keys, by priority, in time, and within what a key may have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from insightedit.serve.admission import Admission, Ticket
from insightedit.serve.keys import Allowance, Caller
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Limits

LIMITS = Limits(in_flight=8, places=1, edit_seconds=20, body_seconds=0.1, budget=1000)


def story(tell: Callable[[Admission], Coroutine[Any, Any, None]], limits: Limits = LIMITS) -> None:
    async def told() -> None:
        admission = Admission(limits, clock=lambda: CLOCK[0])
        async with asyncio.timeout(60):
            await tell(admission)
        assert len(admission) == 0, "everybody has left"

    CLOCK[0] = 0.0
    asyncio.run(told())


CLOCK = [0.0]
"""Seconds; allowances go by it, so that no test waits a minute."""


def caller(name: str, **allowance: Any) -> Caller:
    return Caller(name, Allowance(**allowance))


class Crowd:
    """Requests that note the order in which they were edited, each edit as long as the test wants."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.refused: list[str] = []
        self.go = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def send(self, who: Caller, count: int = 1, cost: float = 10.0) -> None:
        for _ in range(count):
            self.tasks.append(asyncio.ensure_future(self._request(who, cost)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def _request(self, who: Caller, cost: float) -> None:
        try:
            with self.admission.admitted(who) as ticket:
                async with self.admission.place(ticket, cost):
                    await self.go.wait()
                    self.order.append(who.name)
        except ApiError as error:
            self.refused.append(who.name if (error.status, error.retry_after) == (429, 2) else str(error))

    async def end(self) -> None:
        self.go.set()
        await asyncio.gather(*self.tasks)


def test_a_flood_delays_a_single_edit_by_one_edit() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller("flood"), 6)
        await crowd.send(caller("single"))
        await crowd.end()
        assert crowd.order.index("single") == 1
        assert crowd.order.count("flood") == 6

    story(tell)


def test_equals_share_by_what_edits_cost() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller("first"))
        await crowd.send(caller("large"), 3, cost=30)
        await crowd.send(caller("small"), 4, cost=10)
        await crowd.end()
        assert crowd.order[1:5].count("small") == 3, crowd.order

    story(tell)


def test_whoever_was_idle_has_nothing_saved_up() -> None:
    async def tell(admission: Admission) -> None:
        for _ in range(20):
            crowd = Crowd(admission)
            await crowd.send(caller("busy"))
            await crowd.end()
        crowd = Crowd(admission)
        await crowd.send(caller("idle"), 4)
        await crowd.send(caller("busy"), 3)
        await crowd.end()
        assert crowd.order in (
            ["idle", "busy", "idle", "busy", "idle", "busy", "idle"],
            ["idle", "idle", "busy", "idle", "busy", "idle", "busy"],
        )

    story(tell)


def test_higher_priority_goes_first() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller("running"))
        await crowd.send(caller("low", priority=-1), 2)
        await crowd.send(caller("usual"), 2)
        await crowd.send(caller("high", priority=5), 2)
        await crowd.end()
        assert crowd.order == ["running", "high", "high", "usual", "usual", "low", "low"]

    story(tell)


def test_beyond_the_bound_one_caller_is_refused() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller(""), 10)
        assert crowd.refused == ["", ""]
        assert len(admission) == 8
        await crowd.end()
        assert len(crowd.order) == 8

    story(tell)


def test_a_flood_that_fills_the_gateway_keeps_nobody_out() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller("flood"), 8)
        await crowd.send(caller("single"), 5)
        assert crowd.refused == ["flood"] * 4 + ["single"]
        await crowd.send(caller("important", priority=1), 2)
        assert crowd.refused[5:] == ["flood", "single"] or crowd.refused[5:] == ["single", "flood"]
        await crowd.end()
        assert crowd.order[:3] == ["flood", "important", "important"]
        assert crowd.order.count("flood") == 3

    story(tell)


def test_what_has_begun_is_finished() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller("flood"), 8)
        await crowd.send(caller("high", priority=1))
        assert crowd.refused == ["high"]
        await crowd.end()
        assert crowd.order == ["flood"] * 8

    story(tell, LIMITS.model_copy(update={"places": 8}))


def test_a_slow_body_is_given_up_or_displaced() -> None:
    async def read(admission: Admission, who: Caller, seconds: float) -> int:
        try:
            with admission.admitted(who) as ticket:
                async with admission.reading(ticket):
                    await asyncio.sleep(seconds)
        except ApiError as error:
            return error.status
        return 200

    async def tell(admission: Admission) -> None:
        assert await read(admission, caller("slow"), 5) == 408
        readers = [asyncio.ensure_future(read(admission, caller("slow"), 0.05)) for _ in range(8)]
        await asyncio.sleep(0)
        crowd = Crowd(admission)
        await crowd.send(caller("single"))
        await crowd.end()
        assert (crowd.order, crowd.refused) == (["single"], [])
        assert sorted(await asyncio.gather(*readers)) == [200] * 7 + [429]

    story(tell)


def test_who_leaves_gives_up_the_place_and_the_turn() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller("a"), 4)
        for gone in (0, 2):
            crowd.tasks[gone].cancel()
        await asyncio.gather(crowd.tasks.pop(2), crowd.tasks.pop(0), return_exceptions=True)
        await crowd.end()
        assert crowd.order == ["a", "a"]
        # Cancelled in the very moment in which its turn comes.
        crowd = Crowd(admission)
        await crowd.send(caller("a"), 3)
        crowd.tasks[0].cancel()
        await asyncio.sleep(0)
        crowd.tasks[1].cancel()
        await asyncio.gather(crowd.tasks.pop(0), crowd.tasks.pop(0), return_exceptions=True)
        await crowd.end()
        assert crowd.order == ["a"]

    story(tell)


async def edited(admission: Admission, ticket: Ticket, seconds: float) -> None:
    async with ticket.in_time(), admission.place(ticket, 1):
        await asyncio.sleep(seconds)


async def hurried(admission: Admission, waits: float) -> None:
    with admission.admitted(caller("a")) as ticket:
        await asyncio.sleep(waits)
        ticket.shorten(0.2)
        await edited(admission, ticket, 5)


def test_a_deadline_counts_from_the_arrival() -> None:
    async def tell(admission: Admission) -> None:
        for waits in (0.0, 0.3):
            with pytest.raises(ApiError, match=r"longer than 0\.2 seconds") as error:
                await hurried(admission, waits)
            assert error.value.status == 504
        with admission.admitted(caller("a")) as ticket:
            ticket.shorten(500)
            assert ticket.seconds == LIMITS.edit_seconds
            ticket.shorten(None)
            await edited(admission, ticket, 0)

    story(tell)


def test_nobody_gives_way_to_a_request_that_is_refused() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        late = caller("late", requests_per_minute=1)
        with admission.admitted(late):
            pass
        await crowd.send(caller("flood"), 8)
        with pytest.raises(ApiError, match="are used up"), admission.admitted(late):
            pass
        await asyncio.sleep(0.01)
        assert crowd.refused == []
        await crowd.end()

    story(tell)


def test_who_has_just_got_a_place_is_finished() -> None:
    """Also where its task has not gone on since: all images of a request are made, or none is begun."""

    async def tell(admission: Admission) -> None:
        done: list[int] = []
        go = asyncio.Event()

        async def request(images: int) -> None:
            with admission.admitted(caller("flood")) as ticket:
                for _ in range(images):
                    async with admission.place(ticket, 1):
                        await go.wait()
                        done.append(images)

        with admission.admitted(caller("other")) as ticket:
            async with admission.place(ticket, 1):
                tasks = [asyncio.ensure_future(request(images)) for images in (1, 2)]
                await asyncio.sleep(0.01)
            with pytest.raises(ApiError, match="at its limit") as error, admission.admitted(caller("third")):
                pass
            assert error.value.status == 429
            go.set()
            await asyncio.gather(*tasks)
        assert sorted(done) == [1, 2, 2]

    story(tell, LIMITS.model_copy(update={"in_flight": 3, "places": 2}))


def test_a_body_that_is_given_up_already_can_be_displaced() -> None:
    async def tell(admission: Admission) -> None:
        async def body(ticket: Ticket) -> None:
            async with admission.reading(ticket):
                await asyncio.sleep(60)

        with admission.admitted(caller("flood")) as ticket:
            reading = asyncio.ensure_future(body(ticket))
            await asyncio.sleep(0)
            while ticket.reading is not None and not ticket.reading.expired():
                await asyncio.sleep(0)
            # Its task has not gone on since.
            assert not reading.done()
            ticket.displace(ApiError(429, "overloaded", "x"))
            with pytest.raises(ApiError, match="x"):
                await reading

    story(tell)


def test_requests_a_minute() -> None:
    async def tell(admission: Admission) -> None:
        who = caller("a", requests_per_minute=3)
        crowd = Crowd(admission)
        await crowd.send(who, 5)
        assert len(crowd.refused) == 2
        with pytest.raises(ApiError, match="in 20 seconds") as error, admission.admitted(who):
            pass
        assert (error.value.status, error.value.retry_after) == (429, 20)
        CLOCK[0] = 20.0
        await crowd.send(who, 2)
        await crowd.send(caller("b"))
        await crowd.end()
        assert crowd.order.count("a") == 4
        assert "b" in crowd.order
        CLOCK[0] = 10_000.0  # However long: no more than a minute's worth.
        crowd = Crowd(admission)
        await crowd.send(who, 4)
        await crowd.end()
        assert len(crowd.refused) == 1

    story(tell)


def test_at_once() -> None:
    async def tell(admission: Admission) -> None:
        crowd = Crowd(admission)
        await crowd.send(caller("a", at_once=2), 3)
        assert crowd.refused == ["a"]
        await crowd.send(caller("b"), 3)
        await crowd.end()
        await crowd.send(caller("a", at_once=2), 1)
        await crowd.end()
        assert crowd.refused == ["a"]

    story(tell)


def test_budgets() -> None:
    async def tell(admission: Admission) -> None:
        anybody, a = caller(""), caller("a", budget_per_minute=600)
        admission.charge(anybody, 100, 5, 2)
        for _ in range(5):
            admission.charge(anybody, 100, 10, 1)
        with pytest.raises(
            ApiError, match="100 pixels x 11 steps x 1 images = 1100, more than the budget of 1000"
        ) as error:
            admission.charge(anybody, 100, 11, 1)
        assert (error.value.status, error.value.code) == (400, "budget_exceeded")
        with pytest.raises(ApiError, match="budget of 600 that this API key has for a minute") as error:
            admission.charge(a, 100, 7, 1)
        assert error.value.status == 400
        admission.charge(a, 100, 4, 1)
        with pytest.raises(ApiError, match="in 10 seconds") as error:
            admission.charge(a, 100, 3, 1)
        assert (error.value.status, error.value.retry_after) == (429, 10)
        CLOCK[0] = 10.0
        admission.charge(a, 100, 3, 1)

    story(tell)
