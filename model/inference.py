"""The UNet's forward pass as running edits need it: without gradients, and with nothing computed twice.

The modules are diffusers' own, walked in their order. What depends on the edit alone is computed once an edit (keys and
values, the first convolution of the source latents with v), what depends on the timestep alone once a timestep (the
time embedding and each block's share of it), and guidance branches that see the same latents are one row up to the
first cross-attention, where they part.

Shapes: E edits, T trunks (the rows before the first cross-attention), R rows (one for each edit's guidance branch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from insightedit.model.guidance import EditConditions
from insightedit.model.packing import packed
from insightedit.model.unet import AttentionContext, InsightEditUNet

_BLOCKS = frozenset(
    {"CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D"}
)
_PLAIN = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "class_embed_type": None,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
}
"""What a UNet's config has to say for the walk below to be its forward pass; so say Stable Diffusion 1 and 2."""
_TIMESTEPS = 1000
"""Timesteps whose embeddings are kept: as many as a model is trained on."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What stays the same in an edit's rows over its steps; or in those of several edits, one below the other."""

    static: Tensor
    """(T, C, h, w): the first convolution of the source latents, or of zeros, its bias, and v."""
    edit_of_trunk: Tensor
    """(T,): which of the edits' latents a trunk sees."""
    trunk_of_row: Tensor
    """(R,)."""
    keys_values: Mapping[str, tuple[Tensor, ...]]
    """By layer: keys and values (R, heads, tokens, width) of the text, then of the image."""
    image_weight: Tensor | None
    """(R, 1, 1); None for a model without an image branch."""

    def first(self) -> Rows:
        """The first row of an edit alone."""
        one = {name: tuple(x[:1] for x in tensors) for name, tensors in self.keys_values.items()}
        weight = None if self.image_weight is None else self.image_weight[:1]
        return Rows(self.static[:1], self.edit_of_trunk[:1], self.trunk_of_row[:1], one, weight)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """The rows of several edits of one size."""
        if len(parts) == 1:
            return parts[0]
        trunks = torch.tensor([0, *(len(part.static) for part in parts[:-1])]).cumsum(0).tolist()
        weights = [part.image_weight for part in parts if part.image_weight is not None]
        return Rows(
            torch.cat([part.static for part in parts]),
            torch.cat([part.edit_of_trunk + number for number, part in enumerate(parts)]),
            torch.cat([part.trunk_of_row + offset for part, offset in zip(parts, trunks, strict=True)]),
            {
                name: tuple(map(torch.cat, zip(*(part.keys_values[name] for part in parts), strict=True)))
                for name in parts[0].keys_values
            },
            torch.cat(weights) if weights else None,
        )


class UNetRunner:
    """Runs a UNet for edits in progress."""

    def __init__(self, unet: InsightEditUNet, *, compiled: bool = False) -> None:
        """Find the UNet's layers in the order in which they run.

        Args:
            unet: its weights are read where they are; changed weights need another runner.
            compiled: run the blocks through torch.compile.

        Raises:
            ValueError: the UNet is of a kind that is not walked here.
        """
        _check(unet)
        # torch.compile orders weights by itself.
        self.unet = unet if compiled else packed(unet)
        self._unet: Any = self.unet
        self._conv_in: Any = unet.conv_in
        self._resnet = torch.compile(_resnet) if compiled else _resnet
        self._transformer = torch.compile(_transformer) if compiled else _transformer
        self._shifts: dict[float, Tensor] = {}
        self._shares: dict[Any, slice] = {}
        end = 0
        for block in (*self._unet.down_blocks, self._unet.mid_block, *self._unet.up_blocks):
            for resnet in block.resnets:
                begin, end = end, end + resnet.time_emb_proj.out_features
                self._shares[resnet] = slice(begin, end)

    def rows(self, conditions: EditConditions, source: Tensor, branches: Sequence[str], image_weight: float) -> Rows:
        """What stays the same over the steps of one edit.

        Args:
            conditions: of one edit.
            source: its source latents (1, 4, h, w).
            branches: guidance branches, in the order text, image, none.
            image_weight: of the image branch.
        """
        trunks = sorted({branch == "none" for branch in branches})
        static = self._static(conditions, source)[[int(sourceless) for sourceless in trunks]]
        trunk_of_row = torch.tensor([trunks.index(branch == "none") for branch in branches], device=source.device)
        weight = None
        if conditions.image is not None:
            weight = torch.full((len(branches), 1, 1), image_weight, dtype=source.dtype, device=source.device)
        edit_of_trunk = torch.zeros(len(trunks), dtype=torch.long, device=source.device)
        return Rows(static, edit_of_trunk, trunk_of_row, self._keys_values(conditions, branches), weight)

    def _static(self, conditions: EditConditions, source: Tensor) -> Tensor:
        """The first convolution (2, C, h, w) of the source latents and of zeros, with its bias and v."""
        conv = self._conv_in
        weight = conv.weight[:, conv.in_channels - source.shape[1] :]
        static = F.conv2d(torch.cat([source, torch.zeros_like(source)]), weight, conv.bias, padding=conv.padding)
        if conditions.spatial is None:
            return static
        size = source.shape[-2:]
        added = F.interpolate(conditions.spatial.float(), size=size, mode="bilinear", align_corners=False)
        return static + added.to(static.dtype)

    def _keys_values(self, conditions: EditConditions, branches: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """Keys and values of the branches. Without the instruction they are all the same: they are computed once."""
        kinds = sorted({branch != "text" for branch in branches})
        texts = torch.cat([conditions.null_text if null else conditions.text for null in kinds])
        images = None
        if conditions.image is not None and conditions.null_image is not None:
            images = torch.cat([conditions.null_image if null else conditions.image for null in kinds])
        order = [kinds.index(branch != "text") for branch in branches]
        layers = self._unet.cross_attentions()
        projected = self._unet.project(AttentionContext(texts, images)).projected
        return {
            name: tuple(_heads(x[order], layers[name].heads).contiguous() for x in tensors)
            for name, tensors in projected.items()
        }

    def shifts(self, timestep: Tensor) -> Tensor:
        """What a timestep adds inside the residual blocks, one behind the other (1, S)."""
        key = float(timestep)
        if key not in self._shifts:
            if len(self._shifts) == _TIMESTEPS:
                self._shifts.clear()
            unet = self._unet
            waves = unet.time_proj(timestep.reshape(1).to(unet.device)).to(unet.dtype)
            embedding = F.silu(unet.time_embedding(waves))
            self._shifts[key] = torch.cat([resnet.time_emb_proj(embedding) for resnet in self._shares], dim=1)
        return self._shifts[key]

    def __call__(
        self, latents: Tensor, shifts: Tensor, rows: Rows, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            latents: (E, 4, h, w), scaled as the scheduler wants it.
            shifts: of the edits' timesteps (E, S).
            rows: of the edits.
            deep: what an earlier step gave as its second result: the step then runs the last layer alone.

        Returns:
            The UNet's output (R, 4, h, w), and the features (R, C, h, w) before its last layer.
        """
        unet = self._unet
        conv = self._conv_in
        mixed = F.conv2d(latents, conv.weight[:, : latents.shape[1]], padding=conv.padding)
        walk = _Walk(self, shifts, rows)
        first = mixed[rows.edit_of_trunk] + rows.static
        deep = self._up_to_last(walk, first) if deep is None else deep
        hidden = walk.layer(unet.up_blocks[-1], -1, torch.cat([deep, walk.spread(first)], dim=1))
        return unet.conv_out(F.silu(unet.conv_norm_out(walk.spread(hidden)))), deep

    def _up_to_last(self, walk: _Walk, hidden: Tensor) -> Tensor:
        """All but the last layer, which takes the result together with the first convolution's."""
        unet = self._unet
        skips = [hidden]
        for block in unet.down_blocks:
            for index in range(len(block.resnets)):
                hidden = walk.layer(block, index, hidden)
                skips.append(hidden)
            for sampler in block.downsamplers or ():
                hidden = sampler(hidden)
                skips.append(hidden)
        middle = unet.mid_block
        hidden = walk.residual(middle.resnets[0], hidden)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            hidden = walk.residual(resnet, walk.attend(attention, hidden))
        for block in unet.up_blocks:
            for index in range(len(block.resnets)):
                if len(skips) == 1:
                    break
                joined = torch.cat([walk.spread(hidden), walk.spread(skips.pop())], dim=1)
                hidden = walk.layer(block, index, joined)
            for sampler in block.upsamplers or ():
                hidden = sampler(hidden)
        return walk.spread(hidden)

    def run_resnet(self, resnet: Any, hidden: Tensor, shifts: Tensor) -> Tensor:
        """A residual block on rows (B, C, h, w) with their timesteps' shifts (B or 1, S)."""
        return self._resnet(resnet, hidden, shifts[:, self._shares[resnet], None, None])

    def run_transformer(self, transformer: Any, hidden: Tensor, rows: Rows) -> Tensor:
        """A transformer on trunks or rows; gives rows."""
        return self._transformer(transformer, hidden, rows)


class _Walk:
    """One step's way through the layers, with what each of them needs beside its input."""

    def __init__(self, runner: UNetRunner, shifts: Tensor, rows: Rows) -> None:
        self._runner = runner
        self._rows = rows
        self._of_trunks = shifts if len(shifts) == 1 else shifts[rows.edit_of_trunk]
        self._of_rows = shifts if len(shifts) == 1 else self._of_trunks[rows.trunk_of_row]

    def spread(self, hidden: Tensor) -> Tensor:
        """Trunks (T, ...) as rows (R, ...); rows as they are. Where there are as many of both, they are the same."""
        return _spread(hidden, self._rows.trunk_of_row)

    def residual(self, resnet: Any, hidden: Tensor) -> Tensor:
        """A residual block."""
        shifts = self._of_rows if len(hidden) == len(self._of_rows) else self._of_trunks
        return self._runner.run_resnet(resnet, hidden, shifts)

    def attend(self, transformer: Any, hidden: Tensor) -> Tensor:
        """A transformer, if there is one."""
        return hidden if transformer is None else self._runner.run_transformer(transformer, hidden, self._rows)

    def layer(self, block: Any, index: int, hidden: Tensor) -> Tensor:
        """A residual block of a block of the UNet, and the transformer behind it where it has one."""
        attentions = getattr(block, "attentions", None)
        return self.attend(attentions[index] if attentions else None, self.residual(block.resnets[index], hidden))


def _resnet(block: Any, hidden: Tensor, shift: Tensor) -> Tensor:
    inner = block.conv1(F.silu(block.norm1(hidden))) + shift
    inner = block.conv2(F.silu(block.norm2(inner)))
    return (hidden if block.conv_shortcut is None else block.conv_shortcut(hidden)) + inner


def _transformer(module: Any, hidden: Tensor, rows: Rows) -> Tensor:
    """Transformer blocks over the positions of (B, C, h, w); where trunks part, (R, C, h, w) comes back."""
    height, width = hidden.shape[-2:]
    tokens = module.norm(hidden).permute(0, 2, 3, 1).flatten(1, 2)
    tokens = _product(module.proj_in, tokens)
    for block in module.transformer_blocks:
        tokens = tokens + _self_attention(block.attn1, block.norm1(tokens))
        tokens = _spread(tokens, rows.trunk_of_row)
        tokens = tokens + _cross_attention(block.attn2, block.norm2(tokens), rows)
        value, gate = block.ff.net[0].proj(block.norm3(tokens)).chunk(2, dim=-1)
        tokens = tokens + block.ff.net[2](value * F.gelu(gate))
    tokens = _product(module.proj_out, tokens)
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2) + _spread(hidden, rows.trunk_of_row)


def _product(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer; or a convolution of 1x1, which over positions is one."""
    if isinstance(layer, nn.Conv2d):
        return F.linear(tokens, layer.weight.flatten(1), layer.bias)
    return layer(tokens)


def _self_attention(attention: Any, tokens: Tensor) -> Tensor:
    query, key, value = (
        _heads(layer(tokens), attention.heads) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    return attention.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _cross_attention(attention: Any, tokens: Tensor, rows: Rows) -> Tensor:
    """Z = Attn(Q, K_txt, V_txt) + weight * Attn(Q, K_img, V_img), one query for both."""
    query = _heads(attention.to_q(tokens), attention.heads)
    tensors = rows.keys_values[attention.processor.name]
    attended = F.scaled_dot_product_attention(query, tensors[0], tensors[1]).transpose(1, 2).flatten(2)
    if rows.image_weight is not None:
        image = F.scaled_dot_product_attention(query, tensors[2], tensors[3]).transpose(1, 2).flatten(2)
        attended = attended + rows.image_weight * image
    return attention.to_out[0](attended)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, E) as (B, heads, S, E / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _spread(x: Tensor, trunk_of_row: Tensor) -> Tensor:
    return x if len(x) == len(trunk_of_row) else x[trunk_of_row]


def _check(unet: InsightEditUNet) -> None:
    config: Any = unet.config
    for name, wanted in _PLAIN.items():
        if config[name] != wanted:
            raise ValueError(f"unet/config.json has {name} {config[name]!r}; only {wanted!r} can be run.")
    for kind in (*config["down_block_types"], config["mid_block_type"], *config["up_block_types"]):
        if kind not in _BLOCKS:
            raise ValueError(f"unet/config.json has a {kind}; blocks that can be run are {', '.join(sorted(_BLOCKS))}.")
