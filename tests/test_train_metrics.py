"""What a training shows while it runs: Prometheus finds every figure, and the dashboard asks for just those."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
import toy_training as toy
from prometheus_client.parser import text_string_to_metric_families

from insightedit.platform.cluster import connected
from insightedit.platform.efficiency import Efficiency, FlopMeter
from insightedit.platform.storage import Store
from insightedit.platform.train_metrics import FIGURES, exported_names
from insightedit.platform.trainer import TrainingPlan, train_stages
from insightedit.platform.workdir import Workdir

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "training.json"
STEPS = 60


@pytest.fixture
def quick_metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray whose processes tell their figures five times a second."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "200")
    with connected(cpus=8):
        yield


def scraped(run: str) -> dict[str, dict[str, float]]:
    """What Prometheus would find of a run: values by what else than the run and Ray's own labels names them."""
    found: dict[str, dict[str, float]] = {}
    for node in ray.nodes():
        with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("run") == run and "train" in sample.name:
                    key = f"{sample.labels['stage']}{sample.labels.get('loss', '')}"
                    found.setdefault(sample.name, {})[key] = sample.value
    return found


def test_prometheus_finds_every_figure_of_a_running_training(tmp_path: Path, quick_metrics: None) -> None:
    config = toy.toy_config({1: {"steps": STEPS, "log_every": 1}}, count=1, peak_tflops=1e-6)
    workdir = Workdir.open(tmp_path)
    stores = {name: Store.at(toy.prepare_toy(workdir.data / name)) for name in config.data.datasets}
    seen = tmp_path / "seen"
    # Training takes its time until the figures were found, as a real one does.
    task = toy.ToyTask(pause=0.3, pause_until=str(seen))
    plan = TrainingPlan(name="shown", workdir=workdir, config=config, task=task, stages=(1,), datasets=stores)
    found: dict[str, dict[str, float]] = {}

    def look(_progress: Any) -> None:
        found.update(scraped("shown"))
        if exported_names() <= found.keys():
            seen.touch()

    train_stages(plan, look)
    points = [json.loads(line) for line in (plan.stage_folder(1) / "curve.jsonl").read_text().splitlines()]
    assert found.keys() == exported_names()
    assert found["ray_insightedit_train_steps"] == {"1": STEPS}
    for name in FIGURES:
        (value,) = found[f"ray_insightedit_train_{name}"].values()
        assert value in [point["figures"][name] for point in points]
    for loss in points[0]["losses"]:
        assert found["ray_insightedit_train_loss"][f"1{loss}"] in [point["losses"][loss] for point in points]


def test_every_figure_of_the_curves_is_shown() -> None:
    from test_training import Engine, loop

    steps = loop(Engine())
    steps.step(0)
    efficiency = Efficiency(started=0.0, before=0.0, flops=FlopMeter(), peak=1.0)
    more = efficiency.figures(samples_per_second=1.0, seconds=1.0, stalled=0.0, useful=1.0)
    assert set(steps.point(1).figures) | set(more) == set(FIGURES)


def test_the_dashboard_asks_for_what_is_exported_and_nothing_else() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert asked == exported_names()


def test_the_dashboards_panels_do_not_cover_each_other() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
