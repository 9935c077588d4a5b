"""The training loop: one for every stage and every model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from insightedit.platform.bad_steps import BadStep, StepGuard
from insightedit.platform.config import StageConfig
from insightedit.platform.efficiency import FlopMeter
from insightedit.platform.engine import learning_rate, set_learning_rates, watch_norm
from insightedit.platform.errors import InsightEditError
from insightedit.platform.mixtures import step_positions

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a global batch is spread."""

    rank: int
    world: int
    micro_batch: int
    accumulation: int
    device: torch.device


@dataclass(slots=True)
class Meter:
    """Sums over the steps since the last point of the curves."""

    sums: Tensor
    """(2, T) of w_i l_i and w_i, of all ranks."""
    totals: Tensor
    """(T,) of w_i, of all ranks."""
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    skipped: int = 0
    """Bad steps, which count in nothing else but the time."""
    norms: list[float] = field(default_factory=list[float])

    @classmethod
    def start(cls, losses: int, device: torch.device) -> Meter:
        """An empty meter for a number of losses."""
        return cls(torch.zeros(2, losses, device=device), torch.zeros(losses, device=device))

    @classmethod
    def restore(cls, state: Mapping[str, Any], device: torch.device) -> Meter:
        """The meter that `state` described."""
        sums, totals = (torch.tensor(state[name], device=device) for name in ("sums", "totals"))
        rest = {name: value for name, value in state.items() if name not in ("sums", "totals")}
        return cls(sums, totals, **rest)

    def state(self) -> dict[str, Any]:
        """Everything in it, as JSON has it: every float stays what it is, to the bit."""
        return {**asdict(self), "sums": self.sums.tolist(), "totals": self.totals.tolist()}

    def add(self, sums: Tensor, totals: Tensor, norm: float) -> None:
        """Add a good step."""
        self.sums += sums
        self.totals += totals
        self.norms.append(norm)


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a stage's curves: means over the steps since the one before."""

    step: int
    losses: dict[str, float]
    """Of the global batches, by their names in the seed."""
    figures: dict[str, float]
    """By their names in `train_metrics.FIGURES`, which says what each is."""
    seconds: float
    """Of training alone."""


@dataclass(kw_only=True, slots=True)
class Curve:
    """What is kept of a stage's curves."""

    first: dict[str, float] = field(default_factory=dict[str, float])
    """The first point of each loss."""
    last: dict[str, float] = field(default_factory=dict[str, float])
    """The last point of each loss."""
    samples: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    stalled: float = 0.0

    def add(self, point: Point) -> None:
        """Add a point."""
        self.first = point.losses | self.first
        self.last = self.last | point.losses
        self.seconds += point.seconds
        self.samples += point.figures["samples_per_second"] * point.seconds
        self.waited += point.figures["data_wait_seconds"]
        self.stalled += point.figures["checkpoint_stall_seconds"]

    def figures(self) -> dict[str, float]:
        """Means over the stage."""
        seconds = max(self.seconds, 1e-9)
        return {
            "seconds": self.seconds,
            "samples_per_second": self.samples / seconds,
            "data_wait_share": self.waited / seconds,
            "checkpoint_stall_share": self.stalled / (seconds + self.stalled),
        }


class StageLoop:
    """Runs one stage's steps."""

    def __init__(
        self,
        engine: Any,
        config: StageConfig,
        names: Sequence[str],
        layout: Layout,
        arrays: Iterator[Mapping[str, NDArray[Any]]],
        count: Callable[[Batch], dict[str, Tensor]],
        notice: Callable[[], bool] = lambda: False,
        flops: FlopMeter | None = None,
    ) -> None:
        """Prepare a loop.

        Args:
            engine: DeepSpeed's, around `StageLosses`.
            config: of the stage.
            names: the stage's losses, in the engine's order.
            layout: how the global batch is spread.
            arrays: this rank's micro-batches, with `position`.
            count: the samples' weights (B,) in each loss.
            notice: whether this rank has heard that it will be interrupted.
            flops: what counts the model's FLOPs, if anything does.
        """
        self._engine = engine
        self._config = config
        self._names = list(names)
        self._layout = layout
        self._arrays = arrays
        self._count = count
        self._notice = notice
        self._flops = flops
        self.noticed = False
        """Whether any rank had heard so when the last step began; the same on every rank."""
        self._meter = Meter.start(len(self._names), layout.device)
        self._guard = StepGuard(config)
        watch_norm(engine, self._guard.admits)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the engine's state; the same on every rank, and JSON."""
        return {"meter": self._meter.state(), "guard": self._guard.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` described."""
        self._meter = Meter.restore(state["meter"], self._layout.device)
        self._guard.restore(state["guard"])

    def step(self, step: int) -> BadStep | None:
        """One optimiser step.

        Returns:
            What was wrong with the step, if it was left out; the same on every rank.
        """
        began = time.perf_counter()
        window = self._window(step)
        self._meter.waited += time.perf_counter() - began
        totals = self._totals(window)
        set_learning_rates(self._engine, self._config, step)
        sums = torch.zeros_like(self._meter.sums)
        for batch in window:
            sums += self._pass(batch, totals)
            if batch is window[-1]:
                # The engine's step asks the guard, which must know by then what the losses are.
                self._reduce(sums)
                self._guard.expect(step, self._losses(sums, totals))
            self._engine.step()
        bad = self._guard.bad
        if bad is None:
            self._meter.add(sums, totals, self._guard.norm)
        else:
            self._meter.skipped += 1
        self._meter.steps += 1
        self._meter.seconds += time.perf_counter() - began
        return bad

    def point(self, step: int) -> Point:
        """The means since the last point, but for bad steps."""
        meter, self._meter = self._meter, Meter.start(len(self._names), self._layout.device)
        if not torch.allclose(meter.sums[1], meter.totals):
            raise InsightEditError("The model weighs samples otherwise than its task's loss_weights; make them agree.")
        losses = self._losses(meter.sums, meter.totals)
        figures = {
            **({"gradient_norm": sum(meter.norms) / len(meter.norms)} if meter.norms else {}),
            "learning_rate": learning_rate(self._config, step - 1),
            "skipped_steps": float(meter.skipped),
            "samples_per_second": meter.steps * self._config.global_batch / meter.seconds,
            "data_wait_seconds": meter.waited,
            "data_wait_share": meter.waited / meter.seconds,
        }
        return Point(step, losses, figures, meter.seconds)

    def _window(self, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        layout = self._layout
        expected = step_positions(
            step, global_batch=self._config.global_batch, world=layout.world, rank=layout.rank
        ).reshape(layout.accumulation, layout.micro_batch)
        window: list[Batch] = []
        for positions in expected:
            arrays = dict(next(self._arrays, {"position": positions[:0]}))
            if not np.array_equal(arrays.pop("position"), positions):
                raise InsightEditError(f"The data stream is not where step {step} is; start the run again.")
            window.append({name: _tensor(array, layout.device) for name, array in arrays.items()})
        return window

    def _pass(self, batch: Batch, totals: Tensor) -> Tensor:
        """Forward and backward of a micro-batch; (2, T), see `StageLosses.forward`."""
        with self._flops.first(self._layout.micro_batch) if self._flops else nullcontext():
            loss, sums = self._engine(batch, totals)
            self._engine.backward(loss)
        return sums

    def _totals(self, window: Sequence[Batch]) -> Tensor:
        """(T,) the samples' weights summed over the global batch; notices travel with them."""
        counts = [self._count(batch) for batch in window]
        totals = torch.stack([torch.cat([count[name].float() for count in counts]).sum() for name in self._names])
        told = self._reduce(torch.cat([totals, totals.new_tensor([float(self._notice())])]))
        self.noticed = bool(told[-1])
        return told[:-1]

    def _losses(self, sums: Tensor, totals: Tensor) -> dict[str, float]:
        """Mean losses by name; one that no sample had is left out."""
        rows = zip(self._names, sums[0].tolist(), totals.tolist(), strict=True)
        return {name: value / total for name, value, total in rows if total}

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self._layout.world > 1:
            dist.all_reduce(tensor)
        return tensor


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device; features are kept in half precision and used in single."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.to(device, torch.float32 if tensor.dtype == torch.float16 else None)
