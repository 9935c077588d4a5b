"""cluster.yaml is one that Ray's own launcher accepts, with the node groups the README speaks of."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config  # what `ray up` itself runs

from insightedit.platform.config import load_preset
from insightedit.platform.kube import WORK_FOLDER, training_groups

ROOT = Path(__file__).parents[1]
Config = dict[str, Any]


@pytest.fixture
def cluster() -> Config:
    return cast(Config, yaml.safe_load((ROOT / "cluster.yaml").read_text()))


@pytest.fixture(scope="module")
def schema() -> Config:
    return cast(Config, json.loads((Path(ray.autoscaler.__path__[0]) / "ray-schema.json").read_text()))


def test_passes_rays_schema(cluster: Config, schema: Config) -> None:
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(cluster, schema)


def test_the_schema_would_refuse_a_wrong_field(cluster: Config, schema: Config) -> None:
    cluster["available_node_types"]["train-gpu"]["spot"] = True
    with pytest.raises(jsonschema.ValidationError, match="spot"):
        jsonschema.validate(cluster, schema)


def test_passes_what_ray_up_checks(cluster: Config) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(cluster["available_node_types"])


def test_node_groups(cluster: Config) -> None:
    groups = cluster["available_node_types"]
    assert list(groups) == ["head", "cpu-preprocess", "encoder-gpu", "train-gpu", "serve-gpu"]
    assert cluster["head_node_type"] == "head"
    assert groups["head"]["resources"]["CPU"] == 0
    assert [name for name, group in groups.items() if group["resources"].get("GPU", 0)] == list(groups)[2:]
    workers = {name: group for name, group in groups.items() if name != "head"}
    assert sum(group["max_workers"] for group in workers.values()) == cluster["max_workers"]


def test_training_runs_on_spot_and_serving_does_not(cluster: Config) -> None:
    groups = cluster["available_node_types"]
    assert groups["train-gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in groups["serve-gpu"]["node_config"]


def test_cluster_runs_the_tested_ray_behind_its_token(cluster: Config) -> None:
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{version('ray')}-")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]
    assert any("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"])


def test_groups_are_labelled_as_in_kubernetes(cluster: Config) -> None:
    labels = {name: group.get("labels", {}).get("group") for name, group in cluster["available_node_types"].items()}
    config = load_preset("nano", ["data.encoder_gpus=1"])
    assert {labels["cpu-preprocess"], labels["encoder-gpu"], labels["train-gpu"]} == {
        group.place for group in training_groups(config)
    }
    assert labels["head"] is None


def test_every_node_has_the_same_work_folder(cluster: Config) -> None:
    folder = WORK_FOLDER
    assert any(f" {folder}" in command and "mount -t nfs4" in command for command in cluster["initialization_commands"])
    assert f"--env INSIGHTEDIT_WORKDIR={folder}" in cluster["docker"]["run_options"]
    assert any(option.startswith(f"--volume {folder}:{folder}") for option in cluster["docker"]["run_options"])
