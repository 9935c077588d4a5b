"""Layers for inference on a CPU, whose weights are put in order once.

oneDNN multiplies blocks of weights. torch's own layers keep them in rows, and have them put into blocks at every call:
where an image has few positions, as in the depth of a UNet, that takes longer than the product. torch.compile keeps
them in blocks; its operators do that here too, without a compiler.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

_ops: Any = torch.ops.mkldnn
_reorder_conv: Any = torch.ops.aten.mkldnn_reorder_conv2d_weight
_NO_ACTIVATION: tuple[Any, ...] = ("none", [], "")


class PackedLinear(nn.Module):
    """A linear layer with weights in blocks."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put the weights in order.

        Args:
            weight: (out, in).
            bias: (out,).
        """
        super().__init__()
        self.out_features = len(weight)
        self._weight: Tensor = _ops._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        # Under autocast, layers that are not packed may give another type than the weights'.
        return _ops._linear_pointwise(x.to(self._weight.dtype), self._weight, self._bias, *_NO_ACTIVATION)


class PackedConv2d(nn.Module):
    """A convolution with weights in blocks."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Put the weights in order.

        Args:
            conv: with padding in numbers, and zeros.
        """
        super().__init__()
        self._how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._weight: Tensor = _reorder_conv(conv.weight.detach().to_mkldnn(), *self._how)
        self._bias = None if conv.bias is None else conv.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) to (B, out, h', w')."""
        x = x.to(self._weight.dtype)
        return _ops._convolution_pointwise(x, self._weight, self._bias, *self._how, *_NO_ACTIVATION)


def packed(module: Module) -> Module:
    """A module that computes the same with weights in blocks, up to rounding; without gradients.

    What is not packed is shared with the module that is given, which stays as it is. On other devices than a CPU, and
    where torch has no oneDNN, nothing is packed.
    """
    return cast(Module, _packed(module, "")) if torch.backends.mkldnn.is_available() else module


def _packed(module: nn.Module, name: str) -> nn.Module:
    if isinstance(module, nn.Linear) and _suits(module.weight):
        return PackedLinear(module.weight, module.bias)
    if isinstance(module, nn.Conv2d) and _suits(module.weight):
        if module.kernel_size != (1, 1):
            return PackedConv2d(module) if _is_plain(module) else module
        # A transformer's are products over positions. Others have no order of weights that suits every size.
        return PackedLinear(module.weight.flatten(1), module.bias) if name.startswith("proj_") else module
    shared = copy.copy(module)
    children = {key: _packed(child, key) for key, child in module.named_children()}
    shared.__dict__["_modules"] = {**module.__dict__["_modules"], **children}
    return shared


def _suits(weight: Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _ops._is_mkldnn_bf16_supported())


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
