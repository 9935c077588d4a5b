"""The denoiser: Stable Diffusion's UNet with eight input channels, BIM's feature v, and an image branch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

__all__ = ["AttentionContext", "DecoupledCrossAttention", "InsightEditUNet", "ModelMixin"]


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What the cross-attention layers attend to.

    Keys and values depend on the edit alone, not on the step: `InsightEditUNet.project` computes them once.
    """

    text: Tensor
    """f_txt (B, T, D)."""
    image: Tensor | None = None
    """f_img (B, N, D); without it the image branch is not computed."""
    image_weight: Tensor | None = None
    """Weight (B,) of the image branch for each sample; 1 where it is not given."""
    projected: dict[str, tuple[Tensor, ...]] = field(default_factory=dict[str, tuple[Tensor, ...]])
    """By layer: keys and values of the text, then of the image."""


class DecoupledCrossAttention(nn.Module):
    """Attention processor: Z = Attn(Q, K_txt, V_txt) + weight * Attn(Q, K_img, V_img), one query for both."""

    def __init__(self, name: str, attention: Any) -> None:
        super().__init__()
        self.name = name
        self.plain = False
        inner = attention.to_k.out_features
        self.to_k_img = nn.Linear(attention.to_k.in_features, inner, bias=False)
        self.to_v_img = nn.Linear(attention.to_v.in_features, inner, bias=False)

    def project(self, attention: Any, context: AttentionContext) -> tuple[Tensor, ...]:
        """Keys and values of a context: of the text, and of the image if there is one."""
        text = attention.to_k(context.text), attention.to_v(context.text)
        if context.image is None:
            return text
        return (*text, self.to_k_img(context.image), self.to_v_img(context.image))

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: AttentionContext, **_unused: Any
    ) -> Tensor:
        """Attend from hidden states (B, S, E) to the context; returns (B, S, E)."""
        context = encoder_hidden_states
        keys_values = context.projected.get(self.name) or self.project(attn, context)
        query = attn.to_q(hidden_states)
        attended = _attend(query, keys_values[0], keys_values[1], attn.heads, plain=self.plain)
        if context.image is not None:
            image = _attend(query, keys_values[2], keys_values[3], attn.heads, plain=self.plain)
            if context.image_weight is not None:
                image = context.image_weight.to(image.dtype)[:, None, None] * image
            attended = attended + image
        return attn.to_out[1](attn.to_out[0](attended))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, *, plain: bool) -> Tensor:
    """Multi-head attention on (B, S, E) and (B, T, E); plain as `use_plain_attention` wants it."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if plain:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        attended = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(2)


class ConditionedConv(nn.Conv2d):
    """The UNet's first convolution, with v added after it: conv(cat[z_t, E(x)]) + v.

    The input carries v behind its own channels, so that nothing is kept between calls.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name
        """Input (B, in_channels, h, w) or (B, in_channels + out_channels, h, w)."""
        own, added = input[:, : self.in_channels], input[:, self.in_channels :]
        output = super().forward(own)
        return output if added.shape[1] == 0 else output + added


class InsightEditUNet(UNet2DConditionModel):
    """Stable Diffusion's UNet that takes v and a context of text and image.

    It is built, saved and loaded as diffusers' own; the image branch's weights are among its weights.
    """

    # The signature is the config that diffusers saves and loads: it has to read as the parent's.
    @functools.wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        conv: Any = self.conv_in
        self.conv_in = ConditionedConv(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
        for name, attention in self.cross_attentions().items():
            attention.set_processor(DecoupledCrossAttention(name, attention))

    def cross_attentions(self) -> dict[str, Any]:
        """The cross-attention layers by name."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, Attention) and name.endswith("attn2")
        }

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, in_channels: int | None = None) -> InsightEditUNet:
        """The same UNet with an image branch, and more input channels if asked; new channels begin at zero.

        Args:
            unet: a UNet of four channels (text to image) or eight (InstructPix2Pix).
            in_channels: the channels wanted; its own if None.
        """
        config = {**unet.config, "in_channels": in_channels or unet.config["in_channels"]}
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        build: Any = cls
        result: InsightEditUNet = build(**own)
        nn.Module.to(result, unet.dtype)  # diffusers' own warns of nothing
        weights = dict(unet.state_dict())
        first = torch.zeros_like(result.conv_in.weight)
        first[:, : unet.config["in_channels"]] = weights["conv_in.weight"]
        missing, unexpected = result.load_state_dict({**weights, "conv_in.weight": first}, strict=False)
        if unexpected or any(".processor." not in name for name in missing):
            raise ValueError(f"the UNet in model.sources.diffusion does not fit: {[*missing, *unexpected][:3]}.")
        result.start_image_branch()
        return result

    @torch.no_grad()
    def start_image_branch(self) -> None:
        """Copy the text's key and value projections into the image branch, as stage 3 begins."""
        for attention in self.cross_attentions().values():
            attention.processor.to_k_img.weight.copy_(attention.to_k.weight)
            attention.processor.to_v_img.weight.copy_(attention.to_v.weight)

    def project(self, context: AttentionContext) -> AttentionContext:
        """The context with every layer's keys and values computed, for all the steps of an edit."""
        projected = {
            name: attention.processor.project(attention, context) for name, attention in self.cross_attentions().items()
        }
        return AttentionContext(context.text, context.image, context.image_weight, projected)

    def denoise(self, sample: Tensor, timestep: Tensor, context: AttentionContext, spatial: Tensor | None) -> Tensor:
        """epsilon_delta(t, concat[z_t, E(x)] + v_t, f_txt, f_img) of equations 3 and 4.

        Args:
            sample: cat[z_t, E(x)] (B, 8, h, w).
            timestep: (B,) or a scalar.
            context: f_txt and f_img.
            spatial: v (B, C, G, G), resized here to the latents; None leaves it out.

        Returns:
            (B, 4, h, w), what the scheduler's `prediction_type` names.
        """
        if spatial is not None:
            added = F.interpolate(spatial.float(), size=sample.shape[-2:], mode="bilinear", align_corners=False)
            sample = torch.cat([sample, added.to(sample.dtype)], dim=1)
        forward: Any = self
        return forward(sample, timestep, encoder_hidden_states=context, return_dict=False)[0]
