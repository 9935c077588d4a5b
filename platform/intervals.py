"""Means with confidence intervals, by the bootstrap over scenes.

The simple and the advanced instruction of a scene share picture and noise, so they are no two independent observations:
what is drawn again is whole scenes, with all of their cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 4000
LEVEL: Final = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over cases."""

    mean: float
    interval: tuple[float, float] | None
    """Of the mean, at `LEVEL`; None with fewer than two scenes."""
    cases: int
    scenes: int


def estimate(values: Sequence[float], scenes: Sequence[str]) -> Estimate:
    """Estimate a mean by the percentile bootstrap; the same values always give the same interval.

    Args:
        values: one for each case, at least one.
        scenes: each case's scene.
    """
    numbers = {scene: number for number, scene in enumerate(dict.fromkeys(scenes))}
    places = [numbers[scene] for scene in scenes]
    sums, counts = np.bincount(places, weights=values), np.bincount(places).astype(np.float64)
    interval = None
    if len(numbers) > 1:
        draws = _draws(len(numbers))
        # Scenes may have different numbers of cases, so both ends of the mean are drawn.
        means = (draws @ sums) / (draws @ counts)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = float(low), float(high)
    return Estimate(mean=float(np.mean(values)), interval=interval, cases=len(values), scenes=len(numbers))


@lru_cache(maxsize=16)
def _draws(scenes: int) -> NDArray[np.float64]:
    """How often each scene is drawn in each resample (RESAMPLES, scenes), always the same."""
    rng = np.random.default_rng(0)
    return rng.multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES).astype(np.float64)
