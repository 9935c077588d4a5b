"""Attention as plain products, for training on CPUs."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from transformers import PreTrainedModel

from insightedit.model.unet import DecoupledCrossAttention


def use_plain_attention(model: nn.Module) -> None:
    """Let every layer of a model compute attention as two products and a softmax.

    In bfloat16 on a CPU the backward of PyTorch's fused kernel takes five times as long as theirs, and sequences as
    short as a CPU trains on leave it nothing to save.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")
        elif isinstance(module, Attention) and isinstance(module.processor, AttnProcessor2_0):
            module.set_processor(AttnProcessor())
        elif isinstance(module, DecoupledCrossAttention):
            module.plain = True
