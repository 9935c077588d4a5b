"""The gateway: checks what comes in, has it edited, answers. It holds no model."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import FormData, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from insightedit.platform.datasets.shapes_edits import sample_edit
from insightedit.platform.datasets.shapes_world import render
from insightedit.serve.backend import MODEL_NAME, Backend, EditJob, EditOutcome
from insightedit.serve.meters import CONTENT_TYPE, Meters
from insightedit.serve.schema import (
    SEED_LIMIT,
    ApiError,
    EditFields,
    ErrorResponse,
    ImageData,
    ImagesResponse,
    InputTokens,
    Timing,
    Usage,
    overloaded,
    parse_fields,
    request_body_schema,
)
from insightedit.serve.settings import Limits
from insightedit.serve.uploads import Pixels, decode_upload, encode_image

logger = logging.getLogger("insightedit.serve")

EDIT_PATH = "/v1/images/edits"
PAGE = Path(__file__).parent / "page"
# Nothing comes from another host; an image shown is one the user chose or got.
CONTENT_POLICY = "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}
PROBE_SECONDS = 30.0
"""How long a successful probe edit counts."""


@dataclass(frozen=True, slots=True)
class EditRequest:
    """A request whose form has been read and checked, its image not yet decoded."""

    fields: EditFields
    upload: bytes


async def read_edit_request(request: Request, limits: Limits) -> EditRequest:
    """Read a multipart body, at most `limits.body_bytes` of it.

    Raises:
        ApiError: 413 for too much, 415 for another kind of body, 400 for a broken form or a wrong field.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        message = "The body must be multipart/form-data with an image and a prompt."
        raise ApiError(415, "unsupported_media_type", message)
    parser = MultiPartParser(
        request.headers, _bounded_body(request, limits), max_files=8, max_fields=32, max_part_size=2**18
    )
    parser.spool_max_size = limits.body_bytes  # Uploads stay in memory.
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, "invalid_form", f"The multipart form cannot be read: {error.message}") from None
    try:
        texts, uploads = await _sorted_parts(form)
    finally:
        await form.close()
    fields = parse_fields(texts, limits)
    if not uploads:
        raise ApiError(400, "missing_required_parameter", "image is missing; attach one as a file.", "image")
    if len(uploads) > 1:
        raise ApiError(400, "invalid_value", f"image is given {len(uploads)} times; send exactly one.", "image")
    return EditRequest(fields, uploads[0])


async def _sorted_parts(form: FormData) -> tuple[dict[str, str], list[bytes]]:
    """The form's text fields by name, and the files given as image."""
    texts: dict[str, str] = {}
    uploads: list[bytes] = []
    for name, value in form.multi_items():
        if name in ("image", "image[]"):
            uploads.append(await _file_bytes(value))
        elif not isinstance(value, str):
            # A file in any other place is named by the field check, as unknown or not supported.
            texts[name] = ""
        elif name in texts:
            raise ApiError(400, "invalid_value", f"{name[:80]} is given more than once.", name[:80])
        else:
            texts[name] = value
    return texts, uploads


async def _bounded_body(request: Request, limits: Limits) -> AsyncGenerator[bytes]:
    error = ApiError(413, "request_too_large", f"The request is larger than the {limits.body_bytes} bytes allowed.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.body_bytes:
        raise error
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limits.body_bytes:
            raise error
        yield chunk


async def _file_bytes(value: UploadFile | str) -> bytes:
    if isinstance(value, str):
        raise ApiError(400, "invalid_value", "image must be sent as a file, with a file name.", "image")
    return await value.read()


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
        self._proven: set[str] = set()

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
                await self._dispatch(version, job)
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


def error_answer(error: ApiError) -> JSONResponse:
    """An error as its sender reads it."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


class OuterLayer:
    """Around every answer: security headers, a request id, and an error object instead of a traceback."""

    def __init__(self, app: ASGIApp, sets_request_id: bool) -> None:
        self._app = app
        self._sets_request_id = sets_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if 0 < len(given) <= 128 else uuid.uuid4().hex

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if self._sets_request_id:
                    headers["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            logger.info("request %s: the client left", request_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if not begun:
                failure = ApiError(500, "internal_error", "The server failed at this request; its log says why.")
                await error_answer(failure)(scope, receive, send_with_headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return error_answer(error)

    @app.exception_handler(RequestValidationError)
    async def query_error(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return error_answer(ApiError(400, "invalid_value", f"{name}: {first['msg']}.", name))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        return error_answer(ApiError(error.status_code, codes.get(error.status_code, "invalid_request"), message))


def _add_health(app: FastAPI, service: EditService) -> None:
    def route(path: str, check: Callable[[], Awaitable[None]] | None, text: str) -> None:
        async def answer() -> dict[str, object]:
            if check is not None:
                await check()
            return {"status": "ok", "versions": list(service.backend.table.versions)}

        app.get(path, summary=text, responses={503: {"model": ErrorResponse}})(answer)

    route("/livez", None, "The gateway answers.")
    route("/healthz", service.check, "Every served version's replicas answer.")
    route("/readyz", service.probe, "An edit of one step works; tried at most every half minute.")


def build_app(backend: Backend, limits: Limits, meters: Meters, sets_request_id: bool = True) -> FastAPI:
    """The whole HTTP interface over some backend.

    Args:
        backend: what edits.
        limits: what a request may ask for.
        meters: where to count.
        sets_request_id: whether to answer with `x-request-id`; Serve's own proxy does so already.
    """
    service = EditService(backend, limits, meters)
    # FastAPI's documentation pages load scripts from another host; /openapi.json stays.
    app = FastAPI(title="InsightEdit", docs_url=None, redoc_url=None)
    app.add_middleware(OuterLayer, sets_request_id=sets_request_id)
    _add_error_handlers(app)
    _add_health(app, service)
    errors = {status: {"model": ErrorResponse} for status in (400, 404, 413, 415, 429, 503, 504)}

    @app.post(
        EDIT_PATH,
        response_model=ImagesResponse,
        responses=errors,  # pyright: ignore[reportArgumentType]  (FastAPI's own type is wider than it needs)
        openapi_extra={"requestBody": request_body_schema()},
    )
    async def create_image_edit(request: Request) -> Response:
        return await service.answer(request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, object]:
        return await service.models()

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(meters.render), media_type=CONTENT_TYPE)

    _add_page(app)
    return app


def example_scene(seed: int) -> dict[str, object]:
    """A drawn scene of the shapes world for people without a picture at hand, and what to ask of it."""
    edit = sample_edit(seed, "test")
    image = base64.b64encode(encode_image(render(edit.source), "png")).decode("ascii")
    return {"image": image, "instructions": [edit.simple, edit.advanced]}


def _add_page(app: FastAPI) -> None:
    @app.get("/page/example.json", include_in_schema=False)
    def example(seed: Annotated[int, Query(ge=0, lt=SEED_LIMIT)] = 0) -> dict[str, object]:
        return example_scene(seed)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
