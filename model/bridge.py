"""The bridging module of the paper's figure: Q-Former, BIM and image alignment adapter.

Shapes: B batch, r [MM] tokens, H the language model's width, T x D the text encoder's output, N image tokens,
P the projected CLIP width, G x G the image encoder's patch grid, W its width, C the UNet's first width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer


class QFormer(ModelMixin, ConfigMixin):
    """Learned queries that read the hidden states: Q_beta(q, h) of equation 2."""

    @register_to_config
    def __init__(
        self,
        num_queries: int = 77,
        hidden_size: int = 768,
        encoder_hidden_size: int = 4096,
        num_layers: int = 6,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        cross_attention_frequency: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        # They are normalised first, so their size is only how slowly they move: small ones collapse into one.
        self.queries = nn.Parameter(torch.randn(1, num_queries, hidden_size))
        config = Blip2QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=intermediate_size,
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=encoder_hidden_size,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            # BERT's 0.02 is for its own width; in a narrow model it leaves attention uniform and hardly learning.
            initializer_range=hidden_size**-0.5,
        )
        self.layers = Blip2QFormerModel(config)

    def forward(self, states: Tensor) -> Tensor:
        """Hidden states (B, r, H) to q' (B, T, D)."""
        queries = self.queries.expand(states.shape[0], -1, -1)
        return self.layers(query_embeds=queries, encoder_hidden_states=states).last_hidden_state


class BidirectionalInteraction(ModelMixin, ConfigMixin):
    """BIM: text queries and image patches that inform each other, in SAM's two-way transformer.

    Both outputs pass a zero-initialised projection, so that an untrained BIM changes nothing.
    """

    @register_to_config
    def __init__(
        self,
        text_size: int = 768,
        width: int = 1024,
        spatial_channels: int = 320,
        num_layers: int = 2,
        num_heads: int = 8,
        mlp_size: int = 2048,
        text_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.text_in = nn.Linear(text_size, width)
        shape: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "mlp_dim": mlp_size,
            "hidden_act": "relu",
            "attention_downsample_rate": 2,
            # For so few tokens plain products are no slower than a fused kernel, and on a CPU much faster backwards.
            "attn_implementation": "eager",
        }
        self.transformer = SamTwoWayTransformer(SamMaskDecoderConfig(**shape))
        self.text_out = nn.Linear(width, text_size)
        self.spatial_out = nn.Conv2d(width, spatial_channels, kernel_size=1)
        for layer in (self.text_out, self.spatial_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        # Random Fourier features of the patch positions, drawn once and kept with the weights.
        self.frequencies = nn.Buffer(torch.randn(2, width // 2))

    def grid_positions(self, side: int) -> Tensor:
        """Position features (1, W, G, G) of a square grid of `side` patches.

        They are float32 under autocast too: angles of many turns leave bfloat16 no digits for their sines.
        """
        frequencies = self.frequencies.float()
        centres = (torch.arange(side, device=frequencies.device) + 0.5) / side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        turns = 2 * torch.stack([columns, rows], dim=-1) - 1
        # A sum of products: a matrix product would be autocast.
        angles = 2 * math.pi * (turns[..., None] * frequencies).sum(dim=-2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None]

    def forward(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Join text and image.

        Args:
            queries: q' (B, T, D).
            patches: raw patches of the frozen image encoder (B, G * G, W).

        Returns:
            f_txt (B, T, D), and v (B, C, G, G), which the UNet resizes to its latents. Projecting before resizing
            gives the same as after it, both being linear, and is smaller to send.
        """
        side = math.isqrt(patches.shape[1])
        image = patches.transpose(1, 2).unflatten(2, (side, side))
        positions = self.grid_positions(side).to(image.dtype).expand(image.shape[0], -1, -1, -1)
        text, keys = self.transformer(
            point_embeddings=self.text_in(queries).unsqueeze(1),
            image_embeddings=image,
            image_positional_embeddings=positions,
            attention_similarity=None,
        )
        spatial = keys.squeeze(1).transpose(1, 2).unflatten(2, (side, side))
        f_txt = queries + self.config["text_weight"] * self.text_out(text.squeeze(1))
        return f_txt, self.spatial_out(spatial)


class ImageAlignmentAdapter(ModelMixin, ConfigMixin):
    """IAA: a mapper from the hidden states to CLIP's image space, then Linear and LayerNorm to f_img."""

    @register_to_config
    def __init__(
        self,
        num_mm_tokens: int = 32,
        input_size: int = 4096,
        hidden_size: int = 4096,
        embed_size: int = 768,
        context_size: int = 768,
        num_tokens: int = 4,
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "flatten"):
            raise ValueError(f"adapter.pooling is {pooling!r}; use 'mean' or 'flatten'.")
        joined = input_size * num_mm_tokens if pooling == "flatten" else input_size
        self.mapper = nn.Sequential(nn.Linear(joined, hidden_size), nn.GELU(), nn.Linear(hidden_size, embed_size))
        self.projection = ImageProjection(embed_size, context_size, num_tokens)
        # f_img begins at zero, so that stage 3 starts from what stage 2 draws; its keys and values have no bias.
        nn.init.zeros_(self.projection.norm.weight)

    def map(self, states: Tensor) -> Tensor:
        """Mapper(h) of equations 2 and 3: hidden states (B, r, H) to a CLIP image embedding (B, P)."""
        if self.config["pooling"] == "flatten":
            return self.mapper(states.flatten(1))
        return self.mapper(states).mean(dim=1)

    def project(self, embeds: Tensor) -> Tensor:
        """f_img (B, N, D) of CLIP image embeddings (B, P); of zeros where the condition is dropped."""
        return self.projection(embeds)

    def forward(self, states: Tensor) -> Tensor:
        """f_img (B, N, D) of hidden states (B, r, H)."""
        return self.project(self.map(states))
