"""Traces of edits: a span for each request and below it its images' waiting, conditioning and denoising.

The times of a request are known when it has been answered. Its spans are made then, with the moments at which they
began and ended: no span is open while an edit waits, moves to another version, or streams. Prompts and images are in
none.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from insightedit.platform.errors import UsageError
from insightedit.serve.settings import TraceSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from insightedit.serve.edits import Visit

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PARENT = "traceparent"


def check_traces(settings: TraceSettings) -> None:
    """See that traces can be sent.

    Raises:
        UsageError: what sends them is not installed.
    """
    try:
        there = settings.url is None or find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise UsageError("traces.url is set, but nothing here sends traces: pip install 'insightedit[traces]'.")


class Traces:
    """Makes spans and has them sent in the background; what cannot be sent is dropped."""

    def __init__(self, settings: TraceSettings, exporter: Any = None) -> None:
        """Make ready.

        Args:
            settings: where to, and of how many requests.
            exporter: of OpenTelemetry's, in place of the one for `settings.url`.
        """
        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  (an extra)

            exporter = OTLPSpanExporter(endpoint=settings.url)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "insightedit"}),
            sampler=ParentBased(TraceIdRatioBased(settings.share)),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("insightedit.serve")

    def record(self, visit: Visit, status: int, parent: str | None) -> None:
        """The spans of a request that has just ended.

        Args:
            visit: the request.
            status: of its answer.
            parent: the caller's `traceparent` header.
        """
        context = TraceContextTextMapPropagator().extract({_PARENT: parent} if parent else {})
        # Spans want moments of the calendar, and a visit has a stopwatch's.
        calendar = time.time() - time.perf_counter()
        attributes = {
            "http.response.status_code": status,
            "insightedit.request_id": visit.request_id,
            "insightedit.model_version": visit.version,
            "insightedit.replayed": visit.replayed,
        }
        root = self._tracer.start_span("edit", context, attributes=attributes, start_time=_ns(calendar + visit.started))
        below = set_span_in_context(root)
        for image in visit.images:
            moment = calendar + image.begun
            for name, seconds in (("queue", image.queue), ("condition", image.condition), ("denoise", image.edit)):
                span = self._tracer.start_span(name, below, start_time=_ns(moment))
                moment += seconds
                span.end(_ns(moment))
        root.end(_ns(time.time()))

    def flush(self) -> None:
        """Send what is there."""
        self._provider.force_flush()


class TraceLayer:
    """Around the whole gateway: records each request that was an edit, when its answer is sent."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        status = 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            visit = scope.get("state", {}).get("visit")
            if visit is not None:
                headers = dict(scope["headers"])
                parent = headers.get(_PARENT.encode())
                self._traces.record(visit, status, parent.decode("latin-1") if parent else None)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
