"""LLaVA v1.1 in its authors' layout: Vicuna's weights, one Linear to project the image, and a CLIP tower elsewhere.

It becomes the LLaVA of transformers, whose projector is two Linears around an activation: here the first is LLaVA's,
the activation does nothing, and the second is the identity.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)

from insightedit.model.configuration import SourcesConfig

Model = LlavaForConditionalGeneration
VisionTower = CLIPVisionModel

KEYS: Final = {
    r"^model\.mm_projector\.": "model.multi_modal_projector.linear_1.",
    r"^model\.(layers|embed_tokens|norm)\.": r"model.language_model.\1.",
}
"""Names of weights in the authors' files, as patterns, and in transformers."""
ABSENT: Final = re.compile(r"model\.(vision_tower\.|multi_modal_projector\.linear_2\.)")
"""Weights that the authors' files do not have: `joined` fills them in."""

_IMAGE_TOKEN = "<im_patch>"  # noqa: S105
_START, _END = "<im_start>", "<im_end>"
# The conversation that the model was tuned with.
_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
    "{% for message in messages %} USER: {% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{_START}{_IMAGE_TOKEN}{_END}\n{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def original_config(source: str) -> dict[str, Any] | None:
    """The config of a LLaVA in its authors' layout; None for any other model.

    Raises:
        ValueError: there is no config, or it cannot be read.
    """
    try:
        content: dict[str, Any] = PreTrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model.sources.mllm is {source}, and its config.json cannot be read: {reason}") from error
    if not content:
        raise ValueError(f"model.sources.mllm is {source}, which has no config.json; name a whole model.")
    return content if "mm_vision_tower" in content else None


def tower_of(original: dict[str, Any], sources: SourcesConfig) -> str:
    """Where the CLIP tower is: where the sources say, or else the config."""
    return sources.vision_tower or original["mm_vision_tower"]


def converted_config(source: str, original: dict[str, Any], tower: Any) -> LlavaConfig:
    """The same model in transformers' terms.

    Args:
        source: folder or hub id.
        original: the authors' config.
        tower: config of the CLIP tower.

    Raises:
        ValueError: it is another LLaVA than v1.1.
    """
    tokenizer = LlamaTokenizer.from_pretrained(source)
    if original.get("mm_projector_type", "linear") != "linear" or _IMAGE_TOKEN not in tokenizer.get_vocab():
        raise ValueError(
            "model.sources.mllm is a LLaVA in its authors' layout, but not v1.1; name it in transformers' layout, such"
            " as llava-hf/llava-1.5-7b-hf."
        )
    names = LlamaConfig().to_dict().keys() - {"architectures", "model_type", "transformers_version", "dtype"}
    language = LlamaConfig(**{name: value for name, value in original.items() if name in names})
    config: dict[str, Any] = {
        "text_config": language,
        "vision_config": tower,
        "image_token_id": tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN),
        "image_seq_length": (tower.image_size // tower.patch_size) ** 2,
        "projector_hidden_act": "linear",
        "vision_feature_layer": original.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default",
    }
    return LlavaConfig(**config)


@torch.no_grad()
def joined(model: Any, tower: CLIPVisionModel) -> Any:
    """The model with its tower and with the identity behind its projector, in place."""
    second = model.model.multi_modal_projector.linear_2
    torch.nn.init.eye_(second.weight)
    torch.nn.init.zeros_(second.bias)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    # Or it would be saved under the names that it was read with, beside a config of transformers' own.
    model._weight_conversions = None
    return model


def build_processor(source: str, tower: str) -> LlavaProcessor:
    """The processor of texts and images."""
    config = CLIPVisionConfig.from_pretrained(tower)
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(tower),
        tokenizer=LlamaTokenizer.from_pretrained(source, add_bos_token=True),
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_IMAGE_TOKEN,
        chat_template=_TEMPLATE,
    )
