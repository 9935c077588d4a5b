"""The online editor on Kubernetes: one model version as a RayService, which KubeRay keeps up.

Another version or other limits are another `serveConfigV2`, and the cluster stays; another image or other pods are
another cluster, which takes over when it answers.
"""

from __future__ import annotations

import math
from typing import Any

from insightedit.platform.config import KubeConfig, PodsConfig
from insightedit.platform.errors import UsageError
from insightedit.platform.kube import Manifest, PodGroup, check_name, cluster_spec, metadata, to_yaml
from insightedit.platform.registry import Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve import applications
from insightedit.serve.applications import GATEWAY_APPLICATION, single_version_table, version_application_name
from insightedit.serve.door import check_keys_are_asked_for
from insightedit.serve.ingress import HAPROXY_ENABLED
from insightedit.serve.settings import Scaling, ServeSettings

PORT = 8000
"""Where KubeRay's service `NAME-serve-svc` looks for Serve's proxies."""

ALL_ADDRESSES = "0.0.0.0"  # noqa: S104
"""Of the pod: that of the service is one of them. Callers must show API keys, as the pods' network is everybody's."""


MOVE_SECONDS = 90
"""What replicas on other pods may take to start, so that those of a pod that goes can stop; a proxy takes half a minute
to go."""


def serving_manifest(
    kube: KubeConfig, name: str, version: str, aliases: tuple[str, ...], settings: ServeSettings
) -> Manifest:
    """What `kubectl apply` makes a server of.

    Args:
        kube: how it stands on Kubernetes.
        name: of the RayService.
        version: of the model, resolved.
        aliases: what people may call it.
        settings: limits and scaling.

    Raises:
        UsageError: Kubernetes cannot take the name, a pod cannot hold what it has to, or no keys are asked for.
    """
    opened = settings.model_copy(update={"host": ALL_ADDRESSES})
    check_keys_are_asked_for(opened)
    config = serve_config(version, aliases, placed(opened))
    if settings.haproxy:
        kube = kube.model_copy(update={"environment": {**kube.environment, HAPROXY_ENABLED: "1"}})
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata(kube, check_name(name), queued=True),
        "spec": {
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": to_yaml([config]),
            "rayClusterConfig": cluster_spec(kube, serving_groups(kube, settings)),
        },
    }


def resolved(workdir: Workdir, reference: str) -> tuple[str, tuple[str, ...]]:
    """A model version and its aliases. A number needs no registry here: the cluster has its own work folder.

    Raises:
        NotFoundError: the work folder's registry has no such alias.
    """
    if reference.isdecimal():
        return reference, ()
    version = Registry(workdir).resolve(reference)
    return version.version, version.aliases


def serve_config(version: str, aliases: tuple[str, ...], settings: ServeSettings) -> dict[str, Any]:
    """The same applications as `serve up` starts, as Serve's own config."""
    plain = settings.model_dump(mode="json")
    table = single_version_table(version, aliases, settings.sleeps).model_dump(mode="json")
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": settings.host,
            "port": PORT,
            "request_timeout_s": settings.limits.edit_seconds + 15,
        },
        "applications": [
            {
                "name": version_application_name(version),
                "route_prefix": None,
                "import_path": f"{applications.__name__}:build_version",
                "args": {"version": version, "settings": plain},
            },
            {
                "name": GATEWAY_APPLICATION,
                "route_prefix": "/",
                "import_path": f"{applications.__name__}:build_gateway",
                "args": {"table": table, "settings": plain},
            },
        ],
    }


def placed(settings: ServeSettings) -> ServeSettings:
    """The settings with each deployment on the pods that are for it, unless they say where it goes."""

    def on(scaling: Scaling, group: str) -> Scaling:
        return scaling.model_copy(update={"place": scaling.place or {"group": group}})

    return settings.model_copy(
        update={
            "gateway": on(settings.gateway, "gateway"),
            "conditioner": on(settings.conditioner, "serve"),
            "editor": on(settings.editor, "serve"),
        }
    )


def serving_groups(kube: KubeConfig, settings: ServeSettings) -> list[PodGroup]:
    """The worker pods that the deployments' replicas need, from the fewest to the most of them.

    Raises:
        UsageError: a replica does not fit into a pod.
    """
    models = {"conditioner": settings.conditioner, "editor": settings.editor}
    gpus = max(math.ceil(scaling.gpus) for scaling in models.values())
    return [
        _group("gateway", kube.gateway, {"gateway": settings.gateway}, 0, settings.grace_seconds),
        _group("serve", kube.serve, models, gpus, settings.grace_seconds),
    ]


def _group(name: str, pods: PodsConfig, deployments: dict[str, Scaling], gpus: int, replica_seconds: float) -> PodGroup:
    """Enough pods even where replicas of two deployments never share one, each with time to let them finish."""
    room = {key: _replicas_in_a_pod(name, key, scaling, pods, gpus) for key, scaling in deployments.items()}
    least = sum(math.ceil(scaling.min_replicas / room[key]) for key, scaling in deployments.items())
    most = sum(math.ceil(scaling.max_replicas / room[key]) for key, scaling in deployments.items())
    return PodGroup(
        name=name,
        place=name,
        cpus=pods.cpus,
        gpus=gpus,
        least=least,
        most=most,
        placement=pods,
        grace_seconds=math.ceil(replica_seconds + MOVE_SECONDS),
    )


def _replicas_in_a_pod(group: str, deployment: str, scaling: Scaling, pods: PodsConfig, gpus: int) -> int:
    """How many replicas of one deployment a pod can hold."""
    rooms = [pods.cpus / scaling.cpus] if scaling.cpus else []
    rooms += [gpus / scaling.gpus] if scaling.gpus else []
    if rooms and min(rooms) < 1:
        raise UsageError(
            f"{deployment}.cpus is {scaling.cpus:g}, more than the {pods.cpus} of a pod; raise kube.{group}.cpus."
        )
    return int(min(rooms, default=scaling.max_replicas))
