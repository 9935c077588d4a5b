"""The gateway as an ASGI application: routes, the layer around every answer, errors. It holds no model."""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from insightedit.platform.datasets.shapes_edits import sample_edit
from insightedit.platform.datasets.shapes_world import render
from insightedit.serve.answers import (
    EVENTS_SCHEMA,
    ImagesResponse,
    Job,
    JobList,
    WebhookSecret,
    component_schemas,
    request_body,
)
from insightedit.serve.backend import Backend
from insightedit.serve.door import Access, Door, caller_of
from insightedit.serve.draining import Draining, DrainLayer
from insightedit.serve.edit_jobs import JobId, JobQuery, JobService
from insightedit.serve.edits import EditService
from insightedit.serve.feedback import Feedback, FeedbackAnswer, FeedbackRequest
from insightedit.serve.idempotency import KEY_PARAMETER
from insightedit.serve.logs import LOGGER
from insightedit.serve.meters import CONTENT_TYPE, Meters
from insightedit.serve.schema import EDIT_PATH, JOBS_PATH, SEED_LIMIT, ApiError, ErrorResponse
from insightedit.serve.settings import Destinations, FeedbackSettings, Limits, RolloutSettings
from insightedit.serve.shared import Shared
from insightedit.serve.traces import TraceLayer, Traces
from insightedit.serve.trials import Trials
from insightedit.serve.uploads import encode_image

logger = logging.getLogger(LOGGER)

JOB_PATH = JOBS_PATH + "/{job_id}"
PAGE = Path(__file__).parent / "page"
# Nothing comes from another host; an image shown is one the user chose or got.
CONTENT_POLICY = "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


def error_answer(error: ApiError) -> JSONResponse:
    """An error as its sender reads it."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = 'Bearer realm="insightedit"'
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


HEAD_BYTES = 32_768
"""Size of all headers of a request together."""


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
        scope.setdefault("state", {})["request_id"] = request_id

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
            _check_head(scope)
            await self._app(scope, receive, send_with_headers)
        except ApiError as error:  # Of the door, which stands outside FastAPI's own handlers.
            await error_answer(error)(scope, receive, send_with_headers)
        except ClientDisconnect:
            logger.info("request %s: the client left", request_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if not begun:
                failure = ApiError(500, "internal_error", "The server failed at this request; its log says why.")
                await error_answer(failure)(scope, receive, send_with_headers)


def _check_head(scope: Scope) -> None:
    """Refuse more headers than a client has use for."""
    if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
        message = f"The headers are larger than the {HEAD_BYTES} bytes allowed."
        raise ApiError(431, "headers_too_large", message)


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


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse}
    for status in (400, 401, 403, 404, 408, 409, 410, 413, 415, 422, 429, 431, 503, 504)
}
"""What any request about an edit may be answered with."""


def _add_edits(app: FastAPI, service: EditService) -> None:
    stream = {200: {"content": {"text/event-stream": {"schema": EVENTS_SCHEMA}}}}

    @app.post(
        EDIT_PATH,
        response_model=ImagesResponse,
        responses={**_ERRORS, **stream},
        openapi_extra={"requestBody": request_body("Edit"), "parameters": [KEY_PARAMETER]},
    )
    async def create_image_edit(request: Request) -> Response:
        return await service.answer(request)


def _add_jobs(app: FastAPI, jobs: JobService) -> None:
    @app.put(
        JOB_PATH,
        status_code=202,
        response_model=Job,
        responses={200: {"model": Job, "description": "It was sent before"}, **_ERRORS},
        openapi_extra={"requestBody": request_body("Job")},
        summary="Have an edit done later, under an id of your own.",
    )
    async def create_image_edit_job(request: Request, job_id: JobId) -> Response:
        return await jobs.create(request, job_id)

    @app.get(JOBS_PATH, responses=_ERRORS, summary="Your jobs, the newest first, without their images.")
    async def list_image_edit_jobs(request: Request, query: Annotated[JobQuery, Query()]) -> JobList:
        return await jobs.listed(request, query)

    @app.get(JOB_PATH, responses=_ERRORS, summary="How a job is, and its images.")
    async def get_image_edit_job(request: Request, job_id: JobId) -> Job:
        return await jobs.find(request, job_id)

    @app.post(f"{JOB_PATH}/cancel", responses=_ERRORS, summary="Cancel a job that has not ended.")
    async def cancel_image_edit_job(request: Request, job_id: JobId) -> Job:
        return await jobs.cancel(request, job_id)

    @app.get("/v1/webhooks/secret", summary="The key that your webhooks are signed with.", responses=_ERRORS)
    async def get_webhook_secret(request: Request, response: Response) -> WebhookSecret:
        response.headers["cache-control"] = "no-store"
        return await jobs.webhook_secret(request)


class _Application(FastAPI):
    """FastAPI, whose document also has the bodies that the gateway reads by itself."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            super().openapi()["components"]["schemas"].update(component_schemas())
        return super().openapi()


def build_app(
    backend: Backend,
    limits: Limits,
    meters: Meters,
    sets_request_id: bool = True,
    access: Access | None = None,
    shared: Shared | None = None,
    trials: Trials | None = None,
    image_urls: Destinations | None = None,
    traces: Traces | None = None,
    feedback: Feedback | None = None,
    draining: Draining | None = None,
) -> FastAPI:
    """The whole HTTP interface over some backend.

    Args:
        backend: what edits.
        limits: what a request may ask for.
        meters: where to count.
        sets_request_id: whether to answer with `x-request-id`; Serve's own proxy does so already.
        access: who may come in; anybody without it.
        shared: what it has in common with other gateways; nothing without it.
        trials: its part of rollouts; without it, the backend's table stays.
        image_urls: where images may be fetched from; nowhere without it.
        traces: where edits are traced; nowhere without it.
        feedback: what is kept of users' verdicts; nothing without it.
        draining: what has it stop; without it, it takes edits to the end.
    """
    shared = shared or Shared.in_this_process(limits)
    followed = trials or Trials(backend, RolloutSettings(), shared.store, None, meters)
    kept = feedback or Feedback(FeedbackSettings(), shared.store, Path())
    urls = image_urls or Destinations()
    service = EditService(backend, limits, meters, shared.keys, followed, urls, kept)
    jobs = JobService(service, shared.book, shared.webhooks, access or Access(None))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        async with followed.following(), jobs.at_work():
            yield

    # FastAPI's documentation pages load scripts from another host; /openapi.json stays.
    # A redirection from a path with a slash too many would have its body sent twice.
    app = _Application(title="InsightEdit", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    if draining is not None:
        app.add_middleware(DrainLayer, draining=draining)
    if access is not None:
        app.add_middleware(Door, access=access, meters=meters)
    app.add_middleware(OuterLayer, sets_request_id=sets_request_id)
    if traces is not None:
        app.add_middleware(TraceLayer, traces=traces)
    _add_error_handlers(app)
    _add_health(app, service)
    _add_edits(app, service)
    _add_jobs(app, jobs)

    @app.get("/v1/models")
    async def list_models() -> dict[str, object]:
        return await service.models()

    _add_feedback(app, service)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(meters.render), media_type=CONTENT_TYPE)

    _add_page(app)
    return app


def _add_feedback(app: FastAPI, service: EditService) -> None:
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 503)}

    @app.get("/v1/feedback", summary="Whether verdicts on edits are kept.")
    async def asked() -> dict[str, bool]:
        return {"consent": service.feedback.settings.consent}

    @app.post("/v1/feedback", summary="Accept or reject an edit.", responses=errors)
    async def judged(request: Request, said: FeedbackRequest) -> FeedbackAnswer:
        version = await service.feedback.take(caller_of(request).name, said)
        service.trials.said(version, said.verdict == "accept")
        service.meters.feedback.labels(said.verdict, version).inc()
        return FeedbackAnswer()


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
