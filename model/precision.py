"""Where bfloat16 pays: what a device multiplies faster than float32."""

from __future__ import annotations

import torch

_FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""A CPU's abilities, of x86 and of ARM, any of which makes products of bfloat16 faster than those of float32."""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16.

    A CPU without them emulates each: its products then take five times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in _FAST_BF16)
