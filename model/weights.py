"""Pretrained parts from where people have them: folders, hub ids and single files, always safetensors.

Every weight of a part must be in its files, and every weight in its files must have a place in the part: nothing is
left random, and nothing is left out in silence. Other formats than safetensors can run code when they are read, and
are refused. `docs/weights.md` shows the layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
)

from insightedit.model import llava
from insightedit.model.configuration import SourcesConfig

DIFFUSION_PARTS: Final = ("scheduler", "vae", "unet", "text_encoder", "tokenizer")

SINGLE_FILE_CONFIG = Path(__file__).parent / "stable-diffusion-1"
"""The sizes of Stable Diffusion 1.x and InstructPix2Pix, which their single files do not hold."""

_PICKLES: Final = frozenset({".bin", ".ckpt", ".pt", ".pth"})
_VARIANTS: Final = (None, "fp16")
# What the other half of a whole CLIP is called in its files.
_CLIP_TEXT: Final = re.compile(r"text_model\.|text_projection\.|logit_scale$")
_NOTHING: Final = re.compile(r"(?!)")


def load_diffusion(
    sources: SourcesConfig, dtype: torch.dtype = torch.float32, parts: Sequence[str] = DIFFUSION_PARTS
) -> dict[str, Any]:
    """Parts of Stable Diffusion or InstructPix2Pix by their names in a diffusers folder.

    Args:
        sources: `diffusion` is a diffusers folder, a hub id or a single `.safetensors` file. A single file has no
            tokenizer: it comes from `image_encoder`, as both are CLIP's.
        dtype: of the weights.
        parts: which of them.

    Raises:
        ValueError: a part is not there, is no safetensors, or has other weights than it must have.
    """
    if Path(sources.diffusion).is_file():
        return _from_single_file(Path(sources.diffusion), sources.image_encoder, dtype, parts)
    classes: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    loaded = {
        name: _load(classes[name], "diffusion", sources.diffusion, dtype, subfolder=name)
        for name in parts
        if name in classes
    }
    return {**loaded, **_without_weights(sources.diffusion, parts)}


def load_image_encoder(sources: SourcesConfig, dtype: torch.dtype = torch.float32) -> CLIPVisionModelWithProjection:
    """CLIP's vision tower with its projection, alone or out of a whole CLIP."""
    source = sources.image_encoder
    return _load(CLIPVisionModelWithProjection, "image_encoder", source, dtype, others=_CLIP_TEXT)


def load_image_processor(sources: SourcesConfig) -> Any:
    """The image processor beside CLIP's vision tower."""
    return AutoImageProcessor.from_pretrained(sources.image_encoder)


def load_mllm(sources: SourcesConfig, dtype: torch.dtype | Literal["auto"] = torch.float32) -> Any:
    """The language model: what `AutoModelForImageTextToText` loads, or a LLaVA of the authors' own layout.

    Args:
        sources: where it is.
        dtype: of its weights; "auto" is that of its files.
    """
    original = llava.original_config(sources.mllm)
    if original is None:
        return _load(AutoModelForImageTextToText, "mllm", sources.mllm, dtype)
    tower = _load(llava.VisionTower, "vision_tower", llava.tower_of(original, sources), dtype, others=_CLIP_TEXT)
    config = llava.converted_config(sources.mllm, original, tower.config)
    options: dict[str, Any] = {"config": config, "key_mapping": llava.KEYS}
    model = _load(llava.Model, "mllm", sources.mllm, dtype, absent=llava.ABSENT, **options)
    return llava.joined(model, tower)


def load_mllm_processor(sources: SourcesConfig) -> Any:
    """The language model's processor of texts and images."""
    original = llava.original_config(sources.mllm)
    if original is None:
        return AutoProcessor.from_pretrained(sources.mllm)
    return llava.build_processor(sources.mllm, llava.tower_of(original, sources))


def _load(
    part: Any,
    field: str,
    source: str,
    dtype: torch.dtype | Literal["auto"],
    *,
    subfolder: str = "",
    others: re.Pattern[str] = _NOTHING,
    absent: re.Pattern[str] = _NOTHING,
    **options: Any,
) -> Any:
    """A part with every weight from its files.

    Args:
        part: a class with `from_pretrained`.
        field: of the sources, for messages.
        source: folder or hub id.
        others: names in the files that belong to something else.
        absent: names of the part that are filled in from elsewhere.
    """
    where = f"model.sources.{field} is {source}, and its {subfolder or 'weights'}"
    _refuse_pickles(Path(source) / subfolder, where)
    settings = {"subfolder": subfolder, "torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    errors: list[Exception] = []
    for variant in _VARIANTS:
        try:
            model, info = part.from_pretrained(source, variant=variant, **settings, **options)
        except (OSError, RuntimeError, SafetensorError) as error:
            errors.append(error)
            continue
        _check(
            [name for name in info["missing_keys"] if not absent.match(name)],
            [name for name in info["unexpected_keys"] if not others.match(name)],
            where,
        )
        return model
    raise ValueError(f"{where} cannot be loaded: {_line(errors[0])}") from errors[0]


def _without_weights(source: str, parts: Sequence[str]) -> dict[str, Any]:
    """Scheduler and tokenizer of a diffusers folder, whatever their classes are."""
    left_out: dict[str, Any] = dict.fromkeys(
        ("vae", "unet", "text_encoder", "safety_checker", "feature_extractor", "image_encoder")
    )
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(source, requires_safety_checker=False, **left_out)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.sources.diffusion is {source}, and is no diffusers folder: {_line(error)}") from error
    return {name: getattr(pipeline, name) for name in ("scheduler", "tokenizer") if name in parts}


# -- single files -------------------------------------------------------------------------------------------------


def _from_single_file(path: Path, clip: str, dtype: torch.dtype, parts: Sequence[str]) -> dict[str, Any]:
    loaders: dict[str, Callable[[], Any]] = {
        "unet": lambda: _single_file_unet(path, dtype),
        "vae": lambda: _single_file_vae(path, dtype),
        "text_encoder": lambda: _single_file_text_encoder(path, dtype),
        "tokenizer": lambda: _clip_tokenizer(path, clip),
        "scheduler": lambda: EulerAncestralDiscreteScheduler.from_pretrained(SINGLE_FILE_CONFIG, subfolder="scheduler"),
    }
    _refuse_pickles(path, f"model.sources.diffusion is {path}, and its weights")
    return {name: loaders[name]() for name in parts}


def _single_file_unet(path: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    weights = _tensors(path, "model.diffusion_model.", dtype)
    config: Any = UNet2DConditionModel.load_config(SINGLE_FILE_CONFIG, subfolder="unet")
    # Four for a picture from text, eight for InstructPix2Pix.
    config["in_channels"] = weights["model.diffusion_model.input_blocks.0.0.weight"].shape[1]
    converted: Any = convert_ldm_unet_checkpoint(dict(weights), config)
    return _filled(UNet2DConditionModel, config, converted, len(weights), f"the UNet of {path}")


def _single_file_vae(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    weights = _tensors(path, "first_stage_model.", dtype)
    config: Any = AutoencoderKL.load_config(SINGLE_FILE_CONFIG, subfolder="vae")
    converted: Any = convert_ldm_vae_checkpoint(dict(weights), config)
    return _filled(AutoencoderKL, config, converted, len(weights), f"the VAE of {path}")


def _single_file_text_encoder(path: Path, dtype: torch.dtype) -> CLIPTextModel:
    prefix = "cond_stage_model.transformer."
    weights = {name.removeprefix(prefix): tensor for name, tensor in _tensors(path, prefix, dtype).items()}
    config = CLIPTextConfig.from_pretrained(SINGLE_FILE_CONFIG, subfolder="text_encoder")
    load: Any = CLIPTextModel.from_pretrained
    try:
        model, info = load(None, config=config, state_dict=weights, torch_dtype=dtype, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"the text encoder of {path} is not Stable Diffusion 1.x's: {_line(error)}") from error
    _check(info["missing_keys"], info["unexpected_keys"], f"the text encoder of {path}")
    return model


def _clip_tokenizer(path: Path, clip: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(clip)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.sources.diffusion is {path}, a single file, which has no tokenizer, and model.sources.image_encoder"
            f" is {clip}, which has none either; put CLIP's tokenizer beside the image encoder."
        ) from error


def _tensors(path: Path, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a safetensors file whose names begin with a prefix."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
            found = {name: file.get_tensor(name).to(dtype) for name in names}
    except SafetensorError as error:
        raise ValueError(f"model.sources.diffusion is {path}, which is damaged or no safetensors: {error}.") from error
    if not found:
        raise ValueError(
            f"model.sources.diffusion is {path}, which has no {prefix}*; name a whole Stable Diffusion 1.x or"
            " InstructPix2Pix."
        )
    return found


def _filled(part: Any, config: dict[str, Any], weights: dict[str, Tensor], in_file: int, where: str) -> Any:
    """A diffusers part that takes over the weights, which must be all of it and all of the file's."""
    with torch.device("meta"):
        model = part.from_config(config)
    own = model.state_dict()
    unlike = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
    _check([name for name in own if name not in weights], [*(weights.keys() - own.keys()), *unlike], where)
    if in_file != len(weights):
        raise ValueError(f"{where} has {in_file - len(weights)} weights that Stable Diffusion 1.x does not know.")
    model.load_state_dict(weights, assign=True)
    return model.eval()


# -- what is said -------------------------------------------------------------------------------------------------


def _refuse_pickles(path: Path, where: str) -> None:
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    suffixes = {file.suffix for file in files}
    if suffixes & _PICKLES and ".safetensors" not in suffixes:
        raise ValueError(
            f"{where} are pickles, which can run code when they are read; convert them to safetensors as"
            " docs/weights.md shows, on a machine that may run it."
        )


def _check(missing: Sequence[str], unexpected: Sequence[str], where: str) -> None:
    if missing:
        raise ValueError(f"{where} lack {_few(missing)}; name files of the whole model.")
    if unexpected:
        raise ValueError(f"{where} have {_few(unexpected)}, which the model has no place for; name files of its own.")


def _few(names: Sequence[str]) -> str:
    listed = sorted(names)
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
