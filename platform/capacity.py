"""Whether a cluster has room for a run: what the run asks for, and what the nodes have.

A run that does not fit would wait for ever. Only what can never fit is refused: each kind of process is counted on the
nodes alone that it may run on, and all of them together in CPUs and GPUs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray import _raylet
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get  # pyright: ignore[reportPrivateUsage]

from insightedit.platform.config import RunConfig
from insightedit.platform.errors import UsageError
from insightedit.platform.ingest import TASK_CPUS

NODES_SECONDS = 60.0
"""A cluster that has just been started gets its nodes one after the other."""
_POLL_SECONDS = 1.0


class NoRoomError(UsageError):
    """The cluster, with the nodes it has, is too small for the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """Nodes of one kind."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Processes of one kind that must run at the same time."""

    what: str
    """The config's field that asks for them."""
    count: int
    cpus: float
    gpus: float
    place: Mapping[str, str]

    def fitting(self, nodes: Sequence[Nodes]) -> int:
        """How many of them the nodes have room for, if nothing else runs there."""
        return sum(kind.count * self._on_one(kind.resources) for kind in nodes if self.may_run_on(kind))

    def may_run_on(self, kind: Nodes) -> bool:
        """Whether nodes have the labels."""
        match = cast(Any, _raylet).node_labels_match_selector
        return not self.place or bool(match(dict(kind.labels), dict(self.place)))

    def _on_one(self, resources: Mapping[str, float]) -> int:
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        rooms = [math.floor(resources.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items() if amount]
        return min(rooms, default=self.count)

    def __str__(self) -> str:
        """What is asked for, for people."""
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        labels = ", ".join(f"{name}={value}" for name, value in self.place.items())
        where = f" on nodes with {labels}" if labels else ""
        return f"{self.what} asks for {self.count} x {self.cpus:g} CPUs{gpus}{where}"


def needs_of(config: RunConfig) -> list[list[Need]]:
    """What a run needs: while it prepares data, and while it trains."""
    data, workers = config.data, config.workers
    training = Need(
        what="workers.count", count=workers.sizes[0], cpus=workers.cpus, gpus=workers.gpus, place=workers.place
    )
    streaming = Need(what="workers.data_cpus", count=1, cpus=workers.data_cpus, gpus=0, place=data.place)
    ahead = data.encode == "ahead"
    encoding = Need(
        what="data.encoder_workers",
        count=data.encoder_workers,
        cpus=TASK_CPUS if ahead else workers.data_cpus,
        gpus=data.encoder_gpus,
        place=data.place,
    )
    reading = Need(what="data.read_tasks", count=1, cpus=TASK_CPUS, gpus=0, place=data.place)
    return [[reading, encoding], [training, streaming]] if ahead else [[reading], [training, streaming, encoding]]


def check_room(phases: Sequence[Sequence[Need]], nodes: Sequence[Nodes]) -> None:
    """Check that a job can fit.

    Args:
        phases: what it needs at the same time, for each of its phases.
        nodes: of the cluster.

    Raises:
        NoRoomError: it never will; the sentence says what there is.
    """
    for phase in phases:
        _check_each(phase, nodes)
        _check_all(phase, nodes)


def _check_each(phase: Sequence[Need], nodes: Sequence[Nodes]) -> None:
    for need in phase:
        if (fits := need.fitting(nodes)) < need.count:
            raise NoRoomError(f"The cluster has no room: {need}, and {fits} fit; lower that, or add nodes.")


def _check_all(phase: Sequence[Need], nodes: Sequence[Nodes]) -> None:
    usable = [kind for kind in nodes if any(need.may_run_on(kind) for need in phase)]
    wanted = {
        "CPUs": sum(need.count * need.cpus for need in phase),
        "GPUs": sum(need.count * need.gpus for need in phase),
    }
    for name, amount in wanted.items():
        there = sum(kind.count * kind.resources.get(name[:-1], 0.0) for kind in usable)
        if amount > there + 1e-6:
            raise NoRoomError(
                f"The cluster has no room: {'; '.join(map(str, phase))}; together {amount:g} {name}, and the nodes have"
                f" {there:g}; lower that, or add nodes."
            )


def wait_for_room(phases: Sequence[Sequence[Need]], seconds: float = NODES_SECONDS) -> None:
    """Check that a job can fit into the cluster that this process is connected to.

    Args:
        phases: what it needs at the same time, for each of its phases.
        seconds: how long nodes that are not there yet are waited for, as they come one after the other. A Ray that this
            process has started itself has all it will ever have.

    Raises:
        NoRoomError: it does not fit, and no autoscaler may add nodes.
    """
    deadline = time.monotonic() + (0 if _is_own() else seconds)
    while (nodes := nodes_here()) is not None:
        try:
            check_room(phases, nodes)
        except NoRoomError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
        else:
            return


def nodes_alive() -> list[Nodes]:
    """The nodes of the cluster that this process is connected to."""
    return [Nodes(resources=node["Resources"], labels=node["Labels"]) for node in ray.nodes() if node["Alive"]]


def nodes_here() -> list[Nodes] | None:
    """The nodes of the cluster that this process is connected to; None where an autoscaler may add others."""
    # Ray's autoscalers tell nobody what they may add: not which nodes, nor how many at most.
    status = None if _is_own() else _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status or "{}").get("autoscaler_report") or {}
    if not _is_own() and not is_fixed(report.get("node_type_mapping")):
        return None
    return nodes_alive()


def is_fixed(types: Mapping[str, str] | None) -> bool:
    """Whether a cluster's autoscaler adds nothing: Ray's read-only one takes every node for a type of its own.

    Args:
        types: the type of each node, by its id, as the autoscaler reports them; None where none reports.
    """
    return bool(types) and all(kind == f"node_{node}" for node, kind in types.items())


def _is_own() -> bool:
    """Whether this process has started the Ray that it uses."""
    node: Any = cast(Any, ray)._private.worker._global_node
    return node is not None and node.head
