"""Weights in blocks: the same layers up to rounding, and what was given stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from insightedit.model.packing import PackedConv2d, PackedLinear, packed

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.halved = nn.Conv2d(16, 16, 3, padding=1, stride=2, bias=False)
        self.shortcut = nn.Conv2d(16, 8, 1)
        self.proj_in = nn.Conv2d(8, 12, 1)
        self.out = nn.Sequential(nn.Linear(12, 5, bias=False), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shortcut(self.halved(self.conv(self.norm(x))))
        tokens = x.permute(0, 2, 3, 1)
        project = self.proj_in
        tokens = project(tokens) if isinstance(project, PackedLinear) else project(x).permute(0, 2, 3, 1)
        return self.out(tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_packed_layers_compute_the_same(dtype: torch.dtype, tolerance: float, memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    block: Any = Block().to(dtype)
    block.to(memory_format=memory)
    x = torch.randn(2, 8, 6, 10).to(dtype).contiguous(memory_format=memory)
    ours = packed(block)
    expected, found = block(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found, ours(x))
    assert torch.equal(found, packed(block)(x))


@torch.no_grad()
def test_packed_layers_run_under_autocast_behind_layers_that_are_not_packed() -> None:
    """As validation pictures do in a stage whose frozen weights are halved."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 8, 6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed(block)(x)
    torch.testing.assert_close(found.float(), block(x), rtol=3e-2, atol=3e-2)


@torch.no_grad()
def test_what_is_given_stays_and_the_rest_is_shared() -> None:
    block = Block()
    names = set(block.state_dict())
    ours = packed(block)
    assert set(block.state_dict()) == names
    assert isinstance(block.conv, nn.Conv2d)
    assert isinstance(ours.conv, PackedConv2d)
    assert isinstance(ours.out[0], PackedLinear)
    assert ours.norm.weight is block.norm.weight
    assert ours.shortcut.weight is block.shortcut.weight


def test_what_cannot_be_packed_is_left() -> None:
    half = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3)).to(torch.float64)
    assert [type(layer) for layer in packed(half)] == [nn.Linear, nn.Conv2d, nn.Conv2d]
    padded = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    assert [type(layer) for layer in packed(padded)] == [nn.Conv2d, nn.Conv2d]
