"""A stage's samples as a Ray Data stream: exact, resumable, the same for any number of workers.

Block (j, r) holds the samples of rank r for a few consecutive optimiser steps, so after any step exactly the positions
before it were consumed, and a restart begins at a step without reading what lies before. Order is kept, every block
pair (j, 0), (j, 1), ... has equally many rows, and so the streaming split gives each rank its own blocks.
"""

from __future__ import annotations

import functools
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataIterator, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockAccessor
from ray.train import DataConfig

from insightedit.platform.blocks import ordered_blocks
from insightedit.platform.mixtures import Mixture, step_positions
from insightedit.platform.shards import PreparedData, ShardCache, Table
from insightedit.platform.storage import Store

_POSITION, _SEED = "position", "seed"
Arrays = dict[str, NDArray[Any]]
Collate = Callable[[Table], Arrays]
"""Turns rows of records and features into arrays (B, ...), a batch's inputs."""
Encode = Callable[[Table], Table]
"""Adds features to rows of records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStream:
    """All that a data task needs to make a stage's batches."""

    key: str
    """Names the collate function: a process builds it once for each key."""
    make_collate: Callable[[], Collate]
    make_encoder: Callable[[], Encode] | None = None
    """Where the shards hold no features: what computes them, in a pool of actors of its own."""
    encoder_workers: int = 1
    """Actors of that pool, wherever the cluster has room for them."""
    encoder_gpus: float = 0.0
    """GPUs of each."""
    datasets: Mapping[str, tuple[float, Store]]
    """Weight and prepared shards of each dataset."""
    seed: int
    stage: int
    steps: int
    global_batch: int
    steps_per_block: int
    shuffle_shards: int
    tasks: int
    """Data tasks that run at a time."""
    cpus: float
    """CPUs that Ray sets aside for each data task."""
    cache_bytes: int = 1 << 30
    """Shards that each data task keeps in memory, in bytes."""
    place: Mapping[str, str] = field(default_factory=dict[str, str])
    """Labels of the nodes that the data tasks run on."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells streams apart within a process that outlives one of them."""

    def mixture(self) -> tuple[Mixture, ShardCache]:
        """The order of rows, and where they are; kept in this process, as many blocks need it."""
        if self.token not in _MIXTURES:
            # In the order of their names, whatever the order in the config.
            opened = {name: PreparedData.open(store) for name, (_, store) in sorted(self.datasets.items())}
            rows = {name: (self.datasets[name][0], data.shard_rows) for name, data in opened.items()}
            mixture = Mixture(rows, seed=self.seed, stage=self.stage, window=self.shuffle_shards)
            _MIXTURES.clear()
            _MIXTURES[self.token] = (mixture, ShardCache(list(opened.values()), self.cache_bytes))
        return _MIXTURES[self.token]

    def rows(self, first_step: int, rank: int, world: int) -> Table:
        """The rows of one rank for the steps of one block, with the position and the seed of each."""
        steps = range(first_step, min(first_step + self.steps_per_block, self.steps))
        shape = {"global_batch": self.global_batch, "world": world, "rank": rank}
        positions = np.concatenate([step_positions(step, **shape) for step in steps])
        mixture, shards = self.mixture()
        rows = mixture.rows(positions)
        table = _gathered(shards, rows.dataset, rows.shard, rows.row)
        return table.append_column(_POSITION, pa.array(positions)).append_column(_SEED, pa.array(rows.seed))

    def collated(self, table: Table) -> Arrays:
        """The arrays that a worker trains on."""
        numbers = {name: table.column(name).to_numpy() for name in (_POSITION, _SEED)}
        return {**_collate(self.key, self.make_collate)(table.drop_columns(list(numbers))), **numbers}

    def block(self, first_step: int, rank: int, world: int) -> Arrays:
        """The samples of one rank for the steps of one block, where the shards hold the features."""
        return self.collated(self.rows(first_step, rank, world))


_MIXTURES: dict[str, tuple[Mixture, ShardCache]] = {}
_COLLATES: dict[str, Collate] = {}


def _collate(key: str, make: Callable[[], Collate]) -> Collate:
    """This process's collate function; building it loads a tokenizer and more."""
    if key not in _COLLATES:
        _COLLATES.clear()
        _COLLATES[key] = make()
    return _COLLATES[key]


def _gathered(
    shards: ShardCache, dataset: NDArray[np.int64], shard: NDArray[np.int64], row: NDArray[np.int64]
) -> Table:
    """Rows of several shards as one table, in the order they are asked for."""
    places = np.stack([dataset, shard], axis=1)
    sources, which = np.unique(places, axis=0, return_inverse=True)
    order = np.argsort(which, kind="stable")
    parts = [
        shards.read(int(d), int(s)).take(pa.array(row[order[which[order] == number]]))
        for number, (d, s) in enumerate(sources)
    ]
    together = pa.concat_tables(parts) if len(parts) > 1 else parts[0]
    return together.take(pa.array(np.argsort(order))).combine_chunks()


def _read_block(stream: StageStream, first_step: int, rank: int, world: int) -> Table:
    if stream.make_encoder is not None:
        return stream.rows(first_step, rank, world)
    return _block(stream.block(first_step, rank, world))


def _block(arrays: Arrays) -> Any:
    return BlockAccessor.batch_to_arrow_block(cast(Any, arrays))


class _EncodeAndCollate:
    """Encodes blocks of rows, in an actor that holds the encoders."""

    def __init__(self, stream: StageStream, make_encoder: Callable[[], Encode]) -> None:
        self._stream = stream
        self._encode = make_encoder()

    def __call__(self, table: Table) -> Any:
        return _block(self._stream.collated(self._encode(table)))


class _Unhurried(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest between its rounds.

    Whenever workers have enough batches waiting the loop would spin, and take a core from them on a small machine.
    """

    SECONDS = 0.02

    def on_execution_step(self, executor: Any) -> None:
        """Rest after one round."""
        del executor
        time.sleep(self.SECONDS)


def stream_dataset(stream: StageStream, start_step: int, world: int) -> Dataset:
    """The stage's samples from a step on, blocks of the ranks in turn."""
    firsts = range(start_step, stream.steps, stream.steps_per_block)
    makers = [functools.partial(_read_block, stream, first, rank, world) for first in firsts for rank in range(world)]
    rows = stream.steps_per_block * stream.global_batch // world
    # Order makes the split exact.
    dataset = ordered_blocks(f"Stage{stream.stage}", makers, tasks=stream.tasks, cpus=stream.cpus, rows=rows)
    if stream.make_encoder is not None:
        dataset = dataset.map_batches(
            cast(Any, _EncodeAndCollate),
            fn_constructor_args=(stream, stream.make_encoder),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=stream.encoder_workers),
            num_cpus=stream.cpus,
            num_gpus=stream.encoder_gpus,
        )
    dataset.set_name(f"stage-{stream.stage}")
    dataset.context.custom_execution_callback_classes = [_Unhurried]
    dataset.context.execution_options.label_selector = dict(stream.place)
    return dataset


class StageStreams(DataConfig):
    """Gives Ray Train each stage's stream, split for the workers there are, from the step they resume at."""

    def __init__(self, streams: Mapping[str, StageStream], starts: Path) -> None:
        """Describe the streams.

        Args:
            streams: by the name that workers ask for.
            starts: the file in which rank 0 says at which step each stage resumes (`write_start`).
        """
        super().__init__()
        self._streams = dict(streams)
        self._starts = starts

    def placeholders(self) -> dict[str, Any]:
        """What Ray Train is told as its datasets: only the names matter."""
        return {name: ray.data.range(1) for name in self._streams}

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, DataIterator]]:
        """Build and split the streams; called once for each stage and start of workers, when rank 0 asks for it."""
        splits: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        starts = json.loads(self._starts.read_text(encoding="utf-8"))
        for name in datasets:
            dataset = stream_dataset(self._streams[name], int(starts[name]), world_size)
            for split, iterator in zip(splits, dataset.streaming_split(world_size, equal=True), strict=True):
                split[name] = iterator
        return splits


def write_start(starts: Path, name: str, step: int) -> None:
    """Say at which step a stage resumes, before any worker asks for its stream."""
    temporary = starts.with_suffix(".tmp")
    temporary.write_text(json.dumps({name: step}), encoding="utf-8")
    temporary.replace(starts)
