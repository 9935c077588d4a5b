"""People's own pairs: JSON Lines, CSV or parquet files, image folders and datasets of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from insightedit.platform.datasets.masks import mask_rle, read_mask
from insightedit.platform.datasets.parquet import Row, RowGroup, image_bytes, read_rows, row_groups
from insightedit.platform.datasets.reading import (
    Entry,
    FolderOptions,
    as_mapping,
    attempt,
    fingerprint_of,
    parse_options,
    read_file,
    text_field,
)
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask, picture_size

Format = Literal["imagefolder", "hub", "parquet", "jsonl", "csv"]
Role = Literal["source", "target", "instruction", "reply", "mask", "category"]

VERSION: Final = 1
"""Raised whenever the same files give other records."""
ROWS_EACH: Final = 500
"""Rows of a text file that are one entry."""
LONGEST_LINE: Final = 16 << 20
"""Bytes of a line above which a file is taken for something else than lines of rows."""
PICTURE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

_FILES: Final[dict[Format, tuple[str, ...]]] = {
    "imagefolder": ("**/metadata.jsonl", "**/metadata.csv", "**/metadata.parquet"),
    "hub": ("data/*.parquet",),
    "parquet": ("*.parquet",),
    "jsonl": ("*.jsonl",),
    "csv": ("*.csv",),
}
"""Which files each format is stored in; without the option `format`, the first that has any is taken."""
_BEFORE: Final = ("source", "input", "original", "origin", "before")
_AFTER: Final = ("target", "edited", "output", "result", "after")
_PICTURE_NAMES: Final = ("{}_image", "{}_img", "{}")
_KNOWN: Final[dict[Role, tuple[str, ...]]] = {
    "source": (*(form.format(name) for name in _BEFORE for form in _PICTURE_NAMES), "image", "file_name"),
    "target": tuple(form.format(name) for name in _AFTER for form in _PICTURE_NAMES),
    "instruction": ("instruction", "edit_instruction", "edit_prompt", "edit", "prompt", "text"),
    "reply": ("reply", "response", "answer"),
    "mask": ("mask_image", "mask_img", "mask"),
    "category": ("category", "edit_type", "task_type"),
}
"""Well-known names of columns, in lower case and without an ending of `_ENDINGS`; the first that is there is taken."""
_ENDINGS: Final = ("_file_name", "_filename", "_path", "_file")
_NEEDED: Final[tuple[Role, ...]] = ("source", "target", "instruction")
_LONGEST_NOTE: Final = 1000
"""Characters of a text above which it is left out of a record's `meta`."""


class PairsOptions(FolderOptions):
    """Where the pairs are, and what their columns are called."""

    format: Format | None = None
    """How they are stored; None takes the first of imagefolder, hub, parquet, jsonl and csv that has files."""
    split: str | None = None
    """Only files whose name, or a folder's on the way to them, begins with this word; None takes those of `train` if
    there are any, and else all."""
    source: str | None = None
    """Column of the source picture; None looks for a well-known name, such as source_image or file_name."""
    target: str | None = None
    """Column of the edited picture; None looks for a well-known name, such as edited_image or target_file_name."""
    instruction: str | None = None
    """Column of the instruction; None looks for a well-known name, such as instruction or edit_prompt."""
    reply: str | None = None
    """Column of the answer in words; None takes a well-known name if it is there."""
    mask: str | None = None
    """Column of the mask, whose size is checked; None takes a well-known name if it is there."""
    category: str | None = None
    """Column of the kind of edit; None takes a well-known name if it is there."""
    masks: bool = Field(default=False, exclude=True)
    """Whether `meta` has each mask, in COCO's run lengths; training needs none. Prepared datasets have none, so they do
    not depend on it."""


class Piece(NamedTuple):
    """Whole rows of a text file.

    Attributes:
        start: the first one's first byte.
        size: bytes.
        first: number of the first one; lines are counted from 1, rows of a CSV from 1 after its header.
        rows: how many.
    """

    start: int
    size: int
    first: int
    rows: int


class Part(NamedTuple):
    """The place of an entry.

    Attributes:
        file: relative to the dataset's folder, with slashes.
        at: where in the file.
        roles: the column of each role that has one.
        columns: all columns of a CSV; those of a parquet file that are short enough for `meta`.
    """

    file: str
    at: Piece | RowGroup
    roles: dict[Role, str]
    columns: tuple[str, ...] = ()


class PairsReader:
    """Reader of people's own pairs; see `insightedit.platform.datasets.Reader`. An entry is some rows of a file.

    Pictures are paths relative to the file that names them, or in a parquet file bytes or the hub's structs.
    """

    name: ClassVar[str] = "pairs"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("edit",)
    needs: ClassVar[str] = "JSON Lines, CSV or parquet files whose rows have a source, a target and an instruction"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """List row groups, and about `ROWS_EACH` rows of text files; their lines are counted, not parsed."""
        parsed = parse_options(PairsOptions, self.name, options)
        return [entry for file in _files(parsed) for entry in _entries_of(parsed, file)]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read some rows of a file."""
        parsed = parse_options(PairsOptions, self.name, options)
        part: Part = entry.place
        folder = (parsed.root / part.file).parent
        for row in _rows(parsed.root, part):
            yield row if isinstance(row, BadRow) else attempt(row.key, _record, row, part.roles, folder, parsed.masks)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        parsed = parse_options(PairsOptions, self.name, options)
        files = [*_files(parsed), *picture_files(parsed.root)]
        return fingerprint_of(self.name, VERSION, parsed, files)


def picture_files(folder: Path) -> Iterator[Path]:
    """All files in a folder whose names say that they are pictures."""
    return (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)


def _files(options: PairsOptions) -> list[Path]:
    """The files that name the pairs, sorted.

    Raises:
        NotFoundError: there are none of the format, or of the split.
    """
    formats: list[Format] = [options.format] if options.format else list(_FILES)
    for name in formats:
        files = sorted({file for pattern in _FILES[name] for file in options.root.glob(pattern)})
        if files:
            return _of_split(files, options)
    wanted = ", ".join(pattern for name in formats for pattern in _FILES[name])
    raise NotFoundError(f"There is no {wanted} in {options.root}; give the folder that holds the pairs' files.")


def _of_split(files: list[Path], options: PairsOptions) -> list[Path]:
    """The files of a split: `train-00000-of-00004.parquet`, `train.jsonl` or `train/metadata.csv` are all of train."""
    begins = re.compile(re.escape(options.split or "train") + "(?![a-z])", re.IGNORECASE)
    chosen = [file for file in files if any(map(begins.match, file.relative_to(options.root).parts))]
    if options.split and not chosen:
        found = ", ".join(file.relative_to(options.root).as_posix() for file in files[:5])
        raise NotFoundError(f"No file in {options.root} is named after the split {options.split!r}; there are {found}.")
    return chosen or files


def _entries_of(options: PairsOptions, file: Path) -> list[Entry]:
    """The entries of one file."""
    name = file.relative_to(options.root).as_posix()
    if file.suffix == ".parquet":
        return _parquet_entries(options, file, name)
    with file.open("rb") as opened:
        if file.suffix == ".csv":
            return _csv_entries(options, opened, name)
        pieces = list(_pieces(opened, _lines(opened, name)))
        roles = _roles(options, name, _json_columns(opened, name)) if pieces else {}
    return [Entry(Part(name, piece, roles), piece.rows) for piece in pieces]


def _parquet_entries(options: PairsOptions, file: Path, name: str) -> list[Entry]:
    """The row groups of a parquet file."""
    groups = row_groups(options.root, [file])
    schema = pq.read_schema(file)
    roles = _roles(options, name, schema.names)
    is_short = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    short = tuple(field.name for field in schema if any(check(field.type) for check in is_short))
    return [Entry(Part(name, group.place, roles, short), group.rows) for group in groups]


def _csv_entries(options: PairsOptions, opened: BinaryIO, name: str) -> list[Entry]:
    """Pieces of a CSV, cut between rows by the csv module, since a quoted text may go over several lines.

    Raises:
        UsageError: it is no CSV in UTF-8.
    """
    rows = csv.reader(line.decode("utf-8-sig") for line in _lines(opened, name))
    try:
        header = tuple(next(rows, ()))
        pieces = list(_pieces(opened, rows))
    except (csv.Error, UnicodeDecodeError) as error:
        after = f"after line {rows.line_num}"
        raise UsageError(f"{name} cannot be read as CSV {after}: {error}; save it as CSV in UTF-8.") from None
    roles = _roles(options, name, header) if pieces else {}
    return [Entry(Part(name, piece, roles, header), piece.rows) for piece in pieces]


def _lines(opened: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines of a file from where it stands; `tell` says where the last one ended.

    Raises:
        UsageError: one is too long to be a row.
    """
    while line := opened.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise UsageError(f"{name} has a line of more than {LONGEST_LINE} bytes; write each pair on its own line.")
        yield line


def _pieces(opened: BinaryIO, rows: Iterable[object]) -> Iterator[Piece]:
    """Cut a file into pieces, `rows` of which are read from it one by one."""
    rows, start, first = iter(rows), opened.tell(), 1
    while count := sum(1 for _ in islice(rows, ROWS_EACH)):
        yield Piece(start, opened.tell() - start, first, count)
        start, first = opened.tell(), first + count


def _json_columns(opened: BinaryIO, name: str) -> list[str]:
    """Fields of the objects in the first lines of a JSON Lines file.

    Raises:
        UsageError: none of the lines is an object.
    """
    opened.seek(0)
    rows = (_json_row("", line) for line in islice(_lines(opened, name), ROWS_EACH))
    columns = {column: None for row in rows if isinstance(row, Row) for column in row.values}
    if not columns:
        raise UsageError(f"None of the first lines of {name} is a JSON object; write one object a line, one a pair.")
    return list(columns)


def _roles(options: PairsOptions, name: str, columns: Sequence[str]) -> dict[Role, str]:
    """The column of each role that has one.

    Raises:
        UsageError: a column that is named in the options, or needed, is not there.
    """
    found: dict[Role, str] = {}
    there = f"its columns are {', '.join(columns)}"
    for role in _KNOWN:
        wanted: str | None = getattr(options, role)
        column = wanted if wanted in columns else known_column(columns, role)
        if wanted is not None and wanted not in columns:
            raise UsageError(f"{name} has no column {wanted!r}; {there}: set the option {role} to one of them.")
        if column is not None:
            found[role] = column
        elif role in _NEEDED:
            raise UsageError(f"No column of {name} is known as the {role}; {there}: set the option {role} to one.")
    return found


def known_column(columns: Sequence[str], role: Role) -> str | None:
    """The column that has the first of a role's well-known names; None where none has."""
    plain: dict[str, str] = {}
    for column in columns:
        name = column.lower()
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), "")
        plain.setdefault(name.removesuffix(ending), column)
    return next((plain[name] for name in _KNOWN[role] if name in plain), None)


def _rows(root: Path, part: Part) -> Iterator[Row | BadRow]:
    """The rows of an entry, each with its key."""
    if isinstance(part.at, RowGroup):
        return read_rows(root, part.at, sorted({*part.roles.values(), *part.columns}))
    try:
        with (root / part.file).open("rb") as opened:
            opened.seek(part.at.start)
            lines = io.BytesIO(opened.read(part.at.size))
    except OSError:
        key = f"{part.file}:{part.at.first}"
        return iter([BadRow(key, "missing_file", f"There is no file {root / part.file} any more.")])
    return _csv_rows(lines, part, part.at.first) if part.columns else _json_rows(lines, part.file, part.at.first)


def _json_rows(lines: Iterable[bytes], name: str, first: int) -> Iterator[Row | BadRow]:
    """Rows of JSON Lines; empty lines are none."""
    for number, line in enumerate(lines, first):
        if line.strip():
            yield _json_row(f"{name}:{number}", line)


def _json_row(key: str, line: bytes) -> Row | BadRow:
    """The object in a line."""
    try:
        return Row(key, dict(as_mapping(json.loads(line.decode("utf-8-sig")))))
    except (ValueError, RecursionError) as error:
        return BadRow(key, "invalid_json", f"The line {key} cannot be read as a JSON object: {error}")


def _csv_rows(lines: Iterable[bytes], part: Part, first: int) -> Iterator[Row | BadRow]:
    """Rows of CSV; empty lines are none."""
    rows = csv.reader(line.decode("utf-8", "replace") for line in lines)
    for number, cells in enumerate(rows, first):
        key = f"{part.file}:{number}"
        if len(cells) > len(part.columns):
            detail = f"Row {key} has {len(cells)} cells and the header {len(part.columns)}; quote texts with commas."
            yield BadRow(key, "missing_field", detail)
        elif cells:
            yield Row(key, dict(zip(part.columns, cells, strict=False)))


def _record(row: Row, roles: Mapping[Role, str], folder: Path, masks: bool) -> Record:
    """The record of a row; what is no role's and short goes into `meta`."""
    source = _picture(row.values, roles["source"], folder)
    target = _picture(row.values, roles["target"], folder)
    used = set(roles.values())
    notes: dict[str, Any] = {name: value for name, value in row.values.items() if name not in used and _is_note(value)}
    mask = roles.get("mask", "")
    if row.values.get(mask):
        data = _picture(row.values, mask, folder)
        _check_mask(data, source)
        if masks:
            notes["mask"] = mask_rle(read_mask(data, source))
    return Record(
        key=row.key,
        dataset=PairsReader.name,
        task="edit",
        source=source,
        target=target,
        instruction=text_field(row.values, roles["instruction"], "empty_instruction"),
        reply=_optional_text(row.values, roles.get("reply", "")),
        category=_optional_text(row.values, roles.get("category", "")),
        meta=json.dumps(notes),
    )


def _picture(row: Mapping[str, Any], column: str, folder: Path) -> bytes:
    """The encoded picture of a row: the file that its text names, or its bytes.

    Raises:
        BadRowError: there is neither, or no such file.
    """
    value = row.get(column)
    if value is None or isinstance(value, str):
        return read_file(folder, text_field(row, column))
    if isinstance(value, dict) and isinstance(value.get("path"), str) and not value.get("bytes"):
        return read_file(folder, text_field(value, "path"))
    return image_bytes(value, folder)


def _check_mask(mask: bytes, source: bytes) -> None:
    """Refuse a mask of another size than its picture."""
    sizes = picture_size(mask), picture_size(source)
    if sizes[0] != sizes[1]:
        sides = " and ".join(f"{width}x{height}" for width, height in sizes)
        raise BadRowError("mask_size", f"Mask and source differ in size: {sides} pixels.")


def _optional_text(row: Mapping[str, Any], column: str) -> str:
    """A text of a row, or nothing."""
    return text_field(row, column) if str(row.get(column) or "").strip() else ""


def _is_note(value: object) -> bool:
    """Whether a value may go into `meta`."""
    if isinstance(value, str):
        return 0 < len(value) <= _LONGEST_NOTE
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
