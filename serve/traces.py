"""Traces by OpenTelemetry: where a request's time went, from the proxy over gateway and conditioner to the editor.

Serve makes the spans and hands their context on with every call; here is where they go. Needs the extra
`insightedit[tracing]`.
"""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from insightedit.platform.errors import UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.settings import ServeSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

COLLECTOR_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's own names of where a collector listens, as in `http://collector:4318`."""
_EXTRA = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def tracing_config(settings: ServeSettings) -> dict[str, Any] | None:
    """How Serve's components trace; None where tracing is off.

    Raises:
        UsageError: the extra is not installed.
    """
    if settings.trace_share == 0:
        return None
    try:
        missing = [name for name in _EXTRA if find_spec(name) is None]
    except ModuleNotFoundError as error:
        missing = [str(error.name)]
    if missing:
        raise UsageError(f"trace_share needs {missing[0]}; install `insightedit[tracing]`, or leave it out.")
    return {
        "enabled": True,
        "exporter_import_path": f"{__name__}:span_processors",
        "sampling_ratio": settings.trace_share,
    }


def span_processors() -> list[SpanProcessor]:
    """Where a process' spans go: to the collector that the environment names, else to a file of the work folder."""
    from opentelemetry.sdk.trace.export import (  # noqa: PLC0415  (of an extra)
        BatchSpanProcessor,
        ConsoleSpanExporter,
        SimpleSpanProcessor,
    )

    if any(name in os.environ for name in COLLECTOR_VARIABLES):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        return [BatchSpanProcessor(OTLPSpanExporter())]
    folder = Workdir.open().logs / "spans"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{socket.gethostname()}-{os.getpid()}.jsonl").open("a", buffering=1, encoding="utf-8")
    return [SimpleSpanProcessor(ConsoleSpanExporter(out=file, formatter=_line))]


def _line(span: ReadableSpan) -> str:
    return span.to_json(indent=None) + "\n"
