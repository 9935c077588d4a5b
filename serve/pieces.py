"""What an edit request becomes: pieces, each one image to edit by one seed, and files again at the end."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from insightedit.serve.backend import EditJob
from insightedit.serve.forms import EditRequest
from insightedit.serve.idempotency import fingerprint
from insightedit.serve.schema import SEED_LIMIT, ApiError, EditFields
from insightedit.serve.settings import Limits
from insightedit.serve.uploads import Mask, Pixels, decode_mask, decode_upload, encode_image, finish_image


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a request asks for, its images decoded."""

    request: EditRequest
    sources: list[Pixels]
    mask: Mask | None
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One edit of a request."""

    index: int
    """Its place among the answer's images."""
    job: EditJob
    mask: Mask | None


@dataclass(frozen=True, slots=True)
class Picture:
    """A file to send."""

    b64_json: str
    size: str


def area(pixels: Pixels) -> int:
    """Pixels of an image."""
    return pixels.shape[0] * pixels.shape[1]


def decode(wanted: EditRequest, limits: Limits) -> Wanted:
    """Read the sources, which together may have as many pixels as one alone, and the mask."""
    if len(wanted.images) * wanted.fields.n > limits.images:
        message = (
            f"n is {wanted.fields.n}, of {len(wanted.images)} images; {limits.images} edits a request are allowed."
        )
        raise ApiError(400, "invalid_value", message, "n")
    sources: list[Pixels] = []
    left = limits.pixels
    for upload in wanted.images:
        sources.append(decode_upload(upload.data, limits, upload.name))
        left -= area(sources[-1])
        if left < 0:
            message = f"The images have together more than the {limits.pixels} pixels allowed; send fewer at a time."
            raise ApiError(413, "image_too_large", message, upload.name)
    mask = None if wanted.mask is None else decode_mask(wanted.mask.data, limits, sources[0], wanted.mask.name)
    return Wanted(request=wanted, sources=sources, mask=mask, fingerprint=fingerprint(wanted))


def pieces_of(fields: EditFields, seed: int, sources: list[Pixels], mask: Mask | None, priority: int) -> list[Piece]:
    """The edits in the order of the answer: image by image, of each seed by seed. The mask is the first image's."""
    return [
        Piece(
            index=at * fields.n + number,
            job=EditJob(
                prompt=fields.prompt,
                pixels=pixels,
                seed=(seed + number) % SEED_LIMIT,
                num_inference_steps=fields.num_inference_steps,
                guidance_scale=fields.guidance_scale,
                image_guidance_scale=fields.image_guidance_scale,
                negative_prompt=fields.negative_prompt,
                image_branch_scale=fields.image_branch_scale,
                scheduler=fields.scheduler,
                priority=priority,
                partials=fields.partial_images,
            ),
            mask=mask if at == 0 else None,
        )
        for at, pixels in enumerate(sources)
        for number in range(fields.n)
    ]


def picture_of(pixels: Pixels, piece: Piece, fields: EditFields) -> Picture:
    """A piece's edit, or an image on the way to it, as the request's fields want it."""
    finished = finish_image(pixels, piece.job.pixels, piece.mask, fields.output_size)
    data = encode_image(finished, fields.output_format, fields.file_quality)
    height, width = finished.shape[:2]
    return Picture(base64.b64encode(data).decode("ascii"), f"{width}x{height}")
