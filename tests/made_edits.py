"""Edits to be judged, and the scores that the tests' models give them."""

from __future__ import annotations

from typing import Final

import numpy as np

from insightedit.platform.judges import ASPECTS, MadeEdit, Scores, Verdict

VALUES: Final = {"instruction_adherence": 4, "non_overediting": 3, "naturalness": 5, "no_artifacts": 2}


def made_edits(count: int, side: int = 8) -> list[MadeEdit]:
    """Edits of pictures of noise, no two alike."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 2, side, side, 3), dtype=np.uint8)
    return [MadeEdit(source=one[0], edit=one[1], instruction=f'remove "it" {n}') for n, one in enumerate(pictures)]


def values_of(verdict: Verdict) -> dict[str, int]:
    """The four numbers of a verdict that must have them."""
    assert isinstance(verdict, Scores), verdict
    return {aspect: getattr(verdict, aspect).value for aspect in ASPECTS}
