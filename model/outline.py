"""The model's outline: every module, with the shapes and types of its weights but without them.

It is built on torch's `meta` device from config files alone: in seconds and in no memory, however large the model is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from insightedit.model.configuration import ModelConfig, SourcesConfig
from insightedit.model.insightedit import InsightEditModel, join_parts
from insightedit.model.pipeline import InsightEditPipeline

T = TypeVar("T")


def build_outline(config: ModelConfig) -> InsightEditModel:
    """The untrained model as `build_pipeline` would make it, on the `meta` device.

    Raises:
        ValueError: a source's config files are not there.
    """
    sources = config.sources
    diffusion = _outline_diffusion(sources)
    with torch.device("meta"):
        vision: Any = CLIPVisionConfig.from_pretrained
        image_encoder = CLIPVisionModelWithProjection(_read(sources, "image_encoder", vision))
        mllm: Any = AutoModelForImageTextToText
        language = mllm.from_config(_read(sources, "mllm", AutoConfig.from_pretrained), dtype=torch.float32)
        pipeline = join_parts(config, diffusion, image_encoder, language)
    # Not on `meta`: the noise schedule is a table that the loss looks things up in.
    return InsightEditModel(pipeline, config.lora, config.diffusion)


def outline_batch(pipeline: InsightEditPipeline, rows: int) -> dict[str, Tensor]:
    """A batch for the model around an outlined pipeline, with instructions as long as rows can be.

    Numbers are on the `meta` device. Ids, masks and seeds are real: what they are decides what is computed.
    """
    prompts = pipeline.prompts
    pixels = torch.zeros(rows, 3, prompts.image_side, prompts.image_side, dtype=torch.uint8)
    inputs = prompts(["a " * prompts.max_length] * rows, pixels, cut=True)
    vision, text, vae = (part.config for part in (pipeline.image_encoder, pipeline.text_encoder, pipeline.vae))
    patches = (vision.image_size // vision.patch_size) ** 2
    side = pipeline.config["resolution"] // 2 ** (len(vae.block_out_channels) - 1)
    shapes = {
        "clip_patches": (rows, patches, vision.hidden_size),
        "source_embeds": (rows, vision.projection_dim),
        "target_embeds": (rows, vision.projection_dim),
        "text_states": (rows, text.max_position_embeddings, text.hidden_size),
        "source_latents": (rows, vae.latent_channels, side, side),
        "target_moments": (rows, 2 * vae.latent_channels, side, side),
        "diffusion_weight": (rows,),
    }
    numbers = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    inputs = {name: x.to("meta") if x.is_floating_point() else x for name, x in inputs.items()}
    return {**inputs, **numbers, "seed": torch.arange(rows)}


def _outline_diffusion(sources: SourcesConfig) -> dict[str, Any]:
    """The parts of a Stable Diffusion folder or hub id that training needs."""

    def part(read: Callable[..., T], name: str) -> T:
        return _read(sources, "diffusion", lambda source: read(source, subfolder=name))

    unet: Any = part(UNet2DConditionModel.load_config, "unet")
    vae: Any = part(AutoencoderKL.load_config, "vae")
    text: Any = part(CLIPTextConfig.from_pretrained, "text_encoder")
    with torch.device("meta"):
        built = {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(text),
        }
    return {
        **built,
        "tokenizer": part(AutoTokenizer.from_pretrained, "tokenizer"),
        "scheduler": part(DDPMScheduler.from_pretrained, "scheduler"),
    }


def _read(sources: SourcesConfig, field: str, read: Callable[[str], T]) -> T:
    """What is read from a source's config files."""
    source = str(getattr(sources, field))
    try:
        return read(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model.sources.{field} is {source}, and its config files cannot be read ({reason}); put them there or,"
            " for a hub id, where the hub can be reached."
        ) from error
