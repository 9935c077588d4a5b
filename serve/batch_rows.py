"""Which edits `batch-edit` is asked for: the rows of tables, or the pictures of a folder, on a disk or in a bucket.

Tables of text are read whole, as they are small; of a parquet file only the columns of text. Pictures are read later,
by whoever edits them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from insightedit.platform.datasets.pairs import PICTURE_SUFFIXES, known_column
from insightedit.platform.datasets.reading import as_mapping, read_file, text_field
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRowError
from insightedit.platform.storage import Store, retried

_TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
_KEYS = ("key", "id")
_LONGEST_NAME = 200
"""Bytes of a folder's or file's name; file systems take 255, with what is written before and behind it."""
_STORAGE_SECONDS = 60.0
"""How long a failing storage is waited for."""
_CELLS = 16
"""Rows of a parquet file whose pictures are decoded at once."""


class Cell(NamedTuple):
    """A picture in a parquet file."""

    file: str
    column: str
    group: int
    row: int
    """In its row group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedEdit:
    """One edit that is asked for."""

    key: str
    """Its name among the others; it says what its file is called and, with the job's seed, its own seed."""
    instruction: str
    image: str | Cell
    """A file's name, from the input's folder; or where in a parquet file the picture is."""

    @property
    def request(self) -> str:
        """A digest that changes when the edit does."""
        return hashlib.sha256(json.dumps([self.key, self.instruction, self.image]).encode()).hexdigest()[:32]

    @property
    def stem(self) -> str:
        """The name of its file, without the ending."""
        path = PurePosixPath(self.key)
        return str(path.with_suffix("") if path.suffix.lower() in PICTURE_SUFFIXES else path)


@dataclass(frozen=True, kw_only=True, slots=True)
class BadEdit:
    """A row that cannot be edited, and why: one word for counting, one sentence for people."""

    key: str
    reason: str
    detail: str

    def row(self) -> dict[str, str]:
        """As it is listed."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchInput:
    """All that is asked for, in the input's order."""

    store: Store
    """The folder that names of pictures start from."""
    wanted: Sequence[WantedEdit]
    bad: Sequence[BadEdit]


def read_input(place: str, prompt: str | None, out: Store) -> BatchInput:
    """List the edits that an input asks for.

    Args:
        place: a table (CSV, JSON Lines or parquet), or a folder with tables; with `prompt`, a folder of pictures.
            Folders are paths or URIs such as `s3://bucket/folder`.
        prompt: one instruction for all; without it each row has its own.
        out: where the edits go; what is there is no input.

    Raises:
        NotFoundError: there is no such input.
        UsageError: it cannot be read as a table, or lacks a column.
    """
    store = Store.at(place)
    if store.path is not None and store.path.suffix.lower() in PICTURE_SUFFIXES:
        raise UsageError(f"{store} is one picture; edit it with `insightedit edit`, or name its folder.")
    if PurePosixPath(str(store)).suffix.lower() in _TABLE_SUFFIXES:
        folder, name = store.parent()
        return _checked(folder, _table_rows(folder, name, "", prompt))
    names = [name for name in store.sizes() if not _hidden(name) and not f"{store}/{name}".startswith(f"{out}/")]
    if prompt is not None:
        pictures = [name for name in names if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES]
        rows = (WantedEdit(key=name, instruction=prompt, image=name) for name in pictures)
        return _checked(store, rows)
    tables = [name for name in names if PurePosixPath(name).suffix.lower() in _TABLE_SUFFIXES]
    if not tables:
        raise NotFoundError(f"There is no table in {store}; name a CSV, JSONL or parquet file, or give --prompt.")
    several = len(tables) > 1
    found = (
        row
        for name in tables
        for row in _table_rows(store, name, f"{PurePosixPath(name).with_suffix('')}/" if several else "", None)
    )
    return _checked(store, found)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _checked(store: Store, rows: Iterable[WantedEdit | BadEdit]) -> BatchInput:
    """Sort rows into good and bad; of two that would be one file, the second is bad.

    Raises:
        NotFoundError: there are none.
    """
    wanted: dict[str, WantedEdit] = {}
    bad: list[BadEdit] = []
    for row in rows:
        if isinstance(row, BadEdit):
            bad.append(row)
        elif (problem := _key_problem(row.key)) is not None:
            bad.append(BadEdit(key=row.key[:_LONGEST_NAME], reason="bad_key", detail=problem))
        elif other := wanted.get(row.stem):
            detail = f"{row.key} and {other.key} would be written to one file; rename one of them."
            bad.append(BadEdit(key=row.key, reason="duplicate_key", detail=detail))
        else:
            wanted[row.stem] = row
    if not wanted and not bad:
        raise NotFoundError(f"There is nothing to edit in {store}: name a folder with pictures, or a table with rows.")
    return BatchInput(store=store, wanted=list(wanted.values()), bad=bad)


def _key_problem(key: str) -> str | None:
    """Why a key cannot be the name of a file below the output's folder; None where it can."""
    parts = key.split("/")
    if any(not part or part.startswith(".") for part in parts):
        return "The key names no file below --out: it has an empty part, or one that begins with a dot; change it."
    if any(not character.isprintable() or character == "\\" for character in key):
        return "The key has a character that no file should have in its name; change it."
    if any(len(part.encode()) > _LONGEST_NAME for part in parts):
        return f"The key is longer than the {_LONGEST_NAME} bytes that a file's name may have; change it."
    return None


# -- tables -----------------------------------------------------------------------------------------------------------


def _table_rows(store: Store, name: str, prefix: str, prompt: str | None) -> Iterator[WantedEdit | BadEdit]:
    """The rows of a table, each with its own key or else its number behind the prefix.

    Raises:
        UsageError: it cannot be read, or has no column of pictures or of instructions.
    """
    suffix = PurePosixPath(name).suffix.lower()
    read = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}[suffix]
    folder = PurePosixPath(name).parent
    for number, row in enumerate(read(store, name, prompt), 1):
        key = f"{prefix}{number:06d}"
        if isinstance(row, BadEdit):
            yield BadEdit(key=key, reason=row.reason, detail=row.detail)
            continue
        try:
            yield _wanted(row, folder, key, prompt)
        except BadRowError as error:
            yield BadEdit(key=key, reason=error.reason, detail=str(error))


class _Columns(NamedTuple):
    """What a table calls its columns."""

    image: str
    instruction: str | None
    key: str | None


class _Row(NamedTuple):
    """The texts of a row; in `cell`, the place of a picture that the table holds itself."""

    columns: _Columns
    values: Mapping[str, Any]
    cell: Cell | None = None


def _wanted(row: _Row, folder: PurePosixPath, number: str, prompt: str | None) -> WantedEdit:
    columns, values, cell = row
    key = number if columns.key is None else str(values.get(columns.key) or "") or number
    instruction = prompt or ""
    if columns.instruction is not None:
        text_field(values, columns.instruction, "empty_instruction")
        # As it stands there: blanks around it are the writer's, and `insightedit edit` would keep them.
        instruction = str(values[columns.instruction])
    image = cell or str(folder / text_field(values, columns.image))
    return WantedEdit(key=key, instruction=instruction, image=image)


def _columns(name: str, names: Sequence[str], prompt: str | None) -> _Columns:
    """Find the columns by their well-known names.

    Raises:
        UsageError: one that is needed is not there.
    """
    image = known_column(names, "source")
    instruction = known_column(names, "instruction") if prompt is None else None
    key = next((column for column in names if column.lower() in _KEYS), None)
    there = f"its columns are {', '.join(names)}"
    if image is None:
        raise UsageError(f"No column of {name} is known as the picture's; {there}: call it `image`.")
    if instruction is None and prompt is None:
        raise UsageError(f"No column of {name} is known as the instruction; {there}: call it so, or give --prompt.")
    return _Columns(image, instruction, key)


def _csv_rows(store: Store, name: str, prompt: str | None) -> Iterator[_Row | BadEdit]:
    try:
        lines = csv.reader(io.StringIO(store.read(name).decode("utf-8-sig"), newline=""), strict=True)
        header = next(lines, [])
        columns = _columns(name, header, prompt)
        for cells in lines:
            if len(cells) > len(header):
                detail = f"Line {lines.line_num} of {name} has more cells than the header; quote texts with commas."
                yield BadEdit(key="", reason="missing_field", detail=detail)
            elif cells:
                yield _Row(columns, dict(zip(header, cells, strict=False)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read as CSV: {error}; save it as CSV in UTF-8.") from None


def _json_rows(store: Store, name: str, prompt: str | None) -> Iterator[_Row | BadEdit]:
    rows: list[Mapping[str, Any] | BadEdit] = []
    for number, line in enumerate(store.read(name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(as_mapping(json.loads(line.decode("utf-8-sig"))))
        except (ValueError, RecursionError) as error:
            detail = f"Line {number} of {name} cannot be read as a JSON object: {error}"
            rows.append(BadEdit(key="", reason="invalid_json", detail=detail))
    names = {column: None for row in rows if not isinstance(row, BadEdit) for column in row}
    columns = _columns(name, list(names), prompt)
    yield from (row if isinstance(row, BadEdit) else _Row(columns, row) for row in rows)


def _parquet_rows(store: Store, name: str, prompt: str | None) -> Iterator[_Row | BadEdit]:
    try:
        with store.open(name) as file, pq.ParquetFile(file) as parquet:
            schema: Any = parquet.schema_arrow
            columns = _columns(name, schema.names, prompt)
            in_file = not pa.types.is_string(schema.field(columns.image).type)
            texts = [column for column in columns if column and not (in_file and column == columns.image)]
            for group in range(parquet.num_row_groups):
                table: Any = parquet.read_row_group(group, columns=texts)
                for row, values in enumerate(table.to_pylist() if texts else [{}] * len(table)):
                    yield _Row(columns, values, Cell(name, columns.image, group, row) if in_file else None)
    except (pa.ArrowException, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name} cannot be read as a parquet file: {error}; write it again.") from None


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures(store: Store, wanted: Sequence[WantedEdit]) -> Iterator[bytes | BadRowError]:
    """The encoded pictures of some edits, in their order; an error where there is none.

    Raises:
        StorageError: the storage failed, which is no fault of a row.
    """
    cells: Iterator[bytes | BadRowError] = iter(())
    previous: Cell | None = None
    for edit in wanted:
        if not isinstance(edit.image, Cell):
            yield _picture_file(store, edit.image)
            continue
        if previous is None or edit.image[:3] != previous[:3] or edit.image.row != previous.row + 1:
            cells = _picture_cells(store, edit.image)
        previous = edit.image
        yield next(cells)


def _picture_file(store: Store, name: str) -> bytes | BadRowError:
    try:
        if (folder := store.path) is not None:
            return retried(lambda: read_file(folder, name), _STORAGE_SECONDS)
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            return BadRowError("missing_file", f"{name} leads out of {store}; keep the pictures in one folder.")
        return retried(lambda: store.read(name), _STORAGE_SECONDS)
    except NotFoundError as error:
        return BadRowError("missing_file", str(error))
    except BadRowError as error:
        return error


def _picture_cells(store: Store, first: Cell) -> Iterator[bytes | BadRowError]:
    """Pictures of a row group from a row on, without end; pages are decoded when their turn comes."""
    folder, skipped = PurePosixPath(first.file).parent, 0
    try:
        with store.open(first.file) as file, pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_CELLS, row_groups=[first.group], columns=[first.column]):
                values: list[Any] = batch.to_pydict()[first.column]
                for value in values[max(first.row - skipped, 0) :]:
                    yield _cell_bytes(store, folder, value)
                skipped += len(values)
    except (pa.ArrowException, ValueError) as error:
        broken = BadRowError("invalid_archive", f"Row group {first.group} of {first.file} cannot be decoded: {error}")
        while True:
            yield broken


def _cell_bytes(store: Store, folder: PurePosixPath, value: object) -> bytes | BadRowError:
    """A picture as a parquet file holds it: plain bytes, or the hub's `{"bytes": ..., "path": ...}`."""
    fields = cast(dict[str, object], value) if isinstance(value, dict) else {"bytes": value}
    data, path = fields.get("bytes"), fields.get("path")
    if isinstance(data, bytes):
        return data
    if isinstance(path, str):
        return _picture_file(store, str(folder / path))
    return BadRowError("missing_field", "The picture is null, or neither bytes nor the name of a file.")
