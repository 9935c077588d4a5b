"""Work that gateways share: whoever has a hand free takes some of it out of their store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial

from insightedit.serve.job_book import JobRecord
from insightedit.serve.logs import LOGGER
from insightedit.serve.state_store import StoreFullError, StoreUnreachableError
from insightedit.serve.streams import end_all

logger = logging.getLogger(LOGGER)

LOOK_SECONDS = 1.0
"""How often a gateway looks for work that nobody does."""


class Crew:
    """Some hands that each do one thing after the other."""

    def __init__(
        self,
        most: int,
        waiting: Callable[[], Awaitable[Iterable[str]]],
        take: Callable[[str], Awaitable[JobRecord | None]],
        do: Callable[[JobRecord], Awaitable[None]],
    ) -> None:
        """Begin with nothing to do.

        Args:
            most: hands.
            waiting: names what there is to do, the first first.
            take: makes it ours by its name; None if it is not to be had.
            do: does it. Cancelled, it leaves it for others.
        """
        self._most = most
        self._waiting = waiting
        self._take = take
        self._do = do
        self._tasks: dict[str, asyncio.Future[None]] = {}
        self._woken = asyncio.Event()

    @asynccontextmanager
    async def at_work(self) -> AsyncGenerator[None]:
        """Work within the block. What has not been done by its end is left for others."""
        looking = asyncio.create_task(self._look_for_more())
        try:
            yield
        finally:
            await end_all(looking)
            await end_all(*self._tasks.values())

    def look(self) -> None:
        """There may be something to do."""
        self._woken.set()

    async def _look_for_more(self) -> None:
        while True:
            try:
                await self._take_some()
            except (StoreUnreachableError, StoreFullError) as error:
                logger.warning("the store's work cannot be looked for: %s", error)
            except Exception:
                logger.exception("the store's work cannot be looked for")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._woken.wait()
            self._woken.clear()

    async def _take_some(self) -> None:
        if len(self._tasks) >= self._most:
            return
        for path in await self._waiting():
            if len(self._tasks) >= self._most:
                return
            if path not in self._tasks and (job := await self._taken(path)) is not None:
                self._tasks[path] = asyncio.ensure_future(self._do(job))
                self._tasks[path].add_done_callback(partial(self._forget, path))

    async def _taken(self, path: str) -> JobRecord | None:
        try:
            return await self._take(path)
        except (StoreUnreachableError, StoreFullError):
            raise
        except Exception as error:  # noqa: BLE001
            # One that cannot be read, of another release say, must not keep all others waiting.
            logger.error("%s cannot be taken: %s", path, type(error).__name__)
            return None

    def _forget(self, path: str, task: asyncio.Future[None]) -> None:
        del self._tasks[path]
        self.look()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("work out of the store failed", exc_info=error)
