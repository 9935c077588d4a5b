"""How good edits are while nobody has said what they should have been: what a rollout compares two versions by."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.judges import Failed, Judge, MadeEdit
from insightedit.serve.uploads import Pixels


class Quality(Protocol):
    """Scores edits."""

    def score(self, prompt: str, source: Pixels, edit: Pixels) -> float | None:
        """Score an edit.

        Args:
            prompt: the instruction.
            source: what was edited, (H, W, 3).
            edit: what was made of it, of the same size.

        Returns:
            From 0 to 1; None where there is no telling.
        """
        ...


class PixelQuality:
    """What pixels alone tell: an edit is mostly like its source, and no rougher.

    It sees noise, blanks and pictures that fall apart, and does not know what was asked for.
    """

    def score(self, prompt: str, source: Pixels, edit: Pixels) -> float | None:
        """See `Quality.score`."""
        before, after = (np.divide(picture, 255, dtype=np.float32) for picture in (source, edit))
        change = float(np.abs(after - before).mean())
        return 1 - min(change + max(_roughness(after) - _roughness(before), 0.0), 1.0)


class JudgedQuality:
    """What a judge of edits says, as VIEScore."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def score(self, prompt: str, source: Pixels, edit: Pixels) -> float | None:
        """See `Quality.score`."""
        (verdict,) = self._judge.judge([MadeEdit(source=source, edit=edit, instruction=prompt)])
        return None if isinstance(verdict, Failed) else verdict.viescore


def _roughness(picture: NDArray[np.float32]) -> float:
    """Mean difference of a pixel from the ones right of it and below it."""
    steps = [np.abs(np.diff(picture, axis=axis)) for axis in (0, 1) if picture.shape[axis] > 1]
    return float(np.mean([step.mean() for step in steps])) if steps else 0.0
