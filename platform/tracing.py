"""One training step on tensors that have a shape but no data: how much memory it takes, how much there is to compute.

Everything that a step would do is done, down to autograd and autocast, but for the arithmetic itself. So the result
follows the model and its settings by itself; no formula for a model's activations has to be kept right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from insightedit.model.memory import Recomputation


@dataclass(frozen=True, slots=True)
class Arrival:
    """A parameter's gradient, ready in the backward pass."""

    parameter: str
    """The parameter's name in the model."""
    elements: int
    before: int
    """Bytes that activations, and this gradient, took at most since the arrival before."""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one micro-batch does."""

    arrivals: tuple[Arrival, ...]
    """Gradients in their order; the first one's `before` spans the forward pass too."""
    batch: int
    """Bytes of the micro-batch itself."""
    flops: int
    """Floating point operations of products and convolutions, forward and backward."""
    computed: int
    """With those that gradient checkpointing does a second time."""

    @property
    def activations(self) -> int:
        """Bytes that activations took at most."""
        return max((arrival.before for arrival in self.arrivals), default=0)


def trace_step(losses: nn.Module, batch: Mapping[str, Tensor], terms: int) -> StepTrace:
    """Trace a forward and backward pass.

    Args:
        losses: `StageLosses` around a model on the `meta` device, ready to train; its weights are replaced.
        batch: numbers on the `meta` device, and real tensors of whole numbers that the model may look into.
        terms: the number of losses.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_tensors(losses, lambda tensor: _outlined(tensor, mode))
    inputs = {name: _outlined(x, mode) if x.is_meta else x for name, x in batch.items()}
    ledger = _Ledger(mode, [*losses.parameters(), *losses.buffers(), *inputs.values()])
    handles = [
        parameter.register_post_accumulate_grad_hook(ledger.arrived(name))
        for name, parameter in losses.named_parameters()
        if parameter.requires_grad
    ]
    with ledger:
        losses(inputs, torch.ones(terms))[0].backward()
    for handle in handles:
        handle.remove()
    size = sum(x.numel() * x.element_size() for x in inputs.values())
    return StepTrace(tuple(ledger.arrivals), size, ledger.flops, ledger.computed)


class _Ledger(TorchDispatchMode):
    """Runs operations without data, and keeps count of the bytes that are alive.

    What follows from whole numbers alone is really computed, as models look into lengths and masks.
    """

    def __init__(self, mode: FakeTensorMode, known: Sequence[Tensor]) -> None:
        """Begin with nothing alive but what is known: weights and inputs, which are not counted."""
        super().__init__()
        self.arrivals: list[Arrival] = []
        self.flops = 0
        self.computed = 0
        self._mode = mode
        self._alive = 0
        self._peak = 0
        self._seen: dict[int, Any] = {_key(tensor): tensor.untyped_storage() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        settings = kwargs or {}
        if any(isinstance(item, FakeTensor) for item in pytree.tree_leaves((args, settings))):
            with self._mode:
                output = func(*args, **settings)
        else:
            output = func(*args, **settings)
        # Torch's own counter as a mode would do the same, and keep what gradient checkpointing computes again alive.
        if (formula := _FLOPS.get(func.overloadpacket)) is not None:
            count = formula(*args, **settings, out_val=output)
            self.computed += count
            self.flops += 0 if Recomputation.under_way else count
        for item in pytree.tree_leaves(output):
            if isinstance(item, Tensor):
                self._count(item)
        return output

    def arrived(self, name: str) -> Callable[[Tensor], None]:
        """A hook for when a parameter's gradient is ready: it is noted and dropped, and counted by whoever plans."""

        def hook(parameter: Tensor) -> None:
            parameter.grad = None
            self.arrivals.append(Arrival(name, parameter.numel(), self._peak))
            self._peak = self._alive

        return hook

    def _count(self, tensor: Tensor) -> None:
        """Add a tensor's storage, until nobody holds it."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self._alive -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(tensor.untyped_storage(), freed)
        self._alive += size
        self._peak = max(self._peak, self._alive)


def _key(tensor: Tensor) -> int:
    """What tells a tensor's storage from others that are alive."""
    return cast(Any, tensor.untyped_storage())._cdata


def _outlined(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor on the `meta` device as one that says it is on the CPU, where autocast and kernels are chosen."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _replace_tensors(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors in the place of a module's parameters and buffers; what is shared stays shared."""
    made: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            other = replace(tensor)
            made[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
        return made[id(tensor)]

    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in own:
            delattr(part, name)
            setattr(part, name, once(tensor))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# Torch has formulas for the fused kernels of GPUs only.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
