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
    seeds: int = 1
    """Trainings whose edits are in it."""


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


def estimate_over_seeds(values: Sequence[float], scenes: Sequence[str], seeds: Sequence[int]) -> Estimate:
    """Estimate a mean over scenes and over trainings with several seeds, each of which edited the same scenes.

    Scenes and seeds are drawn each by themselves. Of the few seeds one less is drawn than there are: so the spread of
    what is drawn is that of a mean of as many (Rao and Wu, 1988), where drawing all would make it too small. One seed
    gives the interval over scenes alone.

    Args:
        values: one for each case of each seed, at least one.
        scenes: each value's scene.
        seeds: each value's seed.
    """
    rows = {seed: number for number, seed in enumerate(dict.fromkeys(seeds))}
    if len(rows) == 1:
        return estimate(values, scenes)
    columns = {scene: number for number, scene in enumerate(dict.fromkeys(scenes))}
    sums, counts = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    places = [rows[seed] for seed in seeds], [columns[scene] for scene in scenes]
    np.add.at(sums, places, values)
    np.add.at(counts, places, 1)
    interval = None
    if len(columns) > 1:
        of_seeds, of_scenes = _draws(len(rows), len(rows) - 1, 1), _draws(len(columns))
        totals, numbers = (((of_seeds @ table) * of_scenes).sum(axis=1) for table in (sums, counts))
        drawn = numbers > 0
        low, high = np.quantile(totals[drawn] / numbers[drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = float(low), float(high)
    return Estimate(
        mean=float(np.mean(values)), interval=interval, cases=len(values), scenes=len(columns), seeds=len(rows)
    )


@lru_cache(maxsize=16)
def _draws(count: int, drawn: int | None = None, stream: int = 0) -> NDArray[np.float64]:
    """How often each of `count` scenes or seeds is drawn in each resample (RESAMPLES, count), always the same.

    Args:
        count: how many there are.
        drawn: how many are drawn; as many if None.
        stream: of random numbers.
    """
    rng = np.random.default_rng(stream)
    return rng.multinomial(drawn or count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
