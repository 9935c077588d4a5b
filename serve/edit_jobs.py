"""Jobs: edits that are sent under an id of the caller's own, done when there is room for them, and fetched later."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from insightedit.serve.answers import CompletedEvent, Job, JobList, JobStatus, WebhookSecret
from insightedit.serve.crew import Crew
from insightedit.serve.door import Access, caller_of
from insightedit.serve.edits import EditService, Visit
from insightedit.serve.idempotency import store_errors
from insightedit.serve.job_book import UNAVAILABLE, JobBook, JobRecord, OpenJob
from insightedit.serve.logs import LOGGER, log_edit, speak_of
from insightedit.serve.schema import SEED_LIMIT, ApiError, EditFields, ErrorObject, JobFields
from insightedit.serve.state_store import StoreFullError, StoreUnreachableError
from insightedit.serve.streams import end_all
from insightedit.serve.webhooks import Webhooks, shown

logger = logging.getLogger(LOGGER)

_ID = "^[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}$"
JobId = Annotated[str, Path(pattern=_ID)]
RENEW_SECONDS = 1.0
"""How often a gateway looks whether the jobs that it does are still its own."""
LONGEST_PAUSE = 30.0
"""Seconds after which a job that there was no room for is tried again, at most."""
MOST_LOSSES = 3
"""Gateways that may die over one job; it may be what they die of."""
_PASSING = frozenset({429, 503})


class JobQuery(BaseModel):
    """Which of a caller's jobs are listed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    """How many at most."""
    after: Annotated[str, Field(pattern=_ID)] | None = None
    """Id of a job: only older ones, as of the last job of the list before."""
    status: JobStatus | None = None
    """Only those that have it."""


class JobService:
    """Answers requests about jobs, and has them done."""

    def __init__(self, edits: EditService, book: JobBook, webhooks: Webhooks, access: Access) -> None:
        self._edits = edits
        self._book = book
        self._webhooks = webhooks
        self._runner = JobRunner(edits, book, access)

    @asynccontextmanager
    async def at_work(self) -> AsyncGenerator[None]:
        """Do jobs within the block, and tell their ends. What has not been done by its end is left for others."""
        async with self._webhooks.at_work(), self._runner.crew.at_work():
            yield

    async def create(self, request: Request, job_id: str) -> Response:
        """Take a job, or find it if it has been sent before.

        Raises:
            ApiError: it is refused.
        """
        try:
            job, is_new = await self._accepted(request, job_id)
        except ApiError as error:
            self._edits.meters.rejected.labels(error.code).inc()
            raise
        self._runner.crew.look()
        content = (await self._book.answer(job)).model_dump()
        return JSONResponse(content, status_code=202 if is_new else 200)

    async def _accepted(self, request: Request, job_id: str) -> tuple[JobRecord, bool]:
        wanted = await self._edits.accept(request)
        fields = wanted.request.fields
        if fields.stream:
            message = "stream: a job is not streamed; leave it out, and fetch the job."
            raise ApiError(400, "invalid_value", message, "stream")
        webhook, with_images = _webhook(fields)
        if webhook:
            self._webhooks.check(webhook)
        new = self._book.new(
            caller_of(request).name,
            job_id,
            fingerprint=wanted.fingerprint,
            request_id=request.state.request_id,
            images=len(wanted.sources) * fields.n,
            seed=secrets.randbelow(SEED_LIMIT) if fields.seed is None else fields.seed,
            webhook=webhook,
            webhook_images=with_images,
        )
        return await self._book.create(new, wanted.request)

    async def webhook_secret(self, request: Request) -> WebhookSecret:
        """The key that the caller's webhooks are signed with.

        Raises:
            ApiError: 503 if the store is not to be had.
        """
        with store_errors(UNAVAILABLE):
            return WebhookSecret(key=shown(await self._webhooks.key_of(caller_of(request).name)))

    async def find(self, request: Request, job_id: str) -> Job:
        """How a job is.

        Raises:
            ApiError: 404, the caller has none of this id.
        """
        return await self._answered(await self._book.find(caller_of(request).name, job_id))

    async def listed(self, request: Request, query: JobQuery) -> JobList:
        """The caller's own jobs, the newest first, without their images.

        Raises:
            ApiError: 400 if the caller has no job that the list shall come after, 503 if the store is not to be had.
        """
        found, more = await self._book.newest(caller_of(request).name, query.limit, query.after, query.status)
        return JobList.of([await self._book.answer(job, with_images=False) for job in found], more)

    async def cancel(self, request: Request, job_id: str) -> Job:
        """Cancel a job, unless it has ended.

        Raises:
            ApiError: 404, the caller has none of this id.
        """
        job, ended = await self._book.cancel(caller_of(request).name, job_id)
        if job is not None and ended:
            self._runner.look_at(job.path)
            self._edits.meters.jobs.labels(job.status).inc()
        return await self._answered(job)

    async def _answered(self, job: JobRecord | None) -> Job:
        if job is None:
            raise ApiError(404, "job_not_found", "There is no job of this id, or its time is over.", "job_id")
        return await self._book.answer(job)


class _LostError(Exception):
    """The job is not ours any more: it was cancelled, or another gateway has taken it."""


class _Held:
    """A job that this gateway holds."""

    def __init__(self, book: JobBook, job: JobRecord) -> None:
        self.job = job
        self._book = book
        self._changing = asyncio.Lock()
        self._woken = asyncio.Event()
        self._over = False

    async def change(self, **to: Any) -> None:
        """Write something down of it."""
        async with self._changing:
            changed = await self._book.change(self.job, **to)
            if changed is None:
                raise _LostError
            self.job = changed

    async def keep(self) -> None:
        """Renew the lease until `release`, or raise `_LostError`."""
        while not self._over:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(RENEW_SECONDS, self._book.lease_seconds / 3)):
                    await self._woken.wait()
            self._woken.clear()
            if self._over:
                return
            async with self._changing:
                try:
                    renewed = await self._book.renew(self.job)
                except (StoreUnreachableError, StoreFullError) as error:
                    # Another gateway may take it meanwhile. Then what is made here is not heard, and that is all.
                    logger.warning("the lease of a job cannot be renewed: %s", error)
                    continue
            if renewed is None:
                raise _LostError
            self.job = renewed

    def look(self) -> None:
        """See at once whether it is still ours."""
        self._woken.set()

    def release(self) -> None:
        """Let `keep` end."""
        self._over = True
        self._woken.set()


class JobRunner:
    """Does the jobs of the store, some at a time, and stops where it is told to."""

    def __init__(self, edits: EditService, book: JobBook, access: Access) -> None:
        self._edits = edits
        self._book = book
        self._access = access
        # The rest is for those who wait for their answers.
        most = min(edits.limits.jobs_at_once, max(edits.limits.in_flight // 2, 1))
        self.crew = Crew(most, self._waiting, book.take, self._do)
        self._held: dict[str, _Held] = {}

    def look_at(self, path: str) -> None:
        """A job may have been cancelled."""
        if path in self._held:
            self._held[path].look()

    async def _waiting(self) -> list[str]:
        return [job.path for job in _in_turn(await self._book.open())]

    async def _do(self, job: JobRecord) -> None:
        """Do a job that is ours, and write down how it went. Cancelled, it puts the job back for another gateway."""
        speak_of(job.request_id)
        held = self._held[job.path] = _Held(self._book, job)
        keeping = asyncio.ensure_future(held.keep())
        work = asyncio.ensure_future(self._images(held))
        try:
            await asyncio.wait({work, keeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_all(work)
            held.release()
            (lost,) = await asyncio.gather(keeping, return_exceptions=True)
            del self._held[job.path]
            if lost is None:
                await self._end(held.job, work)
            elif not isinstance(lost, _LostError):
                logger.error("a job cannot be held any longer", exc_info=lost)

    async def _images(self, held: _Held) -> list[CompletedEvent]:
        """What a job asks for."""
        job = held.job
        if job.losses > MOST_LOSSES:
            message = f"{job.losses} gateways died while they had this job; it is not tried again."
            raise ApiError(500, "job_lost", message)
        if self._book.is_late(job):
            raise ApiError(504, "timeout", "The server had no room for the job until its time was over; send it again.")
        caller = self._access.caller(job.scope)
        if caller is None:
            message = "The API key that the job was sent with has been revoked, or is over."
            raise ApiError(401, "invalid_api_key", message)
        request = await self._book.request(job)
        version = job.version or self._edits.chosen(caller, request.fields)
        if not job.version:
            await held.change(version=version)
        return await self._edits.do(Visit(caller, job.request_id, version=version, seed=job.seed), request)

    async def _end(self, job: JobRecord, work: asyncio.Future[list[CompletedEvent]]) -> None:
        try:
            written = await self._written(job, work)
        except StoreUnreachableError as error:
            logger.warning("the end of a job cannot be written down, so it will be done again: %s", error)
            return
        if written is not None and not written.is_open:
            self._edits.meters.jobs.labels(written.status).inc()
            code = None if written.error is None else written.error.code
            seconds = (written.ended or written.created) - written.created
            log_edit(written.scope, written.version, 200 if code is None else 500, seconds, code, job=written.id)

    async def _written(self, job: JobRecord, work: asyncio.Future[list[CompletedEvent]]) -> JobRecord | None:
        """How it went, as it is written down; None if it was not ours any more."""
        try:
            return await self._book.end(job, "completed", images=work.result())
        except asyncio.CancelledError:
            return await self._book.put_back(job)
        except _LostError:
            return None
        except ApiError as refusal:
            error = refusal
        except StoreUnreachableError as away:
            # What becomes of that passes too: the images are made again, unless their end was written after all.
            logger.warning("a job could not be done for want of the store: %s", away)
            error = ApiError(503, "unavailable", UNAVAILABLE, retry_after=1)
        except StoreFullError:
            error = ApiError(
                507, "no_room", "There was no room to keep the job's images; ask for fewer or smaller ones."
            )
        except Exception:
            logger.exception("a job failed")
            error = ApiError(500, "internal_error", "The server failed at this job; its log says why.")
        if error.status in _PASSING:
            return await self._book.put_back(job, max(error.retry_after or 0, min(2.0**job.pauses, LONGEST_PAUSE)))
        return await self._book.end(job, "failed", ErrorObject.model_validate(error.body()["error"]))


def _webhook(fields: EditFields) -> tuple[str, bool]:
    """Address of a job's webhook, "" without one, and whether it is told the images."""
    if not isinstance(fields, JobFields):
        raise AssertionError("a job is read as one")
    return fields.webhook or "", fields.webhook_images


def _in_turn(jobs: list[OpenJob]) -> list[OpenJob]:
    """The first of every caller, oldest first, then the second of every caller and so on."""
    ranks: Counter[str] = Counter()
    order: list[tuple[int, str, OpenJob]] = []
    for job in jobs:
        order.append((ranks[job.scope], job.created, job))
        ranks[job.scope] += 1
    return [job for _, _, job in sorted(order, key=lambda one: one[:2])]
