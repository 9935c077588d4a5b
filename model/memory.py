"""What spares memory in training: activations that are computed twice, frozen weights in half precision."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class Recomputation:
    """Whether a backward pass of this process is computing activations again, whichever thread it runs in."""

    under_way = False


@contextmanager
def _under_way() -> Generator[None]:
    before, Recomputation.under_way = Recomputation.under_way, True
    try:
        yield
    finally:
        Recomputation.under_way = before


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first computation of a block, and around the second."""
    return nullcontext(), _under_way()


def checkpoint_activations(module: nn.Module) -> None:
    """Let every model inside keep only what enters its blocks, and compute the rest again in the backward pass.

    It is the libraries' own: gradients stay what they are, and evaluation is not touched.
    """
    if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
        module.activation_checkpointing_enable({"use_reentrant": False, "context_fn": _contexts})
        # It also makes embeddings require gradients, so that all of a frozen model would be passed backwards.
        module.disable_input_require_grads()
    elif isinstance(module, UNet2DConditionModel):
        module.enable_gradient_checkpointing(_call_checkpointed)
    else:
        for child in module.children():
            checkpoint_activations(child)


def _call_checkpointed(block: nn.Module, *args: Any) -> Any:
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=_contexts)


def halve(model: nn.Module) -> None:
    """Keep a model's matrices and convolutions in bfloat16 and its vectors in float32, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if parameter.dim() >= 2 else torch.float32)


def halve_frozen(model: nn.Module) -> None:
    """Keep a model's frozen matrices and convolutions in bfloat16, in place; it then runs under autocast.

    Autocast would bring them to bfloat16 for every product anyway. Vectors stay float32: they are few, and a norm takes
    an input of either type only with weights in float32.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32 and parameter.dim() >= 2:
            parameter.data = parameter.data.to(torch.bfloat16)
