"""Images that strangers send, checked before they are decoded, and images that go back."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from insightedit.serve.schema import ApiError, OutputFormat
from insightedit.serve.settings import Limits

Pixels = NDArray[np.uint8]
"""An RGB image (H, W, 3)."""

MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_SCAN = b"\xff\xda"
MOST_SCANS = 100
"""Scans of a JPEG; a progressive one has about ten. Each of them is worked through the whole image."""


def decode_upload(data: bytes, limits: Limits) -> Pixels:
    """Decode the first frame of a PNG, JPEG or WebP file as RGB, upright, on white where it is transparent.

    Args:
        data: the whole file. Its name and the type that its sender claimed play no part.
        limits: how large an image may be.

    Raises:
        ApiError: 400 for what is not such an image or is broken, 413 for more pixels than allowed.
    """
    if not data:
        raise ApiError(400, "invalid_image", "image is empty.", "image")
    if data.startswith(b"\xff\xd8") and data.count(_SCAN) > MOST_SCANS:
        raise ApiError(400, "invalid_image", f"image is a JPEG of more than {MOST_SCANS} scans.", "image")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except Image.DecompressionBombError:
        raise ApiError(413, "image_too_large", _too_many_pixels(limits), "image") from None
    except Exception:  # noqa: BLE001  (a decoder may raise anything at hostile bytes)
        raise ApiError(400, "invalid_image", "image is not a PNG, JPEG or WebP file.", "image") from None
    width, height = image.size
    if width * height > limits.pixels:
        raise ApiError(413, "image_too_large", _too_many_pixels(limits), "image")
    if max(width, height) > limits.side:
        message = f"image is {width}x{height} pixels; {limits.side} a side are allowed."
        raise ApiError(413, "image_too_large", message, "image")
    if max(width, height) > limits.aspect * min(width, height):
        message = f"image is {width}x{height} pixels; its longer side may be {limits.aspect:g} times its shorter one."
        raise ApiError(400, "invalid_image", message, "image")
    try:
        image.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception:  # noqa: BLE001  (as above)
        raise ApiError(400, "invalid_image", "image is damaged or cut short.", "image") from None


def _too_many_pixels(limits: Limits) -> str:
    return f"image has more than the {limits.pixels} pixels allowed; make it smaller."


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips where it should scale.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def encode_image(pixels: Pixels, file_format: OutputFormat, quality: int = 100) -> bytes:
    """Encode an RGB image, without any metadata."""
    file = io.BytesIO()
    options = {} if file_format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(file, format=file_format, **options)
    return file.getvalue()
