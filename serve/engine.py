"""The two halves of an edit in one process: plain calls, no Ray. What the replicas run."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from PIL import Image

from insightedit.model.pipeline import EditConditions, InsightEditPipeline, exact_mode, load_conditioner, load_editor
from insightedit.serve.backend import Conditions, Edited, EditJob, Refusal, VersionInfo


def use_one_thread() -> None:
    """Keep this thread's torch to one core: replicas share a machine, and exact mode needs it."""
    torch.set_num_threads(1)


class ConditionEngine:
    """Language model, Q-Former, BIM and adapter: one pass an edit."""

    def __init__(self, folder: str, exact: bool) -> None:
        """Load what this half needs from a verified local folder."""
        self._pipeline = load_conditioner(folder)
        self._exact = exact

    def condition(self, job: EditJob) -> Conditions | Refusal:
        """What the editor needs to know beside the image; a refusal where the prompt is longer than the model reads."""
        begun = time.perf_counter()
        try:
            text_tokens, image_tokens = _count_tokens(self._pipeline, job.prompt)
        except ValueError as error:
            return Refusal(f"prompt: {error}", "prompt")
        mode: AbstractContextManager[None] = exact_mode() if self._exact else nullcontext()
        with mode:
            conditions = self._pipeline.condition(job.prompt, Image.fromarray(job.pixels), job.negative_prompt)
        # NumPy has no bfloat16; every bfloat16 is a float32, so nothing is lost on the way.
        arrays = {name: x.float().cpu().numpy() for name, x in conditions.tensors().items()}
        return Conditions(
            arrays=arrays,
            seconds=time.perf_counter() - begun,
            text_tokens=text_tokens,
            image_tokens=image_tokens,
        )


class EditEngine:
    """The UNet's steps between the VAE's encoder and decoder."""

    def __init__(self, folder: str, exact: bool) -> None:
        """Load what this half needs from a verified local folder."""
        self._pipeline = load_editor(folder)
        self._exact = exact

    def edit(self, job: EditJob, conditions: Conditions) -> Edited:
        """Do an edit; in exact mode the same job and conditions give the same bits."""
        begun = time.perf_counter()
        image = Image.fromarray(job.pixels)
        dtype = self._pipeline.unet.dtype
        tensors = {name: torch.tensor(x, dtype=dtype) for name, x in conditions.arrays.items()}
        output = self._pipeline(
            image=image,
            conditions=EditConditions(**tensors),
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            image_guidance_scale=job.image_guidance_scale,
            image_branch_scale=1.0 if job.image_branch_scale is None else job.image_branch_scale,
            scheduler=job.scheduler,
            generator=torch.Generator().manual_seed(job.seed),
            exact=self._exact,
            return_dict=False,
        )
        (edited,) = output[0]
        factor = 2 ** (len(self._pipeline.vae.config.block_out_channels) - 1)
        width, height = self._pipeline.model_size(image)
        return Edited(
            pixels=np.asarray(edited),
            seconds=time.perf_counter() - begun,
            steps=job.num_inference_steps or self._pipeline.defaults.num_inference_steps,
            output_tokens=(width // factor) * (height // factor),
        )

    def describe(self) -> VersionInfo:
        """What this version does where a request says nothing."""
        own = self._pipeline.defaults
        return VersionInfo(
            resolution=self._pipeline.config["resolution"],
            num_inference_steps=own.num_inference_steps,
            guidance_scale=own.guidance_scale,
            image_guidance_scale=own.image_guidance_scale,
        )


def _count_tokens(pipeline: InsightEditPipeline, prompt: str) -> tuple[int, int]:
    """Positions of text and of image that the model reads for a prompt.

    Raises:
        ValueError: the prompt does not fit.
    """
    if pipeline.mllm is None:
        return len(pipeline.tokenizer(prompt).input_ids), 0
    row = pipeline.prompts.encode_text([prompt])
    ids = row["input_ids"][0, : int(row["mm_start"][0])]
    image_tokens = int((ids == getattr(pipeline.mllm.config, "image_token_id", -1)).sum())
    return len(ids) - image_tokens, image_tokens
