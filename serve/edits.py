"""What the gateway does with an edit request: admits it, has it edited in time, counts it, answers."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from insightedit.serve.admission import Admission, Ticket, asked_seconds
from insightedit.serve.backend import MODEL_NAME, Backend, EditJob, EditOutcome
from insightedit.serve.door import caller_of
from insightedit.serve.forms import EditRequest, read_edit_request
from insightedit.serve.logs import log_edit
from insightedit.serve.meters import Meters
from insightedit.serve.schema import (
    SEED_LIMIT,
    ApiError,
    EditFields,
    ImageData,
    ImagesResponse,
    InputTokens,
    Timing,
    Usage,
)
from insightedit.serve.settings import Limits
from insightedit.serve.uploads import Pixels, decode_upload, encode_image

PROBE_SECONDS = 30.0
"""How long a successful probe edit counts."""


class EditService:
    """Answers edit requests: admitted, in fair turn, in time."""

    def __init__(self, backend: Backend, limits: Limits, meters: Meters) -> None:
        self.backend = backend
        self.limits = limits
        self.meters = meters
        self.admission = Admission(limits)
        # A decoded image may be a hundred times its file: two at a time bound the memory.
        self._decoding = asyncio.Semaphore(2)
        self._probe = asyncio.Lock()
        self._probed = float("-inf")
        self._proven: set[str] = set()

    async def answer(self, request: Request) -> Response:
        """Answer one `POST /v1/images/edits`."""
        started = time.perf_counter()
        version = ""
        try:
            with self._admitted(request) as ticket:
                async with self.admission.reading(ticket):
                    wanted = await read_edit_request(request, self.limits)
                ticket.shorten(wanted.fields.timeout)
                version = self.backend.table.resolve(wanted.fields.model)
                response = await self._edit(wanted, version, ticket, started)
        except ApiError as error:
            self.meters.rejected.labels(error.code).inc()
            self._count(request, version, error.status, started, error.code)
            raise
        except Exception:
            self._count(request, version, 500, started, "internal_error")
            raise
        self._count(request, version, 200, started)
        self.meters.duration.observe(time.perf_counter() - started)
        return JSONResponse(response.model_dump())

    def _count(self, request: Request, version: str, status: int, started: float, code: str | None = None) -> None:
        self.meters.requests.labels(status, version).inc()
        log_edit(caller_of(request).name, version, status, time.perf_counter() - started, code)

    @contextmanager
    def _admitted(self, request: Request) -> Generator[Ticket]:
        with self.admission.admitted(caller_of(request)) as ticket, self.meters.in_flight.track_inprogress():
            ticket.shorten(asked_seconds(request.headers))
            yield ticket

    async def _edit(self, wanted: EditRequest, version: str, ticket: Ticket, started: float) -> ImagesResponse:
        fields = wanted.fields
        async with self._decoding:
            pixels = await asyncio.to_thread(decode_upload, wanted.upload, self.limits)
        steps = await self._steps(fields, version)
        height, width = pixels.shape[:2]
        self.admission.charge(ticket.caller, width * height, steps, fields.n)
        # Fixed before the first dispatch, so that a retry gives the same image.
        seed = secrets.randbelow(SEED_LIMIT) if fields.seed is None else fields.seed
        job = EditJob(
            prompt=fields.prompt,
            pixels=pixels,
            seed=seed,
            num_inference_steps=fields.num_inference_steps,
            guidance_scale=fields.guidance_scale,
            image_guidance_scale=fields.image_guidance_scale,
            negative_prompt=fields.negative_prompt,
            priority=ticket.caller.allowance.priority,
        )
        outcome = await self._edit_in_turn(version, job, ticket, width * height * steps)
        self.meters.queue.observe(outcome.queue_seconds)
        self.meters.step.observe(outcome.edit_seconds / outcome.steps)
        height, width = outcome.pixels.shape[:2]
        encoded = await asyncio.to_thread(_encode_edit, outcome.pixels, fields)
        return ImagesResponse(
            created=int(time.time()),
            data=[ImageData(b64_json=encoded)],
            output_format=fields.output_format,
            size=f"{width}x{height}",
            usage=_usage(outcome),
            model_version=version,
            seed=seed,
            timing=_timing(outcome, time.perf_counter() - started),
        )

    async def _steps(self, fields: EditFields, version: str) -> int:
        """Steps of an edit; as many as there may be where the version is not there to say how many are its own."""
        if fields.num_inference_steps is not None:
            return fields.num_inference_steps
        try:
            return (await self.backend.describe(version)).num_inference_steps
        except ApiError:
            return self.limits.steps

    async def _edit_in_turn(self, version: str, job: EditJob, ticket: Ticket, cost: float) -> EditOutcome:
        """One image, when it is the ticket's turn and before its deadline."""
        begun = time.perf_counter()
        async with ticket.in_time(), self.admission.place(ticket, cost):
            waited = time.perf_counter() - begun
            outcome = await self.backend.edit(version, job)
        return replace(outcome, queue_seconds=outcome.queue_seconds + waited)

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


def _encode_edit(pixels: Pixels, fields: EditFields) -> str:
    quality = 100 if fields.output_compression is None else fields.output_compression
    return base64.b64encode(encode_image(pixels, fields.output_format, quality)).decode("ascii")


def _usage(outcome: EditOutcome) -> Usage:
    details = InputTokens(text_tokens=outcome.text_tokens, image_tokens=outcome.image_tokens)
    read = outcome.text_tokens + outcome.image_tokens
    return Usage(
        input_tokens=read,
        input_tokens_details=details,
        output_tokens=outcome.output_tokens,
        total_tokens=read + outcome.output_tokens,
    )


def _timing(outcome: EditOutcome, total: float) -> Timing:
    return Timing(
        queue=round(outcome.queue_seconds, 4),
        condition=round(outcome.condition_seconds, 4),
        edit=round(outcome.edit_seconds, 4),
        total=round(total, 4),
    )
