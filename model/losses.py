"""The losses of the seed's equations 2, 3 and 4, one value for each sample.

The seed writes sums of squares; here every loss is a mean over its elements (the 32 tokens, the features, the
latents), so that its size does not depend on the model's. How samples are weighed and averaged is the training
loop's: a record without a target image has weight 0 in the losses that need one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossTerm(NamedTuple):
    """One loss over a batch: its value for each sample (B,), and how much each sample counts (B,)."""

    values: Tensor
    weights: Tensor


def mm_token_loss(logits: Tensor, first_id: int) -> Tensor:
    """L_LLM of equation 2 and L_MLLM of equation 3: the next-token loss of the [MM] tokens.

    Args:
        logits: (B, r, V + r), at the positions before [MM_1] ... [MM_r]; the last r columns are the [MM] tokens'.
        first_id: the column of [MM_1], V.

    Returns:
        (B,) mean over the r tokens of -log p([MM_i] | v, c, [MM_1] ... [MM_{i-1}]), in nats.
    """
    num_tokens = logits.shape[1]
    targets = torch.arange(first_id, first_id + num_tokens, device=logits.device).expand(logits.shape[0], -1)
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").mean(dim=1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each sample, whatever its shape, in float32.

    It is L_IB (Mapper(h) against CLIP(I_source)) and L_TB (the Q-Former's output against CLIP(T_c)) of equation 2,
    L_IAA (Mapper(h) against CLIP(I_target)) of equations 3 and 4, and the diffusion loss L_diff1 and L_diff2 (the
    UNet's output against what its scheduler's `prediction_type` asks for: the noise in the seed).

    Args:
        prediction: (B, ...).
        target: the same shape.

    Returns:
        (B,).
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
