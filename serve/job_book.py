"""Jobs as the gateways' shared store has them: edits that are done while nobody waits for them.

A job is a record, the request that it was sent as until it has ended, a mark among those that are still open, a line in
its caller's list, and its images once they are made. The gateway that does it holds the record by a lease and renews
it; when that gateway dies, the lease runs out and another one takes the job, with the seed and the version that are
written down. A record is only changed as it was read last. So of two gateways that do a job, and of an end and a
cancellation, one alone is heard.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from insightedit.serve.answers import CompletedEvent, ImagesResponse, Job, JobStatus, WebhookStatus
from insightedit.serve.forms import EditRequest, Upload
from insightedit.serve.idempotency import store_errors
from insightedit.serve.schema import ApiError, EditFields, ErrorObject
from insightedit.serve.settings import Limits, StateSettings
from insightedit.serve.state_store import Clock, Entry, StateStore, StoreFullError

JOBS_PART = 0.8
"""Of the store that jobs may fill: what is left is for the seeds and versions of keys, and for changes of records."""
_OPEN: frozenset[JobStatus] = frozenset({"queued", "in_progress"})
_LINES = 1000
"""Lines of a list that are read at a time where only those of one status count."""
UNAVAILABLE = "Jobs are not to be had at present; send the request again."
"""What is said where the store is not."""


class JobRecord(BaseModel):
    """What is written down of a job, in JSON."""

    model_config = ConfigDict(frozen=True)

    id: str
    scope: str
    """Whose it is: jobs of different callers have nothing to do with each other."""
    fingerprint: str
    """Tells its request from another one."""
    request_id: str
    """Of the request that it was sent by."""
    images: int
    """How many it is to have."""
    seed: int
    version: str = ""
    """Of the model; "" until it has begun."""
    status: JobStatus = "queued"
    created: float
    started: float | None = None
    ended: float | None = None
    deadline: float
    """When it is given up if it has not ended."""
    expires: float
    not_before: float = 0.0
    """When it is tried again."""
    pauses: int = 0
    """How often it was put back, as there was no room for it."""
    losses: int = 0
    """How often a gateway died that had it."""
    owner: str = ""
    """Who is doing it; nobody if it is empty."""
    lease_end: float = 0.0
    error: ErrorObject | None = None
    webhook: str = ""
    """Address to tell its end to; none if it is empty."""
    webhook_images: bool = False
    webhook_status: WebhookStatus | None = None
    """None as long as there is nothing to tell."""
    tries: int = 0
    """How often its end has been told in vain."""
    _value: bytes = PrivateAttr(b"")
    """As it stands in the store."""

    @classmethod
    def read(cls, value: bytes) -> JobRecord:
        """A record out of the store."""
        job = cls.model_validate_json(value)
        job._value = value
        return job

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.status in _OPEN

    @property
    def path(self) -> str:
        """What its entries in the store are named after."""
        return path_of(self.scope, self.id)

    def entry(self) -> Entry:
        """How it is written down now."""
        self._value = self.model_dump_json().encode()
        return Entry(self._value, self.expires)

    @property
    def value(self) -> bytes:
        """What the store has if nobody has changed it, whoever wrote it."""
        return self._value


def path_of(scope: str, job_id: str) -> str:
    """What the entries of a job are named after."""
    return f"{scope}/{hashlib.sha256(job_id.encode()).hexdigest()}"


class _Request(BaseModel):
    """A request as it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    fields: EditFields
    images: tuple[tuple[str, bytes], ...]
    mask: tuple[str, bytes] | None

    @classmethod
    def of(cls, request: EditRequest) -> _Request:
        fields = request.fields.model_dump(include=set(EditFields.model_fields))
        mask = None if request.mask is None else (request.mask.name, request.mask.data)
        images = tuple((image.name, image.data) for image in request.images)
        return cls(fields=EditFields.model_validate(fields), images=images, mask=mask)

    def request(self) -> EditRequest:
        mask = None if self.mask is None else Upload(*self.mask)
        return EditRequest(self.fields, tuple(Upload(*image) for image in self.images), mask)


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job that has not ended."""

    scope: str
    path: str
    created: str
    """In digits that sort as the times do."""


class JobBook:
    """The jobs of all gateways that share a store."""

    def __init__(self, store: StateStore, settings: StateSettings, limits: Limits, clock: Clock = time.time) -> None:
        self._store = store
        self._settings = settings
        self._limits = limits
        self._clock = clock

    @property
    def lease_seconds(self) -> float:
        """How long a job is somebody's who does not renew it."""
        return self._settings.lease_seconds

    # -- for who sends a job ---------------------------------------------------------------------------------------

    def new(self, scope: str, job_id: str, **known: Any) -> JobRecord:
        """The record of a job that comes now."""
        now = self._clock()
        deadline = now + self._settings.job_seconds
        expires = deadline + self._settings.job_seconds
        return JobRecord(id=job_id, scope=scope, created=now, deadline=deadline, expires=expires, **known)

    async def create(self, new: JobRecord, request: EditRequest) -> tuple[JobRecord, bool]:
        """Write a job down, or find it if it has been.

        Returns:
            The job, and whether it is new.

        Raises:
            ApiError: 409 if the id is another job's, 429 where there is no room, 503 if the store is not to be had.
        """
        kept = Entry(_Request.of(request).model_dump_json().encode(), new.expires)
        marks = {name: Entry(b"1", new.expires) for name in (_mark(new), _line(new))}
        names = {f"job/{new.path}": new.entry(), f"job-request/{new.path}": kept, **marks}
        with store_errors(UNAVAILABLE):
            while (found := await self.find(new.scope, new.id)) is None:
                mine = await self._store.names(f"job-open/{new.scope}/", limit=self._limits.jobs)
                if len(mine) >= self._limits.jobs:
                    message = f"{self._limits.jobs} jobs of yours have not ended, as many as may be; wait for some."
                    raise self._no_room(message)
                try:
                    if await self._store.change({f"job/{new.path}": None}, names, JOBS_PART):
                        return new, True
                except StoreFullError:
                    raise self._no_room("There is no room for another job at present; send it again later.") from None
        if found.fingerprint != new.fingerprint:
            message = f"There is a job {new.id} of another request; give every job an id of its own."
            raise ApiError(409, "job_id_taken", message, "job_id")
        return found, False

    def _no_room(self, message: str) -> ApiError:
        return ApiError(429, "overloaded", message, retry_after=self._limits.retry_after)

    async def find(self, scope: str, job_id: str) -> JobRecord | None:
        """A job of a caller, by its id."""
        with store_errors(UNAVAILABLE):
            value = await self._store.get(f"job/{path_of(scope, job_id)}")
        return None if value is None else JobRecord.read(value)

    async def newest(
        self, scope: str, limit: int, after: str | None = None, status: JobStatus | None = None
    ) -> tuple[list[JobRecord], bool]:
        """A caller's jobs, the newest first.

        Args:
            scope: whose.
            limit: how many at most.
            after: id of a job that all of them are older than.
            status: of all of them; any without it.

        Returns:
            The jobs, and whether there are more.

        Raises:
            ApiError: 400 if the caller has no job `after`, 503 if the store is not to be had.
        """
        found: list[JobRecord] = []
        with store_errors(UNAVAILABLE):
            place = "" if after is None else await self._line_after(scope, after)
            at_once = limit + 1 if status is None else _LINES
            while lines := await self._store.names(f"job-list/{scope}/", after=place, limit=at_once):
                for line in lines:
                    job = await self._listed(line, status)
                    found += [] if job is None else [job]
                    if len(found) > limit:
                        return found[:limit], True
                place = lines[-1]
        return found, False

    async def _line_after(self, scope: str, job_id: str) -> str:
        """Where in its caller's list those come that are older than a job."""
        job = await self.find(scope, job_id)
        if job is None:
            message = f"after: there is no job {job_id}, or its time is over; begin the list anew."
            raise ApiError(400, "invalid_value", message, "after")
        return _line(job, "~")  # Whatever state it comes to.

    async def _listed(self, line: str, status: JobStatus | None) -> JobRecord | None:
        """The job of a line in a list, if it has a status and is still there."""
        _, scope, _, digest, state = line.split("/")
        if status is not None and state != _state(status):
            return None
        value = await self._store.get(f"job/{scope}/{digest}")
        try:
            job = None if value is None else JobRecord.read(value)
        except ValidationError:
            return None  # Of another release, say; it must not keep all others from being listed.
        return job if job is not None and status in (None, job.status) else None

    async def cancel(self, scope: str, job_id: str) -> tuple[JobRecord | None, bool]:
        """Cancel a job that has not ended. Who is doing it learns so when it renews its lease.

        Returns:
            The job, if there is one, and whether it was this that ended it.
        """
        with store_errors(UNAVAILABLE):
            while (found := await self.find(scope, job_id)) is not None and found.is_open:
                if (ended := await self.end(found, "cancelled")) is not None:
                    return ended, True
        return found, False

    async def answer(self, job: JobRecord, *, with_images: bool = True) -> Job:
        """What its caller is told of a job."""
        with store_errors(UNAVAILABLE):
            images = await self._images(job) if job.status == "completed" and with_images else []
        return Job(
            id=job.id,
            status=job.status,
            created_at=int(job.created),
            started_at=None if job.started is None else int(job.started),
            ended_at=None if job.ended is None else int(job.ended),
            expires_at=int(job.expires),
            model_version=job.version or None,
            seed=job.seed,
            error=job.error,
            result=ImagesResponse.of(images) if images else None,
            webhook_status=job.webhook_status,
        )

    async def _images(self, job: JobRecord) -> list[CompletedEvent]:
        """All of them, or none."""
        found = [await self._store.get(f"job-image/{job.path}/{index}") for index in range(job.images)]
        return [] if None in found else [CompletedEvent.model_validate_json(one) for one in found if one is not None]

    # -- for who does it -------------------------------------------------------------------------------------------

    async def open(self) -> list[OpenJob]:
        """Every job that has not ended, caller by caller, each one's oldest first."""
        found: list[OpenJob] = []
        page = await self._store.names("job-open/")
        while page:
            for name in page:
                _, scope, created, digest = name.split("/")
                found.append(OpenJob(scope, f"{scope}/{digest}", created))
            page = await self._store.names("job-open/", after=page[-1])
        return found

    async def take(self, path: str) -> JobRecord | None:
        """A job that is now ours; None if it is somebody else's, or not to be tried yet."""
        value = await self._store.get(f"job/{path}")
        if value is None:
            return None
        before, now = JobRecord.read(value), self._clock()
        if not before.is_open or before.not_before > now or (before.owner and before.lease_end > now):
            return None
        return await self.change(
            before,
            status="in_progress",
            started=before.started or now,
            losses=before.losses + bool(before.owner),
            owner=uuid.uuid4().hex,
            lease_end=now + self._settings.lease_seconds,
        )

    def is_late(self, job: JobRecord) -> bool:
        """Whether its time is over."""
        return self._clock() > job.deadline

    async def request(self, job: JobRecord) -> EditRequest:
        """What a job asks for.

        Raises:
            ApiError: 410, it is not there any more.
        """
        value = await self._store.get(f"job-request/{job.path}")
        if value is None:
            raise ApiError(410, "request_gone", "What the job asks for is not kept any more; send it under a new id.")
        return _Request.model_validate_json(value).request()

    async def renew(self, job: JobRecord) -> JobRecord | None:
        """Hold a job for longer; None if it is not ours any more."""
        return await self.change(job, lease_end=self._clock() + self._settings.lease_seconds)

    async def put_back(self, job: JobRecord, pause: float | None = None) -> JobRecord | None:
        """Give a job up, for us or others to take after some seconds; at once where it was not refused."""
        after: dict[str, Any] = {"status": "queued", "owner": "", "lease_end": 0.0}
        if pause is not None:
            after |= {"not_before": self._clock() + pause, "pauses": job.pauses + 1}
        return await self.change(job, **after)

    async def end(
        self,
        job: JobRecord,
        status: JobStatus,
        error: ErrorObject | None = None,
        images: Sequence[CompletedEvent] = (),
    ) -> JobRecord | None:
        """Write down how a job has ended; None if it has not been ours any more.

        Raises:
            StoreFullError: there is no room for its images.
        """
        now = self._clock()
        files = {
            f"job-image/{job.path}/{image.image_index}": Entry(
                image.model_dump_json().encode(), now + self._settings.answer_seconds
            )
            for image in images
        }
        others: dict[str, Entry | None] = {f"job-request/{job.path}": None, _mark(job): None, _line(job): None, **files}
        others[_line(job, _state(status))] = Entry(b"1", now + self._settings.job_seconds)
        after: dict[str, Any] = {
            "status": status,
            "ended": now,
            "expires": now + self._settings.job_seconds,
            "error": error,
        }
        if images:
            # It may have moved to another version than it began with.
            after["version"] = images[0].model_version
        if job.webhook:
            after |= {"webhook_status": "pending", "not_before": now}
            others[_untold(job.path, now)] = Entry(b"1", now + self._settings.job_seconds)
        part = JOBS_PART if images else 1.0
        return await self.change(job, others, part, owner="", lease_end=0.0, **after)

    # -- for who tells how it ended --------------------------------------------------------------------------------

    async def untold(self) -> list[str]:
        """Paths of some of the jobs whose end is to be told now."""
        now = self._clock()
        found = [name.split("/", 2) for name in await self._store.names("job-untold/", limit=100)]
        return [path for _, when, path in found if float(when) <= now]

    async def take_untold(self, path: str, seconds: float) -> JobRecord | None:
        """A job whose end is now ours to tell, for some seconds; None if it is somebody else's."""
        value, now = await self._store.get(f"job/{path}"), self._clock()
        if value is None:
            return None
        job = JobRecord.read(value)
        if job.webhook_status != "pending" or job.not_before > now or (job.owner and job.lease_end > now):
            return None
        return await self.change(job, owner=uuid.uuid4().hex, lease_end=now + seconds)

    async def told(self, job: JobRecord, status: WebhookStatus) -> JobRecord | None:
        """Write down that a job's end has been told, or never will be."""
        mark = {_untold(job.path, job.not_before): None}
        return await self.change(job, mark, owner="", lease_end=0.0, webhook_status=status)

    async def tell_later(self, job: JobRecord, pause: float) -> JobRecord | None:
        """Have a job's end told again after some seconds."""
        when = self._clock() + pause
        marks = {_untold(job.path, job.not_before): None, _untold(job.path, when): Entry(b"1", job.expires)}
        return await self.change(job, marks, owner="", lease_end=0.0, not_before=when, tries=job.tries + 1)

    async def change(
        self, job: JobRecord, others: Mapping[str, Entry | None] = MappingProxyType({}), part: float = 1.0, **to: Any
    ) -> JobRecord | None:
        """Change a record and other entries with it.

        Args:
            job: as it was when it was read or changed last.
            others: entries by name.
            part: of the store that may be full afterwards.
            **to: new values by field.

        Returns:
            The job; None if somebody else has changed it.
        """
        name, after = f"job/{job.path}", job.model_copy(update=to)
        written = await self._store.change({name: job.value}, {name: after.entry(), **others}, part)
        return after if written else None


def _untold(path: str, when: float) -> str:
    """The entry that says that a job's end is to be told, and when."""
    return f"job-untold/{when:017.6f}/{path}"


def _mark(job: JobRecord) -> str:
    """The entry that says that a job is open; those of a caller come in the order of their jobs."""
    scope, digest = job.path.split("/")
    return f"job-open/{scope}/{job.created:017.6f}/{digest}"


def _line(job: JobRecord, state: str = "open") -> str:
    """The entry that is a job's line in its caller's list, the newest first; its state is `open`, or how it ended."""
    scope, digest = job.path.split("/")
    return f"job-list/{scope}/{10**16 - round(job.created * 1e6):016d}/{digest}/{state}"


def _state(status: JobStatus) -> str:
    """What a job's line says of it. It does not tell those that wait from those that are being done."""
    return "open" if status in _OPEN else status
