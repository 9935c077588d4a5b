"""Runs and servers as KubeRay's objects: valid by its own schemas, and what the config says is in them."""

from __future__ import annotations

import copy
import shlex
import socket
import subprocess
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import httpx
import jsonschema
import pytest
import yaml
from kube_schemas import check_manifest
from ray import serve
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage] - what `serve deploy` asks
from ray.serve.schema import ServeDeploySchema
from ray_cluster import ray_cluster
from test_serve_ray import picture, png, register_champion
from tiny_models import write_tiny_preset

from insightedit.platform.cluster import connected
from insightedit.platform.config import KubeConfig, RunConfig, load_preset, preset_names
from insightedit.platform.errors import UsageError
from insightedit.platform.kube import (
    CONFIG_FOLDER,
    QUEUE_LABEL,
    WORK_FOLDER,
    Manifest,
    placed,
    to_yaml,
    training_manifests,
)
from insightedit.platform.trainer import StageResult
from insightedit.platform.workdir import Workdir
from insightedit.serve.applications import gateway_application, single_version_table
from insightedit.serve.client import edit_over_http
from insightedit.serve.kube import resolved, serve_config, serving_manifest
from insightedit.serve.settings import ServeSettings

EVERYTHING = (
    "workers.count=8",
    "workers.gpus=1",
    "workers.cpus=6",
    "data.encoder_gpus=0.5",
    "data.encoder_workers=4",
    "data.read_tasks=40",
    "kube.queue=team-a",
    "kube.namespace=research",
    "kube.service_account=trainer",
    "kube.token_secret=ray-token",
    "kube.image_pull_secrets=[pull]",
    "kube.secrets=[s3]",
    "kube.environment={AWS_ENDPOINT_URL: 'https://s3.example.org'}",
    "kube.scratch_gib=0.5",
    "kube.train={workers: 4, memory_gib: 256, tolerations: [{key: spot, value: 'true'}, {key: nvidia.com/gpu}]}",
    "kube.train.node_selector={pool: spot-gpu}",
)
"""Overrides that give every field of `kube:` that is empty by default."""


def run_job(*overrides: str, name: str = "mine") -> tuple[RunConfig, Manifest]:
    config = load_preset("nano", overrides)
    _, job = training_manifests(config, name)
    return config, job


def groups_of(cluster: Manifest) -> dict[str, Manifest]:
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def container_of(group: Manifest) -> Manifest:
    (container,) = group["template"]["spec"]["containers"]
    return container


def pod_templates(value: Any) -> list[Manifest]:
    """Every pod's spec, wherever it stands."""
    if isinstance(value, list):
        return [pod for one in value for pod in pod_templates(one)]
    if not isinstance(value, dict):
        return []
    found = [value] if "containers" in value else []
    return found + [pod for one in value.values() for pod in pod_templates(one)]


@pytest.mark.parametrize("overrides", [(), EVERYTHING], ids=["plain", "everything"])
def test_a_run_passes_kuberays_schema(overrides: tuple[str, ...]) -> None:
    check_manifest(run_job(*overrides)[1])


@pytest.mark.parametrize("queue", [None, "team-a"])
def test_a_server_passes_kuberays_and_serves_schemas(queue: str | None) -> None:
    service = serving_manifest(KubeConfig(queue=queue), "editor", "3", ("champion",), ServeSettings())
    check_manifest(service)
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert [one.name for one in serve.applications] == ["insightedit-v3", "insightedit-gateway"]
    assert [one.route_prefix for one in serve.applications] == [None, "/"]


@pytest.mark.parametrize("where", ["spec", "spec.rayClusterSpec", "spec.rayClusterSpec.headGroupSpec.template.spec"])
def test_the_schema_would_refuse_a_wrong_field(where: str) -> None:
    job = copy.deepcopy(run_job()[1])
    place = job
    for key in where.split("."):
        place = place[key]
    place["queueName"] = "team-a"
    with pytest.raises(jsonschema.ValidationError, match="queueName"):
        check_manifest(job)


def test_the_entrypoint_trains_the_resolved_config_under_the_runs_name(tmp_path: Path) -> None:
    config = load_preset("nano", EVERYTHING)
    config_map, job = training_manifests(config, "mine")
    program, command, file, *options = shlex.split(job["spec"]["entrypoint"])
    assert (program, command, options) == ("insightedit", "train", ["--name", "mine"])
    folder, _, key = file.rpartition("/")
    written = tmp_path / key
    written.write_text(config_map["data"][key])
    resolved_config = load_preset(written)
    assert resolved_config == placed(config)
    assert resolved_config.fingerprint(3) == config.fingerprint(3)

    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    (mount,) = [one for one in container_of(head)["volumeMounts"] if one["mountPath"] == folder]
    (volume,) = [one for one in head["template"]["spec"]["volumes"] if one["name"] == mount["name"]]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]


def test_workers_that_may_be_fewer_have_pods_that_may_be_fewer() -> None:
    batches = [f"stages.{number}.global_batch=24" for number in (1, 2, 3)]
    _, job = run_job(*batches, "workers.count=[2, 4]", "kube.train.workers=2")
    train = groups_of(job["spec"]["rayClusterSpec"])["train"]
    assert (train["minReplicas"], train["maxReplicas"]) == (1, 2)


def test_what_is_written_is_read_back_the_same() -> None:
    manifests = training_manifests(load_preset("nano", EVERYTHING), "mine")
    assert list(yaml.safe_load_all(to_yaml(manifests))) == manifests


def test_a_dead_head_is_another_try_of_the_same_run() -> None:
    config, job = run_job("kube.retries=7")
    assert job["spec"]["backoffLimit"] == 7
    assert "--name mine" in job["spec"]["entrypoint"]
    work = {"name": "work", "persistentVolumeClaim": {"claimName": config.kube.work_claim}}
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert work in group["template"]["spec"]["volumes"]
        assert {"name": "INSIGHTEDIT_WORKDIR", "value": WORK_FOLDER} in container_of(group)["env"]


def test_the_groups_are_what_the_config_asks_for() -> None:
    cluster = run_job(*EVERYTHING)[1]["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = groups_of(cluster)
    assert list(groups) == ["data", "encode", "train"]
    limits = {name: container_of(group)["resources"]["limits"] for name, group in groups.items()}
    # 8 workers of one GPU and 6 CPUs, four to a pod; 4 encoders, two to a GPU; 40 tasks that read and 40 that write of
    # half a CPU each, on pods of 8.
    assert {name: group["replicas"] for name, group in groups.items()} == {"data": 5, "encode": 2, "train": 2}
    assert limits["train"] == {"cpu": "24", "memory": "256Gi", "nvidia.com/gpu": "4"}
    assert limits["encode"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits["data"]
    train = groups["train"]["template"]["spec"]
    assert train["nodeSelector"] == {"pool": "spot-gpu"}
    assert train["tolerations"] == [
        {"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    ]
    assert "tolerations" not in groups["data"]["template"]["spec"]


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"), [(1, 0.9, 1), (2, 0.5, 1), (3, 0.4, 2), (3, 0.6, 3), (4, 1, 4), (2, 2, 4)]
)
def test_workers_share_a_gpu_only_where_whole_ones_fit(workers: int, gpus: float, expected: int) -> None:
    batches = [f"stages.{number}.global_batch=24" for number in (1, 2, 3)]
    sizes = [f"workers.count={workers}", f"workers.gpus={gpus}", f"kube.train.workers={workers}"]
    _, job = run_job(*batches, *sizes)
    train = groups_of(job["spec"]["rayClusterSpec"])["train"]
    assert container_of(train)["resources"]["limits"]["nvidia.com/gpu"] == str(expected)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_can_run_on_kubernetes(preset: str) -> None:
    check_manifest(training_manifests(load_preset(preset), "mine")[-1])


def test_processes_go_to_the_pods_that_are_for_them() -> None:
    config, job = run_job("data.encoder_gpus=1")
    groups = groups_of(job["spec"]["rayClusterSpec"])
    labels = {name: group["labels"] for name, group in groups.items()}
    assert labels["data"] == labels["encode"] == placed(config).data.place
    assert labels["train"] == placed(config).workers.place
    elsewhere = load_preset("nano", ["data.place={zone: a}"])
    assert placed(elsewhere).data.place == {"zone": "a"}


def test_encoders_without_gpus_work_on_the_data_pods() -> None:
    few = groups_of(run_job("kube.data.cpus=1", "data.encoder_workers=1")[1]["spec"]["rayClusterSpec"])
    many = groups_of(run_job("kube.data.cpus=1", "data.encoder_workers=21")[1]["spec"]["rayClusterSpec"])
    assert list(few) == ["data", "train"]
    assert many["data"]["replicas"] == few["data"]["replicas"] + 10


def test_a_queue_suspends_the_run_and_fixes_its_pods() -> None:
    _, queued = run_job("kube.queue=team-a")
    assert queued["metadata"]["labels"][QUEUE_LABEL] == "team-a"
    assert queued["spec"]["suspend"] is True
    assert queued["spec"]["shutdownAfterJobFinishes"] is True
    assert queued["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False

    _, free = run_job()
    assert QUEUE_LABEL not in free["metadata"]["labels"]
    assert "suspend" not in free["spec"]
    assert free["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_every_pod_is_without_root_and_the_cluster_has_a_token() -> None:
    service = serving_manifest(KubeConfig(), "editor", "3", (), ServeSettings())
    for manifest in (run_job()[1], run_job(*EVERYTHING)[1], service):
        pods = pod_templates(manifest)
        assert len(pods) >= 3
        for pod in pods:
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] != 0
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        spec = manifest["spec"]
        assert (spec.get("rayClusterSpec") or spec["rayClusterConfig"])["authOptions"]["mode"] == "token"


def test_a_training_pod_says_when_it_goes() -> None:
    train = groups_of(run_job("kube.train.grace_seconds=55")[1]["spec"]["rayClusterSpec"])["train"]
    assert train["template"]["spec"]["terminationGracePeriodSeconds"] == 55
    command = container_of(train)["lifecycle"]["preStop"]["exec"]["command"]
    assert "--deadline-remaining-seconds 55" in command[-1]


def test_a_serving_pod_lets_its_edits_finish() -> None:
    settings = ServeSettings.model_validate({"limits": {"edit_seconds": 300}})
    groups = groups_of(serving_manifest(KubeConfig(), "editor", "3", (), settings)["spec"]["rayClusterConfig"])
    for name in ("gateway", "serve"):
        assert groups[name]["template"]["spec"]["terminationGracePeriodSeconds"] > settings.grace_seconds > 300
        command = container_of(groups[name])["lifecycle"]["preStop"]["exec"]["command"]
        assert "ServeReplica" in command[-1]


def test_serving_pods_hold_every_replica_there_may_be() -> None:
    settings = ServeSettings.model_validate(
        {
            "conditioner": {"gpus": 0.5, "cpus": 1, "min_replicas": 2, "max_replicas": 3},
            "editor": {"gpus": 1, "cpus": 4, "min_replicas": 1, "max_replicas": 8},
            "gateway": {"cpus": 0.5, "min_replicas": 2, "max_replicas": 5},
        }
    )
    service = serving_manifest(KubeConfig(), "editor", "3", (), settings)
    groups = groups_of(service["spec"]["rayClusterConfig"])
    counts = {name: (group["minReplicas"], group["maxReplicas"]) for name, group in groups.items()}
    # Gateway: four of half a CPU to a pod of 2. Models: two conditioners to a GPU, one editor.
    assert counts == {"gateway": (1, 2), "serve": (2, 10)}
    assert container_of(groups["serve"])["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_replicas_go_to_the_pods_that_are_for_them() -> None:
    settings = ServeSettings.model_validate({"editor": {"place": {"zone": "a"}}})
    service = serving_manifest(KubeConfig(), "editor", "3", (), settings)
    labels = {name: group["labels"] for name, group in groups_of(service["spec"]["rayClusterConfig"]).items()}
    version, _ = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    written = ServeSettings.model_validate(version["args"]["settings"])
    assert written.gateway.place == labels["gateway"]
    assert written.conditioner.place == labels["serve"]
    assert written.editor.place == {"zone": "a"}
    application = gateway_application(single_version_table("3", ()), written)
    assert cast(Any, application)._bound_deployment.ray_actor_options["label_selector"] == labels["gateway"]


@pytest.mark.parametrize(
    ("overrides", "name", "message"),
    [
        ((), "My_Run", "--name My_Run cannot be a name in Kubernetes"),
        ((), "a" * 48, "up to 47"),
        ((), "1st", "a letter first"),
        (("kube.train.workers=3",), "mine", "kube.train.workers is 3, which does not divide workers.count 2"),
        (("checkpoints.store=here",), "mine", "checkpoints.store is here: on a cluster, name a folder"),
    ],
)
def test_what_kubernetes_cannot_take_is_refused(overrides: tuple[str, ...], name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_job(*overrides, name=name)


def test_a_replica_that_fits_no_pod_is_refused() -> None:
    settings = ServeSettings.model_validate({"editor": {"cpus": 9}})
    with pytest.raises(UsageError, match=r"editor.cpus is 9, more than the 4 of a pod; raise kube.serve.cpus"):
        serving_manifest(KubeConfig(), "editor", "3", (), settings)


@pytest.mark.slow
def test_serve_makes_an_editor_of_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The applications are built from the work folder alone, as the pods build them, and edit."""
    workdir = Workdir.open(tmp_path / "work")
    monkeypatch.setenv("INSIGHTEDIT_WORKDIR", str(workdir.root))
    register_champion(workdir, tmp_path)
    # A Ray on one machine has no groups; where replicas go is the other tests'.
    plain = serve_config(*resolved(workdir, "champion"), ServeSettings())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        plain["http_options"] |= {"host": "127.0.0.1", "port": probe.getsockname()[1]}
    config = ServeDeploySchema.model_validate(plain)
    untyped_serve, untyped_client = cast(Any, serve), cast(Any, _get_global_client)
    with connected(cpus=8):
        untyped_serve.start(proxy_location="HeadOnly", http_options=config.http_options.model_dump())
        untyped_client().deploy_apps(config, _blocking=True)
        url = f"http://127.0.0.1:{config.http_options.port}"
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/readyz").status_code != HTTPStatus.OK and time.monotonic() < deadline:
            time.sleep(0.5)
        answer = edit_over_http(url, png(picture()), "remove the red circle", seed=7)
        untyped_serve.shutdown()
    assert (answer.model_version, answer.seed) == ("1", 7)


@pytest.mark.slow
def test_a_run_trains_on_just_the_pods_that_are_asked_for(tmp_path: Path) -> None:
    """Nodes with the CPUs and labels of a RayJob's pods, and its entrypoint beside the head."""
    preset = write_tiny_preset(tmp_path, steps=2)
    config_map, job = training_manifests(load_preset(preset, ["kube.data.cpus=3", "kube.train.workers=2"]), "mine")
    groups = groups_of(job["spec"]["rayClusterSpec"])
    # One pod each: three CPUs, which is what preparing asks for at most, and two workers.
    assert [group["replicas"] for group in groups.values()] == [1, 1]
    cpus = {name: int(container_of(group)["resources"]["limits"]["cpu"]) for name, group in groups.items()}
    (tmp_path / "run.yaml").write_text(config_map["data"]["run.yaml"])
    command = shlex.split(job["spec"]["entrypoint"].replace(CONFIG_FOLDER, str(tmp_path)))
    work = tmp_path / "work"
    with ray_cluster(**cpus) as cluster:
        environment = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}", "INSIGHTEDIT_WORKDIR": str(work)}
        done = subprocess.run(
            command, env=cluster.environment | environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert all(StageResult.read(work / "runs" / "mine" / f"stage-{number}") for number in (1, 2, 3))
