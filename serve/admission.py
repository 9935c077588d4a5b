"""Who is edited for, and when: a bounded number of requests, places in fair turn, deadlines, and each key's allowance.

A request is admitted for as long as the gateway has it, and has a place for each image while that is edited. When
places are short, higher priority goes first, and among equals the caller that has had least: by start-time fair
queueing over pixels x steps, a flood of one key delays another key's single edit by one edit and not by the flood.
When the gateway is full, a caller that has less in it than another takes the place of the other's newest request
that still waits; so a flood cannot keep others out either.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from insightedit.serve.keys import Caller
from insightedit.serve.schema import LEAST_TIMEOUT, ApiError, overloaded
from insightedit.serve.settings import Limits

TIMEOUT_HEADER = "x-request-timeout"


def asked_seconds(headers: Mapping[str, str]) -> float | None:
    """The time that a request's headers allow for it.

    Raises:
        ApiError: 400 for what is not a number of seconds.
    """
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST_TIMEOUT <= seconds < math.inf:
        message = f"The header {TIMEOUT_HEADER} must be a number of seconds, {LEAST_TIMEOUT:g} or more."
        raise ApiError(400, "invalid_value", message, TIMEOUT_HEADER)
    return seconds


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that has been admitted."""

    caller: Caller
    deadline: float
    """By the event loop's clock."""
    seconds: float
    """From the request's arrival to the deadline."""
    begun: bool = False
    """Whether an image of it has had a place: it is finished then, whoever comes."""
    reading: asyncio.Timeout | None = None
    waiting: set[asyncio.Future[None]] = field(default_factory=set[asyncio.Future[None]])
    displaced: ApiError | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - asyncio.get_running_loop().time()

    def shorten(self, seconds: float | None) -> None:
        """Take the time that the request itself allows, if that is less."""
        if seconds is not None and seconds < self.seconds:
            self.deadline -= self.seconds - seconds
            self.seconds = seconds

    def displace(self, error: ApiError) -> None:
        """Give its place in the gateway to somebody else's request."""
        self.displaced = error
        if self.reading is not None and not self.reading.expired():
            self.reading.reschedule(asyncio.get_running_loop().time())
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_exception(error)

    @asynccontextmanager
    async def in_time(self) -> AsyncGenerator[None]:
        """Give the block up at the deadline.

        Raises:
            ApiError: 504.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                yield
        except TimeoutError:
            message = f"The edit took longer than {self.seconds:g} seconds; allow more time, or use fewer steps."
            raise ApiError(504, "timeout", message) from None


@dataclass(eq=False, slots=True)
class _Waiter:
    ticket: Ticket
    cost: float
    number: int
    turn: asyncio.Future[None]


class Admission:
    """The requests of one gateway replica."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nobody in it.

        Args:
            limits: how many, how long, how much.
            clock: seconds, for allowances.
        """
        self._limits = limits
        self._tickets: list[Ticket] = []
        self._buckets = _Buckets(clock)
        self._free = limits.places
        self._waiting: list[_Waiter] = []
        self._arrived = 0
        self._virtual = 0.0
        """What the caller served last had been given by then; whoever has been idle starts from here."""
        self._given: dict[str, float] = {}
        """What each caller has been given, in pixels x steps since `_virtual` began."""

    def __len__(self) -> int:
        """How many requests are in the gateway."""
        return self._held().total()

    # -- a request -----------------------------------------------------------------------------------------------

    @contextmanager
    def admitted(self, caller: Caller, *, counts: bool = True) -> Generator[Ticket]:
        """Let a request in for as long as the block takes.

        Args:
            caller: whose it is.
            counts: whether it is one of the caller's requests of the minute; not where it has been counted before.

        Raises:
            ApiError: 429 if the caller has had its requests, or the gateway is full.
        """
        self._check_share(caller)
        a_minute = caller.allowance.requests_per_minute if counts else None
        if a_minute is not None:
            # Before room is made: nobody's request gives way to one that is refused.
            self._buckets.check((caller.name, "requests"), 1, a_minute)
        self._make_room(caller)
        if a_minute is not None:
            self._buckets.take((caller.name, "requests"), 1, a_minute)
        seconds = self._limits.edit_seconds
        ticket = Ticket(caller, asyncio.get_running_loop().time() + seconds, seconds)
        self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)

    @asynccontextmanager
    async def reading(self, ticket: Ticket) -> AsyncGenerator[None]:
        """Read a request's body within the block, in limited time.

        Raises:
            ApiError: 408 for a body that does not come.
        """
        try:
            async with asyncio.timeout(self._limits.body_seconds) as ticket.reading:
                yield
        except TimeoutError:
            message = f"The request's body did not come within {self._limits.body_seconds:g} seconds."
            raise ticket.displaced or ApiError(408, "request_timeout", message) from None
        finally:
            ticket.reading = None

    def charge(self, caller: Caller, pixels: int, steps: int, images: int) -> None:
        """Count what a request asks for.

        Raises:
            ApiError: 400 for more than a request or a minute may ever have, 429 for more than is left of the minute.
        """
        cost = pixels * steps * images
        asked = f"The request asks for {pixels} pixels x {steps} steps x {images} images = {cost}"
        less = "make the image smaller, or ask for fewer steps or images"
        if cost > self._limits.budget:
            message = f"{asked}, more than the budget of {self._limits.budget} for one request; {less}."
            raise ApiError(400, "budget_exceeded", message)
        budget = caller.allowance.budget_per_minute
        if budget is None:
            return
        if cost > budget:
            message = f"{asked}, more than the budget of {budget} that this API key has for a minute; {less}."
            raise ApiError(400, "budget_exceeded", message)
        self._buckets.take((caller.name, "budget"), cost, budget)

    def _check_share(self, caller: Caller) -> None:
        at_once = caller.allowance.at_once
        if at_once is not None and self._held()[caller.name] >= at_once:
            message = f"This API key has {at_once} requests here, as many as it may at once; wait for one of them."
            raise ApiError(429, "rate_limit_exceeded", message, retry_after=self._limits.retry_after)

    def _make_room(self, caller: Caller) -> None:
        held = self._held()
        if held.total() < self._limits.in_flight:
            return
        idle = [ticket for ticket in self._tickets if not ticket.begun and ticket.displaced is None]
        # The lowest priority first, of that who has most, of theirs the newest.
        order = [(ticket.caller.allowance.priority, -held[ticket.caller.name]) for ticket in idle]
        full = overloaded(self._limits)
        if not order:
            raise full
        lowest = min(order)
        mine = (caller.allowance.priority, -held[caller.name] - 1)
        if lowest >= mine:
            raise full
        victim = next(ticket for ticket, place in reversed(list(zip(idle, order, strict=True))) if place == lowest)
        victim.displace(full)

    def _held(self) -> Counter[str]:
        """How many requests of each caller are here; those that are on their way out no longer count."""
        return Counter(ticket.caller.name for ticket in self._tickets if ticket.displaced is None)

    # -- a place for an image ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def place(self, ticket: Ticket, cost: float) -> AsyncGenerator[None]:
        """Wait for the ticket's turn and have a place within the block.

        Args:
            ticket: whose.
            cost: pixels x steps, of which every caller gets the same where places are short.

        Raises:
            ApiError: 429 if somebody who has less here took the ticket's place.
        """
        await self._turn(ticket, cost)
        try:
            yield
        finally:
            self._free += 1
            self._hand_out()

    async def _turn(self, ticket: Ticket, cost: float) -> None:
        if ticket.displaced is not None:
            raise ticket.displaced
        turn = asyncio.get_running_loop().create_future()
        self._arrived += 1
        waiter = _Waiter(ticket, cost, self._arrived, turn)
        self._waiting.append(waiter)
        ticket.waiting.add(turn)
        self._hand_out()
        try:
            await turn
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                # Its turn came, and it is being cancelled: the place goes to the next one.
                self._free += 1
                self._hand_out()
            raise
        finally:
            ticket.waiting.discard(turn)

    def _hand_out(self) -> None:
        """Give free places to those whose turn it is."""
        self._waiting = [waiter for waiter in self._waiting if not waiter.turn.done()]
        while self._free and self._waiting:
            waiter = min(self._waiting, key=self._order)
            self._waiting.remove(waiter)
            self._free -= 1
            name = waiter.ticket.caller.name
            self._virtual = self._tag(name)
            self._given = {key: given for key, given in self._given.items() if given > self._virtual}
            self._given[name] = self._virtual + waiter.cost
            # At once: it may be a moment until its task goes on.
            waiter.ticket.begun = True
            waiter.turn.set_result(None)

    def _order(self, waiter: _Waiter) -> tuple[int, float, int]:
        caller = waiter.ticket.caller
        return -caller.allowance.priority, self._tag(caller.name), waiter.number

    def _tag(self, name: str) -> float:
        return max(self._virtual, self._given.get(name, 0.0))


class _Buckets:
    """What is left of each minute's allowance: a bucket that holds a minute's worth and fills up evenly."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}

    def take(self, name: tuple[str, str], amount: float, per_minute: float) -> None:
        """Take some out of a bucket.

        Raises:
            ApiError: 429 when there is not that much in it, with the time until there is.
        """
        self.check(name, amount, per_minute)
        level, filled = self._levels[name]
        self._levels[name] = level - amount, filled

    def check(self, name: tuple[str, str], amount: float, per_minute: float) -> None:
        """Fill a bucket, and look whether there is enough in it.

        Raises:
            ApiError: as `take`.
        """
        now = self._clock()
        level, filled = self._levels.get(name, (per_minute, now))
        level = min(level + (now - filled) * per_minute / 60, per_minute)
        self._levels[name] = level, now
        if amount > level:
            seconds = math.ceil((amount - level) * 60 / per_minute)
            message = (
                f"This API key's {name[1]} of {per_minute:g} a minute are used up; try again in {seconds} seconds."
            )
            raise ApiError(429, "rate_limit_exceeded", message, retry_after=seconds)
