"""Which rows a stage trains on, in which order: a pure function of seed, stage and position.

A stage is one pass over positions 0, 1, 2, ... Each position has a dataset, a row of it and a seed for all of the
sample's noise. Nothing here depends on how many workers there are or where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_CYCLE = 1000
"""Positions in which a mixture's weights are met exactly (to a thousandth)."""
# What the streams of random numbers are for; a stream never serves two purposes.
_ORDER, _SHARDS, _ROWS, _NOISE = range(4)


class Rows(NamedTuple):
    """Where the samples of some positions come from, one entry each."""

    dataset: NDArray[np.int64]
    """Index into the mixture's datasets."""
    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    """Row of the shard."""
    seed: NDArray[np.int64]
    """The sample's own seed, at least 0."""


class Mixture:
    """Datasets mixed by weight. Each is shuffled anew in every epoch and repeats as often as it is needed.

    Rows are shuffled within windows of shards whose order is shuffled, so that neighbouring positions need few shards.
    """

    def __init__(
        self, datasets: Mapping[str, tuple[float, Sequence[int]]], *, seed: int, stage: int, window: int
    ) -> None:
        """Describe a mixture.

        Args:
            datasets: weight, and rows of each shard, by name.
            seed: of the run.
            stage: stages draw different orders.
            window: shards whose rows are shuffled together.
        """
        self.names = list(datasets)
        self._shard_rows = [tuple(rows) for _, rows in datasets.values()]
        self._key = (seed, stage)
        self._window = window
        self._share = _shares([weight for weight, _ in datasets.values()])

    def rows(self, positions: NDArray[np.int64]) -> Rows:
        """Look up positions, in any order."""
        result = Rows(*(np.zeros(len(positions), np.int64) for _ in Rows._fields))
        for index, position in enumerate(positions.tolist()):
            dataset, use = self._use(position)
            shard, row = self._row(dataset, use)
            seed = int(_generator(*self._key, _NOISE, position).integers(2**63))
            for column, value in zip(result, (dataset, shard, row, seed), strict=True):
                column[index] = value
        return result

    def _use(self, position: int) -> tuple[int, int]:
        """The dataset of a position, and how many earlier positions had the same."""
        if len(self.names) == 1:
            return 0, position
        cycle, offset = divmod(position, _CYCLE)
        order, before = _cycle_order(self._key, cycle, self._share)
        dataset = int(order[offset])
        return dataset, cycle * self._share[dataset] + int(before[offset])

    def _row(self, dataset: int, use: int) -> tuple[int, int]:
        """Shard and row that a dataset gives at its n-th use."""
        shard_rows = self._shard_rows[dataset]
        epoch, offset = divmod(use, sum(shard_rows))
        key = (*self._key, dataset, epoch)
        windows, ends = _epoch_windows(key, shard_rows, self._window)
        number = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[number - 1]) if number else 0
        shard, row = _window_order(key, number, windows[number], shard_rows)[offset - start]
        return int(shard), int(row)


def step_positions(step: int, *, global_batch: int, world: int, rank: int) -> NDArray[np.int64]:
    """The positions that one rank takes in a step: a contiguous part of [step * G, (step + 1) * G)."""
    share = global_batch // world
    start = step * global_batch + rank * share
    return np.arange(start, start + share, dtype=np.int64)


def micro_batch_size(global_batch: int, world: int, at_most: int) -> int:
    """The largest micro-batch up to a limit that divides a rank's share of the global batch."""
    share = global_batch // world
    return max(size for size in range(1, min(at_most, share) + 1) if share % size == 0)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of each dataset in a cycle: weights rounded so that they add up, none to nothing."""
    exact = np.asarray(weights, np.float64) / sum(weights) * _CYCLE
    share = np.maximum(np.floor(exact), 1).astype(int)
    while share.sum() != _CYCLE:
        step = 1 if share.sum() < _CYCLE else -1
        share[int(np.argmax(step * (exact - share)))] += step
    return tuple(share.tolist())


@lru_cache(maxsize=8)
def _cycle_order(
    key: tuple[int, int], cycle: int, share: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Dataset of each position of a cycle, and how often the cycle had it before."""
    order = np.repeat(np.arange(len(share)), share)
    _generator(*key, _ORDER, cycle).shuffle(order)
    before = np.zeros(len(order), np.int64)
    for dataset in range(len(share)):
        places = np.flatnonzero(order == dataset)
        before[places] = np.arange(len(places))
    return order, before


@lru_cache(maxsize=32)
def _epoch_windows(
    key: tuple[int, ...], shard_rows: tuple[int, ...], size: int
) -> tuple[list[tuple[int, ...]], NDArray[np.int64]]:
    """An epoch's windows of shards, and the number of rows up to the end of each."""
    order: list[int] = _generator(*key, _SHARDS).permutation(len(shard_rows)).tolist()
    windows = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    ends = np.cumsum([sum(shard_rows[shard] for shard in window) for window in windows])
    return windows, ends


@lru_cache(maxsize=32)
def _window_order(
    key: tuple[int, ...], number: int, window: tuple[int, ...], shard_rows: tuple[int, ...]
) -> NDArray[np.int64]:
    """Shard and row (n, 2) of every place in a window."""
    rows = [np.stack([np.full(shard_rows[shard], shard), np.arange(shard_rows[shard])], axis=1) for shard in window]
    pairs = np.concatenate(rows)
    return pairs[_generator(*key, _ROWS, number).permutation(len(pairs))]
