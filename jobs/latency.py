"""How long an edit takes, for a gate: pipelines in turn on one machine, so that a busy moment meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from insightedit.jobs.evaluate import PipelineActor
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig
from insightedit.platform.errors import InsightEditError
from insightedit.platform.evaluation import EditCase, evaluation_cases

ROUNDS = 3
"""How often each pipeline is loaded: only one at a time has to fit."""
EDITS = 3
"""Timed edits of a round, after one that is not timed."""


def measure_latency(
    folders: Sequence[Path], config: RunConfig, *, edits: int = EDITS, rounds: int = ROUNDS
) -> list[float]:
    """Measure single edits, one after the other, on a worker of the Ray that there is or on a local one.

    Args:
        folders: the pipelines; one at a time is in memory.
        config: its `evaluation` says on which pictures.
        edits: timed ones of each pipeline in each round.
        rounds: how often each pipeline is loaded.

    Returns:
        The median seconds of an edit, for each folder.

    Raises:
        InsightEditError: a pipeline cannot edit.
    """
    workers = config.workers
    cases = evaluation_cases(config.evaluation, edits + 1)[: edits + 1]
    seconds: list[list[float]] = [[] for _ in folders]
    with connected():
        make: Any = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(PipelineActor)
        actor = make.remote(workers.threads)
        try:
            for _ in range(rounds):
                for folder, own in zip(folders, seconds, strict=True):
                    own.extend([_seconds(actor, folder, case) for case in cases][1:])
        finally:
            ray.kill(actor)
    return [statistics.median(own) for own in seconds]


def _seconds(actor: Any, folder: Path, case: EditCase) -> float:
    began = time.perf_counter()
    try:
        ray.get(actor.edit.remote(str(folder), [case.instruction], [case.source], [case.seed]))
    except RayTaskError as error:
        raise InsightEditError(f"An edit of {folder} failed: {str(error.cause).rstrip('.')}.") from error
    return time.perf_counter() - began
