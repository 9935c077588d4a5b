"""How well the parts of the nano foundation do, measured on validation scenes."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from insightedit.jobs import foundation_parts as parts
from insightedit.jobs.foundation_parts import DESCRIBE, NUM_PATCHES, Pictures
from insightedit.platform.datasets.shapes import (
    description,
    plain_question,
    reasoning_question,
    shape_masks,
    short_caption,
)

CHOICES = 16
"""Captions among which CLIP has to find the right one."""


@torch.no_grad()
def vae_quality(vae: Any, pictures: Pictures) -> dict[str, float]:
    """Mean absolute error of reconstructions, over pictures and over the worst shape of each; in [0, 1]."""
    pixels = pictures.pixels.float() / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    errors = ((decoded - pixels).abs().mean(dim=1) / 2).numpy()
    worst = [
        max(float(error[mask].mean()) for mask in shape_masks(scene))
        for error, scene in zip(errors, pictures.scenes, strict=True)
    ]
    return {"mean_absolute_error": round(float(errors.mean()), 5), "worst_shape_error": round(float(np.mean(worst)), 5)}


@torch.no_grad()
def clip_quality(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, pictures: Pictures) -> dict[str, float]:
    """How often a picture's own caption is the best of `CHOICES`, and of all validation captions."""
    rng = random.Random(0)
    captions = [short_caption(scene, rng) for scene in pictures.scenes]
    scores = _clip_scores(clip, tokenizer, captions, pictures.pixels)
    return {
        "best_of_16": _own_is_best(scores, CHOICES),
        f"best_of_{len(captions)}": _own_is_best(scores, len(captions)),
    }


@torch.no_grad()
def unet_quality(
    pipeline: StableDiffusionPipeline, clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, pictures: Pictures
) -> dict[str, float]:
    """How often CLIP finds the caption that a picture was drawn from among `CHOICES`."""
    rng = random.Random(0)
    captions = [short_caption(scene, rng) for scene in pictures.scenes[:64]]
    pipeline.set_progress_bar_config(disable=True)
    drawn: Any = pipeline(
        captions,
        height=32,
        width=32,
        num_inference_steps=12,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    pixels = torch.from_numpy((drawn.images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return {"best_of_16": _own_is_best(_clip_scores(clip, tokenizer, captions, pixels), CHOICES)}


def _clip_scores(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, captions: list[str], pixels: Tensor) -> Tensor:
    ids = parts.clip_token_ids(tokenizer, captions)
    return clip.float()(input_ids=ids, pixel_values=parts.normalised(pixels)).logits_per_image


def _own_is_best(scores: Tensor, choices: int) -> float:
    """The share of pictures (rows) whose own caption (column) scores best among its group of `choices`."""
    groups = [scores[start : start + choices, start : start + choices] for start in range(0, len(scores), choices)]
    hits = [group.argmax(dim=1) == torch.arange(len(group)) for group in groups]
    return round(float(torch.cat(hits).float().mean()), 4)


@torch.no_grad()
def mllm_quality(
    mllm: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, pictures: Pictures, rng: random.Random
) -> dict[str, float]:
    """The share of answers that are right to the letter."""
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, pixels in zip(pictures.scenes, pictures.pixels, strict=True):
        asked = {
            "descriptions": (DESCRIBE, description(scene)),
            "plain questions": plain_question(scene, rng),
            "reasoning questions": reasoning_question(scene, rng),
        }
        for kind, (question, answer) in asked.items():
            right[kind].append(_answer(mllm, tokenizer, question, pixels) == answer)
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in right.items()}


def _answer(mllm: Any, tokenizer: PreTrainedTokenizerFast, question: str, pixels: Tensor) -> str:
    """The language model's greedy answer to a question about a picture (3, 32, 32)."""
    prompt = f"USER:{'<image>' * NUM_PATCHES}\n {question} ASSISTANT:"
    inputs = tokenizer(prompt, return_tensors="pt")
    output = mllm.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        pixel_values=parts.normalised(pixels[None]),
        max_new_tokens=32,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)).strip()
