"""The one record that every dataset is read into, and its Arrow schema."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal, cast, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from insightedit.platform.errors import UsageError

RecordTask = Literal["caption", "edit", "segment", "chat"]
RECORD_TASKS: Final[tuple[RecordTask, ...]] = get_args(RecordTask)

Reason = Literal[
    "missing_file",
    "missing_field",
    "invalid_json",
    "invalid_archive",
    "not_an_image",
    "truncated_image",
    "decompression_bomb",
    "wrong_size",
    "mask_size",
    "invalid_mask",
    "empty_instruction",
]
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)
"""Why a row is set aside. `wrong_size`: source and target differ in size, `mask_size`: a mask and its picture do."""

MAX_PIXELS: Final = 100_000_000
"""Pixels of a picture above which it is taken for a decompression bomb, and not decoded."""

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


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of a dataset that cannot become a record.

    Attributes:
        key: as the record's would be, or the file's name where a whole file is bad.
        reason: one of `REASONS`.
        detail: one sentence that names the file or field.
    """

    key: str
    reason: Reason
    detail: str


class BadRowError(UsageError):
    """What is read cannot become a record; `reason` is one of `REASONS`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        """Say why: the reason for counting, and one sentence for people."""
        super().__init__(detail)
        self.reason: Reason = reason


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
        BadRowError: The bytes are not a whole picture, or are one of more than `MAX_PIXELS`.
    """
    return np.asarray(open_image(data)[0])


def open_image(data: bytes, at_least: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a picture, as `decode_image`, for Pillow.

    Args:
        data: the encoded picture.
        at_least: a JPEG may be decoded at a reduced scale, as long as its shorter side keeps this many pixels.

    Returns:
        The picture in RGB, and its full size: (width, height) in pixels.
    """
    with _opened(data) as image:
        size = image.size
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        return image.convert("RGB"), size


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture in pixels, from its header alone.

    Raises:
        BadRowError: as `decode_image`, where the header shows it.
    """
    with _opened(data) as image:
        return image.size


@contextlib.contextmanager
def _opened(data: bytes) -> Generator[Image.Image]:
    """A picture whose pixels are not decoded yet; what is wrong with it is said in our words.

    Pillow warns of large pictures and refuses larger ones; the limit here is our own.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRowError(
                    "decompression_bomb",
                    f"The picture cannot be read: it has {image.width}x{image.height} pixels, and {MAX_PIXELS} are"
                    " allowed; make it smaller.",
                )
            yield image
    except UnidentifiedImageError:
        raise BadRowError(
            "not_an_image", "The picture cannot be read: it is no known format; give a whole PNG, JPEG or WebP file."
        ) from None
    except (BadRowError, MemoryError):
        raise
    except Exception as error:
        # Decoders raise what they like over damage, and not only errors of reading.
        detail = f"The picture cannot be read: {error}; give a whole PNG, JPEG or WebP file."
        raise BadRowError("truncated_image", detail) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
