"""Every choice of the model that a preset makes. Sizes that follow from the sources are not repeated here.

The classes are plain dataclasses, so that this floor needs no validation library; `__pydantic_config__` is what the
platform's config objects read to refuse unknown fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcesConfig:
    """Where the pretrained parts come from: local folders or hub ids."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    diffusion: str
    """Stable Diffusion or InstructPix2Pix: a folder with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`, or
    a single `.safetensors` file."""
    image_encoder: str
    """CLIP vision tower with projection, alone or in a whole CLIP, and its image processor."""
    mllm: str
    """Any model that `AutoModelForImageTextToText` and `AutoProcessor` load, or LLaVA v1.1 in its authors' layout."""
    vision_tower: str | None = None
    """The CLIP tower of such a LLaVA v1.1, where it is not what the model's own config names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QFormerConfig:
    """The Q-Former: BERT layers whose queries read the MLLM's hidden states.

    The number of queries and their width are those of the text encoder's output, which stage 1 aligns them with.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class BimConfig:
    """The bidirectional interaction module: a two-way transformer at the width of the image encoder's patches."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    enabled: bool = True
    """Without it the model has no BIM: the Q-Former's output is f_txt, and nothing is added to the UNet's latents."""
    num_layers: int = 2
    num_heads: int = 8
    mlp_size: int = 2048
    text_weight: float = 0.5
    """How much of the interaction is added to the text feature: f_txt = q' + text_weight * ZeroLinear(queries)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The image alignment adapter: mapper, Linear and LayerNorm."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    num_tokens: int = 4
    hidden_size: int = 4096
    pooling: Literal["mean", "flatten"] = "mean"
    """How the r hidden states become one vector: MLP on each and their mean, or one MLP on all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation of the language model's query and value projections (stage 2)."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """What chance decides for a sample of the diffusion loss. The defaults are those of InstructPix2Pix."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    condition_drop: float = 0.05
    """Share of the samples that lose the text alone, the source image alone, or both: three times this in all."""
    high_noise: float = 1.0
    """k of t = T (1 - (1 - u)^k) with u uniform in [0, 1): 1 draws all timesteps alike, more draws noisy ones more
    often. There the instruction decides the picture; at low noise the noisy picture itself shows it."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        if not 0 <= self.condition_drop <= 1 / 3:
            raise ValueError("condition_drop must be between 0 and a third")
        if self.high_noise <= 0:
            raise ValueError("high_noise must be more than 0; 1 draws all timesteps alike")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """What an edit uses where the caller says nothing. The defaults are those of InstructPix2Pix."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    num_inference_steps: int = 100
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The whole model."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    sources: SourcesConfig
    conditioning: Literal["mllm", "text"] = "mllm"
    """Who reads the instruction: the language model with the bridging module, or the diffusion model's own frozen text
    encoder alone. The latter is InstructPix2Pix: stage 2 trains its UNet, and there are no other stages."""
    scheduler: Literal["ddim", "euler", "euler_a", "dpm++"] | None = None
    """How an edit denoises where the caller says nothing, see `insightedit.model.schedulers`; as the diffusion model's
    own files say if None."""
    resolution: int = 256
    """Side in pixels of the square whose area an edited image has inside the model."""
    num_mm_tokens: int = 32
    prompt_length: int = 512
    """Positions of the MLLM for one edit, image and [MM] tokens included. Every row is padded to it."""
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    bim: BimConfig = field(default_factory=BimConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
