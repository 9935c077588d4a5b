"""Where an edit belongs: masks in the forms in which datasets have them, and as run lengths in a record's `meta`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from insightedit.platform.datasets.segmentation import rle_mask
from insightedit.platform.records import BadRowError, decode_image, picture_size

_HOLE: Final = 128
"""Alpha below which a pixel is to be edited, and grey from which a pixel of a black and white mask is."""
_GREY: Final = (32, 224)
"""Between these a pixel is neither black nor white; JPEG blurs edges."""
_GREY_SHARE: Final = 0.2
"""Of grey pixels, above which a picture is no black and white mask."""
_DIFFERS: Final = 32
"""By how much a mask that is a copy of the source with a hole differs in the hole."""


def read_mask(data: bytes, source: bytes) -> NDArray[np.bool_]:
    """Read a picture that says where an edit belongs.

    It may be transparent there, white there and black elsewhere, or a copy of the source with something painted there.

    Args:
        data: the encoded mask.
        source: the encoded source picture, of the same size.

    Returns:
        (H, W), true where the edit belongs.

    Raises:
        BadRowError: it cannot be read (`invalid_mask`), or is of another size (`mask_size`).
    """
    size = picture_size(source)
    try:
        pixels, mask_size = decode_image(data), picture_size(data)
    except BadRowError as error:
        raise BadRowError("invalid_mask", str(error)) from None
    if size != mask_size:
        sides = " and ".join(f"{width}x{height}" for width, height in (size, mask_size))
        raise BadRowError("mask_size", f"Source and mask differ in size: {sides} pixels.")
    with Image.open(io.BytesIO(data)) as image:
        alpha: NDArray[np.uint8] = np.asarray(image.convert("RGBA"))[..., 3]
    hole: NDArray[np.bool_] = np.less(alpha, _HOLE)
    if hole.any():
        return hole
    grey = pixels.mean(axis=-1)
    if ((grey > _GREY[0]) & (grey < _GREY[1])).mean() <= _GREY_SHARE:
        return np.greater_equal(grey, _HOLE)
    difference = np.abs(pixels.astype(np.int16) - decode_image(source)).max(axis=-1)
    return np.greater_equal(difference, _DIFFERS)


def mask_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO's compressed run lengths, which JSON can hold."""
    encoder: Any = coco
    encoded = encoder.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def mask_of(rle: object, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode run lengths, and bring the mask to a size.

    Args:
        rle: what `mask_rle` made, or COCO's own.
        size: height and width of the picture, which may be smaller than what the mask was made for.

    Raises:
        BadRowError: they are no run lengths (`invalid_mask`).
    """
    fields = cast(Mapping[str, Any], rle) if isinstance(rle, Mapping) else {}
    stated = fields.get("size")
    if not isinstance(stated, list) or len(cast(list[Any], stated)) != 2:
        raise BadRowError("invalid_mask", "The run lengths of a mask lack their size.")
    height, width = cast(list[int], stated)
    mask = rle_mask(fields, (height, width))
    if mask.shape == size:
        return mask
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
