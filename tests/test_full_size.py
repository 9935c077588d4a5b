"""The paper's sizes on one machine's CPU: `make test-full-size` builds, saves, loads and edits, inside 24 GB."""

from __future__ import annotations

import gc
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from insightedit.model.configuration import ModelConfig, SourcesConfig
from insightedit.model.insightedit import build_pipeline
from insightedit.model.pipeline import SHARD_SIZE, load_pipeline
from insightedit.model.weights import SINGLE_FILE_CONFIG
from insightedit.platform.config import load_preset

GIGABYTE = 10**9
LIMIT_GB = 24
LAYERS = 32
"""Of LLaVA-7B's language model. With fewer the same is done in less memory and time."""


def peak() -> float:
    """The most memory that this process has had, in GB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) * 1024 / GIGABYTE


def random_model(build: Callable[[], Any]) -> Any:
    """A model in bf16 whose matrices are random, made without a second copy or another type on the way."""
    with torch.device("meta"):
        model = build().to(torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def write_sources(folder: Path, layers: int) -> SourcesConfig:
    """The sources of the paper's preset with random weights: Stable Diffusion 1.5, CLIP ViT-L/14 and LLaVA 1.5."""
    torch.manual_seed(0)
    _write_diffusion(folder / "diffusion")
    sizes: dict[str, Any] = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    clip = CLIPVisionConfig(image_size=224, **sizes)
    random_model(lambda: CLIPVisionModelWithProjection(clip)).save_pretrained(folder / "image_encoder")
    _image_processor(224).save_pretrained(folder / "image_encoder")
    tokenizer = tiny_models.make_tokenizer(4096)
    config: Any = {
        "text_config": LlamaConfig(vocab_size=32064, num_hidden_layers=layers, max_position_embeddings=4096),
        "vision_config": CLIPVisionConfig(image_size=336, **sizes),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    llava = random_model(lambda: LlavaForConditionalGeneration(LlavaConfig(**config)))
    llava.save_pretrained(folder / "mllm", max_shard_size=SHARD_SIZE)
    LlavaProcessor(
        image_processor=_image_processor(336), tokenizer=tokenizer, patch_size=14,
        chat_template=tiny_models.CHAT_TEMPLATE, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "mllm")  # fmt: skip
    return SourcesConfig(**{name: str(folder / name) for name in ("diffusion", "image_encoder", "mllm")})


def _image_processor(side: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _write_diffusion(folder: Path) -> None:
    unet: Any = UNet2DConditionModel.load_config(SINGLE_FILE_CONFIG, subfolder="unet")
    vae: Any = AutoencoderKL.load_config(SINGLE_FILE_CONFIG, subfolder="vae")
    text = CLIPTextConfig.from_pretrained(SINGLE_FILE_CONFIG, subfolder="text_encoder")
    scheduler = EulerAncestralDiscreteScheduler.from_pretrained(SINGLE_FILE_CONFIG, subfolder="scheduler")
    parts: dict[str, Any] = {
        "unet": random_model(lambda: UNet2DConditionModel.from_config(unet)),
        "vae": random_model(lambda: AutoencoderKL.from_config(vae)),
        "text_encoder": random_model(lambda: CLIPTextModel(text)),
        "tokenizer": tiny_models.make_tokenizer(77),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    StableDiffusionPipeline(**parts).save_pretrained(folder)


def build_save_load_edit(config: ModelConfig, folder: Path, say: Callable[[str], None]) -> Image.Image:
    """One edit of 256 pixels by a model that was built, saved and loaded."""
    pipeline: Any = build_pipeline(config, torch.bfloat16)
    parameters = sum(p.numel() for part in pipeline.components.values() if isinstance(part, nn.Module)
                     for p in part.parameters())  # fmt: skip
    say(f"built, {parameters / 1e9:.2f} billion parameters")
    pipeline.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
    say("saved")
    del pipeline
    gc.collect()
    shutil.rmtree(folder.with_name("sources"))
    loaded: Any = load_pipeline(folder, torch.bfloat16)
    say("loaded")
    picture = Image.effect_noise((256, 256), 80).convert("RGB")
    edited = loaded("remove the red circle", picture, num_inference_steps=2).images[0]
    say("edited")
    return edited


@pytest.mark.full_size
@pytest.mark.timeout(7200)
def test_the_papers_model_is_built_saved_loaded_and_edits_in_24_gb(tmp_path: Path) -> None:
    started = time.monotonic()

    def say(what: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:6.0f} s  {peak():6.2f} GB at most  {what}\n")
        sys.stdout.flush()

    sources = write_sources(tmp_path / "sources", LAYERS)
    gc.collect()
    say("sources written")
    model = replace(load_preset("sd15-llava7b").model, sources=sources)
    edited = build_save_load_edit(model, tmp_path / "pipeline", say)
    assert edited.size == (256, 256)
    assert peak() < LIMIT_GB
