"""The dashboard for serving asks for what a gateway counts, and for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from test_serve_gateway import LIMITS, InvertingBackend, post

from insightedit.serve.gateway import build_app
from insightedit.serve.meters import Meters

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "serving.json"
GIVEN = {
    "insightedit_edit_requests_total": {"code", "model_version"},
    "insightedit_edit_duration_seconds": set[str](),
    "insightedit_edit_queue_seconds": set[str](),
    "insightedit_edit_step_seconds": set[str](),
    "insightedit_edit_rejected_total": {"reason"},
}
"""The names that dashboards and alerts of others go by, with their labels."""


def exported() -> dict[str, set[str]]:
    """The names that Prometheus finds after an edit and a refusal, with their labels."""
    meters = Meters()
    for labelled in (meters.quality, meters.stood_in):
        labelled.labels("2")
    meters.feedback.labels("accept", "2")
    with TestClient(build_app(InvertingBackend(), LIMITS, meters)) as client:
        assert post(client).status_code == 200
        assert post(client, n="0").status_code == 400
        text = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) - {"le"} for sample in samples}


def asked(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_given_names_are_exported() -> None:
    found = exported()
    for name, labels in GIVEN.items():
        assert found[name if name.endswith("_total") else f"{name}_bucket"] == labels


def test_the_dashboard_asks_for_what_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    names = {name for query in asked(dashboard) for name in re.findall(r"\binsightedit_\w+", query)}
    assert names <= exported().keys()
    assert {name.removesuffix("_bucket") for name in names} >= GIVEN.keys()


def test_the_dashboards_panels_do_not_cover_each_other() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
