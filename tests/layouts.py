"""Tiny models written to disk as the real ones are: names of weights, configs and files of each layout people have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tiny_models
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

VISION = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
    projection_dim=16,
)  # fmt: skip
TEXT = CLIPTextConfig(
    vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=tiny_models.TEXT_LENGTH, projection_dim=16, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
SIDE = {"height": 16, "width": 16}


def write(folder: Path, weights: Mapping[str, Tensor], name: str = "model.safetensors") -> None:
    """Weights as one file of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / name, metadata={"format": "pt"})


def write_sharded(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Weights as two files and their index, as large models have them."""
    names = sorted(weights)
    places = {key: f"model-{1 + 2 * number // len(names):05d}-of-00002.safetensors" for number, key in enumerate(names)}
    for name in set(places.values()):
        write(folder, {key: weights[key] for key in names if places[key] == name}, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_config(folder: Path, content: Mapping[str, Any], name: str = "config.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def old_clip_names(weights: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """Weights of one of CLIP's towers under the names from before transformers 5."""
    length = tiny_models.TEXT_LENGTH if tower == "text_model" else 17
    named = {f"{tower}.{name.removeprefix(f'{tower}.')}": tensor for name, tensor in weights.items()}
    return {**named, f"{tower}.embeddings.position_ids": torch.arange(length)[None]}


def whole_clip(folder: Path) -> CLIPModel:
    """CLIP with both towers, image processor and tokenizer: `openai/clip-vit-large-patch14`."""
    clip = CLIPModel(CLIPConfig(text_config=TEXT.to_dict(), vision_config=VISION.to_dict(), projection_dim=16))
    clip.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIDE).save_pretrained(folder)
    tiny_models.make_tokenizer(tiny_models.TEXT_LENGTH).save_pretrained(folder)
    return clip


# -- Stable Diffusion -------------------------------------------------------------------------------------------


def diffusion_config(folder: Path) -> Path:
    """What `insightedit.model.weights.SINGLE_FILE_CONFIG` holds, with Stable Diffusion's blocks, but narrow."""
    parts = diffusion_parts(4)
    parts["unet"].save_config(folder / "unet")
    parts["vae"].save_config(folder / "vae")
    TEXT.save_pretrained(folder / "text_encoder")
    parts["scheduler"].save_config(folder / "scheduler")
    return folder


def diffusion_parts(channels: int) -> dict[str, Any]:
    """Every part of Stable Diffusion (4 channels) or InstructPix2Pix (8)."""
    widths: Any = (8, 8, 16, 16)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=channels, block_out_channels=widths, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2,
    )  # fmt: skip
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return {
        "unet": unet,
        "vae": AutoencoderKL(block_out_channels=widths, norm_num_groups=4, layers_per_block=2, **blocks),
        "text_encoder": CLIPTextModel(TEXT),
        "tokenizer": tiny_models.make_tokenizer(tiny_models.TEXT_LENGTH),
        "scheduler": PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
    }  # fmt: skip


def diffusers_folder(folder: Path, parts: Mapping[str, Any], variant: str | None = None) -> None:
    """Parts as a diffusers folder, CLIP under its old names, in half precision if the variant says so."""
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: Any = StableDiffusionPipeline(**parts, **absent)
    pipeline.to(torch.float16 if variant else torch.float32).save_pretrained(folder, variant=variant)
    name = f"model.{variant}.safetensors" if variant else "model.safetensors"
    write(folder / "text_encoder", old_clip_names(parts["text_encoder"].state_dict(), "text_model"), name)
    pipeline.to(torch.float32)


def single_file(path: Path, parts: Mapping[str, Any]) -> None:
    """Parts as one file in the layout of CompVis' latent diffusion."""
    text = old_clip_names(parts["text_encoder"].state_dict(), "text_model")
    weights = {
        **{f"model.diffusion_model.{key}": x for key, x in ldm_unet(parts["unet"].state_dict()).items()},
        **{f"first_stage_model.{key}": x for key, x in ldm_vae(parts["vae"].state_dict()).items()},
        **{f"cond_stage_model.transformer.{key}": x for key, x in text.items()},
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.9999),
    }
    write(path.parent, weights, path.name)


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def ldm_unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet of diffusers under the names of latent diffusion: numbered input, middle and output blocks."""
    return {_ldm_unet_name(name): tensor for name, tensor in weights.items()}


def _ldm_unet_name(name: str) -> str:
    for ours, theirs in _OUTER.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, layer, rest = found.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{_inner(kind, rest)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    assert found, name
    side, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.{rest}"
    place = f"input_blocks.{3 * block + layer + 1}" if side == "down" else f"output_blocks.{3 * block + layer}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    module, _, parameter = rest.rpartition(".")
    return f"{_RESNET[module]}.{parameter}" if kind == "resnets" else rest


_VAE_NAMES = {
    r"\.conv_shortcut\.": ".nin_shortcut.", r"conv_norm_out": "norm_out",
    r"mid_block\.attentions\.0\.": "mid.attn_1.", r"group_norm": "norm", r"to_q": "q", r"to_k": "k", r"to_v": "v",
    r"to_out\.0": "proj_out", r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    r"down_blocks\.(\d)\.resnets\.": r"down.\1.block.", r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
}  # fmt: skip


def ldm_vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE of diffusers under the names of latent diffusion, whose attention is made of convolutions."""
    result: dict[str, Tensor] = {}
    for own, tensor in weights.items():
        name = own
        for pattern, replacement in _VAE_NAMES.items():
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda x: f"up.{3 - int(x[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda x: f"up.{3 - int(x[1])}.upsample", name)
        attention = "mid.attn_1" in name and tensor.ndim == 2
        result[name] = tensor[:, :, None, None] if attention else tensor
    return result


# -- LLaVA ------------------------------------------------------------------------------------------------------


def llava_15(folder: Path) -> LlavaForConditionalGeneration:
    """`llava-hf/llava-1.5-7b-hf`: two files, names and config from before transformers 5."""
    tokenizer = tiny_models.make_tokenizer(512)
    config: Any = {
        "text_config": LlamaConfig(vocab_size=400, **LANGUAGE), "vision_config": VISION, "image_seq_length": 16,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(**config))
    renames = {
        r"^model\.language_model\.": "language_model.model.", r"^lm_head": "language_model.lm_head",
        r"^model\.vision_tower\.": "vision_tower.vision_model.", r"^model\.multi": "multi",
    }  # fmt: skip
    write_sharded(folder, renamed(model.state_dict(), renames))
    content = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "model_type": "llava",
        "image_token_index": model.config.image_token_id, "pad_token_id": 0, "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", "vocab_size": 400, **LANGUAGE}, "vision_feature_layer": -2,
        "vision_config": {**VISION.to_dict(), "vocab_size": 32000}, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    write_config(folder, content)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIDE), tokenizer=tokenizer,
        patch_size=4, chat_template=tiny_models.CHAT_TEMPLATE, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return model


def llava_interleave(folder: Path) -> LlavaForConditionalGeneration:
    """`llava-hf/llava-interleave-qwen-0.5b-hf`: Qwen with tied embeddings and SigLIP, whose patches are all used."""
    tokenizer = tiny_models.make_tokenizer(512)
    vision: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    text: dict[str, Any] = {"vocab_size": 400, "tie_word_embeddings": True, **LANGUAGE}
    options: Any = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    image: Any = tokenizer.convert_tokens_to_ids("<image>")
    own: dict[str, Any] = {"text_config": Qwen2Config(**text), "vision_config": SiglipVisionConfig(**vision)}
    config = LlavaConfig(image_token_index=image, **own, **options)
    model = LlavaForConditionalGeneration(config)
    renames = {
        r"^model\.language_model\.": "language_model.model.", r"^model\.vision_tower\.": "vision_tower.vision_model.",
        r"^model\.multi": "multi",
    }  # fmt: skip
    weights = renamed(model.state_dict(), renames)
    del weights["lm_head.weight"]
    write(folder, weights)
    content = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": image,
        "projector_hidden_act": "gelu", "text_config": {"model_type": "qwen2", **text},
        "vision_config": {"model_type": "siglip_vision_model", **vision}, **options,
    }  # fmt: skip
    write_config(folder, content)
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=SIDE), tokenizer=tokenizer, patch_size=4,
        chat_template=tiny_models.CHAT_TEMPLATE, vision_feature_select_strategy="full", num_additional_image_tokens=0,
    ).save_pretrained(folder)  # fmt: skip
    return model


def renamed(weights: Mapping[str, Tensor], renames: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights with the first pattern that fits their names replaced."""
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        fitting = [(pattern, new) for pattern, new in renames.items() if re.search(pattern, name)]
        result[re.sub(*fitting[0], name) if fitting else name] = tensor
    return result


def llava_11(folder: Path, tower: Path) -> tuple[LlamaForCausalLM, nn.Linear, CLIPVisionModel]:
    """LLaVA v1.1 as its authors have it, its tower elsewhere; what it is made of."""
    words = _sentencepiece(folder)
    added = ["<im_patch>", "<im_start>", "<im_end>"]
    size = words + len(added)
    language = LlamaForCausalLM(LlamaConfig(vocab_size=size, rms_norm_eps=1e-6, **LANGUAGE))
    projector, vision = nn.Linear(16, 32), CLIPVisionModel(VISION)
    weights = {**language.state_dict()}
    weights |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_sharded(folder, weights)
    content = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "vocab_size": size, "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6, "mm_hidden_size": 16,
        "max_position_embeddings": 2048, "mm_use_im_start_end": True, "mm_vision_select_layer": -2, "use_mm_proj": True,
        "mm_vision_tower": str(tower), "tie_word_embeddings": False, "torch_dtype": "float16", **LANGUAGE,
    }  # fmt: skip
    write_config(folder, content)
    write_config(folder, {token: words + number for number, token in enumerate(added)}, "added_tokens.json")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_config(folder, {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, **special},
                 "tokenizer_config.json")  # fmt: skip
    write_config(folder, {**special, "pad_token": "<unk>"}, "special_tokens_map.json")
    write(tower, old_clip_names(vision.state_dict(), "vision_model"))
    write_config(tower, VISION.to_dict())
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIDE).save_pretrained(tower)
    return language, projector, vision


def _sentencepiece(folder: Path) -> int:
    """A `tokenizer.model` of bytes and letters; its size."""
    folder.mkdir(parents=True, exist_ok=True)
    train: Any = sentencepiece.SentencePieceTrainer.train
    train(
        sentence_iterator=iter([tiny_models.WORDS]), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
