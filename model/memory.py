"""What spares memory in training: activations that are computed twice, frozen weights in half precision."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import PreTrainedModel


def checkpoint_activations(module: nn.Module) -> None:
    """Let every model inside keep only what enters its blocks, and compute the rest again in the backward pass.

    It is the libraries' own: gradients stay what they are, and evaluation is not touched.
    """
    if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
        module.activation_checkpointing_enable({"use_reentrant": False})
        # It also makes embeddings require gradients, so that all of a frozen model would be passed backwards.
        module.disable_input_require_grads()
    elif isinstance(module, UNet2DConditionModel):
        module.enable_gradient_checkpointing()
    else:
        for child in module.children():
            checkpoint_activations(child)


def halve_frozen(model: nn.Module) -> None:
    """Keep a model's frozen matrices and convolutions in bfloat16, in place; it then runs under autocast.

    Autocast would bring them to bfloat16 for every product anyway. Vectors stay float32: they are few, and a norm takes
    an input of either type only with weights in float32.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32 and parameter.dim() >= 2:
            parameter.data = parameter.data.to(torch.bfloat16)
