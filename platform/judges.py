"""The exact judge: scores of an edit whose true target is known, on the scales of the paper's VIEScore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.datasets.shapes_world import Scene, render, shape_masks

Picture: TypeAlias = NDArray[np.floating[Any]]
"""Pixels (H, W, 3) in [0, 1]."""

TOP_SCORE: Final = 5
OVEREDIT_LIMIT: Final = 0.25
"""Mean absolute error over an untouched region, in the range 0 to 1, at which non-overediting is worth nothing."""


@dataclass(frozen=True, slots=True)
class EditScore:
    """Scores of one edit.

    Attributes:
        instruction: S_i, how far the instruction was followed, 0 to 5.
        non_overedit: S_n, how far the rest was left alone, 0 to 5.
        s_i_raw: S_i before rounding.
        s_n_raw: S_n before rounding.
    """

    instruction: int
    non_overedit: int
    s_i_raw: float
    s_n_raw: float

    @property
    def viescore(self) -> float:
        """The edit's VIEScore."""
        return viescore(self.instruction, self.non_overedit)


def viescore(s_i: float, s_n: float) -> float:
    """Join instruction following and non-overediting, each 0 to 5, to a score from 0 to 1 (equation 1)."""
    return (s_n / TOP_SCORE + s_i / TOP_SCORE) / 2


def edit_region(source: Picture, target: Picture) -> NDArray[np.bool_]:
    """Return m: where source and target (H, W, 3) differ, grown by one pixel in all eight directions; bool (H, W)."""
    differ = np.pad((source != target).any(axis=-1), 1)
    height, width = differ.shape[0] - 2, differ.shape[1] - 2
    shifted = [differ[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_or.reduce(shifted)


def judge_edit(
    source: Picture,
    target: Picture,
    edit: Picture,
    keep_regions: Sequence[NDArray[np.bool_]],
) -> EditScore:
    """Score an edit exactly.

    S_i = 5 clip(1 - mean|edit - target| / mean|source - target|, 0, 1), means over m (`edit_region`).
    S_n = 5 clip(1 - e / 0.25, 0, 1), with e the largest of the means |edit - target| over each region to keep.
    Both are rounded half up. Where nothing should change, S_i = S_n.

    Args:
        source: picture before the edit, (H, W, 3) in [0, 1].
        target: what the edit should be.
        edit: what the editor made, nothing pasted back.
        keep_regions: masks (H, W) of what must not change; what m covers of them does not count.

    Raises:
        ValueError: Shapes or ranges do not fit, or no region to keep has a pixel outside m.
    """
    _check(source, target, edit, keep_regions)
    region = edit_region(source, target)
    error = np.abs(edit.astype(np.float64) - target.astype(np.float64)).mean(axis=-1)
    kept = [error[mask & ~region] for mask in keep_regions]
    worst = max((float(values.mean()) for values in kept if values.size), default=None)
    if worst is None:
        raise ValueError("keep_regions must hold a pixel outside the edited region, or nothing can be overedited.")
    s_n = _scale(worst / OVEREDIT_LIMIT)
    if region.any():
        change = np.abs(source.astype(np.float64) - target.astype(np.float64)).mean(axis=-1)
        s_i = _scale(float(error[region].mean() / change[region].mean()))
    else:
        s_i = s_n
    return EditScore(_round_half_up(s_i), _round_half_up(s_n), s_i, s_n)


def shapes_keep_regions(source: Scene, target: Scene) -> list[NDArray[np.bool_]]:
    """Return what an edit of a shapes scene must leave alone, bool (32, 32) each.

    A region for the part of every unchanged shape outside m, and one for the rest of the picture.
    """
    before, after = (render(scene).astype(np.float32) / 255 for scene in (source, target))
    region = edit_region(before, after)
    pairs = zip(source.shapes, shape_masks(source), strict=True)
    shapes = [mask & ~region for shape, mask in pairs if shape in target.shapes]
    rest = ~np.logical_or.reduce([region, *shapes])
    return [*shapes, rest]


def _scale(share: float) -> float:
    return TOP_SCORE * min(max(1 - share, 0.0), 1.0)


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _check(
    source: Picture,
    target: Picture,
    edit: Picture,
    keep_regions: Sequence[NDArray[np.bool_]],
) -> None:
    if source.ndim != 3 or not source.shape == target.shape == edit.shape:
        raise ValueError(
            f"source {source.shape}, target {target.shape} and edit {edit.shape} must have one shape (H, W, C)."
        )
    for name, picture in (("source", source), ("target", target), ("edit", edit)):
        if not (np.issubdtype(picture.dtype, np.floating) and picture.min() >= 0 and picture.max() <= 1):
            raise ValueError(f"{name} must be floats in [0, 1]; divide 8-bit pixels by 255.")
    for mask in keep_regions:
        if mask.shape != source.shape[:2] or mask.dtype != np.bool_:
            raise ValueError(f"keep_regions must be boolean masks of shape {source.shape[:2]}.")
