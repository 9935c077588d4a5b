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
Mask = NDArray[np.bool_]
"""Which pixels of an image are edited (H, W)."""

MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_SCAN = b"\xff\xda"
MOST_SCANS = 100
"""Scans of a JPEG; a progressive one has about ten. Each of them is worked through the whole image."""


def decode_upload(data: bytes, limits: Limits, name: str = "image") -> Pixels:
    """Decode the first frame of a PNG, JPEG or WebP file as RGB, upright, on white where it is transparent.

    Args:
        data: the whole file. Its name and the type that its sender claimed play no part.
        limits: how large an image may be.
        name: of the image in the request.

    Raises:
        ApiError: 400 for what is not such an image or is broken, 413 for more pixels than allowed.
    """
    if data.startswith(b"\xff\xd8") and data.count(_SCAN) > MOST_SCANS:
        raise ApiError(400, "invalid_image", f"{name} is a JPEG of more than {MOST_SCANS} scans.", name)
    image = _opened(data, limits, name, ("PNG", "JPEG", "WEBP"))
    width, height = image.size
    if max(width, height) > limits.aspect * min(width, height):
        message = f"{name} is {width}x{height} pixels; its longer side may be {limits.aspect:g} times its shorter one."
        raise ApiError(400, "invalid_image", message, name)
    try:
        image.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception:  # noqa: BLE001  (as in `_opened`)
        raise _damaged(name) from None


def decode_mask(data: bytes, limits: Limits, source: Pixels, name: str = "mask") -> Mask:
    """Decode a PNG whose alpha says where an image is edited.

    Args:
        data: the whole file.
        limits: how large an image may be.
        source: the image (H, W, 3), whose size the mask has.
        name: of the mask in the request.

    Returns:
        Where alpha is 0 (H, W).

    Raises:
        ApiError: 400 for another kind of file, another size, or a mask that leaves nothing to edit.
    """
    image = _opened(data, limits, name, ("PNG",))
    height, width = source.shape[:2]
    if image.size != (width, height):
        message = f"{name} is {image.width}x{image.height} pixels and its image {width}x{height}; make them the same."
        raise ApiError(400, "invalid_mask", message, name)
    if not image.has_transparency_data:
        message = f"{name} has no transparency; make it transparent where the image is to change."
        raise ApiError(400, "invalid_mask", message, name)
    try:
        edited = np.asarray(image.convert("RGBA"))[..., 3] == 0
    except Exception:  # noqa: BLE001  (as in `_opened`)
        raise _damaged(name) from None
    if not edited.any():
        message = f"{name} is transparent nowhere; make it so where the image is to change."
        raise ApiError(400, "invalid_mask", message, name)
    return edited


def _opened(data: bytes, limits: Limits, name: str, formats: tuple[str, ...]) -> Image.Image:
    """An image whose head has been read and whose size is allowed."""
    if not data:
        raise ApiError(400, "invalid_image", f"{name} is empty.", name)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise _too_many_pixels(limits, name) from None
    except Exception:  # noqa: BLE001  (a decoder may raise anything at hostile bytes)
        kinds = {"JPEG": "JPEG", "WEBP": "WebP"}
        *others, last = (kinds.get(kind, kind) for kind in formats)
        kind = f"{', '.join(others)} or {last}" if others else last
        raise ApiError(400, "invalid_image", f"{name} is not a {kind} file.", name) from None
    if image.width * image.height > limits.pixels:
        raise _too_many_pixels(limits, name)
    if max(image.size) > limits.side:
        message = f"{name} is {image.width}x{image.height} pixels; {limits.side} a side are allowed."
        raise ApiError(413, "image_too_large", message, name)
    return image


def _damaged(name: str) -> ApiError:
    return ApiError(400, "invalid_image", f"{name} is damaged or cut short.", name)


def _too_many_pixels(limits: Limits, name: str) -> ApiError:
    message = f"{name} has more than the {limits.pixels} pixels allowed; make it smaller."
    return ApiError(413, "image_too_large", message, name)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips where it should scale.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def finish_image(edited: Pixels, source: Pixels, mask: Mask | None, size: tuple[int, int] | None) -> Pixels:
    """What the model has made, as the caller wants it.

    Args:
        edited: (H, W, 3).
        source: (H, W, 3); outside the mask its pixels are kept to the bit.
        mask: where the edit counts; everywhere without it.
        size: width and height to bring it to. Of another shape, it is cut evenly at both ends of its longer side.
    """
    whole = edited if mask is None else np.where(mask[..., None], edited, source)
    height, width = whole.shape[:2]
    if size is None or size == (width, height):
        return whole
    return np.asarray(ImageOps.fit(Image.fromarray(whole), size, Image.Resampling.LANCZOS))


def encode_image(pixels: Pixels, file_format: OutputFormat, quality: int = 100) -> bytes:
    """Encode an RGB image, without any metadata."""
    file = io.BytesIO()
    options = {} if file_format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(file, format=file_format, **options)
    return file.getvalue()
