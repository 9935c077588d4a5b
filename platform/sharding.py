"""Prepared shards, written by Ray Data: read chunks, cut into equal shards, encode, write.

A folder is resumable at any moment. `PLAN.json` comes first and says what the shards are made from; each shard appears
whole, and its own metadata says which rows it ends with; the manifest comes last. A second run with the same plan keeps
the shards up to the first that is missing, and goes on behind them: it writes what the first run would have written.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.exceptions import RayError

from insightedit.platform.cluster import cause_of
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.datasets import reader_named
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.ingest import TASK_CPUS, Chunk, chunk_dataset, chunks_of, read_chunk
from insightedit.platform.records import BadRow, to_table
from insightedit.platform.shards import MANIFEST_NAME, Shard, ShardManifest, Table, write_shard
from insightedit.platform.storage import Store

QUARANTINE_NAME = "quarantine.jsonl"
PLAN_NAME = "PLAN.json"
_SET_ASIDE = "quarantine"
_CHUNK, _ROW, _LAST, _BAD = "_chunk", "_row", "_last", "_bad"
"""Columns that travel with the rows: their chunk, their place in it, whether it is the chunk's last, and on the first
row of a chunk how many of its rows are bad."""
_SPAN = "insightedit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How one dataset becomes shards."""

    name: str
    dataset: DatasetConfig
    seed: int
    rows_per_shard: int
    quarantine_limit: float
    pictures: PictureConfig
    resolution: int
    tasks: int
    """Tasks at a time that read."""
    encoder: type[Any] | None
    """A class whose objects turn a table of records into one with features, and whose `fingerprint` names them."""
    encoder_arguments: tuple[Any, ...] = ()
    encoder_workers: int = 1
    encoder_gpus: float = 0.0

    def plan(self) -> dict[str, Any]:
        """All that the shards' bytes depend on, but for the encoders' weights."""
        reader = reader_named(self.dataset.reader)
        return {
            "dataset": self.name,
            "reader": reader.name,
            "source": reader.fingerprint(self.dataset.options),
            "seed": self.seed,
            "rows_per_shard": self.rows_per_shard,
            "pictures": self.pictures.model_dump(mode="json"),
            "resolution": self.resolution if self.encoder is not None else 0,
        }


@dataclass(frozen=True, slots=True)
class _Span:
    """Which rows a shard holds: from its first up to its last, by chunk and place in the chunk."""

    first: tuple[int, int]
    last: tuple[int, int]
    ends_chunk: bool
    bad: int
    """Bad rows of the chunks that begin in this shard."""
    encoders: str

    def following(self) -> tuple[int, int]:
        """Where the next shard begins."""
        chunk, row = self.last
        return (chunk + 1, 0) if self.ends_chunk else (chunk, row + 1)


@dataclass(frozen=True, slots=True)
class _Written:
    shard: Shard
    span: _Span


Progress = Callable[[int, int], None]
"""Is told how many rows are written, and about how many there are."""


def prepared_manifest(sharding: Sharding, store: Store) -> ShardManifest | None:
    """The manifest of shards that are there already; None where they are missing or not all there.

    Raises:
        UsageError: they were made with other settings.
    """
    try:
        plan = json.loads(store.read(PLAN_NAME))
    except NotFoundError:
        return None
    except ValueError:
        plan = None
    if plan != sharding.plan():
        raise UsageError(
            f"{store} was prepared with other settings; prepare it again with --rebuild, or use another --workdir."
        )
    try:
        return ShardManifest.read(store)
    except NotFoundError:
        return None


def write_shards(sharding: Sharding, store: Store, progress: Progress | None = None) -> ShardManifest:
    """Prepare a dataset's shards, or go on where an earlier run stopped.

    Raises:
        UsageError: an option or an index file of the dataset is wrong.
        NotFoundError: the dataset is not there.
        InsightEditError: too many rows are bad, or the work failed.
    """
    chunks = chunks_of(sharding.dataset, sharding.seed)
    total = sum(entry.rows for chunk in chunks for entry in chunk.entries)
    store.write(PLAN_NAME, json.dumps(sharding.plan(), indent=1).encode())
    written = _written_before(store)
    start = written[-1].span.following() if written else (0, 0)
    try:
        if start[0] < len(chunks):
            for row in _pipeline(sharding, store, chunks, start).iter_rows():
                written.append(_from_row(row))
                _stop_if_hopeless(sharding, store, written, total)
                if progress is not None:
                    progress(sum(one.shard.rows for one in written), total)
    except RayError as error:
        raise InsightEditError(f"Preparing {sharding.name} failed: {cause_of(error)}") from error
    return _finish(sharding, store, written)


def _pipeline(sharding: Sharding, store: Store, chunks: Sequence[Chunk], start: tuple[int, int]) -> Dataset:
    """A row about each shard, as they are written, in their order."""
    make_table = functools.partial(_read, sharding=sharding, store=store, start=start)
    dataset = chunk_dataset(sharding.name, chunks[start[0] :], make_table, sharding.tasks)
    dataset = dataset.repartition(target_num_rows_per_block=sharding.rows_per_shard, strict=True)
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": TASK_CPUS}
    if sharding.encoder is not None:
        dataset = dataset.map_batches(
            _Encode,
            fn_constructor_args=(sharding.encoder, sharding.encoder_arguments),
            compute=ActorPoolStrategy(size=sharding.encoder_workers),
            num_gpus=sharding.encoder_gpus,
            **whole,
        )
    writing = TaskPoolStrategy(size=sharding.tasks)
    return dataset.map_batches(cast(Any, _write), fn_kwargs={"store": store}, compute=writing, **whole)


def _read(chunk: Chunk, *, sharding: Sharding, store: Store, start: tuple[int, int]) -> Table:
    """A chunk's good rows with their places; its bad rows are written down on the way."""
    rows = read_chunk(sharding.dataset, sharding.pictures, chunk, sharding.seed)
    if rows.bad:
        lines = "".join(f"{json.dumps(asdict(row))}\n" for row in rows.bad)
        store.child(_SET_ASIDE).write(f"chunk-{chunk.number:08d}.jsonl", lines.encode())
    table, count = to_table(rows.good), len(rows.good)
    places = np.arange(count)
    columns = {
        _CHUNK: np.full(count, chunk.number),
        _ROW: places,
        _LAST: places == count - 1,
        _BAD: np.where(places == 0, len(rows.bad), 0),
    }
    for name, column in columns.items():
        table = table.append_column(name, pa.array(column))
    return table.slice(start[1]) if chunk.number == start[0] else table


class _Encode:
    """Runs an encoder, made once in each process, over whole shards."""

    def __init__(self, encoder: type[Any], arguments: tuple[Any, ...]) -> None:
        self._encoder = encoder(*arguments)

    def __call__(self, table: Table) -> Table:
        return self._encoder(table).replace_schema_metadata({_SPAN: self._encoder.fingerprint})


def _write(table: Table, store: Store) -> Table:
    """Write a shard, named by the row it begins with."""
    span = _span_of(table)
    rows = table.drop_columns([_CHUNK, _ROW, _LAST, _BAD]).replace_schema_metadata({_SPAN: json.dumps(asdict(span))})
    name = f"shard-{span.first[0]:08d}-{span.first[1]:06d}.parquet"
    shard = write_shard(rows, store, name)
    return pa.table({"shard": [json.dumps(asdict(shard))], "span": [json.dumps(asdict(span))]})


def _span_of(table: Table) -> _Span:
    first, last = table.slice(0, 1).to_pylist()[0], table.slice(len(table) - 1, 1).to_pylist()[0]
    metadata = cast(Mapping[bytes, bytes], table.schema.metadata or {})
    return _Span(
        first=(first[_CHUNK], first[_ROW]),
        last=(last[_CHUNK], last[_ROW]),
        ends_chunk=last[_LAST],
        bad=int(np.sum(table.column(_BAD).to_numpy())),
        encoders=metadata.get(_SPAN.encode(), b"").decode(),
    )


def _from_row(row: Mapping[str, Any]) -> _Written:
    return _Written(Shard(**json.loads(row["shard"])), _parse_span(row["span"]))


def _parse_span(text: str | bytes) -> _Span:
    fields: dict[str, Any] = json.loads(text)
    first, last = (cast(tuple[int, int], tuple(fields[end])) for end in ("first", "last"))
    return _Span(first, last, fields["ends_chunk"], fields["bad"], fields["encoders"])


def _written_before(store: Store) -> list[_Written]:
    """Shards of an earlier run, from the first up to where one is missing."""
    found: list[_Written] = []
    expected = (0, 0)
    for name in store.sizes():
        if not name.startswith("shard-"):
            continue
        data = store.read(name)
        table = pq.ParquetFile(pa.BufferReader(data))
        span = _parse_span(cast(Any, table.schema_arrow.metadata)[_SPAN.encode()])
        # A chunk of bad rows alone lies between two shards unseen: then the work goes on with that chunk.
        if span.first != expected:
            break
        shard = Shard(name, table.metadata.num_rows, len(data), hashlib.sha256(data).hexdigest())
        found.append(_Written(shard, span))
        expected = span.following()
    return found


def _stop_if_hopeless(sharding: Sharding, store: Store, written: Sequence[_Written], total: int) -> None:
    """Do not go on to the end of a dataset whose bad rows are too many already."""
    good = sum(one.shard.rows for one in written)
    bad = sum(one.span.bad for one in written)
    if bad > sharding.quarantine_limit * max(total, good + bad):
        _refuse(sharding, _set_aside(store), good)


def _set_aside(store: Store) -> list[BadRow]:
    """Every bad row so far, listed in one file."""
    parts = store.child(_SET_ASIDE)
    lines = b"".join(parts.read(name) for name in parts.sizes())
    if lines:
        store.write(QUARANTINE_NAME, lines)
    return [BadRow(**json.loads(line)) for line in lines.splitlines()]


def _refuse(sharding: Sharding, bad: Sequence[BadRow], good: int) -> None:
    first = f"{bad[0].key}: {bad[0].detail}" if bad else "it has no rows at all."
    raise InsightEditError(
        f"{len(bad)} of {good + len(bad)} rows of {sharding.name} are bad, more than data.quarantine_limit"
        f" {sharding.quarantine_limit:g} allows; they are listed in {QUARANTINE_NAME}, and the first is {first}"
    )


def _finish(sharding: Sharding, store: Store, written: Sequence[_Written]) -> ShardManifest:
    """Put the shards together under a manifest."""
    bad = _set_aside(store)
    good = sum(one.shard.rows for one in written)
    if not good or len(bad) > sharding.quarantine_limit * (good + len(bad)):
        _refuse(sharding, bad, good)
    encoders = {one.span.encoders for one in written}
    if len(encoders) != 1:
        raise InsightEditError(
            f"The shards of {sharding.name} come from different encoders; give every machine the same sources, and"
            " prepare again with --rebuild."
        )
    manifest = ShardManifest(
        dataset=sharding.name,
        plan=sharding.plan(),
        encoders=encoders.pop(),
        shards=tuple(one.shard for one in written),
        quarantined=len(bad),
    )
    store.write(MANIFEST_NAME, manifest.to_json().encode())
    return manifest
