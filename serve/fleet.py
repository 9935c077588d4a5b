"""Who serves at this moment: replicas, what waits for them, versions, aliases. `serve status` and the page show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict

from insightedit.serve.backend import RolloutStatus, VersionTable

InHand = Mapping[tuple[str, str], int]
"""Calls that gateways have made and not seen answered, by model version and deployment."""


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class DeploymentStatus(_Shown):
    """One deployment's replicas, and the work they have and will have."""

    name: str
    version: str | None
    """The model version; None for the gateway, which serves all of them."""
    running: int
    starting: int
    stopping: int
    wanted: int
    """Replicas that the load asks for now, within the bounds below."""
    min_replicas: int
    max_replicas: int
    ongoing: int
    """Calls in the hands of running replicas."""
    queued: int
    """Calls beyond what the running replicas take at once."""


class VersionStatus(_Shown):
    """One model version that is served."""

    version: str
    aliases: tuple[str, ...]
    default: bool
    state: str
    """Serve's word for its application, as in `RUNNING` or `DEPLOYING`."""


class FleetStatus(_Shown):
    """Everything that serves."""

    versions: tuple[VersionStatus, ...]
    deployments: tuple[DeploymentStatus, ...]
    rollout: RolloutStatus | None = None
    """The last change of version, under way or over; None where there was none since the server's start."""


def fleet_status(details: Mapping[str, Any], table: VersionTable, in_hand: InHand) -> FleetStatus:
    """Put together what Serve and the gateways know.

    Args:
        details: of Serve's applications, as its `ServeInstanceDetails` gives them.
        table: the versions that the gateways offer.
        in_hand: the gateways' own count, of the gateways too, whose version is "".
    """
    applications: Mapping[str, Any] = details["applications"]
    versions = {entry.application: version for version, entry in {**table.others, **table.versions}.items()}
    deployments = [
        _deployment(one, versions.get(name), in_hand)
        for name, application in sorted(applications.items())
        for one in application["deployments"].values()
    ]
    return FleetStatus(
        versions=tuple(
            VersionStatus(
                version=version,
                aliases=entry.aliases,
                default=version == table.default,
                state=_word(applications.get(entry.application, {"status": "NOT_STARTED"})["status"]),
            )
            for version, entry in table.versions.items()
        ),
        deployments=tuple(deployments),
        rollout=table.rollout,
    )


def _deployment(details: Mapping[str, Any], version: str | None, in_hand: InHand) -> DeploymentStatus:
    states = Counter(_word(replica["state"]) for replica in details["replicas"])
    running = states["RUNNING"]
    stopping = states["STOPPING"] + states["PENDING_MIGRATION"]
    config = details["deployment_config"]
    calls = in_hand.get((version or "", details["name"]), 0)
    ongoing = min(calls, running * int(config["max_ongoing_requests"]))
    return DeploymentStatus(
        name=details["name"],
        version=version,
        running=running,
        starting=sum(states.values()) - running - stopping,
        stopping=stopping,
        wanted=details["target_num_replicas"],
        min_replicas=config["autoscaling_config"]["min_replicas"],
        max_replicas=config["autoscaling_config"]["max_replicas"],
        ongoing=ongoing,
        queued=calls - ongoing,
    )


def _word(state: str | Enum) -> str:
    return str(state.value) if isinstance(state, Enum) else state
