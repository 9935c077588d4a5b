"""Metrics beside the judge's scores: what changed outside the edit region, and how near an edit is to its target.

A metric that cannot be measured is missing, with the reason, and never 0: no weights are configured, or an edit has no
mask, no target or no caption. In no mean does such an edit count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from insightedit.platform.config import MetricsConfig
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.lpips import LEAST_SIDE, load_lpips

Picture = NDArray[np.uint8]
"""Pixels (H, W, 3), RGB."""
Mask = NDArray[np.bool_]

MOST_PSNR: Final = 100.0
"""dB of pictures without any difference, for which the formula gives infinity."""
_WINDOW: Final = 11
_SIGMA: Final = 1.5
_C1: Final = 0.01**2
_C2: Final = 0.03**2
"""SSIM's window and constants, for pixels in [0, 1] (Wang et al. 2004)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What is known of a metric."""

    title: str
    better: Literal["higher", "lower"]
    weights: Literal["lpips", "clip", "dino"] | None = None
    """The field of the config that names its weights."""


METRICS: Final[Mapping[str, Metric]] = {
    "psnr": Metric(title="PSNR outside the edit region, dB", better="higher"),
    "ssim": Metric(title="SSIM outside the edit region", better="higher"),
    "mse": Metric(title="MSE outside the edit region", better="lower"),
    "lpips": Metric(title="LPIPS outside the edit region", better="lower", weights="lpips"),
    "l1": Metric(title="L1 to the target", better="lower"),
    "l2": Metric(title="L2 to the target", better="lower"),
    "clip_score": Metric(title="CLIP score of the edited region", better="higher", weights="clip"),
    "clip_i": Metric(title="CLIP-I, likeness to the target", better="higher", weights="clip"),
    "dino": Metric(title="DINO, likeness to the target", better="higher", weights="dino"),
}
"""Every metric by its name in tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One edit, and what is known of how it should be."""

    source: Picture
    edit: Picture
    """Of the source's size."""
    target: Picture | None = None
    region: Mask | None = None
    """(H, W) of the source, true where the edit belongs; None if nobody knows."""
    caption: str = ""
    """What the edited region should show; empty if nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A metric's mean over the edits that have it."""

    mean: float
    edits: int


class _Unmeasurable(Exception):  # noqa: N818 - no error, an answer
    """An edit lacks what a metric needs; the message is the reason."""


class Meter:
    """Measures edits by every metric whose weights a config names."""

    def __init__(self, config: MetricsConfig) -> None:
        """Load the weights.

        Raises:
            NotFoundError: a folder is missing.
            UsageError: a folder's weights cannot be loaded.
        """
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._metrics: dict[str, Callable[[Comparison], float]] = {
            "psnr": lambda one: psnr(self._mse(one)),
            "ssim": self._ssim,
            "mse": self._mse,
            "l1": lambda one: float(np.abs(_error_to_target(one)).mean()),
            "l2": lambda one: float(np.square(_error_to_target(one)).mean()),
        }
        if config.lpips is not None:
            self._lpips = load_lpips(Path(config.lpips).expanduser(), config.network).to(self._device)
            self._metrics["lpips"] = self._lpips_outside
        if config.clip is not None:
            self._clip = _Clip(_folder("clip", config.clip), self._device)
            self._metrics |= {"clip_score": self._clip_score, "clip_i": lambda one: _likeness(self._clip.see, one)}
        if config.dino is not None:
            dino = _Dino(_folder("dino", config.dino), self._device)
            self._metrics["dino"] = lambda one: _likeness(dino.see, one)
        self._reasons: dict[str, Counter[str]] = {name: Counter() for name in self._metrics}

    def measure(self, comparisons: Iterable[Comparison]) -> list[dict[str, float]]:
        """Measure edits; what an edit lacks is not in its figures."""
        return [self._measure(_of_side(one, self._config.side)) for one in comparisons]

    def missing(self, measured: Sequence[Mapping[str, float]]) -> dict[str, str]:
        """The metrics that no edit has, with the reason in one sentence."""
        return {name: self._reason(name) for name in METRICS if not any(name in row for row in measured)}

    def _measure(self, one: Comparison) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, compute in self._metrics.items():
            try:
                found[name] = compute(one)
            except _Unmeasurable as reason:
                self._reasons[name][str(reason)] += 1
        return {name: found[name] for name in METRICS if name in found}

    def _reason(self, name: str) -> str:
        if name not in self._metrics:
            return f"No weights: set evaluation.metrics.{METRICS[name].weights} to their folder."
        common = self._reasons[name].most_common(1)
        return common[0][0] if common else "There are no edits."

    def _compared(self, one: Comparison) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Source and edit in [0, 1] with the region black, and how much each pixel (H, W) counts."""
        if one.region is None:
            raise _Unmeasurable("No edit has a mask of the region that it belongs to.")
        outside = ~one.region
        if not outside.any():
            raise _Unmeasurable("The edit regions are the whole pictures.")
        source, edit = (np.where(outside[..., None], picture / 255, 0.0) for picture in (one.source, one.edit))
        counts = np.ones(outside.shape) if self._config.outside == "blackened" else outside.astype(np.float64)
        return source, edit, counts

    def _mse(self, one: Comparison) -> float:
        source, edit, counts = self._compared(one)
        return float((np.square(source - edit).mean(axis=-1) * counts).sum() / counts.sum())

    def _ssim(self, one: Comparison) -> float:
        source, edit, counts = self._compared(one)
        if min(counts.shape) < _WINDOW:
            raise _Unmeasurable(f"The pictures are smaller than SSIM's window of {_WINDOW} pixels.")
        edge = _WINDOW // 2
        inner = counts[edge:-edge, edge:-edge]
        if not inner.any():
            raise _Unmeasurable("The edit regions leave nothing but the edges of the pictures.")
        return float((ssim_map(source, edit) * inner).sum() / inner.sum())

    def _lpips_outside(self, one: Comparison) -> float:
        source, edit, counts = self._compared(one)
        if min(counts.shape) < LEAST_SIDE:
            raise _Unmeasurable(f"The pictures are smaller than {LEAST_SIDE} pixels; set evaluation.metrics.side.")
        rows = [torch.tensor(one, dtype=torch.float32, device=self._device)[None] for one in (source, edit, counts)]
        return self._lpips(*(row.permute(0, 3, 1, 2) for row in rows[:2]), rows[2]).item()

    def _clip_score(self, one: Comparison) -> float:
        if one.region is None or not one.region.any():
            raise _Unmeasurable("No edit has a mask of the region that it belongs to.")
        if not one.caption:
            raise _Unmeasurable("No edit has a caption of what its region should show.")
        rows, columns = (np.flatnonzero(one.region.any(axis=axis)) for axis in (1, 0))
        crop = one.edit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return 100 * max(_cosine(self._clip.see(crop), self._clip.read(one.caption)), 0.0)


def means(measured: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """Each metric's mean over the edits that have it."""
    result: dict[str, Mean] = {}
    for name in METRICS:
        values = [row[name] for row in measured if name in row]
        if values:
            result[name] = Mean(mean=float(np.mean(values)), edits=len(values))
    return result


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [0, 1], `MOST_PSNR` at most."""
    return min(-10 * math.log10(mse), MOST_PSNR) if mse > 0 else MOST_PSNR


def ssim_map(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Structural similarity at each place whose window lies within the picture.

    Args:
        one: (H, W, C) in [0, 1].
        other: likewise.

    Returns:
        (H - 10, W - 10), the mean of the channels.
    """
    x, y = (torch.from_numpy(picture).permute(2, 0, 1)[:, None] for picture in (one, other))
    mean_x, mean_y, square_x, square_y, product = (_blurred(part) for part in (x, y, x * x, y * y, x * y))
    variances = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return (likeness / ((mean_x**2 + mean_y**2 + _C1) * (variances + _C2))).mean(dim=(0, 1)).numpy()


def _blurred(channels: Tensor) -> Tensor:
    """The means (C, 1, H - 10, W - 10) of Gaussian windows, without those that reach over an edge."""
    distances = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    window = torch.exp(-(distances**2) / (2 * _SIGMA**2))
    window /= window.sum()
    return F.conv2d(F.conv2d(channels, window[None, None, :, None]), window[None, None, None, :])


def _error_to_target(one: Comparison) -> NDArray[np.float64]:
    return one.edit / 255 - _target(one) / 255


def _target(one: Comparison) -> Picture:
    if one.target is None:
        raise _Unmeasurable("No edit has a target picture.")
    return one.target


def _likeness(see: Callable[[Picture], Tensor], one: Comparison) -> float:
    return _cosine(see(one.edit), see(_target(one)))


def _cosine(one: Tensor, other: Tensor) -> float:
    return F.cosine_similarity(one, other, dim=-1).item()


def _of_side(one: Comparison, side: int | None) -> Comparison:
    """A comparison with all pictures of one size: that of a square, or the source's."""
    height, width = (side, side) if side else one.source.shape[:2]
    source, edit = (_resized(picture, (width, height)) for picture in (one.source, one.edit))
    target = None if one.target is None else _resized(one.target, (width, height))
    region = one.region
    if region is not None and region.shape != (height, width):
        region = np.asarray(Image.fromarray(region).resize((width, height), Image.Resampling.NEAREST))
    return replace(one, source=source, edit=edit, target=target, region=region)


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    """A picture of a size (width, height)."""
    if picture.shape[1::-1] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


# -- models that see --------------------------------------------------------------------------------------------------


class _Clip:
    """A CLIP model: embeddings (1, D) of pictures and texts in one space."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel  # noqa: PLC0415 - only where it is asked for

        self._model: Any = _loaded("clip", folder, CLIPModel).to(device)
        self._processor: Any = _loaded("clip", folder, AutoImageProcessor)
        self._tokenizer: Any = _loaded("clip", folder, AutoTokenizer)
        self._length: int = self._model.config.text_config.max_position_embeddings
        self.read = cache(self._read)

    @torch.no_grad()
    def see(self, picture: Picture) -> Tensor:
        inputs = self._processor(images=Image.fromarray(picture), return_tensors="pt").to(self._model.device)
        return self._model.get_image_features(**inputs).pooler_output

    @torch.no_grad()
    def _read(self, text: str) -> Tensor:
        inputs = self._tokenizer([text], truncation=True, max_length=self._length, return_tensors="pt")
        return self._model.get_text_features(**inputs.to(self._model.device)).pooler_output


class _Dino:
    """A DINO model: the state (1, D) of a picture's class token."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel  # noqa: PLC0415 - only where it is asked for

        self._model: Any = _loaded("dino", folder, AutoModel).to(device)
        self._processor: Any = _loaded("dino", folder, AutoImageProcessor)

    @torch.no_grad()
    def see(self, picture: Picture) -> Tensor:
        inputs = self._processor(images=Image.fromarray(picture), return_tensors="pt").to(self._model.device)
        return self._model(**inputs).last_hidden_state[:, 0]


def _folder(field: str, name: str) -> Path:
    """A folder of transformers.

    Raises:
        NotFoundError: there is none.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"evaluation.metrics.{field} is {name}, and there is no {folder / 'config.json'}.")
    return folder


def _loaded(field: str, folder: Path, kind: Any) -> Any:
    """A model or a processor of a folder, which transformers reads without running any code of it.

    Raises:
        UsageError: it cannot be read, or the model lacks weights.
    """
    is_model = hasattr(kind, "forward") or kind.__name__ == "AutoModel"
    options: dict[str, Any] = {"output_loading_info": True} if is_model else {}
    try:
        found = kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"evaluation.metrics.{field} is {folder}, which cannot be loaded: {reason}.") from None
    if not is_model:
        return found
    model, info = found
    # Buffers and heads that are not used may lack; random weights would give figures that mean nothing.
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise UsageError(f"evaluation.metrics.{field} is {folder}, whose files lack weights such as {missing[0]}.")
    return model.eval().requires_grad_(requires_grad=False)
