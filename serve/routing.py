"""How the gateway reaches the replicas: which version's, again when one dies, and never more than they can hold."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from ray import serve as ray_serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]  (the dashboard's own way)
from ray.serve.exceptions import BackPressureError, RayServeException, ReplicaUnavailableError
from starlette.types import ASGIApp

from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import (
    Conditions,
    Edited,
    EditJob,
    EditOutcome,
    PartialTaker,
    Refusal,
    VersionInfo,
    VersionTable,
)
from insightedit.serve.door import Access
from insightedit.serve.draining import Draining
from insightedit.serve.feedback import FOLDER, Feedback
from insightedit.serve.fleet import FleetStatus, fleet_status
from insightedit.serve.gateway import build_app
from insightedit.serve.logs import LOGGER
from insightedit.serve.meters import Meters
from insightedit.serve.schema import ApiError, overloaded
from insightedit.serve.settings import Limits, ServeSettings
from insightedit.serve.shared import Shared
from insightedit.serve.state_store import open_store
from insightedit.serve.traces import Traces
from insightedit.serve.trials import Trials

logger = logging.getLogger(LOGGER)
Result = TypeVar("Result")
serve: Any = ray_serve  # Its types are incomplete.

CONDITIONER, EDITOR = "Conditioner", "Editor"
ANSWER_SECONDS = 10.0
"""How long replicas may take to say that they are there, and how long an edit that worked says it for them."""

# A replica that died took its work with it. An edit's seed is fixed, so doing it again gives the same image.
_LOST = (RayActorError, ObjectLostError, ReplicaUnavailableError)


class ReplicaBackend:
    """Edits by the Serve applications of a version table."""

    def __init__(self, table: VersionTable, limits: Limits, meters: Meters) -> None:
        self.table = table
        self._limits = limits
        self._meters = meters
        self._infos: dict[str, tuple[float, VersionInfo]] = {}
        self._handles: dict[tuple[str, str], Any] = {}
        """By application and deployment."""
        self._rousing: set[str] = set()
        """Versions whose editor has been told that an edit is coming."""

    async def edit(self, version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        """Condition, then edit."""
        begun = time.perf_counter()
        async with self._editor_roused(version):
            conditions: Conditions | Refusal = await self._call(version, CONDITIONER, "condition", job)
        if isinstance(conditions, Refusal):
            raise ApiError(400, "invalid_value", conditions.message, conditions.param)
        if on_partial is None or job.partials == 0:
            edited: Edited = await self._call(version, EDITOR, "edit", job, conditions)
        else:
            edited = await self._edit_in_parts(version, job, conditions, on_partial)
        if version in self._infos:
            self._infos[version] = (time.monotonic(), self._infos[version][1])
        working = conditions.seconds + edited.seconds
        return EditOutcome(
            pixels=edited.pixels,
            steps=edited.steps,
            queue_seconds=max(time.perf_counter() - begun - working, 0.0),
            condition_seconds=conditions.seconds,
            edit_seconds=edited.seconds,
            text_tokens=conditions.text_tokens,
            image_tokens=conditions.image_tokens,
            output_tokens=edited.output_tokens,
        )

    async def describe(self, version: str) -> VersionInfo:
        """Ask both halves, which also makes the first edit find its way; one that has just worked is answer enough.

        A version that may sleep is asked once: asking again would keep it awake.
        """
        when, known = self._infos.get(version, (float("-inf"), None))
        entry = self.table.entry(version)
        sleeps = entry is not None and entry.sleeps
        if known is not None and (sleeps or time.monotonic() - when < ANSWER_SECONDS):
            return known
        try:
            async with asyncio.timeout(self._limits.edit_seconds if sleeps else ANSWER_SECONDS):
                _, info = await asyncio.gather(
                    self._call(version, CONDITIONER, "ready"), self._call(version, EDITOR, "describe")
                )
        except TimeoutError:
            message = f"The replicas of model version {version} do not answer."
            raise ApiError(503, "unavailable", message) from None
        self._infos[version] = (time.monotonic(), info)
        return info

    async def _handle(self, version: str, deployment: str) -> Any:
        entry = self.table.entry(version)
        if entry is None:
            message = f"Model version {version} is not served any more; send the request again."
            raise ApiError(503, "unavailable", message, retry_after=self._limits.retry_after)
        place = (entry.application, deployment)
        if place not in self._handles:
            # It asks Serve's controller, while nothing else is done on its thread.
            found = await asyncio.to_thread(serve.get_deployment_handle, deployment, entry.application)
            served = {one.application for one in (*self.table.versions.values(), *self.table.others.values())}
            kept = {key: handle for key, handle in self._handles.items() if key[0] in served}
            self._handles = {**kept, place: found}
        return self._handles[place]

    @asynccontextmanager
    async def _editor_roused(self, version: str) -> AsyncGenerator[None]:
        """While the block runs, have an editor start where none does: it need not wait for the conditions.

        One call is enough for all edits of these seconds. It ends with the block, since Serve counts calls for scaling.
        """
        handle = await self._handle(version, EDITOR)
        if version in self._rousing or _runs(handle):
            yield
            return
        self._rousing.add(version)
        call = asyncio.create_task(self._call(version, EDITOR, "ready"))
        try:
            yield
        finally:
            self._rousing.discard(version)
            call.cancel()
            # What fails here fails again at the edit, which says so.
            await asyncio.gather(call, return_exceptions=True)

    async def _edit_in_parts(
        self, version: str, job: EditJob, conditions: Conditions, on_partial: PartialTaker
    ) -> Edited:
        """An edit whose partial images are handed on, each once however many replicas die under it."""
        taken = 0

        async def attempt() -> Edited:
            nonlocal taken
            handle = (await self._handle(version, EDITOR)).options(stream=True)
            response = handle.edit_in_parts.remote(job, conditions)
            with _cancelling(response):
                async for part in response:
                    if isinstance(part, Edited):
                        return part
                    if part.index == taken:
                        taken += 1
                        await on_partial(part.index, part.pixels)
            raise RuntimeError("the editor has ended an edit without its image")

        with self._meters.in_hand.labels(version, EDITOR).track_inprogress():
            return await self._attempts(version, "edit_in_parts", attempt)

    async def _call(self, version: str, deployment: str, method: str, *arguments: object) -> Any:
        """One call to some replica."""

        async def attempt() -> Any:
            response = getattr(await self._handle(version, deployment), method).remote(*arguments)
            with _cancelling(response):
                return await response

        with self._meters.in_hand.labels(version, deployment).track_inprogress():
            return await self._attempts(version, method, attempt)

    async def _attempts(self, version: str, what: str, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What replicas do, done again where one dies under it."""
        # A version that is nobody's choice has another one to stand in for it, at once.
        attempts = 1 if version in self.table.others else self._limits.attempts
        for number in range(1, attempts + 1):
            try:
                return await attempt()
            except _LOST as error:
                logger.warning("%s of version %s was lost at attempt %d: %s", what, version, number, type(error))
                await asyncio.sleep(min(0.1 * 2**number, 2.0))
            except BackPressureError:
                raise overloaded(self._limits) from None
            except RayServeException:
                logger.exception("version %s cannot be reached", version)
                break
        message = f"Model version {version} cannot be reached at present; send the request again."
        raise ApiError(503, "unavailable", message, retry_after=self._limits.retry_after)


def _runs(handle: Any) -> bool:
    """Whether a handle knows of a replica. Serve tells it of each that comes or goes; nobody is asked."""
    router = getattr(handle._router, "_asyncio_router", None)  # None before the first call.
    known = getattr(router, "_request_router", None)
    return known is not None and len(known.curr_replicas) > 0


@contextmanager
def _cancelling(response: Any) -> Generator[None]:
    """Whoever leaves early takes the work out of the replica too: nobody waits for it."""
    try:
        yield
    except asyncio.CancelledError:
        response.cancel()
        raise


@serve.ingress()
class Gateway:
    """The gateway as a Serve deployment. Its version table is its `user_config` and changes without a restart."""

    def __init__(self, settings: dict[str, Any], table: dict[str, Any], channel: str | None = None) -> None:
        """Build the gateway.

        Args:
            settings: a `ServeSettings` as plain data.
            table: the first `VersionTable`, as plain data.
            channel: where later ones come, in the store.
        """
        own = ServeSettings.model_validate(settings)
        self._limits = own.limits
        self._access = Access.of(own)
        self._image_urls = own.image_urls
        self._meters = Meters()
        self._backend = ReplicaBackend(VersionTable.model_validate(table), self._limits, self._meters)
        store = open_store(own.state.url, Workdir.open().root / "state.db", own.state.bytes)
        self._shared = Shared.of(store, own.state, own.limits, own.webhooks)
        self._feedback = Feedback(own.feedback, store, Workdir.open().root / FOLDER)
        self._trials = Trials(self._backend, own.rollout, store, channel, self._meters)
        self._traces = Traces(own.traces) if own.traces.url else None
        self._draining = Draining(own.limits, self._meters)

    def reconfigure(self, table: dict[str, Any]) -> None:
        """Take another version table, as plain data."""
        self._backend.table = VersionTable.model_validate(table)

    async def drain(self) -> int:
        """Take no more edits, and say how many requests are in hand; see `Draining.begin`."""
        return self._draining.begin()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve puts behind the route."""
        app = build_app(
            self._backend,
            self._limits,
            self._meters,
            sets_request_id=False,
            access=self._access,
            shared=self._shared,
            trials=self._trials,
            image_urls=self._image_urls,
            traces=self._traces,
            feedback=self._feedback,
            draining=self._draining,
        )
        app.get("/v1/status", summary="Replicas, queues, versions and aliases.")(self._status)
        return app

    async def _status(self) -> FleetStatus:
        details, calls = await asyncio.gather(
            asyncio.to_thread(_serve_details), asyncio.to_thread(self._meters.calls_in_hand)
        )
        return fleet_status(details, self._backend.table, calls)


def _serve_details() -> dict[str, Any]:
    """What Serve's controller knows. `serve.status` has less of it: not how many replicas are wanted."""
    client: Any = _get_global_client()
    return client.get_serve_details()
