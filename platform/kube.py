"""Kubernetes: a run as a RayJob, which KubeRay turns into a Ray cluster of its own, trains on, and takes down again.

The head has no work beside the run's driver; data tasks, encoders and training workers each have a group of pods. All
of them see one work folder. When the head dies, KubeRay starts the same run under the same name in a new cluster, and
it goes on from its newest checkpoint.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from insightedit.platform.config import KubeConfig, PlacementConfig, RunConfig, dump_config
from insightedit.platform.errors import UsageError
from insightedit.platform.ingest import TASK_CPUS
from insightedit.platform.submission import check_paths
from insightedit.platform.workdir import ENVIRONMENT_VARIABLE

Manifest = dict[str, Any]

WORK_FOLDER = "/mnt/insightedit"
"""Where every pod finds the work folder."""
CONFIG_FOLDER = "/etc/insightedit"
"""Where the head finds the run's config."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
"""KubeRay appends to the names of its objects, so they are shorter than Kubernetes' 63 characters."""
_GPU = "nvidia.com/gpu"
_USER, _USERS = 1000, 100
"""The user `ray` and its group in the images of rayproject/ray."""
_IDLE_SECONDS = 300
"""After which Ray gives a pod back where it scales by itself."""
_FINISHED_SECONDS = 600
"""For which a finished run's pods stay, to be looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PodGroup:
    """Some equal worker pods."""

    name: str
    place: str
    """What Ray's nodes on them are labelled with, as `group`: `data.place` and `workers.place` choose by it."""
    cpus: float
    """Of each pod, for Ray and for Kubernetes."""
    gpus: int = 0
    least: int
    most: int
    placement: PlacementConfig
    grace_seconds: int | None = None
    """With it, Ray is told when a pod is about to be deleted, so long before its end."""


def training_manifests(config: RunConfig, name: str) -> list[Manifest]:
    """What `kubectl apply` makes a run of.

    Args:
        config: of the run; its sources must exist in the image, in the work folder or on the hub.
        name: of the run, of the RayJob and of the ConfigMap beside it.

    Raises:
        UsageError: Kubernetes cannot take the name, the config names a path that is not absolute, or the pods do not
            come out even.
    """
    command = ["insightedit", "train", f"{CONFIG_FOLDER}/run.yaml", "--name", check_name(name)]
    check_paths(config)
    kube = config.kube
    spec: Manifest = {
        "entrypoint": shlex.join(command),
        "backoffLimit": kube.retries,
        "shutdownAfterJobFinishes": True,  # Kueue asks for it.
        "ttlSecondsAfterFinished": _FINISHED_SECONDS,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": _submitter(kube),
        "rayClusterSpec": cluster_spec(kube, training_groups(config), config_map=name),
    }
    if kube.queue is not None:
        spec["suspend"] = True  # Kueue takes this back when it admits the run.
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(kube, name),
            "data": {"run.yaml": dump_config(placed(config))},
        },
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata(kube, name, queued=True), "spec": spec},
    ]


def placed(config: RunConfig) -> RunConfig:
    """The config with its data tasks and its workers on the pods that are for them, unless it says where they go."""
    data = config.data.model_copy(update={"place": config.data.place or {"group": "data"}})
    workers = config.workers.model_copy(update={"place": config.workers.place or {"group": "train"}})
    return config.model_copy(update={"data": data, "workers": workers})


def training_groups(config: RunConfig) -> list[PodGroup]:
    """The worker pods that a run needs.

    Raises:
        UsageError: the last pod that trains would have fewer workers than the others.
    """
    return [_data_group(config), *_encoder_group(config), _train_group(config)]


def _data_group(config: RunConfig) -> PodGroup:
    """Pods for the tasks that read, check, write and collate."""
    data, workers, kube = config.data, config.workers, config.kube
    encoders = 0 if data.encoder_gpus else data.encoder_workers
    while_training = data.encode == "while_training"
    # Preparing reads and writes at the same time; shards that are made are trained on afterwards.
    preparing = (2 * data.read_tasks + (0 if while_training else encoders)) * TASK_CPUS
    training = (workers.data_tasks + (encoders if while_training else 0)) * workers.data_cpus
    count = math.ceil(max(preparing, training) / kube.data.cpus)
    return PodGroup(name="data", place="data", cpus=kube.data.cpus, least=count, most=count, placement=kube.data)


def _encoder_group(config: RunConfig) -> Iterator[PodGroup]:
    """Pods for frozen encoders on GPUs, if the config wants any."""
    data = config.data
    if not data.encoder_gpus:
        return
    together = max(int(1 / data.encoder_gpus), 1)
    count = math.ceil(data.encoder_workers / together)
    gpus = _whole_gpus(together, data.encoder_gpus)
    cpus = math.ceil(together * max(TASK_CPUS, config.workers.data_cpus))
    yield PodGroup(
        name="encode", place="data", cpus=cpus, gpus=gpus, least=count, most=count, placement=config.kube.encode
    )


def _whole_gpus(processes: int, gpus: float) -> int:
    """GPUs of a pod in which some processes take so many, or such a part of one, each; none takes parts of two."""
    if gpus == 0 or gpus >= 1:
        return processes * math.ceil(gpus)
    return math.ceil(processes / int(1 / gpus))


def _train_group(config: RunConfig) -> PodGroup:
    """Pods for the workers that train."""
    workers, pods = config.workers, config.kube.train
    least, most = workers.sizes[0], workers.sizes[-1]
    if least % pods.workers or most % pods.workers:
        raise UsageError(
            f"kube.train.workers is {pods.workers}, which does not divide workers.count {workers.shown}; choose one"
            " that does."
        )
    return PodGroup(
        name="train",
        place="train",
        cpus=pods.workers * workers.cpus,
        gpus=_whole_gpus(pods.workers, workers.gpus),
        least=least // pods.workers,
        most=most // pods.workers,
        placement=pods,
        grace_seconds=pods.grace_seconds,
    )


def check_name(name: str) -> str:
    """The name, if KubeRay takes it.

    Raises:
        UsageError: it does not.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name} cannot be a name in Kubernetes; use up to 47 small letters, digits and dashes, a letter"
            " first."
        )
    return name


def metadata(kube: KubeConfig, name: str, *, queued: bool = False) -> Manifest:
    """An object's name, where it lives, and the queue it waits in."""
    labels = {"app.kubernetes.io/name": "insightedit", "app.kubernetes.io/instance": name}
    if queued and kube.queue is not None:
        labels[QUEUE_LABEL] = kube.queue
    return {"name": name, **({"namespace": kube.namespace} if kube.namespace else {}), "labels": labels}


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """The manifests as one file for `kubectl apply -f`."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Texts of many lines as blocks, and no references to what was said before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


# -- a Ray cluster in pods ------------------------------------------------------------------------------------------


def cluster_spec(kube: KubeConfig, groups: Sequence[PodGroup], *, config_map: str | None = None) -> Manifest:
    """KubeRay's description of a cluster with a token.

    Args:
        kube: how it stands on Kubernetes.
        groups: its worker pods.
        config_map: what the head finds in `CONFIG_FOLDER`.
    """
    auth = {"mode": "token", **({"secretName": kube.token_secret} if kube.token_secret else {})}
    return {
        "rayVersion": version("ray"),
        "authOptions": auth,
        # Kueue admits a number of pods, once; without it Ray asks for pods as it needs them.
        "enableInTreeAutoscaling": kube.queue is None,
        **({} if kube.queue else {"autoscalerOptions": _autoscaler()}),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},  # No task is put beside Ray's own services.
            "template": _head(kube, config_map),
        },
        "workerGroupSpecs": [_worker_group(kube, group) for group in groups],
    }


def _autoscaler() -> Manifest:
    return {"version": "v2", "idleTimeoutSeconds": _IDLE_SECONDS, "securityContext": _container_security()}


def _head(kube: KubeConfig, config_map: str | None) -> Manifest:
    template = _pod(kube, "ray-head", _resources(kube.head.cpus, kube.head.memory_gib), kube.head)
    if config_map is not None:
        spec = template["spec"]
        spec["volumes"].append({"name": "config", "configMap": {"name": config_map}})
        mount = {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}
        spec["containers"][0]["volumeMounts"].append(mount)
    return template


def _worker_group(kube: KubeConfig, group: PodGroup) -> Manifest:
    resources = _resources(group.cpus, group.placement.memory_gib, group.gpus)
    template = _pod(kube, "ray-worker", resources, group.placement)
    spec = template["spec"]
    spec["automountServiceAccountToken"] = False
    if group.grace_seconds is not None:
        spec["terminationGracePeriodSeconds"] = group.grace_seconds
        spec["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": _notice(group.grace_seconds)}}}
    return {
        "groupName": group.name,
        "labels": {"group": group.place},
        # To begin with: Ray asks for more where it scales by itself.
        "replicas": group.most if kube.queue else group.least,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        "rayStartParams": {},  # KubeRay tells Ray the CPUs and GPUs of the pod's limits.
        "template": template,
    }


# The brackets keep the pattern from matching the shell that it stands in.
_BUSY = "[r]ay::(RayTrainWorker|ServeReplica|ProxyActor)"


def _notice(seconds: int) -> list[str]:
    """What a pod does before it is deleted: it tells Ray, and stays for as long as it is training or serving."""
    drain = (
        "timeout 20 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod is being deleted'"
        f" --deadline-remaining-seconds {seconds}"
    )
    return ["/bin/bash", "-c", f"{drain} && while pgrep -f '{_BUSY}' >/dev/null; do sleep 1; done"]


def _pod(kube: KubeConfig, container: str, resources: Manifest, placement: PlacementConfig) -> Manifest:
    """A pod with the work folder, a disk for temporary files, and a user that is not root."""
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "insightedit"}},
        "spec": {
            **_identity(kube),
            "securityContext": _pod_security(),
            **({"nodeSelector": placement.node_selector} if placement.node_selector else {}),
            **({"tolerations": _tolerations(placement)} if placement.tolerations else {}),
            "volumes": [
                {"name": "work", "persistentVolumeClaim": {"claimName": kube.work_claim}},
                {"name": "scratch", "emptyDir": {"sizeLimit": _gib(kube.scratch_gib)}},
            ],
            "containers": [
                {
                    "name": container,
                    "image": kube.image,
                    "env": _environment(kube),
                    **({"envFrom": [{"secretRef": {"name": name}} for name in kube.secrets]} if kube.secrets else {}),
                    "resources": resources,
                    "securityContext": _container_security(),
                    "volumeMounts": [
                        {"name": "work", "mountPath": WORK_FOLDER},
                        {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108 - in a pod of its own
                    ],
                }
            ],
        },
    }


def _submitter(kube: KubeConfig) -> Manifest:
    """The pod that hands the run to the cluster and shows its log."""
    container = {
        "name": "ray-job-submitter",
        "image": kube.image,
        "resources": _resources(0.5, 1),
        "securityContext": _container_security(),
    }
    spec = {**_identity(kube), "securityContext": _pod_security(), "restartPolicy": "Never", "containers": [container]}
    return {"spec": spec}


def _identity(kube: KubeConfig) -> Manifest:
    return {
        **({"serviceAccountName": kube.service_account} if kube.service_account else {}),
        **(
            {"imagePullSecrets": [{"name": name} for name in kube.image_pull_secrets]}
            if kube.image_pull_secrets
            else {}
        ),
    }


def _environment(kube: KubeConfig) -> list[Manifest]:
    variables: Mapping[str, str] = {ENVIRONMENT_VARIABLE: WORK_FOLDER, **kube.environment}
    return [{"name": name, "value": value} for name, value in variables.items()]


def _tolerations(placement: PlacementConfig) -> list[Manifest]:
    return [
        {
            "key": one.key,
            **({"operator": "Exists"} if one.value is None else {"operator": "Equal", "value": one.value}),
            "effect": one.effect,
        }
        for one in placement.tolerations
    ]


def _pod_security() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USERS,
        "fsGroup": _USERS,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _resources(cpus: float, memory_gib: float, gpus: int = 0) -> Manifest:
    """The same as request and limit: a pod is never ended because its neighbours grow."""
    amounts = {"cpu": f"{cpus:g}", "memory": _gib(memory_gib), **({_GPU: str(gpus)} if gpus else {})}
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _gib(amount: float) -> str:
    """An amount of memory or disk as Kubernetes writes it."""
    return f"{math.ceil(amount * 1024)}Mi" if amount % 1 else f"{int(amount)}Gi"
