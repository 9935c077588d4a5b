"""Parquet files of datasets from the Hugging Face hub: row groups as entries, rows one by one, pictures in columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from insightedit.platform.datasets.reading import Entry, read_file
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError

_BATCH: Final = 16
"""Rows decoded at once: a row group of a thousand pictures would not fit beside its neighbours."""
_DAMAGE: Final = (pa.ArrowException, OSError, ValueError)
"""What a damaged file raises; ValueError also where a text is not UTF-8."""


class RowGroup(NamedTuple):
    """The place of an entry: a row group of a file.

    Attributes:
        file: relative to the dataset's folder, with slashes.
        group: number of the row group in the file.
        first: number of its first row in the file.
    """

    file: str
    group: int
    first: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file.

    Attributes:
        key: unique in the dataset: the file without its suffix, a slash and the row's number in the file.
        values: its columns, as `pyarrow` gives them.
    """

    key: str
    values: dict[str, Any]


def hub_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split, sorted: `SPLIT-*.parquet` in `root/data`, or else in `root`.

    Raises:
        NotFoundError: there are none.
    """
    for folder in (root / "data", root):
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if files:
            return files
    raise NotFoundError(
        f"There is no {split}-*.parquet in {root / 'data'} or {root}; download the split's parquet files there."
    )


def row_groups(root: Path, files: Iterable[Path], columns: Sequence[str] = ()) -> list[Entry]:
    """The row groups of files, one entry each, whose place is a `RowGroup`; only the files' footers are read.

    Args:
        root: the dataset's folder.
        files: in it, in the order in which they are read.
        columns: what every file must have.

    Raises:
        UsageError: a file is no parquet file, or lacks a column.
    """
    entries: list[Entry] = []
    for file in files:
        first = 0
        for group, rows in enumerate(_group_sizes(file, columns)):
            entries.append(Entry(RowGroup(file.relative_to(root).as_posix(), group, first), rows))
            first += rows
    return entries


def _group_sizes(file: Path, columns: Sequence[str]) -> list[int]:
    """Rows of each row group of a file."""
    try:
        with pq.ParquetFile(file) as parquet:
            missing = [name for name in columns if name not in parquet.schema_arrow.names]
            footer = parquet.metadata
            sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    except _DAMAGE as error:
        raise UsageError(f"{file} cannot be read as a parquet file: {error}; download it again.") from None
    if missing:
        raise UsageError(f"{file} has no column {missing[0]!r}; give the files of the right dataset.")
    return sizes


def read_rows(root: Path, place: RowGroup, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    """Read the rows of a row group, a few at a time.

    Args:
        root: the dataset's folder.
        place: the place of an entry of `row_groups`.
        columns: which ones; others are not read.

    Yields:
        The rows in order; where the row group cannot be decoded, one `BadRow` (`invalid_archive`) that ends it.
    """
    stem, number = place.file.removesuffix(".parquet"), place.first
    try:
        for values in _decoded(root / place.file, place.group, columns):
            yield Row(f"{stem}/{number:06d}", values)
            number += 1
    except _DAMAGE as error:
        detail = f"Row group {place.group} of {place.file} cannot be decoded from row {number} on: {error}."
        yield BadRow(f"{stem}/{number:06d}", "invalid_archive", detail)


def _decoded(file: Path, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a row group; pages are read when their turn comes, and checked where they have checksums."""
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as parquet:
        for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=list(columns)):
            yield from batch.to_pylist()


def image_bytes(value: object, root: Path) -> bytes:
    """The encoded picture in a column: plain bytes, or the hub's `{"bytes": ..., "path": ...}`.

    Args:
        value: of the column; where its bytes are null, its path names a file of the dataset.
        root: the dataset's folder.

    Raises:
        BadRowError: it is null or something else (`missing_field`), or its file is missing (`missing_file`).
    """
    if isinstance(value, bytes):
        return value
    struct = cast(dict[str, object], value) if isinstance(value, dict) else {}
    data, path = struct.get("bytes"), struct.get("path")
    if isinstance(data, bytes):
        return data
    if isinstance(path, str):
        return read_file(root, path)
    raise BadRowError("missing_field", "A picture is null, or neither bytes nor the name of a file.")
