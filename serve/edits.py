"""What the gateway does with an edit request: admits it, has it edited in time, counts it, answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from insightedit.serve.admission import Admission, Ticket, asked_seconds
from insightedit.serve.answers import CompletedEvent, ImagesResponse, PartialImageEvent, Timing, Usage
from insightedit.serve.backend import MODEL_NAME, Backend, EditJob, PartialTaker
from insightedit.serve.door import caller_of
from insightedit.serve.feedback import Feedback, OfferedEdit
from insightedit.serve.forms import EditRequest, read_edit_request
from insightedit.serve.idempotency import REPLAYED_HEADER, Claim, IdempotencyKeys, KeyedRequest, key_of
from insightedit.serve.keys import Caller
from insightedit.serve.logs import LOGGER, log_edit
from insightedit.serve.meters import Meters
from insightedit.serve.pieces import Piece, Wanted, area, decode, picture_of, pieces_of
from insightedit.serve.schema import EDIT_BODIES, JOB_BODIES, SEED_LIMIT, ApiError, Bodies, EditFields, overloaded
from insightedit.serve.settings import Destinations, Limits
from insightedit.serve.streams import Emit, EventStream, Running, all_or_none, while_client_stays
from insightedit.serve.trials import Trials
from insightedit.serve.uploads import Pixels

logger = logging.getLogger(LOGGER)

StreamEvent = PartialImageEvent | CompletedEvent
PROBE_SECONDS = 30.0
"""How long a successful probe edit counts."""
CLIENT_LEFT = 499
"""What a request counts as whose client left before its answer; nobody is answered so."""


@dataclass(frozen=True, slots=True)
class ImageTimes:
    """What one image took, in seconds."""

    begun: float
    """By `time.perf_counter`."""
    queue: float
    condition: float
    edit: float


@dataclass(slots=True)
class Visit:
    """A request while the gateway has it."""

    caller: Caller
    request_id: str
    """What the caller and the log know it by."""
    version: str = ""
    """Of the model; "" until the request has been read."""
    seed: int = 0
    """Likewise."""
    replayed: bool = False
    """Whether its answer was there already, under its key."""
    user: str | None = None
    """Whom the caller asks for."""
    started: float = field(default_factory=time.perf_counter)
    images: list[ImageTimes] = field(default_factory=list[ImageTimes])
    """Those that were made for it."""

    @classmethod
    def of(cls, request: Request) -> Visit:
        """A request that has just come, whose state then has it."""
        request.state.visit = cls(caller_of(request), request.state.request_id)
        return request.state.visit

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.started

    @property
    def headers(self) -> dict[str, str]:
        """What its answer's headers say."""
        replayed = {REPLAYED_HEADER: "true"} if self.replayed else {}
        return {"x-insightedit-model-version": self.version, "x-insightedit-seed": str(self.seed), **replayed}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be done for a request: its seeds and version fixed, so that a retry gives the same images."""

    visit: Visit
    ticket: Ticket
    claim: Claim
    fields: EditFields
    pieces: list[Piece]
    steps: int
    took: list[float] = field(default_factory=list[float])
    """Seconds of each edit that the present version has made, from its place on."""

    @property
    def version(self) -> str:
        """Of the model."""
        return self.claim.version


@dataclass(frozen=True, slots=True)
class Made:
    """An image that is there and has not been kept or sent."""

    event: CompletedEvent
    pixels: Pixels
    """As the model gave it."""


class EditService:
    """Answers edit requests: admitted, in fair turn, in time."""

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        meters: Meters,
        keys: IdempotencyKeys,
        trials: Trials,
        image_urls: Destinations,
        feedback: Feedback,
    ) -> None:
        self._image_urls = image_urls
        self.backend = backend
        self.limits = limits
        self.meters = meters
        self.keys = keys
        self.trials = trials
        self.feedback = feedback
        self.admission = Admission(limits)
        # A decoded image may be a hundred times its file: two at a time bound the memory.
        self._decoding = asyncio.Semaphore(2)
        self._probe = asyncio.Lock()
        self._probed = float("-inf")
        self._proven: set[str] = set()

    async def answer(self, request: Request) -> Response:
        """Answer one `POST /v1/images/edits`, as a whole or as a stream; who leaves has the edits cancelled.

        Raises:
            ApiError: it is refused, or fails before the first event of its stream.
            ClientDisconnect: nobody waits for the answer any more.
        """
        visit = Visit.of(request)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._counted(visit))
            ticket = stack.enter_context(self._admitted(request))
            key = key_of(request.headers)
            wanted = await self._read(visit, ticket, request)
            if wanted.request.fields.stream:
                work = partial(self._edits, visit, ticket, wanted, key)
                events = await stack.enter_async_context(Running[StreamEvent](work))
                # What fails before it has an image is answered with its own status.
                first = await while_client_stays(request.receive, anext(events))
                return EventStream(first, events, visit.headers, stack.pop_all())
            images = await while_client_stays(request.receive, self._edits(visit, ticket, wanted, key))
            body = ImagesResponse.of(images)
            headers = {
                "x-insightedit-queue-seconds": str(body.timing.queue),
                "x-insightedit-compute-seconds": str(body.timing.compute),
            }
            return JSONResponse(body.model_dump(), headers={**visit.headers, **headers})

    async def accept(self, request: Request) -> Wanted:
        """Read and check an edit that is to be done later.

        Raises:
            ApiError: it is refused.
        """
        with self._admitted(request) as ticket:
            return await self._read(Visit.of(request), ticket, request, JOB_BODIES)

    async def do(self, visit: Visit, request: EditRequest) -> list[CompletedEvent]:
        """Do an edit that was accepted earlier, for nobody who waits.

        Args:
            visit: whose it is, with its seed and version.
            request: as it was accepted.

        Raises:
            ApiError: 429 or 503 for what may go well at another time, others for what fails for good.
        """
        admitted = self.admission.admitted(visit.caller, counts=False)
        with admitted as ticket, self.meters.in_flight.track_inprogress():
            ticket.shorten(request.fields.timeout)
            try:
                return await self._made(visit, ticket, await self._decoded(request), Claim(visit.seed, visit.version))
            except ApiError as error:
                # It was not slow: its turn did not come.
                if error.status == HTTPStatus.GATEWAY_TIMEOUT and not ticket.begun:
                    raise overloaded(self.limits) from None
                raise

    @asynccontextmanager
    async def _counted(self, visit: Visit) -> AsyncGenerator[None]:
        status, code = 200, None
        try:
            yield
        except ApiError as error:
            status, code = error.status, error.code
            self.meters.rejected.labels(code).inc()
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            status, code = CLIENT_LEFT, "client_left"
            raise
        except Exception:
            status, code = 500, "internal_error"
            raise
        else:
            self.meters.duration.observe(visit.seconds)
        finally:
            self.meters.requests.labels(status, visit.version).inc()
            log_edit(visit.caller.name, visit.version, status, visit.seconds, code, visit.user)

    @contextmanager
    def _admitted(self, request: Request) -> Generator[Ticket]:
        with self.admission.admitted(caller_of(request)) as ticket, self.meters.in_flight.track_inprogress():
            ticket.shorten(asked_seconds(request.headers))
            yield ticket

    # -- what is to be done --------------------------------------------------------------------------------------

    async def _read(self, visit: Visit, ticket: Ticket, request: Request, bodies: Bodies = EDIT_BODIES) -> Wanted:
        async with self.admission.reading(ticket):
            read = await read_edit_request(request, self.limits, self._image_urls, bodies)
        visit.user = read.fields.user
        ticket.shorten(read.fields.timeout)
        visit.version = self.chosen(visit.caller, read.fields)
        return await self._decoded(read)

    def chosen(self, caller: Caller, fields: EditFields) -> str:
        """The version that an edit gets which begins now.

        Raises:
            ApiError: 404, it asks for one that is not served.
        """
        return self.backend.table.choose(fields.model, self.trials.draw(caller.name, fields.user))

    async def _decoded(self, read: EditRequest) -> Wanted:
        async with self._decoding:
            return await asyncio.to_thread(decode, read, self.limits)

    @asynccontextmanager
    async def _claimed(self, visit: Visit, wanted: Wanted, key: str | None) -> AsyncGenerator[Claim]:
        """Seed and version, fixed now or by an earlier request under the same key."""
        fields = wanted.request.fields
        seed = secrets.randbelow(SEED_LIMIT) if fields.seed is None else fields.seed
        if key is None:
            yield Claim(seed, visit.version)
            return
        keyed = KeyedRequest(visit.caller.name, key, wanted.fingerprint, len(wanted.sources) * fields.n)
        async with self.keys.claimed(keyed, seed, visit.version) as claim:
            yield claim

    async def _plan(self, visit: Visit, ticket: Ticket, wanted: Wanted, claim: Claim) -> Plan:
        table = self.backend.table
        # A version that was rolled back is gone before it has made an image that anybody was sent.
        if table.entry(claim.version) is None and not await claim.move(table.default):
            message = (
                f"Model version {claim.version}, which this edit was to be made by, is not served any more; send it "
                "under a new key or id."
            )
            raise ApiError(410, "version_gone", message)
        fields = wanted.request.fields
        # What a request costs does not depend on whom chance gave it to.
        steps = await self._steps(fields, table.default if self.trials.on_trial(claim.version) else claim.version)
        self.admission.charge(visit.caller, sum(map(area, wanted.sources)), steps, fields.n)
        pieces = pieces_of(fields, claim.seed, wanted.sources, wanted.mask, ticket.caller.allowance.priority)
        return Plan(visit=visit, ticket=ticket, claim=claim, fields=fields, pieces=pieces, steps=steps)

    async def _steps(self, fields: EditFields, version: str) -> int:
        """Steps of an edit; as many as there may be where the version is not there to say how many are its own."""
        if fields.num_inference_steps is not None:
            return fields.num_inference_steps
        try:
            return (await self.backend.describe(version)).num_inference_steps
        except ApiError:
            return self.limits.steps

    # -- doing it ------------------------------------------------------------------------------------------------

    async def _edits(
        self, visit: Visit, ticket: Ticket, wanted: Wanted, key: str | None, emit: Emit[StreamEvent] | None = None
    ) -> list[CompletedEvent]:
        """The images of a request: made now, or kept from when they were made under the same key.

        Args:
            visit: the request.
            ticket: its own.
            wanted: what it asks for.
            key: what it is sent under.
            emit: takes images in progress, and every finished one as soon as it is kept.
        """
        async with AsyncExitStack() as stack:
            async with ticket.in_time():
                claim = await stack.enter_async_context(self._claimed(visit, wanted, key))
            visit.version, visit.seed = claim.version, claim.seed
            if claim.kept is None:
                return await self._made(visit, ticket, wanted, claim, emit)
        visit.replayed = True
        self.meters.replayed.inc()
        if emit is not None:
            for image in claim.kept:
                await emit(image)
        return claim.kept

    async def _made(
        self, visit: Visit, ticket: Ticket, wanted: Wanted, claim: Claim, emit: Emit[StreamEvent] | None = None
    ) -> list[CompletedEvent]:
        """The images of a request, made now."""
        plan = await self._plan(visit, ticket, wanted, claim)
        visit.version = plan.version
        if self.trials.on_trial(plan.version):
            return await self._try_out(plan, emit)
        images = await all_or_none([self._whole(plan, piece, emit) for piece in plan.pieces])
        self.trials.answered(plan.version, max(plan.took))
        return images

    async def _try_out(self, plan: Plan, emit: Emit[StreamEvent] | None) -> list[CompletedEvent]:
        """The images by a version on trial, or all of them by the default one when it fails at any.

        Nothing of it is kept or sent before everything is there: no answer is of two versions.
        """
        tried, table = plan.version, self.backend.table
        limit = self.trials.limit(plan.ticket.left)
        try:
            made = await all_or_none([self._image(plan, piece, None, limit) for piece in plan.pieces])
        except Exception as error:
            if plan.ticket.displaced is not None or not await plan.claim.move(table.default):
                raise
            logger.warning("version %s has failed at an edit: %s: %s", tried, type(error).__name__, error)
            made = await self._by_default(plan, tried, error)
        else:
            self.trials.answered(tried, max(plan.took))
            self.trials.shadow(plan.pieces[0].job, made[0].pixels)
        plan.visit.version = plan.version
        return [await self._hand_out(plan, one, emit) for one in made]

    async def _by_default(self, plan: Plan, tried: str, error: Exception) -> list[Made]:
        """The images by the version that the plan has moved to, where another one has failed."""
        plan.took.clear()
        made = await all_or_none([self._image(plan, piece, None) for piece in plan.pieces])
        self.meters.stood_in.labels(tried).inc()
        if not (isinstance(error, ApiError) and error.status == HTTPStatus.TOO_MANY_REQUESTS):
            self.trials.failed(tried)
        self.trials.answered(plan.version, max(plan.took))
        return made

    async def _whole(self, plan: Plan, piece: Piece, emit: Emit[StreamEvent] | None) -> CompletedEvent:
        """One image, kept and sent."""
        return await self._hand_out(plan, await self._image(plan, piece, emit), emit)

    async def _hand_out(self, plan: Plan, made: Made, emit: Emit[StreamEvent] | None) -> CompletedEvent:
        kept = await plan.claim.keep(made.event)
        if kept is made.event:
            piece = plan.pieces[kept.image_index]
            self.feedback.offer(plan.ticket.caller.name, kept, OfferedEdit(piece.job, made.pixels, piece.mask))
        if emit is not None:
            await emit(kept)
        return kept

    async def _image(
        self, plan: Plan, piece: Piece, emit: Emit[StreamEvent] | None, limit: float | None = None
    ) -> Made:
        """One image, when it is the request's turn and before its deadline.

        Args:
            plan: the request's.
            piece: which.
            emit: takes images in progress.
            limit: seconds that the edit itself may take.
        """
        begun = time.perf_counter()
        cost = area(piece.job.pixels) * plan.steps
        on_partial = None if emit is None else _partial_taker(plan.fields, piece, emit)
        async with plan.ticket.in_time(), self.admission.place(plan.ticket, cost):
            waited = time.perf_counter() - begun
            async with asyncio.timeout(limit):
                outcome = await self.backend.edit(plan.version, piece.job, on_partial)
        plan.took.append(time.perf_counter() - begun - waited)
        outcome = replace(outcome, queue_seconds=outcome.queue_seconds + waited)
        times = ImageTimes(begun, outcome.queue_seconds, outcome.condition_seconds, outcome.edit_seconds)
        plan.visit.images.append(times)
        self.meters.queue.observe(outcome.queue_seconds)
        self.meters.step.observe(outcome.edit_seconds / outcome.steps)
        picture = await asyncio.to_thread(picture_of, outcome.pixels, piece, plan.fields)
        event = CompletedEvent(
            b64_json=picture.b64_json,
            created_at=int(time.time()),
            size=picture.size,
            output_format=plan.fields.output_format,
            image_index=piece.index,
            usage=Usage.of(outcome),
            model_version=plan.version,
            seed=piece.job.seed,
            request_id=plan.visit.request_id,
            timing=Timing.of(outcome, plan.visit.seconds),
        )
        return Made(event, outcome.pixels)

    # -- how the server is ---------------------------------------------------------------------------------------

    async def _probe_edit(self, version: str, job: EditJob) -> None:
        try:
            async with asyncio.timeout(self.limits.edit_seconds):
                await self.backend.edit(version, job)
        except TimeoutError:
            message = f"An edit of one step took longer than {self.limits.edit_seconds:g} seconds."
            raise ApiError(504, "timeout", message) from None

    async def check(self) -> None:
        """Return once the replicas of every served version have answered.

        Raises:
            ApiError: they do not.
        """
        # Asking a version that sleeps would wake it.
        asked = [version for version, entry in self.backend.table.versions.items() if not entry.sleeps]
        await asyncio.gather(*(self.backend.describe(version) for version in asked))

    async def models(self) -> dict[str, object]:
        """The versions served, in the shape of OpenAI's list of models, with each one's defaults."""
        table = self.backend.table
        rows = [
            {
                "id": version,
                "object": "model",
                "owned_by": MODEL_NAME,
                "default": version == table.default,
                "aliases": list(entry.aliases),
                **(await self.backend.describe(version)).model_dump(),
            }
            for version, entry in table.versions.items()
        ]
        return {"object": "list", "data": rows}

    async def probe(self) -> None:
        """Return if an edit of one step has worked in the last `PROBE_SECONDS`, trying one if need be.

        Raises:
            ApiError: it does not work.
        """
        async with self._probe:
            if time.monotonic() - self._probed < PROBE_SECONDS:
                return
            pixels = np.full((32, 32, 3), 128, np.uint8)
            for version, entry in self.backend.table.versions.items():
                if entry.sleeps and version in self._proven:
                    continue  # Another edit would keep it awake.
                job = EditJob(prompt="leave it as it is", pixels=pixels, seed=0, num_inference_steps=1)
                await self._probe_edit(version, job)
                self._proven.add(version)
            self._probed = time.monotonic()


def _partial_taker(fields: EditFields, piece: Piece, emit: Emit[StreamEvent]) -> PartialTaker:
    async def take(index: int, pixels: Pixels) -> None:
        picture = await asyncio.to_thread(picture_of, pixels, piece, fields)
        event = PartialImageEvent(
            b64_json=picture.b64_json,
            created_at=int(time.time()),
            size=picture.size,
            output_format=fields.output_format,
            image_index=piece.index,
            partial_image_index=index,
        )
        await emit(event)

    return take
