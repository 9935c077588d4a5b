"""torch.compile for the blocks that a model repeats, which take nearly all of a step's time."""

from __future__ import annotations

import os
import shutil

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_FORMS = 64
"""Widths and lengths that one kind of block may be compiled for: a UNet's blocks all differ."""


def missing_compiler() -> str | None:
    """The compiler that torch.compile would call and does not find; None if it is there."""
    name = os.environ.get("CXX", "g++")
    return None if shutil.which(name) else name


def compile_blocks(model: nn.Module) -> None:
    """Compile the UNet's and the transformers' blocks, each when it first runs. Names of parameters stay."""
    torch.compiler.config.recompile_limit = _FORMS
    for module in model.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile()
        elif isinstance(module, GradientCheckpointingLayer):
            # Its own forward may be the checkpointed one, which is not compiled.
            for child in module.children():
                child.compile()
