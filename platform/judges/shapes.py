"""The exact judge: scores of an edit in the world of shapes, whose truth is known, on the scales of VIEScore.

The two scores of semantic consistency compare the edit with its true target. The two of perceptual quality ask whether
the picture is one that the world of shapes can show, whatever was asked for: a copy of the source is perfectly natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.datasets.shapes_world import (
    CANVAS,
    COLOURS,
    KINDS,
    RGB,
    SIZES,
    Scene,
    coverage,
    render,
    shape_masks,
)
from insightedit.platform.errors import UsageError
from insightedit.platform.judges import TOP_SCORE, Costs, MadeEdit, Progress, Score, Scores, Truth, Verdict, viescore

Picture: TypeAlias = NDArray[np.floating[Any]]
"""Pixels (H, W, 3) in [0, 1]."""

OVEREDIT_LIMIT: Final = 0.25
"""Mean absolute error in the range 0 to 1 at which non-overediting, naturalness or the lack of artifacts is worth
nothing."""
_EDGES: Final = (0, 11, 21, CANVAS)
"""Where the rows, and the columns, of cells begin and end: a shape never reaches beyond its cell."""


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


class ShapesJudge:
    """Judges edits of shapes scenes by their truth; see `insightedit.platform.judges.Judge`."""

    def __init__(self) -> None:
        self.identity = "shapes"
        self.costs = Costs()

    def judge(self, edits: Sequence[MadeEdit], progress: Progress | None = None) -> list[Verdict]:
        """Score edits.

        Raises:
            UsageError: the truth of an edit is not known.
        """
        verdicts: list[Verdict] = []
        for edit in edits:
            verdicts.append(_verdict(edit))
            if progress is not None:
                progress(len(verdicts), len(edits))
        return verdicts


def _verdict(edit: MadeEdit) -> Scores:
    if edit.truth is None:
        raise UsageError(
            "evaluation.judge is shapes, which judges only edits whose truth is known, those of the shapes dataset;"
            " name a language model as the judge, with `endpoint` and `model` or with `local`."
        )
    source, target, made, ground = (
        np.divide(picture, 255, dtype=np.float32)
        for picture in (edit.source, edit.truth.target, edit.edit, edit.truth.ground)
    )
    score = judge_edit(source, target, made, edit.truth.keep_regions)
    strangeness = cell_errors(made, ground)
    whole, worst = float(strangeness.mean()), float(strangeness.max())
    natural, clean = _scale(whole / OVEREDIT_LIMIT), _scale(worst / OVEREDIT_LIMIT)
    return Scores(
        instruction_adherence=Score(
            score.instruction,
            f"The edited region is {score.s_i_raw / TOP_SCORE:.0%} of the way from the source to what was asked for.",
            score.s_i_raw,
        ),
        non_overediting=Score(
            score.non_overedit,
            f"Of what should stay, the part that changed most is off by {_off(score.s_n_raw)} of the range of pixels.",
            score.s_n_raw,
        ),
        naturalness=Score(
            _round_half_up(natural), f"Cells are off from any shape or ground by {whole:.3f} on average.", natural
        ),
        no_artifacts=Score(
            _round_half_up(clean), f"The worst cell is off from any shape or ground by {worst:.3f}.", clean
        ),
    )


def _off(raw: float) -> str:
    """The error that a raw score stands for; at 0 it may be any larger one."""
    return f"{OVEREDIT_LIMIT * (1 - raw / TOP_SCORE):.3f}" + (" or more" if raw == 0 else "")


def cell_errors(edit: Picture, ground: Picture) -> NDArray[np.float64]:
    """How far each cell of an edit is from everything that the world of shapes can show there.

    Args:
        edit: (32, 32, 3) in [0, 1].
        ground: the picture without its shapes, likewise.

    Returns:
        Mean absolute errors (9,) to the nearest of the bare ground and one shape of any kind, colour and size.
    """
    colours = np.array([RGB[colour] for colour in COLOURS], np.float32)[:, None, None, :] / 255
    errors: list[float] = []
    for cell in range(9):
        rows, columns = (slice(_EDGES[place], _EDGES[place + 1]) for place in divmod(cell, 3))
        shares = np.stack([coverage(kind, size, cell)[rows, columns] for kind in KINDS for size in SIZES])
        shares = shares[:, None, :, :, None]  # (kinds and sizes, colours, H, W, RGB)
        bare = ground[rows, columns]
        shown = np.abs(edit[rows, columns] - (bare + shares * (colours - bare))).mean(axis=(2, 3, 4)).min()
        errors.append(min(float(shown), float(np.abs(edit[rows, columns] - bare).mean())))
    return np.array(errors)


def shapes_truth(source: Scene, target: Scene) -> Truth:
    """What is known of an edit that turns one scene into another."""
    return Truth(
        target=render(target),
        keep_regions=tuple(shapes_keep_regions(source, target)),
        ground=render(Scene(source.ground, ())),
    )


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
