"""Any editing pipeline of diffusers, called in one way: ours, InstructPix2Pix, or one that takes image and prompt."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from insightedit.model.pipeline import InsightEditPipeline, load_pipeline

Picture = NDArray[np.uint8]
"""Pixels (H, W, 3), RGB."""

_OURS: Final = frozenset({"InsightEditPipeline", "StableDiffusionInstructPix2PixPipeline"})


class PictureEditor(Protocol):
    """Makes edits at the sources' own sizes."""

    def edit(self, instructions: Sequence[str], sources: Sequence[Picture], seeds: Sequence[int]) -> list[Picture]:
        """Edit a batch of pictures of one size, each with the noise of its seed."""
        ...


def load_editor_of(folder: str | Path) -> PictureEditor:
    """Open a pipeline folder on the device that there is.

    Raises:
        ValueError: it is none, or its pipeline takes no image with a prompt.
        OSError: its files cannot be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = _class_name(Path(folder))
    if name in _OURS:
        return _OurEditor(load_pipeline(folder).to(device))
    pipeline: Any = DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
    takes = inspect.signature(pipeline.__call__).parameters
    if missing := [argument for argument in ("prompt", "image", "generator") if argument not in takes]:
        raise ValueError(f"it is a {name}, which takes no {missing[0]}: name a pipeline that edits by instructions")
    pipeline.set_progress_bar_config(disable=True)
    return _OtherEditor(pipeline.to(device))


class _OurEditor:
    """Batches run as one."""

    def __init__(self, pipeline: InsightEditPipeline) -> None:
        self._pipeline: Any = pipeline

    def edit(self, instructions: Sequence[str], sources: Sequence[Picture], seeds: Sequence[int]) -> list[Picture]:
        images = [Image.fromarray(source) for source in sources]
        output = self._pipeline(list(instructions), images, generator=_generators(seeds), output_type="pt")
        edits: Tensor = output.images
        if not torch.isfinite(edits).all():
            # As bytes, what is no number is black, and would be judged like any picture.
            raise ValueError("the edit came to values that are not numbers; look at the model's weights")
        if edits.shape[2:] != sources[0].shape[:2]:  # the model's own size; a picture is judged at its own
            edits = F.interpolate(edits, sources[0].shape[:2], mode="bicubic", antialias=True).clamp(0, 1)
        return list((edits.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8))


class _OtherEditor:
    """One edit after the other: what a pipeline makes of several pictures at once is its own affair."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def edit(self, instructions: Sequence[str], sources: Sequence[Picture], seeds: Sequence[int]) -> list[Picture]:
        asked = zip(instructions, sources, _generators(seeds), strict=True)
        return [self._one(instruction, source, generator) for instruction, source, generator in asked]

    def _one(self, instruction: str, source: Picture, generator: torch.Generator) -> Picture:
        image = Image.fromarray(source)
        edit: Image.Image = self._pipeline(prompt=instruction, image=image, generator=generator).images[0]
        return np.asarray(edit.convert("RGB").resize(image.size, Image.Resampling.BICUBIC))


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _class_name(folder: Path) -> str:
    """The class of a folder's pipeline.

    Raises:
        ValueError: there is no index of one.
    """
    index = folder / "model_index.json"
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is missing or names no pipeline") from None
