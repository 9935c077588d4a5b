"""Work that ends when its client leaves, and answers that come as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any, Generic, Self, TypeVar, cast

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from insightedit.serve.schema import ApiError

Result = TypeVar("Result")
Event = TypeVar("Event")
Emit = Callable[[Event], Awaitable[None]]
_END = object()


async def while_client_stays(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work, or cancel it when the client leaves.

    Args:
        receive: the connection's; the request's body has been read from it.
        work: what to do.

    Raises:
        ClientDisconnect: the client left first.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await end_all(task, leaving)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def all_or_none(works: list[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Do some things at the same time; when one fails, cancel the others and raise its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await end_all(*tasks)


async def end_all(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and return when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Running(Generic[Event]):
    """Work in a task of its own, whose events are taken as they come. Whoever leaves its block cancels it."""

    def __init__(self, work: Callable[[Emit[Event]], Coroutine[Any, Any, object]]) -> None:
        self._queue: asyncio.Queue[object] = asyncio.Queue()
        self._work = work

    async def __aenter__(self) -> Self:
        self._task = asyncio.ensure_future(self._work(self._queue.put))
        self._task.add_done_callback(lambda _: self._queue.put_nowait(_END))
        return self

    async def __aexit__(self, *_: object) -> None:
        await end_all(self._task)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """The next event; the work's error once it has failed."""
        item = await self._queue.get()
        if item is _END:
            await self._task
            raise StopAsyncIteration
        return cast(Event, item)


class EventStream(Response):
    """An answer whose parts are sent as they come: events of OpenAI's form, each a line of its type and one of JSON.

    An error in between is sent as an event too, since the status has gone out by then.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: BaseModel, rest: AsyncIterator[BaseModel], headers: Mapping[str, str], closing: AsyncExitStack
    ) -> None:
        """Prepare to send.

        Args:
            first: the first event, which is there already.
            rest: the others.
            headers: beside the type's.
            closing: what to leave when all is sent, or cannot be.
        """
        self._first = first
        self._rest = rest
        self._closing = closing
        self.background = None
        self.status_code = 200
        # What stands in front must not collect the events.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop where the client leaves."""
        try:
            async with self._closing:
                await while_client_stays(receive, self._send_events(send))
        except ApiError as error:
            await _send_part(send, _event("error", error.body()))
        except ClientDisconnect:
            raise
        except Exception:
            failure = ApiError(500, "internal_error", "The server failed at this request; its log says why.")
            await _send_part(send, _event("error", failure.body()))
            await _send_end(send)
            raise
        await _send_end(send)

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _send_part(send, _event_of(self._first))
        async for event in self._rest:
            await _send_part(send, _event_of(event))


def _event_of(model: BaseModel) -> bytes:
    content = model.model_dump()
    return _event(content["type"], content)


def _event(name: str, content: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _send_end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})
