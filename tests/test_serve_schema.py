"""Requests made from the OpenAPI document, right ones and wrong ones: no 5xx, and no answer that is not in it."""

from __future__ import annotations

import base64
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_serve_gateway import LIMITS, InvertingBackend, encoded, picture

from insightedit.serve.gateway import build_app
from insightedit.serve.meters import Meters

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
PICTURE = encoded(picture(16, 16))
URL = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
# Nothing else would ever be an image. What is none is sent by the hostile requests.
schemathesis.openapi.format("binary", st.just(PICTURE))
schemathesis.openapi.format("uri", st.just(URL))


def ask(count: int) -> Counter[int]:
    """Send up to so many requests for each operation, check the answers, and count them by status."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", build_app(InvertingBackend(), LIMITS, Meters()))
    statuses: Counter[int] = Counter()
    operations: Any = schema.get_all_operations()
    for operation in operations:
        right, wrong = (operation.ok().as_strategy(generation_mode=mode) for mode in GenerationMode)

        @settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        )
        @given(case=right | wrong)
        def send(case: Any) -> None:
            response = case.call()
            # The document says what the data of a stream's events is, as OpenAI's does, and not what events are.
            stream = response.headers["content-type"][0].startswith("text/event-stream")
            case.validate_response(response, checks=[*CHECKS, *([] if stream else [response_schema_conformance])])
            statuses[response.status_code] += 1

        send()
    return statuses


def test_no_request_makes_the_server_fail() -> None:
    statuses = ask(100)
    assert statuses[200] > 10
    assert statuses[400] > 10


@pytest.mark.slow
def test_two_thousand_requests_do_not_make_the_server_fail() -> None:
    statuses = ask(2000)
    print(f"\n{statuses}")  # noqa: T201  (pytest -s shows it)
    assert statuses.total() >= 2000
