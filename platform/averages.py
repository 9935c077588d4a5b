"""The exponential moving average of the weights that train: what a stage leaves, where its config asks for it.

Each rank keeps its share of every average: with ZeRO-3 what its own partition holds, else a slice as long. So a step
costs no messages, and all ranks together keep one average.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from insightedit.platform.engine import parameter_shape, trained_parameters
from insightedit.platform.loop import Layout


class Averages:
    """One rank's shares, flat and in float32."""

    def __init__(self, model: nn.Module, decay: float, layout: Layout) -> None:
        """Begin with the weights as they are.

        Args:
            model: its parameters are where DeepSpeed has put them.
            decay: what an average keeps of itself in a step, in the long run.
            layout: of the ranks.
        """
        self._model = model
        self._decay = decay
        self._layout = layout
        self._updates = 0
        self._shares = {name: self._of(x).clone() for name, x in trained_parameters(model).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as a good step has left them.

        What an average keeps of itself rises from 2/11 to the decay, so that the start is soon forgotten.
        """
        self._updates += 1
        keep = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for name, parameter in trained_parameters(self._model).items():
            self._shares[name].lerp_(self._of(parameter), 1 - keep)

    def state(self) -> dict[str, Any]:
        """A copy on the CPU for a checkpoint, whose file is `averages_name`."""
        return {
            "updates": self._updates,
            "shares": {name: share.to("cpu", copy=True) for name, share in self._shares.items()},
        }

    def load(self, folder: Path) -> None:
        """Go on from a verified checkpoint, of any number of ranks."""
        paths = sorted(folder.glob(averages_name("*")), key=lambda path: int(path.stem.rpartition("-")[2]))
        states = [torch.load(path, weights_only=True, mmap=True) for path in paths]
        self._updates = states[0]["updates"]
        for name, share in self._shares.items():
            # The shares of all ranks, one after the other, are the whole.
            whole = torch.cat([state["shares"][name] for state in states])
            start = self._layout.rank * self._length(trained_parameters(self._model)[name])
            share.copy_(whole[start : start + len(share)])

    def gathered(self) -> dict[str, Tensor]:
        """Whole averages, on the CPU of rank 0; empty elsewhere. Every rank must call this."""
        weights: dict[str, Tensor] = {}
        for name, parameter in trained_parameters(self._model).items():
            shape = parameter_shape(parameter)
            share = self._shares[name].to(self._layout.device)
            sent = torch.nn.functional.pad(share, (0, self._length(parameter) - len(share)))
            parts = [torch.empty_like(sent) for _ in range(self._layout.world)] if self._layout.rank == 0 else None
            dist.gather(sent, parts)
            if parts is not None:
                weights[name] = torch.cat(parts)[: math.prod(shape)].reshape(shape).cpu()
        return weights

    @contextmanager
    def shown(self) -> Generator[None]:
        """Let rank 0's model have the averages for weights. Every rank must call this; not for ZeRO-3."""
        averages = self.gathered()
        parameters = {name: x for name, x in trained_parameters(self._model).items() if name in averages}
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _fill(parameters, averages)
        try:
            yield
        finally:
            _fill(parameters, own)

    def _length(self, parameter: nn.Parameter) -> int:
        """Values of a whole share; those of the last ranks may be shorter."""
        return math.ceil(math.prod(parameter_shape(parameter)) / self._layout.world)

    def _of(self, parameter: nn.Parameter) -> Tensor:
        """This rank's share of a parameter, flat."""
        count, length = math.prod(parameter_shape(parameter)), self._length(parameter)
        start = min(self._layout.rank * length, count)
        if hasattr(parameter, "ds_id"):
            # ZeRO-3 pads its partitions to one length.
            return cast(Tensor, cast(Any, parameter).ds_tensor)[: min(length, count - start)]
        return parameter.detach().reshape(-1)[start : start + length]


def averages_name(rank: int | str) -> str:
    """A rank's file in a checkpoint."""
    return f"averages-{rank}.pt"


@torch.no_grad()
def _fill(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
