"""The one record that every dataset is read into, and its Arrow schema."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal, cast, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from insightedit.platform.errors import UsageError

RecordTask = Literal["caption", "edit", "segment", "chat"]
RECORD_TASKS: Final[tuple[RecordTask, ...]] = get_args(RecordTask)

RECORD_SCHEMA: Final[pa.Schema] = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("source", pa.binary()),
        pa.field("target", pa.binary()),
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("reply", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
    ]
)
"""Columns of every dataset, whatever it came from; pictures are encoded files, `meta` is a JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One example.

    Attributes:
        key: unique in its dataset, and the same on every reading.
        dataset: name of the dataset.
        task: what the example teaches.
        source: the encoded picture; None for a chat without one.
        target: the encoded edited picture; None where nothing is drawn.
        instruction: what the user says, or the caption.
        reply: what the assistant says, where the dataset has it.
        category: the dataset's own class of the example, such as the kind of edit.
        meta: a JSON object with whatever else is known.
    """

    key: str
    dataset: str
    task: RecordTask
    source: bytes | None
    target: bytes | None = None
    instruction: str
    reply: str = ""
    category: str = ""
    meta: str = "{}"

    def row(self) -> dict[str, object]:
        """Return the record as a row of `RECORD_SCHEMA`."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> Record:
        """Build a record from a row; columns that are not a record's are left alone.

        Raises:
            UsageError: A column is missing, or the task is none of a record's.
        """
        missing = [name for name in RECORD_SCHEMA.names if name not in row]
        if missing:
            raise UsageError(f"A record lacks the column {missing[0]!r}; prepare the dataset again.")
        if row["task"] not in RECORD_TASKS:
            raise UsageError(f"A record's task is {row['task']!r}; it must be one of {', '.join(RECORD_TASKS)}.")
        return cls(**{name: row[name] for name in RECORD_SCHEMA.names})  # pyright: ignore[reportArgumentType] - checked

    def details(self) -> dict[str, object]:
        """Return `meta`, parsed."""
        return cast(dict[str, object], json.loads(self.meta))


def to_table(records: Iterable[Record]) -> pa.Table:  # pyright: ignore[reportUnknownParameterType] - pyarrow has no types
    """Collect records in an Arrow table of `RECORD_SCHEMA`."""
    return pa.Table.from_pylist([record.row() for record in records], schema=RECORD_SCHEMA)


def from_table(table: pa.Table) -> list[Record]:  # pyright: ignore[reportUnknownParameterType] - pyarrow has no types
    """Return the records of a table.

    Raises:
        UsageError: A column is missing.
    """
    return [Record.from_row(row) for row in table.to_pylist()]


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a picture without loss: uint8 (H, W, 3) RGB to a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode a picture of any format that Pillow reads.

    Returns:
        Pixels (H, W, 3), uint8 RGB.

    Raises:
        UsageError: The bytes are not a whole picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"The picture cannot be read: {error}; give a whole PNG, JPEG or WebP file.") from error
