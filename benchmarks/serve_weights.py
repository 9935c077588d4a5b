"""The weights and the edits that both halves of `serve.py` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from insightedit.model.pipeline import load_pipeline
from insightedit.model.unet import InsightEditUNet
from insightedit.model.weights import SINGLE_FILE_CONFIG
from insightedit.platform.config import PRESETS
from insightedit.platform.datasets.shapes_edits import sample_edit
from insightedit.platform.datasets.shapes_world import render
from insightedit.serve.backend import EditJob

FOUNDATION = PRESETS / "nano-foundation" / "diffusion"
GUIDANCE: dict[str, Any] = {"guidance_scale": 7.5, "image_guidance_scale": 1.5}


def make_job(seed: int, size: int, steps: int) -> EditJob:
    """An edit of the shapes world."""
    edit = sample_edit(seed, "validation")
    image = Image.fromarray(render(edit.source)).resize((size, size), Image.Resampling.BICUBIC)
    return EditJob(prompt=edit.simple, pixels=np.asarray(image), seed=seed, num_inference_steps=steps, **GUIDANCE)


def save_instruct_pix2pix(source: Path, folder: Path) -> None:
    """A pipeline's UNet without what is InsightEdit's own, its VAE and its text encoder, as InstructPix2Pix."""
    parts = load_pipeline(source).components
    inner: Any = parts["unet"]
    wide = InsightEditUNet.from_unet(inner, in_channels=8) if inner.config["in_channels"] == 4 else inner
    unet: Any = UNet2DConditionModel.from_config({k: v for k, v in wide.config.items() if not k.startswith("_")})
    unet.load_state_dict({name: x for name, x in wide.state_dict().items() if ".processor." not in name})
    save(folder, {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")} | {"unet": unet})


def save_full_size(folder: Path) -> None:
    """InstructPix2Pix of Stable Diffusion 1.5's size with random weights, which take as long as any."""
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    unet_config: Any = UNet2DConditionModel.load_config(SINGLE_FILE_CONFIG, subfolder="unet")
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config({**unet_config, "in_channels": 8}),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(SINGLE_FILE_CONFIG, subfolder="vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(SINGLE_FILE_CONFIG / "text_encoder")),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(FOUNDATION / "tokenizer", model_max_length=77),
        "scheduler": EulerAncestralDiscreteScheduler.from_pretrained(SINGLE_FILE_CONFIG, subfolder="scheduler"),
    }
    torch.set_default_dtype(torch.float32)
    save(folder, parts)


def save(folder: Path, parts: dict[str, Any]) -> None:
    """A folder of InstructPix2Pix."""
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionInstructPix2PixPipeline(**parts, **absent).save_pretrained(folder)
