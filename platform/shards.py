"""Prepared datasets: folders of Parquet shards with records, and features of the frozen encoders beside them.

A folder is whole when its manifest is there. The manifest says what it was made from, so that shards of other settings,
other encoders or another version of a dataset are refused instead of trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from insightedit.platform.errors import InsightEditError, NotFoundError
from insightedit.platform.storage import Store

Table = Any
"""A table of pyarrow, which has no types."""
MANIFEST_NAME = "MANIFEST.json"
_SHAPE = b"shape"
_TYPE = b"dtype"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its name, rows, bytes and sha256 in hex."""

    file: str
    rows: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardManifest:
    """What a prepared dataset holds, and what it was made from."""

    dataset: str
    plan: Mapping[str, Any]
    """The settings that its bytes depend on: the source's fingerprint, seed, form of the pictures and more."""
    encoders: str
    """Fingerprint of the frozen encoders; empty where nothing was encoded ahead."""
    shards: tuple[Shard, ...]
    quarantined: int
    """Bad rows, listed in `quarantine.jsonl`."""

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A sha256 over everything: two datasets with the same hold the same bytes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `MANIFEST.json`; the last file of a folder."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, store: Store) -> ShardManifest:
        """Read a prepared dataset's manifest.

        Raises:
            NotFoundError: there is none.
            InsightEditError: it is not one.
        """
        try:
            text = store.read(MANIFEST_NAME)
        except NotFoundError:
            raise NotFoundError(f"There are no prepared shards in {store}; run `insightedit data prepare`.") from None
        try:
            content = json.loads(text)
            content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
            return cls(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise InsightEditError(
                f"{store}/{MANIFEST_NAME} is not a readable manifest ({error}); prepare the dataset again."
            ) from None

    def check_files(self, store: Store) -> None:
        """Check that every shard is there in its size.

        Raises:
            InsightEditError: one is not.
        """
        sizes = store.sizes()
        for shard in self.shards:
            if sizes.get(shard.file) != shard.size:
                raise InsightEditError(
                    f"{store}/{shard.file} is missing or torn; delete {store} and prepare the dataset again."
                )


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A prepared dataset's folder with its manifest."""

    store: Store
    manifest: ShardManifest

    @classmethod
    def open(cls, place: str | Path | Store) -> PreparedData:
        """Open a prepared dataset.

        Raises:
            NotFoundError: there is none.
            InsightEditError: it is damaged.
        """
        store = Store.at(place)
        manifest = ShardManifest.read(store)
        manifest.check_files(store)
        return cls(store, manifest)

    @property
    def shard_rows(self) -> list[int]:
        """Rows of each shard."""
        return [shard.rows for shard in self.manifest.shards]

    def read(self, shard: int) -> Table:
        """One shard.

        Raises:
            NotFoundError: it is not there.
            InsightEditError: it differs from its manifest.
        """
        entry = self.manifest.shards[shard]
        data = self.store.read(entry.file)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise InsightEditError(
                f"{self.store}/{entry.file} differs from its manifest; delete it and run `insightedit data prepare`."
            )
        return pq.read_table(pa.BufferReader(data)).combine_chunks()


class ShardCache:
    """The shards that were read last, up to some bytes; a process reads the shards of a window again and again."""

    def __init__(self, data: Sequence[PreparedData], max_bytes: int) -> None:
        """Keep shards of some prepared datasets.

        Args:
            data: the datasets.
            max_bytes: of the tables in memory; the last one that was read stays, whatever its size.
        """
        self._data = data
        self._max_bytes = max_bytes
        self._bytes = 0
        self._tables: OrderedDict[tuple[int, int], Table] = OrderedDict()

    def read(self, dataset: int, shard: int) -> Table:
        """One shard of the dataset with this number."""
        key = (dataset, shard)
        if key not in self._tables:
            self._tables[key] = self._data[dataset].read(shard)
            self._bytes += self._tables[key].nbytes
        self._tables.move_to_end(key)
        while self._bytes > self._max_bytes and len(self._tables) > 1:
            self._bytes -= self._tables.popitem(last=False)[1].nbytes
        return self._tables[key]


def add_features(table: Table, features: Mapping[str, NDArray[Any]]) -> Table:
    """Add arrays (B, ...) as columns of fixed-size bytes; shape and type are kept in the column's metadata."""
    for name, array in features.items():
        width = array[0].nbytes
        flat = pa.py_buffer(np.ascontiguousarray(array))
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, flat])
        metadata = {_SHAPE: json.dumps(array.shape[1:]), _TYPE: str(array.dtype)}
        table = table.append_column(pa.field(name, pa.binary(width), metadata=metadata), column)
    return table


def feature_names(schema: Any) -> list[str]:
    """The columns that `add_features` added."""
    return [field.name for field in schema if field.metadata and _SHAPE in field.metadata]


def features_of(table: Table) -> dict[str, NDArray[Any]]:
    """The arrays (B, ...) that `add_features` added, as views of the table."""
    result: dict[str, NDArray[Any]] = {}
    for name in feature_names(table.schema):
        metadata = cast(dict[bytes, bytes], table.schema.field(name).metadata)
        column = table.column(name).combine_chunks()
        chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        dtype = np.dtype(metadata[_TYPE].decode())
        shape = (len(chunk), *json.loads(metadata[_SHAPE]))
        flat = np.frombuffer(chunk.buffers()[1], dtype)
        start = chunk.offset * chunk.type.byte_width // dtype.itemsize
        result[name] = flat[start : start + int(np.prod(shape))].reshape(shape)
    return result


def write_shard(table: Table, store: Store, name: str) -> Shard:
    """Write one shard. Pictures and features are stored as they are: neither gets smaller.

    The file's name ends with a part of its sha256: writers of other rows do not write over each other.
    """
    bulky = {"source", "target", *feature_names(table.schema)}
    texts = [column for column in table.column_names if column not in bulky]
    compression: Any = {column: "none" if column in bulky else "zstd" for column in table.column_names}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, use_dictionary=cast(Any, texts), row_group_size=len(table))
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(data).hexdigest()
    file = f"{name}-{digest[:8]}.parquet"
    store.write(file, data)
    return Shard(file, len(table), len(data), digest)
