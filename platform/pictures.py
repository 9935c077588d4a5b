"""Encoded pictures to squares of pixels; a JPEG is decoded at the smallest scale that is enough, which is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from insightedit.platform.records import MAX_PIXELS, open_image


def decode_squares(files: Sequence[bytes], side: int) -> NDArray[np.uint8]:
    """Decode pictures, each made square as a whole.

    Args:
        files: encoded pictures of any format that Pillow reads.
        side: in pixels.

    Returns:
        Pixels (B, side, side, 3), uint8 RGB.

    Raises:
        BadRowError: a picture is broken or too large.
    """
    squares = np.empty((len(files), side, side, 3), np.uint8)
    for square, data in zip(squares, files, strict=True):
        pixels = _decode_jpeg(data, side)
        if pixels is None:
            pixels = np.asarray(open_image(data, at_least=side)[0])
        if pixels.shape != square.shape:
            pixels = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
        square[:] = pixels
    return squares


def to_tensor(squares: NDArray[np.uint8]) -> Tensor:
    """Pixels (B, H, W, 3) as a tensor (B, 3, H, W), uint8."""
    return torch.from_numpy(squares).permute(0, 3, 1, 2)


def _decode_jpeg(data: bytes, side: int) -> NDArray[np.uint8] | None:
    """A JPEG in ordinary colours, whole and not too large; anything else is left to Pillow."""
    try:
        header: Any = simplejpeg.decode_jpeg_header(data)
        if header[0] * header[1] > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side)
    except ValueError:
        return None
