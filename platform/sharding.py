"""Prepared shards, written by Ray Data: read chunks, cut into equal shards, encode, write.

A folder is resumable at any moment. `PLAN.json` comes first and says what the shards are made from; each shard appears
whole, and a note beside it says which rows it holds; the manifest comes last. A second run with the same plan keeps the
shards up to the first that is missing, and goes on behind them: it writes what the first run would have written.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.exceptions import RayError

from insightedit.platform.cluster import cause_of
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.datasets import reader_named
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.ingest import TASK_CPUS, Chunk, chunk_dataset, chunks_of, read_chunk
from insightedit.platform.records import to_table
from insightedit.platform.shards import MANIFEST_NAME, Shard, ShardManifest, Table, write_shard
from insightedit.platform.storage import Store

QUARANTINE_NAME = "quarantine.jsonl"
PLAN_NAME = "PLAN.json"
_SET_ASIDE = "quarantine"
"""Folder of bad rows behind which their chunk has no good one, until the whole list is written."""
_NOTES = "notes"
"""Folder of the notes on shards, until the manifest is written."""
_CHUNK, _PLACE, _BEFORE, _LAST, _BAD = "_chunk", "_place", "_before", "_last", "_bad"
"""Columns that travel with the good rows: their chunk; their place in it, and that of the good row before, -1 for the
first; whether it is the chunk's last good row; and the bad rows since the one before, for the last also those behind.
So what a shard says of good and bad rows is of one reading, whatever another reading found."""
_FINGERPRINT = b"insightedit.encoders"


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
    place: Mapping[str, str] = field(default_factory=dict[str, str])
    """Labels of the nodes that do all this."""

    def plan(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """All that the shards' bytes depend on, but for the encoders' weights."""
        cuts = json.dumps([[entry.rows for entry in chunk.entries] for chunk in chunks])
        return {
            **self.settings(),
            "source": reader_named(self.dataset.reader).fingerprint(self.dataset.options),
            "chunks": hashlib.sha256(cuts.encode()).hexdigest(),
        }

    def settings(self) -> dict[str, Any]:
        """The part of the plan that is known without the source."""
        return {
            "dataset": self.name,
            "reader": self.dataset.reader,
            "options": {name: str(value) for name, value in self.dataset.options.items() if name != "root"},
            "seed": self.seed,
            "rows_per_shard": self.rows_per_shard,
            "pictures": self.pictures.model_dump(mode="json"),
            "resolution": self.resolution if self.encoder is not None else 0,
        }


@dataclass(frozen=True, slots=True)
class _Note:
    """Which rows a shard holds, by chunk and place in the chunk."""

    shard: Shard
    plan: str
    """sha256 of the plan."""
    first: tuple[int, int]
    before: int
    """Place of the chunk's good row before the first; -1 where there is none."""
    last: tuple[int, int]
    ends_chunk: bool
    """Whether the last row is the chunk's last good one."""
    bad: list[dict[str, str]]
    """Bad rows that its rows carried."""
    skipped: list[int]
    """Chunks between its first and its last that had no good row."""
    encoders: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: str | bytes) -> _Note:
        fields: dict[str, Any] = json.loads(text)
        shard: Any = Shard(**fields.pop("shard"))
        ends: dict[str, Any] = {end: tuple(fields.pop(end)) for end in ("first", "last")}
        return cls(shard=shard, **ends, **fields)


Progress = Callable[[int, int], None]
"""Is told how many rows are written, and about how many there are."""


def prepared_manifest(sharding: Sharding, store: Store) -> ShardManifest | None:
    """The manifest of shards that are there already; None where they are missing or not all there.

    Shards whose source is no longer there are taken as they are, where the settings are the same.

    Raises:
        UsageError: they were made with other settings or from another source, or the place holds something else.
        NotFoundError: neither they nor the dataset are there.
    """
    plan = _plan_before(store)
    if plan is None:
        return None
    try:
        manifest = ShardManifest.read(store)
        manifest.check_files(store)
    except InsightEditError:
        manifest = None
    try:
        expected = sharding.plan(chunks_of(sharding.dataset, sharding.seed))
    except NotFoundError:
        if manifest is None:
            raise
        expected = {**plan, **sharding.settings()}
    if plan != expected:
        differing = next(key for key in {**plan, **expected} if plan.get(key) != expected.get(key))
        raise UsageError(
            f"{store} was prepared with other settings ({differing} differs); make it again with --rebuild"
            f" {sharding.name}, or use another --workdir."
        )
    return manifest


def _plan_before(store: Store) -> dict[str, Any] | None:
    """What the shards of a place are made from; None where the place is empty."""
    sizes = store.sizes()
    if not sizes:
        return None
    try:
        return cast(dict[str, Any], json.loads(store.read(PLAN_NAME)))
    except (NotFoundError, ValueError):
        raise UsageError(f"{store} holds something else than shards; name another place in data.store.") from None


def clear_shards(store: Store) -> None:
    """Delete shards and what belongs to them, and nothing else.

    Raises:
        UsageError: the place holds something else.
    """
    if _plan_before(store) is None:
        return
    ours = (PLAN_NAME, MANIFEST_NAME, QUARANTINE_NAME)
    names = list(store.sizes())
    # The plan last: without it the rest could not be told from other files.
    store.remove(*(name for name in names if name.startswith(("shard-", f"{_SET_ASIDE}/", f"{_NOTES}/"))))
    store.remove(*(name for name in reversed(ours) if name in names))


def write_shards(sharding: Sharding, store: Store, progress: Progress | None = None) -> ShardManifest:
    """Prepare a dataset's shards, or go on where an earlier run stopped.

    Raises:
        UsageError: an option or an index file of the dataset is wrong.
        NotFoundError: the dataset is not there.
        InsightEditError: too many rows are bad, or the work failed.
    """
    chunks = chunks_of(sharding.dataset, sharding.seed)
    plan = sharding.plan(chunks)
    store.write(PLAN_NAME, json.dumps(plan, indent=1).encode())
    work = _Work(sharding, store, plan, chunks)
    try:
        for rows in work.write():
            if progress is not None:
                progress(rows, work.total)
    except RayError as error:
        work.list_bad()
        raise InsightEditError(f"Preparing {sharding.name} failed: {cause_of(error)}") from error
    return work.finish()


class _Work:
    """One run over a dataset."""

    def __init__(self, sharding: Sharding, store: Store, plan: Mapping[str, Any], chunks: Sequence[Chunk]) -> None:
        self.total = sum(entry.rows for chunk in chunks for entry in chunk.entries)
        self._sharding = sharding
        self._store = store
        self._plan = plan
        self._digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        self._chunks = chunks
        self._written = self._written_before()

    def write(self) -> Iterator[int]:
        """Write what is missing; yields the number of rows that are written, after each shard."""
        start = _behind(self._written)
        rows = sum(note.shard.rows for note in self._written)
        bad = sum(len(note.bad) for note in self._written)
        tally = ray.remote(num_cpus=0)(cast(Any, _Tally)).remote(self._sharding.quarantine_limit, self.total, rows, bad)
        if start[0] == len(self._chunks):
            return
        for row in self._pipeline(start, tally).iter_rows():
            note = _Note.from_json(row["note"])
            self._written.append(note)
            rows += note.shard.rows
            yield rows

    def _pipeline(self, start: tuple[int, int], tally: Any) -> Dataset:
        """A row about each shard, as they are written, in their order."""
        sharding = self._sharding
        make_table = functools.partial(_read, sharding=sharding, store=self._store, start=start, tally=tally)
        dataset = chunk_dataset(sharding.name, self._chunks[start[0] :], make_table, sharding.tasks)
        dataset.context.execution_options.label_selector = dict(sharding.place)
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
        arguments = {"store": self._store, "plan": self._digest}
        writing = TaskPoolStrategy(size=sharding.tasks)
        return dataset.map_batches(cast(Any, _write), fn_kwargs=arguments, compute=writing, **whole)

    def _written_before(self) -> list[_Note]:
        """Shards of an earlier run, from the first up to where one is missing."""
        notes, sizes = self._store.child(_NOTES), self._store.sizes()
        found: list[_Note] = []
        for name in notes.sizes():
            note = _Note.from_json(notes.read(name))
            whole = sizes.get(note.shard.file) == note.shard.size
            # Another run may have read other rows there: of two shards that begin alike, one is enough.
            if whole and note.plan == self._digest and self._bad_between(found, note.first, note.before) is not None:
                found.append(note)
        return found

    def _bad_between(
        self, before: Sequence[_Note], first: tuple[int, int], previous: int
    ) -> list[dict[str, str]] | None:
        """Bad rows between some shards and a good row behind them that carries none of these; None where good rows are.

        Args:
            before: the shards.
            first: chunk and place of the good row.
            previous: place of the chunk's good row before it; -1 where there is none.
        """
        chunk, place = _behind(before)
        if previous >= 0:
            return [] if (chunk, place) == (first[0], previous + 1) else None
        bad: list[dict[str, str]] = []
        for number in range(chunk, first[0]):
            alone = self._bad_alone(number, place)
            if alone is None:
                return None
            bad += alone
            place = 0
        return bad if place == 0 else None

    def _bad_alone(self, chunk: int, begin: int) -> list[dict[str, str]] | None:
        """The rows of a chunk from a place on, where none of them is good."""
        try:
            return json.loads(self._store.child(_SET_ASIDE).read(_aside_name(chunk, begin)))
        except NotFoundError:
            return None

    def finish(self) -> ShardManifest:
        """Put the shards together under a manifest.

        Raises:
            InsightEditError: too many rows are bad, or none is good, or the encoders differ.
        """
        good = sum(note.shard.rows for note in self._written)
        bad, first = self.list_bad()
        if not good or bad > self._sharding.quarantine_limit * (good + bad):
            raise InsightEditError(_refusal(self._sharding, bad, good + bad, first))
        encoders = {note.encoders for note in self._written}
        if len(encoders) != 1:
            raise InsightEditError(
                f"The shards of {self._sharding.name} come from different encoders; give every machine the same"
                f" sources, and make them again with --rebuild {self._sharding.name}."
            )
        manifest = ShardManifest(
            dataset=self._sharding.name,
            plan=self._plan,
            encoders=encoders.pop(),
            shards=tuple(note.shard for note in self._written),
            quarantined=bad,
        )
        self._store.write(MANIFEST_NAME, manifest.to_json().encode())
        # Shards of a row order that came to nothing, and what only a run that goes on would need.
        kept = {shard.file for shard in manifest.shards}
        self._store.remove(*(n for n in self._store.sizes() if n.startswith("shard-") and n not in kept))
        for folder in (_NOTES, _SET_ASIDE):
            self._store.child(folder).delete()
        return manifest

    def list_bad(self) -> tuple[int, str]:
        """Write the list of all bad rows so far; their number, and the first in words."""
        rows: list[dict[str, str]] = []
        for number, note in enumerate(self._written):
            rows += self._bad_between(self._written[:number], note.first, note.before) or []
            rows += note.bad
            for chunk in note.skipped:
                rows += self._bad_alone(chunk, 0) or []
        rows += self._bad_behind()
        if rows:
            self._store.write(QUARANTINE_NAME, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        first = rows[0] if rows else {"key": "-", "detail": "It has no rows at all."}
        return len(rows), f"{first['key']}: {first['detail']}"

    def _bad_behind(self) -> list[dict[str, str]]:
        """Bad rows behind the last shard, as far as they were read."""
        chunk, place = _behind(self._written)
        rows: list[dict[str, str]] = []
        for number in range(chunk, len(self._chunks)):
            alone = self._bad_alone(number, place)
            if alone is None:
                break
            rows += alone
            place = 0
        return rows


def _behind(notes: Sequence[_Note]) -> tuple[int, int]:
    """Chunk and place where the rows behind some shards begin."""
    if not notes:
        return 0, 0
    chunk, place = notes[-1].last
    return (chunk + 1, 0) if notes[-1].ends_chunk else (chunk, place + 1)


def _refusal(sharding: Sharding, bad: int, rows: int, first: str) -> str:
    return (
        f"{bad} of {rows} rows of {sharding.name} are bad, more than data.quarantine_limit"
        f" {sharding.quarantine_limit:g} allows; {QUARANTINE_NAME} lists them, and the first is {first}"
    )


class _Tally:
    """Counts the rows of all reading tasks, so that a hopeless job stops early."""

    def __init__(self, limit: float, total: int, good: int, bad: int) -> None:
        self._limit = limit
        self._total = total
        self._good, self._bad = good, bad
        self._seen: set[int] = set()

    def add(self, chunk: int, good: int, bad: int) -> tuple[int, int] | None:
        """Count a chunk, once; returns bad and all rows so far where they are too many already."""
        if chunk not in self._seen:
            self._seen.add(chunk)
            self._good += good
            self._bad += bad
        rows = self._good + self._bad
        return (self._bad, rows) if self._bad > self._limit * max(self._total, rows) else None


def _read(chunk: Chunk, *, sharding: Sharding, store: Store, start: tuple[int, int], tally: Any) -> Table:
    """A chunk's good rows, each with its place and the bad ones before it."""
    rows = read_chunk(sharding.dataset, sharding.pictures, chunk, sharding.seed)
    begin = start[1] if chunk.number == start[0] else 0
    good = [(place, record) for place, record in rows.good if place >= begin]
    bad = [(place, row) for place, row in rows.bad if place >= begin]
    if not good:
        listed = json.dumps([asdict(row) for _, row in bad])
        store.child(_SET_ASIDE).write(_aside_name(chunk.number, begin), listed.encode())
    if over := ray.get(tally.add.remote(chunk.number, len(good), len(bad))):
        first = f"{bad[0][1].key}: {bad[0][1].detail}" if bad else "in the list."
        raise InsightEditError(_refusal(sharding, over[0], over[1], first))
    places = np.array([place for place, _ in good], np.int64)
    ordinals = np.arange(len(places))
    carriers = np.minimum(np.searchsorted(places, [place for place, _ in bad]), len(places) - 1)
    carried: list[list[dict[str, str]]] = [[] for _ in good]
    for carrier, (_, row) in zip(carriers.tolist(), bad if good else (), strict=False):
        carried[carrier].append(asdict(row))
    columns = {
        _CHUNK: np.full(len(places), chunk.number),
        _PLACE: places,
        _BEFORE: np.concatenate([[begin - 1], places])[: len(places)],
        _LAST: ordinals == len(places) - 1,
        _BAD: np.array([json.dumps(one) for one in carried], np.object_),
    }
    table = to_table([record for _, record in good])
    for name, column in columns.items():
        table = table.append_column(name, pa.array(column, pa.string() if name == _BAD else None))
    return table


def _aside_name(chunk: int, begin: int) -> str:
    return f"chunk-{chunk:08d}-{begin:06d}.json"


class _Encode:
    """Runs an encoder, made once in each process, over whole shards."""

    def __init__(self, encoder: type[Any], arguments: tuple[Any, ...]) -> None:
        self._encoder = encoder(*arguments)

    def __call__(self, table: Table) -> Table:
        return self._encoder(table).replace_schema_metadata({_FINGERPRINT: self._encoder.fingerprint})


def _write(table: Table, store: Store, plan: str) -> Table:
    """Write a shard, named by the row it begins with and by its content, and a note on it."""
    ends = [table.slice(row, 1).select([_CHUNK, _PLACE, _BEFORE, _LAST]).to_pylist()[0] for row in (0, len(table) - 1)]
    first, last = ends
    metadata = cast(Mapping[bytes, bytes], table.schema.metadata or {})
    bad: list[dict[str, str]] = [row for rows in table.column(_BAD).to_pylist() for row in json.loads(rows)]
    rows = table.drop_columns([_CHUNK, _PLACE, _BEFORE, _LAST, _BAD]).replace_schema_metadata(None)
    name = f"shard-{first[_CHUNK]:08d}-{first[_PLACE]:06d}"
    shard = write_shard(rows, store, name)
    note = _Note(
        shard=shard,
        plan=plan,
        first=(first[_CHUNK], first[_PLACE]),
        before=first[_BEFORE],
        last=(last[_CHUNK], last[_PLACE]),
        ends_chunk=last[_LAST],
        bad=bad,
        skipped=sorted(set(range(first[_CHUNK], last[_CHUNK])) - set(table.column(_CHUNK).to_pylist())),
        encoders=metadata.get(_FINGERPRINT, b"").decode(),
    )
    store.child(_NOTES).write(f"{Path(shard.file).stem}.json", note.to_json())
    return pa.table({"note": [note.to_json()]})
