"""Runs in MLflow: what is kept of a training, and that writing never gets out of order or lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_training as toy
from mlflow import MlflowClient
from PIL import Image

from insightedit.platform.config import RunConfig
from insightedit.platform.errors import InsightEditError
from insightedit.platform.tracking import StageTracker, TrackedRun, end_run, start_run
from insightedit.platform.workdir import Workdir


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return toy.toy_config({1: {"steps": 3}, 2: {"steps": 4}})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    return Workdir.open(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def tracked(workdir: Workdir, config: RunConfig) -> TrackedRun:
    return start_run(workdir, "toy-run", config, {"a": "fingerprint of a"})


def test_a_run_has_a_child_for_each_stage(workdir: Workdir, config: RunConfig, tracked: TrackedRun) -> None:
    client = MlflowClient(workdir.tracking_uri)
    parent = client.get_run(tracked.run_id)
    assert parent.info.run_name == "toy-run"
    assert parent.data.params["stages.2.steps"] == "4"
    assert parent.data.params["workers.count"] == "2"
    assert parent.data.tags["dataset.a"] == "fingerprint of a"
    assert "version.torch" in parent.data.tags
    assert tracked.stage_runs.keys() == {1, 2}
    for number, run_id in tracked.stage_runs.items():
        child = client.get_run(run_id)
        assert child.data.tags["mlflow.parentRunId"] == tracked.run_id
        assert child.data.tags["fingerprint"] == config.fingerprint(number)
        assert child.data.params["steps"] == str(config.stages[number].steps)
        assert Path(str(child.info.artifact_uri).removeprefix("file://")).is_relative_to(workdir.artifacts)


def test_figures_and_pictures_are_written_in_order(workdir: Workdir, tracked: TrackedRun) -> None:
    tracker = StageTracker(tracked, 1)
    for step in range(30):
        tracker.metrics(step, {"L_LLM": 1.0 / (step + 1), "learning_rate": 0.1})
    tracker.pictures(30, {"edits": Image.new("RGB", (4, 4))})
    tracker.tags({"weights": "abc"})
    tracker.close("FINISHED")
    client = MlflowClient(workdir.tracking_uri)
    history = client.get_metric_history(tracker.run_id, "L_LLM")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1.0 / (step + 1)) for step in range(30)]
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["weights"] == "abc"
    assert any("edits" in file.path for file in client.list_artifacts(tracker.run_id, "images"))


def test_what_cannot_be_written_is_told(tracked: TrackedRun) -> None:
    gone = TrackedRun(uri=tracked.uri, run_id=tracked.run_id, stage_runs={1: "0" * 32})
    tracker = StageTracker(gone, 1)
    tracker.metrics(1, {"L_LLM": 1.0})
    tracker.metrics(2, {"L_LLM": 1.0})
    with pytest.raises(InsightEditError, match="MLflow refused what was logged"):
        tracker.close("FINISHED")


def test_an_interrupted_run_goes_on(workdir: Workdir, config: RunConfig) -> None:
    first = start_run(workdir, "interrupted", config, {})
    end_run(first, "FAILED")
    client = MlflowClient(workdir.tracking_uri)
    assert client.get_run(first.stage_runs[2]).info.status == "FAILED"
    again = start_run(workdir, "interrupted", config, {}, continued=first)
    assert again == first
    assert client.get_run(first.run_id).info.status == "RUNNING"
    end_run(again, "FINISHED")
    assert client.get_run(first.run_id).info.status == "FINISHED"
