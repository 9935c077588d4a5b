"""Where things are, and which pixels are theirs: Grounding DINO finds a name, SAM 2 outlines what is in a box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, Sam2Model
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from insightedit.platform.construction.config import GroundedMasksConfig
from insightedit.platform.construction.masks import Boxed, Masked
from insightedit.platform.construction.photos import Photo, Rejected, Thing
from insightedit.platform.errors import UsageError

_SAME: Final = 0.6
"""Overlap (intersection over union) above which two boxes are about the same thing."""
Boxes = NDArray[np.float32]
"""(N, 4): left, top, right, bottom in pixels."""


class GroundingDetector:
    """Finds things by their names; see `masks.Detector`. Each name is asked for alone: names asked for together mix."""

    def __init__(self, config: GroundedMasksConfig, threads: int = 1) -> None:
        """Load the model.

        Raises:
            UsageError: it cannot be loaded.
        """
        torch.set_num_threads(threads)
        self._config = config
        self._device = _device()
        self._processor: Any = _loaded("detector", config.detector, AutoProcessor)
        model: Any = _loaded("detector", config.detector, AutoModelForZeroShotObjectDetection)
        self._model = model.to(self._device).eval()

    def boxes(self, photos: Sequence[Photo]) -> list[list[Boxed | Rejected]]:
        """See `masks.Detector`."""
        return [[self._box(photo, thing) for thing in photo.things] for photo in photos]

    @torch.inference_mode()
    def _box(self, photo: Photo, thing: Thing) -> Boxed | Rejected:
        height, width = photo.pixels.shape[:2]
        inputs = self._processor(images=photo.pixels, text=[[thing.name.replace(".", " ")]], return_tensors="pt")
        inputs = inputs.to(self._device)
        found = self._processor.post_process_grounded_object_detection(
            self._model(**inputs),
            inputs["input_ids"],
            threshold=self._config.box_threshold,
            text_threshold=self._config.text_threshold,
            target_sizes=[(height, width)],
        )[0]
        boxes: Boxes = found["boxes"].float().cpu().numpy()
        distinct = distinct_boxes(boxes, found["scores"].float().cpu().numpy())
        if len(distinct) != 1:
            reason = "several" if distinct else "not_found"
            return Rejected(reason, f"{len(distinct)} places in the picture may be {thing.name}.")
        left, top, right, bottom = boxes[distinct[0]].clip(0, (width, height, width, height)).tolist()
        return Boxed((left, top, right - left, bottom - top), float(found["scores"][distinct[0]]))


class Sam2Segmenter:
    """Outlines what is in boxes; see `masks.Masker`. A picture is looked at once for all its things.

    Pictures are brought into the model's form here: transformers' own processor of SAM 2 needs torchvision, and with
    that installed every other processor would give other pixels.
    """

    def __init__(self, config: GroundedMasksConfig, threads: int = 1) -> None:
        """Load the model.

        Raises:
            UsageError: it cannot be loaded.
        """
        torch.set_num_threads(threads)
        self._device = _device()
        model: Any = _loaded("segmenter", config.segmenter, Sam2Model)
        self._model = model.to(self._device).eval()
        self._side: int = model.config.prompt_encoder_config.image_size
        self._mean, self._std = _normalisation(config.segmenter)

    def masks(self, photos: Sequence[Photo]) -> list[list[Masked | Rejected]]:
        """See `masks.Masker`."""
        return [self._masks(photo) for photo in photos]

    @torch.inference_mode()
    def _masks(self, photo: Photo) -> list[Masked | Rejected]:
        height, width = photo.pixels.shape[:2]
        corners = torch.tensor([[[x, y, x + w, y + h] for x, y, w, h in map(_box_of, photo.things)]])
        scale = torch.tensor([self._side / width, self._side / height]).repeat(2)
        outputs = self._model(
            pixel_values=self._pixels(photo), input_boxes=(corners * scale).to(self._device), multimask_output=False
        )
        logits: Tensor = outputs.pred_masks[0].float()  # (things, 1, h, w)
        masks = interpolate(logits, (height, width), mode="bilinear", align_corners=False)[:, 0] > 0
        scores: list[float] = outputs.iou_scores[0, :, 0].float().clamp(0, 1).tolist()
        return [Masked(mask.cpu().numpy(), score) for mask, score in zip(masks, scores, strict=True)]

    def _pixels(self, photo: Photo) -> Tensor:
        """A picture stretched to the model's square and normalised: (1, 3, side, side)."""
        square = Image.fromarray(photo.pixels).resize((self._side, self._side), Image.Resampling.BILINEAR)
        values = (np.asarray(square, np.float32) / 255 - self._mean) / self._std
        return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None].to(self._device)


def _normalisation(place: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of the colours that a model was trained with, as its folder says."""
    content: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(place)[0]
    mean = content.get("image_mean", IMAGENET_DEFAULT_MEAN)
    std = content.get("image_std", IMAGENET_DEFAULT_STD)
    return np.array(mean, np.float32), np.array(std, np.float32)


def distinct_boxes(boxes: Boxes, scores: NDArray[np.float32]) -> list[int]:
    """Numbers of the boxes that are about different things, the surest of each."""
    kept: list[int] = []
    for number in np.argsort(-scores).tolist():
        if all(_overlap(boxes[number], boxes[other]) < _SAME for other in kept):
            kept.append(number)
    return kept


def _overlap(one: Boxes, other: Boxes) -> float:
    """Intersection over union of two boxes (4,)."""
    corner, end = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    common = float(np.prod(np.maximum(end - corner, 0)))
    areas = sum(float(np.prod(box[2:] - box[:2])) for box in (one, other))
    return common / max(areas - common, 1e-6)


def _box_of(thing: Thing) -> tuple[float, float, float, float]:
    if thing.box is None:
        raise ValueError(f"{thing.name} has no box.")
    return thing.box


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _loaded(field: str, place: str, kind: Any) -> Any:
    try:
        return kind.from_pretrained(place)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"construction.masks.{field} is {place}, which cannot be loaded: {why}") from error
