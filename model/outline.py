"""The model's outline: every module, with the shapes and types of its weights but without them.

It is built on torch's `meta` device from config files alone: in seconds and in no memory, however large the model is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from insightedit.model import llava
from insightedit.model.configuration import ModelConfig, SourcesConfig
from insightedit.model.insightedit import InsightEditModel, join_parts, join_text_parts
from insightedit.model.pipeline import InsightEditPipeline
from insightedit.model.unet import InsightEditUNet
from insightedit.model.weights import SINGLE_FILE_CONFIG, load_diffusion

T = TypeVar("T")


def build_outline(config: ModelConfig) -> InsightEditModel:
    """The untrained model as `build_pipeline` would make it, on the `meta` device.

    Raises:
        ValueError: a source's config files are not there.
    """
    sources = config.sources
    diffusion = _outline_diffusion(sources)
    vision: Any = _read("image_encoder", sources.image_encoder, CLIPVisionConfig.from_pretrained)
    with torch.device("meta"):
        image_encoder = CLIPVisionModelWithProjection(vision)
        if config.conditioning == "text":
            pipeline = join_text_parts(config, diffusion, image_encoder)
        else:
            mllm: Any = AutoModelForImageTextToText
            language = mllm.from_config(_mllm_config(sources), dtype=torch.float32)
            pipeline = join_parts(config, diffusion, image_encoder, language)
    # Not on `meta`: the noise schedule is a table that the loss looks things up in.
    return InsightEditModel(pipeline, config.lora, config.diffusion)


def outline_batch(pipeline: InsightEditPipeline, rows: int) -> dict[str, Tensor]:
    """A batch for the model around an outlined pipeline, with instructions as long as rows can be.

    Numbers are on the `meta` device. Ids, masks and seeds are real: what they are decides what is computed.
    """
    vision, text, vae = (part.config for part in (pipeline.image_encoder, pipeline.text_encoder, pipeline.vae))
    inputs = _outline_inputs(pipeline, rows, text.max_position_embeddings)
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


def _outline_inputs(pipeline: InsightEditPipeline, rows: int, text_length: int) -> dict[str, Tensor]:
    """What whoever reads the instructions is given."""
    if pipeline.mllm is None:
        return {"text_ids": torch.zeros(rows, text_length, dtype=torch.long)}
    prompts = pipeline.prompts
    pixels = torch.zeros(rows, 3, prompts.image_side, prompts.image_side, dtype=torch.uint8)
    return prompts(["a " * prompts.max_length] * rows, pixels, cut=True)


def _outline_diffusion(sources: SourcesConfig) -> dict[str, Any]:
    """The parts of Stable Diffusion by their names in a pipeline, with InsightEdit's UNet."""
    source = str(SINGLE_FILE_CONFIG) if Path(sources.diffusion).is_file() else sources.diffusion

    def read(load: Callable[..., Any], name: str) -> Any:
        return _read("diffusion", source, lambda place: load(place, subfolder=name))

    unet, vae = read(UNet2DConditionModel.load_config, "unet"), read(AutoencoderKL.load_config, "vae")
    text = read(CLIPTextConfig.from_pretrained, "text_encoder")
    with torch.device("meta"):
        plain: Any = UNet2DConditionModel.from_config(unet)
        parts = {
            "unet": InsightEditUNet.from_unet(plain, in_channels=2 * vae["latent_channels"]),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(text),
        }
    return {**parts, **load_diffusion(sources, parts=("scheduler", "tokenizer"))}


def _mllm_config(sources: SourcesConfig) -> Any:
    """The language model's config in transformers' terms."""
    original = _read("mllm", sources.mllm, llava.original_config)
    if original is None:
        return _read("mllm", sources.mllm, AutoConfig.from_pretrained)
    tower = _read("vision_tower", llava.tower_of(original, sources), CLIPVisionConfig.from_pretrained)
    return llava.converted_config(sources.mllm, original, tower)


def _read(field: str, source: str, load: Callable[[str], T]) -> T:
    """What is read from a source's config files."""
    try:
        return load(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model.sources.{field} is {source}, and its config files cannot be read ({reason}); put them there or,"
            " for a hub id, where the hub can be reached."
        ) from error
