"""From a dataset's own files to checked records, on Ray Data: chunks of entries, in an order that a seed decides.

Nothing here writes shards (`sharding.py`) or loads a model (`encoding.py`).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from ray.data import Dataset

from insightedit.platform.blocks import ordered_blocks
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.datasets import Entry, reader_named
from insightedit.platform.datasets.reading import attempt
from insightedit.platform.records import BadRow, BadRowError, Record, open_image
from insightedit.platform.shards import Table

TASK_CPUS = 0.5
_CHUNK_ROWS = 256
"""Rows that one task reads, about."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Entries that one task reads."""

    number: int
    entries: tuple[Entry, ...]


MakeTable = Callable[[Chunk], Table]


@dataclass(frozen=True, slots=True)
class ReadRows:
    """What one chunk gave, each row with its place in the chunk's shuffled order."""

    good: list[tuple[int, Record]]
    bad: list[tuple[int, BadRow]]


def chunks_of(dataset: DatasetConfig, seed: int) -> list[Chunk]:
    """Cut a dataset into chunks, its entries shuffled by a seed.

    Raises:
        UsageError: an option or an index file is wrong.
        NotFoundError: the dataset is not there.
    """
    entries = reader_named(dataset.reader).entries(dataset.options)
    order = np.random.default_rng(seed).permutation(len(entries)).tolist()
    chunks: list[Chunk] = []
    some: list[Entry] = []
    rows = 0
    for place in order:
        some.append(entries[place])
        rows += entries[place].rows
        if rows >= _CHUNK_ROWS:
            chunks.append(Chunk(len(chunks), tuple(some)))
            some, rows = [], 0
    return [*chunks, Chunk(len(chunks), tuple(some))] if some else chunks


def read_chunk(dataset: DatasetConfig, pictures: PictureConfig, chunk: Chunk, seed: int) -> ReadRows:
    """Read a chunk's records, check them and bring their pictures into form; rows of files are shuffled by the seed."""
    reader = reader_named(dataset.reader)
    found = (row for entry in chunk.entries for row in reader.read(dataset.options, entry))
    rows = [row if isinstance(row, BadRow) else attempt(row.key, checked_record, row, pictures) for row in found]
    # Good and bad rows together: no row's place depends on whether another one is bad.
    order = np.random.default_rng((seed, chunk.number)).permutation(len(rows)).tolist()
    placed = [(place, rows[number]) for place, number in enumerate(order)]
    return ReadRows(
        [(place, row) for place, row in placed if isinstance(row, Record)],
        [(place, row) for place, row in placed if isinstance(row, BadRow)],
    )


def checked_record(record: Record, pictures: PictureConfig) -> Record:
    """Check that a record can be trained on, with its pictures as the preset wants them.

    Raises:
        BadRowError: a picture is missing, broken or too large, source and target differ in size, or an instruction is
            empty.
    """
    if not record.instruction.strip():
        raise BadRowError("empty_instruction", "The instruction is empty.")
    if record.source is None:
        raise BadRowError("missing_file", "The source picture is missing.")
    if record.target is None:
        if record.task in {"edit", "segment"}:
            raise BadRowError("missing_file", "The target picture is missing.")
        return replace(record, source=_formed(record.source, pictures)[0])
    source, size = _formed(record.source, pictures)
    target, target_size = _formed(record.target, pictures)
    if size != target_size:
        sides = " and ".join(f"{width}x{height}" for width, height in (size, target_size))
        raise BadRowError("wrong_size", f"Source and target differ in size: {sides} pixels.")
    return replace(record, source=source, target=target)


def _formed(data: bytes, pictures: PictureConfig) -> tuple[bytes, tuple[int, int]]:
    """A picture resized and encoded as configured, and its size before: (width, height)."""
    side = pictures.shorter_side
    image, size = open_image(data, at_least=side)
    if side is not None and min(size) > side:
        scale = side / min(size)
        shape = (max(round(size[0] * scale), side), max(round(size[1] * scale), side))
        image = image.resize(shape, Image.Resampling.BICUBIC)
    elif pictures.format == "keep":
        return data, size
    buffer = io.BytesIO()
    if pictures.format in {"keep", "png"}:
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, pictures.format, quality=pictures.quality)
    return buffer.getvalue(), size


def chunk_dataset(name: str, chunks: Sequence[Chunk], make_table: MakeTable, tasks: int) -> Dataset:
    """Tables of chunks in their order, each whole, made by a picklable function of the chunk."""
    makers = [functools.partial(make_table, chunk) for chunk in chunks]
    return ordered_blocks(name, makers, tasks=tasks, cpus=TASK_CPUS)
