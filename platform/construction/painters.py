"""Painters of any pictures: OpenCV, without a model, and whatever inpainting model diffusers loads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import cv2
import numpy as np
from PIL import Image

from insightedit.platform.construction.config import DiffusionConfig, OpenCvConfig
from insightedit.platform.construction.painting import Job
from insightedit.platform.construction.photos import Mask, Picture, Rejected
from insightedit.platform.errors import UsageError

_METHODS: Final = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}
_EIGHT: Final = 8
"""Latents are an eighth of a picture: sides that it paints at are multiples of it."""


class OpenCvPainter:
    """Fills the place of a thing from around it; see `painting.Painter`. It draws nothing new."""

    def __init__(self, config: OpenCvConfig, threads: int = 1) -> None:
        cv2.setNumThreads(threads)
        self._config = config

    def paint(self, jobs: Sequence[Job]) -> list[Picture | Rejected]:
        """See `painting.Painter`."""
        return [self._paint(job) for job in jobs]

    def _paint(self, job: Job) -> Picture | Rejected:
        hole = grown(job.mask, self._config.grow)
        if hole.all():
            return Rejected("nothing_left", "The mask covers the whole picture, and nothing is left to fill it from.")
        method = _METHODS[self._config.opencv]
        return np.asarray(cv2.inpaint(job.photo.pixels, hole.astype(np.uint8), self._config.radius, method), np.uint8)


class DiffusionPainter:
    """Paints by a model that diffusers loads; see `painting.Painter`.

    Outside the mask, which fades over its own growth, the picture stays as it was to the pixel.
    """

    def __init__(self, config: DiffusionConfig, seed: int = 0, threads: int = 1) -> None:
        """Load the model.

        Raises:
            UsageError: it cannot be loaded.
        """
        import torch  # noqa: PLC0415 - OpenCV needs neither
        from diffusers import AutoPipelineForInpainting  # noqa: PLC0415

        torch.set_num_threads(threads)
        types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        options: dict[str, Any] = {"torch_dtype": types[config.precision], "use_safetensors": True}
        try:
            pipeline: Any = AutoPipelineForInpainting.from_pretrained(config.diffusion, **options)
        except (OSError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"diffusion is {config.diffusion}, which is no inpainting model: {why}") from error
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self._config = config
        self._seed = seed

    def paint(self, jobs: Sequence[Job]) -> list[Picture | Rejected]:
        """See `painting.Painter`."""
        return [self._paint(job) for job in jobs]

    def _paint(self, job: Job) -> Picture | Rejected:
        import torch  # noqa: PLC0415

        config, change, pixels = self._config, job.change, job.photo.pixels
        hole = grown(job.mask, config.grow)
        width, height = _sides(pixels, config.side)
        # Each edit has noise of its own, whichever process paints it.
        digest = hashlib.sha256(f"{self._seed}:{job.photo.key}:{change.named}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        try:
            image = self._pipeline(
                prompt=config.prompt if change.task == "remove" else f"{change.new_name}, {change.new_caption}",
                negative_prompt=config.negative_prompt,
                image=Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS),
                mask_image=Image.fromarray(hole).resize((width, height), Image.Resampling.NEAREST),
                width=width,
                height=height,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=generator,
            ).images[0]
        except (RuntimeError, ValueError) as error:  # too large for the memory, or a side that it cannot paint at
            return Rejected("failed", f"The model failed: {' '.join(str(error).split())[:200]}")
        sides = (pixels.shape[1], pixels.shape[0])
        painted = np.asarray(image.convert("RGB").resize(sides, Image.Resampling.LANCZOS), np.float32)
        share = _fading(job.mask, hole)[..., None]
        return np.rint(share * painted + (1 - share) * pixels).astype(np.uint8)


def grown(mask: Mask, share: float) -> Mask:
    """A mask with a rim around it.

    Args:
        mask: (H, W).
        share: of the shorter side, how wide the rim is; a pixel at least, unless it is 0.
    """
    rim = max(round(share * min(mask.shape)), 1) if share else 0
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * rim + 1, 2 * rim + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel)) > 0


def _fading(mask: Mask, hole: Mask) -> np.ndarray[Any, np.dtype[np.float32]]:
    """How much of what was painted is taken (H, W): all on the mask, nothing outside the hole, between them less."""
    inside = np.asarray(cv2.distanceTransform(hole.astype(np.uint8), cv2.DIST_L2, 3), np.float32)
    outside = np.asarray(cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3), np.float32)
    return np.where(mask, 1, np.where(hole, inside / np.maximum(inside + outside, 1e-6), 0)).astype(np.float32)


def _sides(pixels: Picture, side: int) -> tuple[int, int]:
    """Width and height to paint at: the shorter one as wished, both multiples of eight."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    wide, high = (max(round(length * scale / _EIGHT), 1) * _EIGHT for length in (width, height))
    return wide, high
