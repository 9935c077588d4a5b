"""What a run makes of its machines: model FLOPs, time at checkpoints, and useful time over all time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from insightedit.model.memory import Recomputation


class FlopMeter:
    """Counts what the model computes for a sample, in the first micro-batch that it sees."""

    def __init__(self) -> None:
        self.per_sample = 0.0
        """Floating point operations, forward and backward; 0 until they are counted. What checkpointing computes a
        second time is none of the model's."""

    @contextmanager
    def first(self, samples: int) -> Generator[None]:
        """Count inside, once."""
        if self.per_sample:
            yield
            return
        counter = FlopCounterMode(
            display=False, custom_mapping={op: _once(count) for op, count in flop_registry.items()}
        )
        # What is compiled cannot be counted: this micro-batch runs as it is written.
        with torch.compiler.set_stance("force_eager"), counter:
            yield
        self.per_sample = counter.get_total_flops() / samples


def _once(count: Callable[..., int]) -> Callable[..., int]:
    """A rule of the counter that gives nothing for what is computed a second time."""

    def unless_again(*args: Any, **kwargs: Any) -> int:
        return 0 if Recomputation.under_way else count(*args, **kwargs)

    # The counter then passes what the rule wants: tensors, not shapes.
    cast(Any, unless_again)._get_raw = True
    return unless_again


class Efficiency:
    """The figures of a stage's points beside the loop's own."""

    def __init__(self, *, started: float, before: float, flops: FlopMeter | None, peak: float) -> None:
        """Begin a stage, or go on with one.

        Args:
            started: when the run started first, in seconds since the epoch.
            before: useful seconds of the stages before.
            flops: of this rank; None where the peak is not known.
            peak: floating point operations a second that all workers together could do.
        """
        self._started = started
        self._before = before
        self._flops = flops
        self._peak = peak
        self._stalled = 0.0

    def stalled(self, total: float) -> float:
        """The seconds of a growing total that were not asked for before."""
        new, self._stalled = total - self._stalled, total
        return new

    def figures(self, *, samples_per_second: float, seconds: float, stalled: float, useful: float) -> dict[str, float]:
        """Figures of a point of the curves.

        Args:
            samples_per_second: since the point before.
            seconds: of training since then.
            stalled: seconds since then in which training waited for checkpoints.
            useful: seconds of the stage's steps up to here; of one that was done again, the last time alone.
        """
        figures = {
            "checkpoint_stall_seconds": stalled,
            "checkpoint_stall_share": stalled / (seconds + stalled),
            "goodput": (self._before + useful) / (time.time() - self._started),
        }
        if self._flops:
            figures["model_flops_utilisation"] = self._flops.per_sample * samples_per_second / self._peak
        return figures
