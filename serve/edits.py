"""What the gateway does with an edit request: admits it, has it edited in time, counts it, answers."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from insightedit.serve.backend import MODEL_NAME, Backend, EditJob, EditOutcome
from insightedit.serve.forms import EditRequest, read_edit_request
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
    overloaded,
)
from insightedit.serve.settings import Limits
from insightedit.serve.uploads import Pixels, decode_upload, encode_image

PROBE_SECONDS = 30.0
"""How long a successful probe edit counts."""


class EditService:
    """Answers edit requests, a bounded number at a time."""

    def __init__(self, backend: Backend, limits: Limits, meters: Meters) -> None:
        self.backend = backend
        self.limits = limits
        self.meters = meters
        self._in_flight = 0
        # A decoded image may be a hundred times its file: two at a time bound the memory.
        self._decoding = asyncio.Semaphore(2)
        self._probe = asyncio.Lock()
        self._probed = float("-inf")

    async def answer(self, request: Request) -> Response:
        """Answer one `POST /v1/images/edits`."""
        started = time.perf_counter()
        version = ""
        try:
            async with self._admitted():
                wanted = await read_edit_request(request, self.limits)
                version = self.backend.table.resolve(wanted.fields.model)
                response = await self._edit(wanted, version, started)
        except ApiError as error:
            self.meters.rejected.labels(error.code).inc()
            self.meters.requests.labels(error.status, version).inc()
            raise
        except Exception:
            self.meters.requests.labels(500, version).inc()
            raise
        self.meters.requests.labels(200, version).inc()
        self.meters.duration.observe(time.perf_counter() - started)
        return JSONResponse(response.model_dump())

    @asynccontextmanager
    async def _admitted(self) -> AsyncGenerator[None]:
        if self._in_flight >= self.limits.in_flight:
            raise overloaded(self.limits)
        self._in_flight += 1
        self.meters.in_flight.inc()
        try:
            yield
        finally:
            self._in_flight -= 1
            self.meters.in_flight.dec()

    async def _edit(self, wanted: EditRequest, version: str, started: float) -> ImagesResponse:
        fields = wanted.fields
        async with self._decoding:
            pixels = await asyncio.to_thread(decode_upload, wanted.upload, self.limits)
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
        )
        outcome = await self._dispatch(version, job)
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

    async def _dispatch(self, version: str, job: EditJob) -> EditOutcome:
        try:
            async with asyncio.timeout(self.limits.edit_seconds):
                return await self.backend.edit(version, job)
        except TimeoutError:
            message = f"The edit took longer than {self.limits.edit_seconds:g} seconds; try again or use fewer steps."
            raise ApiError(504, "timeout", message) from None

    async def check(self) -> None:
        """Return once the replicas of every served version have answered.

        Raises:
            ApiError: they do not.
        """
        await asyncio.gather(*(self.backend.describe(version) for version in self.backend.table.versions))

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
            for version in self.backend.table.versions:
                job = EditJob(prompt="leave it as it is", pixels=pixels, seed=0, num_inference_steps=1)
                await self._dispatch(version, job)
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
