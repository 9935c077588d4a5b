"""Steps that must not change the weights: losses or gradients that are not finite, or that leap.

A step is judged after its gradients are there and before the optimiser uses them. Every rank judges the same figures of
the whole batch with the same history, so all come to the same verdict. The history is part of a checkpoint: a run that
was interrupted judges as one that was not.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from insightedit.platform.config import StageConfig
from insightedit.platform.errors import InsightEditError
from insightedit.platform.shards import ShardManifest
from insightedit.platform.streams import StageStream

_WINDOW = 100
"""Good steps that a leap is measured against."""
_LEAST = 8
"""Good steps without which nothing is a leap."""

log = logging.getLogger(__name__)


class BadStepError(InsightEditError):
    """Training stopped at a bad step; it would come to the same step again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadStep:
    """A step that was left out."""

    step: int
    """From 0."""
    reason: str
    """In words, such as `L_diff1 is nan`."""
    losses: Mapping[str, float]
    """Of the whole batch, by name."""
    norm: float
    """Of the gradients of the whole batch."""
    in_a_row: int
    """Bad steps up to this one, without a good one between them."""


class StepGuard:
    """Judges a stage's steps."""

    def __init__(self, config: StageConfig) -> None:
        self._config = config
        self._norms = deque[float](maxlen=_WINDOW)
        self._totals = deque[float](maxlen=_WINDOW)
        self._in_a_row = 0
        self._step = 0
        self._losses: Mapping[str, float] = {}
        self.norm = 0.0
        """Of the gradients of the step that was judged last."""
        self.bad: BadStep | None = None
        """What was wrong with it, if something was."""

    def expect(self, step: int, losses: Mapping[str, float]) -> None:
        """Say which step will be judged, and the losses of its whole batch."""
        self._step, self._losses = step, losses

    def admits(self, norm: float) -> bool:
        """Whether the step may change the weights, by the norm of its batch's gradients."""
        self.norm, self.bad = norm, None
        total = sum(self._config.losses[name] * value for name, value in self._losses.items())
        reason = self._not_finite() or self._leap("the loss", total, self._totals)
        reason = reason or self._leap("the gradients' norm", norm, self._norms)
        if not reason:
            self._in_a_row = 0
            self._norms.append(norm)
            self._totals.append(total)
            return True
        self._in_a_row += 1
        self.bad = BadStep(step=self._step, reason=reason, losses=self._losses, norm=norm, in_a_row=self._in_a_row)
        return False

    def state(self) -> dict[str, Any]:
        """The history, as JSON has it."""
        return {"norms": list(self._norms), "totals": list(self._totals), "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` described."""
        self._norms = deque(state["norms"], maxlen=_WINDOW)
        self._totals = deque(state["totals"], maxlen=_WINDOW)
        self._in_a_row = state["in_a_row"]

    def _not_finite(self) -> str:
        for name, value in self._losses.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        return "" if math.isfinite(self.norm) else "the gradients' norm is not finite"

    def _leap(self, name: str, value: float, history: Sequence[float]) -> str:
        if self._config.spike is None or len(history) < _LEAST:
            return ""
        usual = median(history)
        if value <= self._config.spike * usual:
            return ""
        return f"{name} is {value:.4g}, more than {self._config.spike:g} times the usual {usual:.4g}"


def check_bad_step(bad: BadStep, config: StageConfig, stage: int, listed: Path) -> None:
    """Decide whether training goes on after a step was left out.

    Args:
        bad: the step.
        config: of the stage.
        stage: its number.
        listed: the file that lists the samples of the step's batch.

    Raises:
        BadStepError: training stops.
    """
    place = f"stages.{stage}"
    if config.bad_steps == "stop":
        raise BadStepError(
            f"Training diverged at step {bad.step} of stage {stage}, where {bad.reason}; the samples of its batch are"
            f" in {listed}: lower {place}.learning_rate, or set {place}.bad_steps to skip to go on without them."
        )
    if bad.in_a_row >= config.max_bad_steps:
        raise BadStepError(
            f"Training diverged: step {bad.step} of stage {stage}, where {bad.reason}, was bad as were all of the last"
            f" {bad.in_a_row}; the samples are in {listed}: lower {place}.learning_rate or raise {place}.max_bad_steps."
        )
    log.warning("Step %s of stage %s was left out: %s; its samples are in %s.", bad.step, stage, bad.reason, listed)


def bad_step_entry(bad: BadStep, stage: int, stream: StageStream) -> dict[str, Any]:
    """What is kept of a bad step: figures, and dataset, shard, row and key of each sample of the batch."""
    return {
        "stage": stage,
        "step": bad.step,
        "reason": bad.reason,
        "losses": {name: _number(value) for name, value in bad.losses.items()},
        "gradient_norm": _number(bad.norm),
        "samples": samples_of(stream, bad.step),
    }


def samples_of(stream: StageStream, step: int) -> list[dict[str, Any]]:
    """Where each sample of a step's whole batch comes from."""
    positions = np.arange(step * stream.global_batch, (step + 1) * stream.global_batch, dtype=np.int64)
    mixture, shards = stream.mixture()
    rows, names = mixture.rows(positions), mixture.names
    files = {name: ShardManifest.read(store).shards for name, (_, store) in stream.datasets.items()}
    places = list(zip(rows.dataset.tolist(), rows.shard.tolist(), rows.row.tolist(), strict=True))
    return [
        {
            "position": int(position),
            "dataset": names[dataset],
            "shard": files[names[dataset]][shard].file,
            "row": row,
            "key": shards.read(dataset, shard).column("key")[row].as_py(),
        }
        for position, (dataset, shard, row) in zip(positions, places, strict=True)
    ]


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
