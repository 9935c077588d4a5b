"""Tiny models with random weights, saved in the layouts that people have: a Stable Diffusion folder, CLIP, LLaVA."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
    PreTrainedTokenizerFast,
)

from insightedit.model.configuration import (
    AdapterConfig,
    BimConfig,
    LoraConfig,
    ModelConfig,
    QFormerConfig,
    SamplingConfig,
    SourcesConfig,
)

RESOLUTION = 16
TEXT_LENGTH = 12
WORDS = "remove the red circle USER: ASSISTANT:"
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_sources(folder: Path, prediction_type: str = "v_prediction", seed: int = 0) -> SourcesConfig:
    """Save tiny pretrained parts below a folder."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    _save_diffusion(folder / "diffusion", prediction_type)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    _image_processor().save_pretrained(folder / "image_encoder")
    _save_mllm(folder / "mllm", vision)
    return SourcesConfig(
        diffusion=str(folder / "diffusion"), image_encoder=str(folder / "image_encoder"), mllm=str(folder / "mllm")
    )


def tiny_config(sources: SourcesConfig) -> ModelConfig:
    """A model config of the tiny sources' sizes."""
    return ModelConfig(
        sources=sources,
        resolution=RESOLUTION,
        num_mm_tokens=4,
        prompt_length=64,
        qformer=QFormerConfig(num_layers=2, num_heads=2, intermediate_size=32, dropout=0.0),
        bim=BimConfig(num_layers=2, num_heads=2, mlp_size=32),
        adapter=AdapterConfig(num_tokens=2, hidden_size=32),
        lora=LoraConfig(rank=2, alpha=4, dropout=0.0),
        sampling=SamplingConfig(num_inference_steps=3, guidance_scale=2.0, image_guidance_scale=1.5),
    )


def make_tokenizer(length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=length
    )


def _image_processor() -> CLIPImageProcessorPil:
    size = {"height": 16, "width": 16}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size)


def _save_diffusion(folder: Path, prediction_type: str) -> None:
    text = CLIPTextConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH, projection_dim=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    widths: Any = (8, 8, 8)
    vae = AutoencoderKL(block_out_channels=widths, norm_num_groups=4, layers_per_block=1, latent_channels=4, **blocks)
    zero_snr = prediction_type == "v_prediction"
    prediction: Any = prediction_type
    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=False, timestep_spacing="trailing",
        beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    members: dict[str, Any] = {
        "vae": vae, "unet": unet, "text_encoder": CLIPTextModel(text), "tokenizer": make_tokenizer(TEXT_LENGTH),
        "scheduler": scheduler, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    StableDiffusionPipeline(**members).save_pretrained(folder)


def _save_mllm(folder: Path, vision: CLIPVisionConfig) -> None:
    tokenizer = make_tokenizer(512)
    language = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config: dict[str, Any] = {
        "vision_config": vision, "text_config": language, "image_seq_length": 16, "vision_feature_layer": -2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }  # fmt: skip
    LlavaForConditionalGeneration(LlavaConfig(**config)).save_pretrained(folder)
    LlavaProcessor(
        image_processor=_image_processor(), tokenizer=tokenizer, patch_size=4, chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


TINY_COUNTS = {"captions": 32, "questions": 8, "edits": 32}
"""Scenes of each dataset; a question's scene gives four records, an edit two."""


def write_tiny_preset(folder: Path, *, steps: int, **sections: Any) -> Path:
    """A file that extends nano with tiny parts and a few steps of each stage, and with other sections if given."""
    model = replace(tiny_config(build_sources(folder / "sources")), prompt_length=256, resolution=32)
    short = {
        "steps": steps,
        "global_batch": 8,
        "micro_batch": 4,
        "log_every": 1,
        "validate_every": 0,
        "precision": "fp32",
    }
    content = {
        "extends": "nano",
        "name": "tiny",
        "model": asdict(model),
        "data": {"datasets": {name: {"options": {"count": count}} for name, count in TINY_COUNTS.items()}},
        "stages": dict.fromkeys((1, 2, 3), short),
        "evaluation": {"scenes": 4},
        **sections,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
