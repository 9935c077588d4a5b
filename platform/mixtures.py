"""Which rows a stage trains on, in which order: a pure function of seed, stage and position.

A stage is one pass over positions 0, 1, 2, ... Each position has a dataset, a row of it and a seed for all of the
sample's noise. Nothing here depends on how many workers there are or where a run was interrupted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

_CYCLE = 1000
"""Positions in which a mixture's weights are met exactly (to a thousandth)."""
# What the streams of random numbers are for; a stream never serves two purposes.
_ORDER, _SHARDS, _ROWS, _NOISE = range(4)

Ints = NDArray[np.int64]


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
    Within a cycle, the n-th of k uses of a dataset lies at random in the n-th of k equal parts: the shares of any run
    of positions are those of the weights, but for two uses or so.
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
        self._key = (seed, stage)
        self._share = np.array(_shares([weight for weight, _ in datasets.values()]))
        self._sets = [
            _ShuffledRows((seed, stage, number), rows, window) for number, (_, rows) in enumerate(datasets.values())
        ]
        self._cycles = _Recent[int, tuple[Ints, Ints]](8)

    @property
    def epoch_length(self) -> int:
        """Positions in which every row of the largest dataset is used once; smaller ones repeat."""
        if len(self._sets) == 1:
            return self._sets[0].total
        largest = max(range(len(self._sets)), key=lambda number: self._sets[number].total)
        return -(-self._sets[largest].total * _CYCLE // int(self._share[largest]))

    def rows(self, positions: Ints) -> Rows:
        """Look up positions, in any order."""
        dataset, use = self._uses(positions)
        shard, row = np.zeros_like(dataset), np.zeros_like(dataset)
        for number, places in _groups(dataset):
            shard[places], row[places] = self._sets[number].at(use[places])
        return Rows(dataset, shard, row, _noise((*self._key, _NOISE), positions))

    def _uses(self, positions: Ints) -> tuple[Ints, Ints]:
        """The dataset of each position, and how many earlier positions had the same."""
        if len(self._sets) == 1:
            return np.zeros_like(positions), positions
        cycles, offsets = np.divmod(positions, _CYCLE)
        dataset, use = np.zeros_like(positions), np.zeros_like(positions)
        for cycle, places in _groups(cycles):
            order, before = self._cycles.get(cycle, self._cycle)
            dataset[places] = order[offsets[places]]
            use[places] = cycle * self._share[dataset[places]] + before[offsets[places]]
        return dataset, use

    def _cycle(self, cycle: int) -> tuple[Ints, Ints]:
        """Dataset of each position of a cycle, and how often the cycle had it before."""
        generator = _generator(*self._key, _ORDER, cycle)
        numbers = [np.arange(share) for share in self._share]
        places = np.concatenate([(number + generator.random(len(number))) / len(number) for number in numbers])
        order = np.argsort(places)
        return np.repeat(np.arange(len(self._share)), self._share)[order], np.concatenate(numbers)[order]


class _ShuffledRows:
    """The rows of one dataset's shards in the order of their uses, epoch after epoch."""

    def __init__(self, key: tuple[int, ...], shard_rows: Sequence[int], window: int) -> None:
        self.total = sum(shard_rows)
        self._key = key
        self._shard_rows = np.array(shard_rows)
        self._window = window
        self._epochs = _Recent[int, tuple[Ints, Ints]](4)
        self._windows = _Recent[tuple[int, int], tuple[Ints, Ints]](8)

    def at(self, uses: Ints) -> tuple[Ints, Ints]:
        """Shard and row of each use."""
        shard, row = np.zeros_like(uses), np.zeros_like(uses)
        epochs, offsets = np.divmod(uses, self.total)
        for epoch, in_epoch in _groups(epochs):
            _, ends = self._epochs.get(epoch, self._epoch)
            numbers = np.searchsorted(ends, offsets[in_epoch], side="right")
            for number, places in _groups(numbers):
                start = int(ends[number - 1]) if number else 0
                shards, rows = self._windows.get((epoch, number), self._order)
                chosen = in_epoch[places]
                shard[chosen] = shards[offsets[chosen] - start]
                row[chosen] = rows[offsets[chosen] - start]
        return shard, row

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """An epoch's order of shards, and the number of rows up to the end of each window of them."""
        order = _generator(*self._key, epoch, _SHARDS).permutation(len(self._shard_rows))
        starts = np.arange(0, len(order), self._window)
        return order, np.cumsum(np.add.reduceat(self._shard_rows[order], starts))

    def _order(self, place: tuple[int, int]) -> tuple[Ints, Ints]:
        """Shard and row of every use in a window of an epoch."""
        epoch, number = place
        order, _ = self._epochs.get(epoch, self._epoch)
        window = order[number * self._window : (number + 1) * self._window]
        counts = self._shard_rows[window]
        rows = np.concatenate([np.arange(count) for count in counts])
        shuffled = _generator(*self._key, epoch, _ROWS, number).permutation(len(rows))
        return np.repeat(window, counts)[shuffled], rows[shuffled]


def step_positions(step: int, *, global_batch: int, world: int, rank: int) -> NDArray[np.int64]:
    """The positions that one rank takes in a step: a contiguous part of [step * G, (step + 1) * G)."""
    share = global_batch // world
    start = step * global_batch + rank * share
    return np.arange(start, start + share, dtype=np.int64)


def micro_batch_size(global_batch: int, world: int, at_most: int) -> int:
    """The largest micro-batch up to a limit that divides a rank's share of the global batch."""
    share = global_batch // world
    return max(size for size in range(1, min(at_most, share) + 1) if share % size == 0)


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Recent(Generic[Key, Value]):
    """The values that were asked for last; the others are computed again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[Key], Value]) -> Value:
        if key not in self._values:
            if len(self._values) == self._size:
                self._values.popitem(last=False)
            self._values[key] = make(key)
        self._values.move_to_end(key)
        return self._values[key]


def _groups(numbers: Ints) -> Iterator[tuple[int, Ints]]:
    """Each distinct number with its places, in rising order."""
    order = np.argsort(numbers, kind="stable")
    distinct, starts = np.unique(numbers[order], return_index=True)
    yield from zip(distinct.tolist(), np.split(order, starts[1:]), strict=True)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _noise(key: Sequence[int], positions: Ints) -> Ints:
    """A number of 63 bits for each position: SplitMix64 from a state that the key decides."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        mixed = state + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of each dataset in a cycle: weights rounded so that they add up, none to nothing."""
    exact = np.asarray(weights, np.float64) / sum(weights) * _CYCLE
    share = np.maximum(np.floor(exact), 1).astype(int)
    while share.sum() != _CYCLE:
        step = 1 if share.sum() < _CYCLE else -1
        surplus = np.where(share + step > 0, step * (exact - share), -np.inf)
        share[int(np.argmax(surplus))] += step
    return tuple(share.tolist())
