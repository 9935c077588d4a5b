"""Groups of workers that shrink and grow with the cluster.

Ray starts a group of as many workers as there is room for, and starts it again with fewer when a node is gone, or with
more when there is room. To this is added that it looks at the cluster of now before it starts a group, and that a
checkpoint is made before a group that trains is ended.
"""

from __future__ import annotations

import math
import time
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from insightedit.platform.surveillance import ask_for_checkpoint, checkpoint_is_made

_ANSWER_SECONDS = 5.0
"""How long a worker may take to say whether it has made a checkpoint; it is asked again."""


class CarefulScaling(ElasticScalingPolicy):
    """Ray's policy, with a fresh view of the cluster and a checkpoint before each change."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(cast(Any, scaling_config))
        self._asked = False
        """Whether the workers have been asked for a checkpoint, to be started again after it."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many workers as there is room for, once that is enough."""
        self._asked = False
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Whether to start a group that trains again, with another number of workers."""
        workers = worker_group_state.workers
        if self._asked:
            if not _is_saved(workers[0]):
                return NoopDecision()
            # The room that was seen may be gone by now.
            self._asked, self._latest_monitor_time = False, -math.inf
            return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            self._asked = True
            for worker in workers:
                worker.execute_async(ask_for_checkpoint)
        return NoopDecision()

    def _get_reserved_resources(self) -> Any:
        # What the coordinator knows by itself is up to 20 seconds old: a node that has died since would be waited for.
        # It takes questions in their order, so the answer that follows is to what it sees now.
        if time.monotonic() - self._latest_reserved_resources_query_time >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            coordinator: Any = self._autoscaling_coordinator
            coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        return super()._get_reserved_resources()


def _is_saved(worker: Any) -> bool:
    """Whether rank 0 has finished the checkpoint that it was asked for."""
    try:
        return cast(bool, ray.get(worker.execute_async(checkpoint_is_made), timeout=_ANSWER_SECONDS))
    except RayError:
        # A worker that died is Ray's to find.
        return False
