"""Reads the body of an edit request into an `EditRequest`: bounded, parsed, its fields checked."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from insightedit.serve.schema import ApiError, EditFields, parse_fields
from insightedit.serve.settings import Limits

_CHARSET = re.compile(r"""charset\s*=\s*["']?([^"';,\s]*)""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EditRequest:
    """A request whose form has been read and checked, its image not yet decoded."""

    fields: EditFields
    upload: bytes


class _FormParser(MultiPartParser):
    """Starlette's parser, but for fields that are no UTF-8: it would take them for Latin-1."""

    def on_part_end(self) -> None:
        """Take a part that is complete."""
        try:
            self._current_part.data.decode("utf-8")
        except UnicodeDecodeError:
            raise MultiPartException(f"{self._current_part.field_name[:80]} is not UTF-8.") from None
        super().on_part_end()


async def read_edit_request(request: Request, limits: Limits) -> EditRequest:
    """Read a multipart body, at most `limits.body_bytes` of it.

    Raises:
        ApiError: 413 for too much, 415 for another kind of body, 400 for a broken form or a wrong field.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        message = "The body must be multipart/form-data with an image and a prompt."
        raise ApiError(415, "unsupported_media_type", message)
    _check_charset(content_type)
    parser = _FormParser(
        request.headers, _bounded_body(request, limits), max_files=8, max_fields=32, max_part_size=2**18
    )
    parser.spool_max_size = limits.body_bytes  # Uploads stay in memory.
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, "invalid_form", f"The multipart form cannot be read: {error.message}") from None
    try:
        texts, uploads = await _sorted_parts(form)
    finally:
        await form.close()
    fields = parse_fields(texts, limits)
    if not uploads:
        raise ApiError(400, "missing_required_parameter", "image is missing; attach one as a file.", "image")
    if len(uploads) > 1:
        raise ApiError(400, "invalid_value", f"image is given {len(uploads)} times; send exactly one.", "image")
    return EditRequest(fields, uploads[0])


def _check_charset(content_type: str) -> None:
    """Let nobody choose the codec by which fields are read: some of Python's take quadratic time."""
    found = _CHARSET.search(content_type)
    if found and found[1].lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "unsupported_media_type", "The form's charset must be utf-8; leave it out.")


async def _sorted_parts(form: FormData) -> tuple[dict[str, str], list[bytes]]:
    """The form's text fields by name, and the files given as image."""
    texts: dict[str, str] = {}
    uploads: list[bytes] = []
    for name, value in form.multi_items():
        if name in ("image", "image[]"):
            uploads.append(await _file_bytes(value))
        elif not isinstance(value, str):
            # A file in any other place is named by the field check, as unknown or not supported.
            texts[name] = ""
        elif name in texts:
            raise ApiError(400, "invalid_value", f"{name[:80]} is given more than once.", name[:80])
        else:
            texts[name] = value
    return texts, uploads


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


async def _file_bytes(value: UploadFile | str) -> bytes:
    if isinstance(value, str):
        raise ApiError(400, "invalid_value", "image must be sent as a file, with a file name.", "image")
    return await value.read()
