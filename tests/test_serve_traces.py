"""Traces: one for each edit, its images' times below it, in the caller's own trace where there is one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from test_serve_gateway import LIMITS, InvertingBackend, encoded, picture

from insightedit.platform.errors import UsageError
from insightedit.serve import traces as module
from insightedit.serve.gateway import EDIT_PATH, build_app
from insightedit.serve.meters import Meters
from insightedit.serve.settings import TraceSettings
from insightedit.serve.traces import Traces, check_traces

PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Traced:
    def __init__(self, share: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.traces = Traces(TraceSettings(url="http://127.0.0.1:1", share=share), self.exporter)
        self.client = TestClient(build_app(InvertingBackend(), LIMITS, Meters(), traces=self.traces))

    def edit(self, headers: dict[str, str] | None = None, **fields: str) -> list[ReadableSpan]:
        """The spans of one edit."""
        files = {"image": ("a", encoded(picture()))}
        self.client.post(EDIT_PATH, data={"prompt": "a secret", **fields}, files=files, headers=headers).read()
        self.traces.flush()
        spans = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return spans


@pytest.mark.parametrize("stream", ["false", "true"])
def test_an_edit_is_one_trace_with_its_times_below(stream: str) -> None:
    spans = Traced().edit({"x-request-id": "mine"}, n="2", stream=stream)
    (root,) = [span for span in spans if span.name == "edit"]
    below = [span for span in spans if span is not root]
    assert sorted(span.name for span in below) == ["condition", "condition", "denoise", "denoise", "queue", "queue"]
    assert {span.context.trace_id for span in spans if span.context} == {root.context and root.context.trace_id}
    assert {span.parent and span.parent.span_id for span in below} == {root.context and root.context.span_id}
    assert root.parent is None
    attributes = dict(root.attributes or {})
    assert attributes["insightedit.request_id"] == "mine"
    assert attributes["insightedit.model_version"] == "3"
    assert attributes["http.response.status_code"] == 200
    assert "a secret" not in "".join(span.to_json() for span in spans)
    assert root.start_time
    assert all(root.start_time <= (span.start_time or 0) <= (span.end_time or 0) for span in below)


def test_refusals_are_traced_and_pages_are_not() -> None:
    traced = Traced()
    (span,) = traced.edit(n="nine")
    assert dict(span.attributes or {})["http.response.status_code"] == 400
    traced.client.get("/livez")
    traced.traces.flush()
    assert not traced.exporter.get_finished_spans()


def test_a_callers_trace_goes_on_and_decides() -> None:
    spans = Traced(share=0.0).edit({"traceparent": PARENT})
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {PARENT.split("-")[1]}
    assert not Traced(share=0.0).edit()


def test_without_the_package_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check_traces(TraceSettings(url="http://127.0.0.1:1"))
    monkeypatch.setattr(module, "_EXPORTER", "no_such_package.trace_exporter")
    check_traces(TraceSettings())
    with pytest.raises(UsageError, match=r"insightedit\[traces\]"):
        check_traces(TraceSettings(url="http://127.0.0.1:1"))


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
        server.shutdown()
        thread.join()


def test_a_collector_gets_them(collector: tuple[str, list[bytes]]) -> None:
    url, bodies = collector
    traces = Traces(TraceSettings(url=url))
    client = TestClient(build_app(InvertingBackend(), LIMITS, Meters(), traces=traces))
    client.post(EDIT_PATH, data={"prompt": "x"}, files={"image": ("a", encoded(picture()))})
    traces.flush()
    sent = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans[0]
    assert sorted(span.name for span in sent.scope_spans[0].spans) == ["condition", "denoise", "edit", "queue"]
