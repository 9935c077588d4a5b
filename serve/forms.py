"""Reads the body of an edit request, a form or JSON, into an `EditRequest`: bounded, parsed, its fields checked."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, cast

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from insightedit.serve.outbound import FailedConnectionError, RefusedAddressError, fetch
from insightedit.serve.schema import (
    EDIT_BODIES,
    SOURCES,
    ApiError,
    Bodies,
    EditFields,
    ImageRef,
    parse_form,
    parse_json,
)
from insightedit.serve.settings import Destinations, Limits

_CHARSET = re.compile(r"""charset\s*=\s*["']?([^"';,\s]*)""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as it came, and its name in the request: what an error is said of."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class EditRequest:
    """A request whose body has been read and checked, its images not yet decoded."""

    fields: EditFields
    images: tuple[Upload, ...]
    mask: Upload | None = None


async def read_edit_request(
    request: Request, limits: Limits, image_urls: Destinations, bodies: Bodies = EDIT_BODIES
) -> EditRequest:
    """Read a body, and the images that it names by their addresses: together at most `limits.body_bytes`.

    Args:
        request: the body's.
        limits: what it may be.
        image_urls: where images may be fetched from.
        bodies: what it is made of.

    Raises:
        ApiError: 413 for too much, 415 for another kind of body, 400 for a broken one or a wrong field.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json"):
        message = "The body must be multipart/form-data with an image and a prompt, or application/json with images."
        raise ApiError(415, "unsupported_media_type", message)
    _check_charset(content_type)
    if kind == "multipart/form-data":
        return await _read_form(request, limits, bodies)
    return await _read_json(request, limits, bodies, image_urls)


def _check_charset(content_type: str) -> None:
    """Let nobody choose the codec by which fields are read: some of Python's take quadratic time."""
    found = _CHARSET.search(content_type)
    if found and found[1].lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "unsupported_media_type", "The form's charset must be utf-8; leave it out.")


async def _bounded_body(request: Request, limits: Limits) -> AsyncGenerator[bytes]:
    error = ApiError(413, "request_too_large", f"The request is larger than the {limits.body_bytes} bytes allowed.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.body_bytes:
        raise error
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limits.body_bytes:
            raise error
        yield chunk


# -- forms -----------------------------------------------------------------------------------------------------------


class _FormParser(MultiPartParser):
    """Starlette's parser, but for fields that are no UTF-8: it would take them for Latin-1."""

    def on_part_end(self) -> None:
        """Take a part that is complete."""
        try:
            self._current_part.data.decode("utf-8")
        except UnicodeDecodeError:
            raise MultiPartException(f"{self._current_part.field_name[:80]} is not UTF-8.") from None
        super().on_part_end()


async def _read_form(request: Request, limits: Limits, bodies: Bodies) -> EditRequest:
    parser = _FormParser(
        request.headers, _bounded_body(request, limits), max_files=SOURCES + 1, max_fields=32, max_part_size=2**18
    )
    parser.spool_max_size = limits.body_bytes  # Uploads stay in memory.
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, "invalid_form", f"The multipart form cannot be read: {error.message}") from None
    try:
        texts, images, masks = await _sorted_parts(form)
    finally:
        await form.close()
    fields = parse_form(texts, limits, bodies.form)
    if not images:
        raise ApiError(400, "missing_required_parameter", "image is missing; attach one as a file.", "image")
    if len(images) > SOURCES:
        raise ApiError(400, "invalid_value", f"image is given {len(images)} times; send {SOURCES} at most.", "image")
    if len(masks) > 1:
        raise ApiError(400, "invalid_value", "mask is given more than once.", "mask")
    named = tuple(Upload(f"image[{at}]" if len(images) > 1 else "image", data) for at, data in enumerate(images))
    return EditRequest(fields, named, Upload("mask", masks[0]) if masks else None)


async def _sorted_parts(form: FormData) -> tuple[dict[str, str], list[bytes], list[bytes]]:
    """The form's text fields by name, the files given as image, and those given as mask."""
    texts: dict[str, str] = {}
    images: list[bytes] = []
    masks: list[bytes] = []
    files = {"image": images, "image[]": images, "mask": masks}
    for name, value in form.multi_items():
        if name in files:
            files[name].append(await _file_bytes(name.removesuffix("[]"), value))
        elif not isinstance(value, str):
            # A file in any other place is named by the field check, as unknown or not supported.
            texts[name] = ""
        elif name in texts:
            raise ApiError(400, "invalid_value", f"{name[:80]} is given more than once.", name[:80])
        else:
            texts[name] = value
    return texts, images, masks


async def _file_bytes(name: str, value: UploadFile | str) -> bytes:
    if isinstance(value, str):
        raise ApiError(400, "invalid_value", f"{name} must be sent as a file, with a file name.", name)
    return await value.read()


# -- JSON ------------------------------------------------------------------------------------------------------------


async def _read_json(request: Request, limits: Limits, bodies: Bodies, image_urls: Destinations) -> EditRequest:
    text = b"".join([chunk async for chunk in _bounded_body(request, limits)])
    try:
        content: object = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "The body cannot be read as JSON.") from None
    if not isinstance(content, dict):
        raise ApiError(400, "invalid_json", "The body must be a JSON object with images and a prompt.")
    body = parse_json(cast(dict[str, object], content), limits, bodies.json)
    references = {f"images[{at}].image_url": image for at, image in enumerate(body.images)}
    if body.mask is not None:
        references["mask.image_url"] = body.mask
    uploads: list[Upload] = []
    left = limits.body_bytes - len(text)
    for name, image in references.items():  # One after the other, so that the memory is bounded.
        if _is_data(image):
            uploads.append(_held(image, name))
        else:
            uploads.append(await _fetched(image, name, image_urls, left))
            left -= len(uploads[-1].data)
    *images, mask = [*uploads, None] if body.mask is None else uploads
    return EditRequest(body, tuple(upload for upload in images if upload is not None), mask)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:80]
        raise ApiError(400, "invalid_value", f"{twice} is given more than once.", twice)
    return content


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not a number in JSON")


def _is_data(image: ImageRef) -> bool:
    return image.image_url[:50].lstrip().lower().startswith("data:")


async def _fetched(image: ImageRef, name: str, allowed: Destinations, most_bytes: int) -> Upload:
    """The file at an address."""
    if not allowed.origins:
        message = f"{name} is no data: URL; this server fetches nothing, so send the image itself in base64."
        raise ApiError(400, "unsupported_value", message, name)
    try:
        return Upload(name, await fetch(image.image_url, allowed, most_bytes))
    except RefusedAddressError as error:
        raise ApiError(400, "image_url_not_allowed", f"{name}: {error}", name) from None
    except FailedConnectionError as error:
        raise ApiError(400, "image_url_not_fetched", f"{name}: {error}", name) from None


def _held(image: ImageRef, name: str) -> Upload:
    """The file that a `data:` URL holds."""
    head, _, payload = image.image_url.partition(",")
    kind = head.strip().lower()
    if not kind.endswith(";base64"):
        raise ApiError(400, "invalid_value", f"{name} must be in base64, as in data:image/png;base64,....", name)
    try:
        return Upload(name, base64.b64decode(payload, validate=True))
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_value", f"{name} is not valid base64.", name) from None
