"""LPIPS, the learned distance of two pictures (arXiv 1801.03924), from weights in a folder.

The networks are torchvision's feature layers of VGG-16, AlexNet and SqueezeNet 1.1, built here without torchvision.
What is read are the files that people have: torchvision's weights of the network beside the linear layers that LPIPS's
authors give (`lin0.model.1.weight`, ...), or one file with both; safetensors, or a state dict that torch saved.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from insightedit.platform.errors import NotFoundError, UsageError

Network = Literal["vgg", "alex", "squeeze"]

LEAST_SIDE: Final = 32
"""Pixels below which the networks have nothing left at their end."""
_SHIFT: Final = (-0.030, -0.088, -0.188)
_SCALE: Final = (0.458, 0.448, 0.450)
"""What the networks' inputs in [-1, 1] are normalised by."""
_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin")
_FEATURE: Final = re.compile(r"(?:features|net\.slice\d+)\.(\d+)\.(.+)")
"""A weight of the network, as torchvision and as LPIPS's authors call it; both keep torchvision's numbers."""
_LINEAR: Final = re.compile(r"lin(\d+)\.model\.\d+\.weight")


class _Fire(nn.Module):
    """SqueezeNet's block: a narrow convolution, then two wide ones side by side."""

    def __init__(self, inputs: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        narrow = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(narrow)), F.relu(self.expand3x3(narrow))], dim=1)


class _Layout(NamedTuple):
    """A network: its layers, and after which of them features are compared, with their channels."""

    layers: nn.Sequential
    taps: dict[int, int]


def _vgg() -> _Layout:
    layers: list[nn.Module] = []
    inputs = 3
    for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return _Layout(nn.Sequential(*layers[:-1]), {3: 64, 8: 128, 15: 256, 22: 512, 29: 512})


def _alex() -> _Layout:
    pool = nn.MaxPool2d(3, 2)
    layers = [
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    return _Layout(nn.Sequential(*layers), {1: 64, 4: 192, 7: 384, 9: 256, 11: 256})


def _squeeze() -> _Layout:
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    layers = [
        *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool),
        *(_Fire(64, 16, 64), _Fire(128, 16, 64), pool),
        *(_Fire(128, 32, 128), _Fire(256, 32, 128), pool),
        *(_Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)),
    ]
    return _Layout(nn.Sequential(*layers), {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512})


_LAYOUTS: Final = {"vgg": _vgg, "alex": _alex, "squeeze": _squeeze}


class Lpips(nn.Module):
    """The distance of two pictures as a network sees them; 0 for the same one."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: Network) -> None:
        """Build a network without weights; `load_lpips` gives one with them."""
        super().__init__()
        self.features, self._taps = _LAYOUTS[network]()
        self.linear = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in self._taps.values())
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])

    @torch.no_grad()
    def forward(self, one: Tensor, other: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compare pictures.

        Args:
            one: (B, 3, H, W) float32 in [0, 1], with `LEAST_SIDE` pixels or more on each side.
            other: likewise.
            weight: (B, H, W), how much each pixel counts in the mean; all the same if None.

        Returns:
            B distances.
        """
        total = torch.zeros(len(one), device=one.device)
        for a, b, linear in zip(self._seen(one), self._seen(other), self.linear, strict=True):
            error = torch.einsum("bchw,c->bhw", (a - b) ** 2, linear)
            total += _weighted_mean(error, weight)
        return total

    def _seen(self, picture: Tensor) -> list[Tensor]:
        """The features that are compared, each place's of length 1."""
        x = (picture * 2 - 1 - self.shift) / self.scale
        seen: list[Tensor] = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._taps:
                seen.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return seen


def _weighted_mean(error: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return error.mean(dim=(1, 2))
    # A place of a coarse map counts as far as what it covers counts.
    coarse = F.adaptive_avg_pool2d(weight[:, None], (error.shape[1], error.shape[2]))[:, 0]
    return (error * coarse).sum(dim=(1, 2)) / coarse.sum(dim=(1, 2))


def load_lpips(folder: Path, network: Network) -> Lpips:
    """Read a network's weights from the files of a folder.

    Args:
        folder: with one file or more; what belongs to another network is left alone.
        network: which.

    Raises:
        NotFoundError: there is no such folder, or no file of weights in it.
        UsageError: a file cannot be read, or a weight is missing.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES)
    if not files:
        raise NotFoundError(f"evaluation.metrics.lpips is {folder}, where there is no {' or '.join(_SUFFIXES)} file.")
    model = Lpips(network)
    wanted = model.state_dict()
    fixed = {"shift", "scale"}
    found: dict[str, Tensor] = {}
    for file in files:
        tensors = _renamed(_read(file))
        # The networks share some names and sizes, so a file belongs to this one as a whole or not at all.
        if all(name in wanted and value.numel() == wanted[name].numel() for name, value in tensors.items()):
            found |= {name: value.reshape(wanted[name].shape).float() for name, value in tensors.items()}
    if missing := sorted(wanted.keys() - found.keys() - fixed):
        raise UsageError(
            f"The files in {folder} lack {len(missing)} of the {network} LPIPS's weights, such as {missing[0]}; add"
            " torchvision's weights of the network and LPIPS's of the linear layers, or set evaluation.metrics.network."
        )
    model.load_state_dict(found | {name: wanted[name] for name in fixed})
    return model.eval().requires_grad_(requires_grad=False)


def _read(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a file. Nothing is unpickled but tensors.

    Raises:
        UsageError: it holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(f"{file} cannot be read as weights of LPIPS: {reason}.") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{file} cannot be read as weights of LPIPS: it holds no state dict.")
    named = cast(Mapping[object, object], content)
    return {str(name): value for name, value in named.items() if isinstance(value, Tensor)}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that they have here."""
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if match := _FEATURE.fullmatch(name):
            result[f"features.{match[1]}.{match[2]}"] = value
        elif match := _LINEAR.fullmatch(name):
            result[f"linear.{match[1]}"] = value
    return result
