"""An edit in this process, in exact mode, as a server would do it: the same request gives the same files."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image

from insightedit.model.pipeline import InsightEditPipeline, load_pipeline
from insightedit.platform.errors import UsageError
from insightedit.platform.registry import CHAMPION, Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve.client import EditOptions, form_of
from insightedit.serve.schema import SEED_LIMIT, ApiError, EditFields, parse_form
from insightedit.serve.settings import Limits
from insightedit.serve.uploads import Mask, Pixels, decode_mask, decode_upload, encode_image, finish_image


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalEdit:
    """What was made."""

    images: tuple[bytes, ...]
    """The encoded files."""
    seeds: tuple[int, ...]
    """Of each."""
    model_version: str


def edit_here(
    workdir: Workdir, image: bytes, prompt: str, *, mask: bytes | None = None, **options: Unpack[EditOptions]
) -> LocalEdit:
    """Edit an image by a version of the work folder's registry.

    Args:
        workdir: whose registry has the model.
        image: a PNG, JPEG or WebP file.
        prompt: the instruction.
        mask: a PNG of the image's size.
        **options: as `edit_over_http` takes them; the model is the champion without one.

    Raises:
        NotFoundError: there is no such version.
        UsageError: the edit is not possible, and why.
    """
    try:
        fields = parse_form(form_of(prompt, options), Limits())
        source = decode_upload(image, Limits())
        where = None if mask is None else decode_mask(mask, Limits(), source)
    except ApiError as error:
        raise UsageError(error.message) from None
    registry = Registry(workdir)
    version = registry.resolve(fields.model or CHAMPION)
    pipeline = load_pipeline(registry.fetch(version))
    first = secrets.randbelow(SEED_LIMIT) if fields.seed is None else fields.seed
    seeds = tuple((first + number) % SEED_LIMIT for number in range(fields.n))
    try:
        images = tuple(_edit(pipeline, fields, source, where, seed) for seed in seeds)
    except ValueError as error:
        raise UsageError(f"The edit is not possible: {error}") from None
    return LocalEdit(images=images, seeds=seeds, model_version=version.version)


def _edit(pipeline: InsightEditPipeline, fields: EditFields, source: Pixels, mask: Mask | None, seed: int) -> bytes:
    output: Any = pipeline(
        fields.prompt,
        Image.fromarray(source),
        num_inference_steps=fields.num_inference_steps,
        guidance_scale=fields.guidance_scale,
        image_guidance_scale=fields.image_guidance_scale,
        negative_prompt=fields.negative_prompt,
        generator=torch.Generator().manual_seed(seed),
        image_branch_scale=1.0 if fields.image_branch_scale is None else fields.image_branch_scale,
        scheduler=fields.scheduler,
        exact=True,
    )
    finished = finish_image(np.asarray(output.images[0]), source, mask, fields.output_size)
    return encode_image(finished, fields.output_format, fields.file_quality)
