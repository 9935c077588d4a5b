"""MagicBrush: pictures edited by hand in one or more turns, with an instruction and a mask for each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from insightedit.platform.datasets.masks import mask_rle, read_mask
from insightedit.platform.datasets.parquet import Row, hub_files, image_bytes, read_rows, row_groups
from insightedit.platform.datasets.reading import Entry, FolderOptions, fingerprint_of, parse_options, text_field
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask, picture_size

_VERSION: Final = 1
_COLUMNS: Final = ("img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img")


class MagicBrushOptions(FolderOptions):
    """Which part of MagicBrush."""

    split: Literal["train", "dev"] = "train"
    """The hub has 8,807 turns in train and 528 in dev; the test set comes in another form and is not read."""
    masks: bool = Field(default=False, exclude=True)
    """Whether `meta` has each turn's mask, in COCO's run lengths; training needs none. Prepared datasets have none, so
    they do not depend on it."""


class MagicBrushReader:
    """Reader of MagicBrush as the hub has it (osunlp/MagicBrush): `data/SPLIT-*.parquet`, or the files in the root.

    Every turn is a record of its own, with the key `IMG_ID-TURN_INDEX`: the source of a later turn is what the turn
    before it made. Masks are only checked, against the size of the source.
    """

    name: ClassVar[str] = "magicbrush"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("edit",)
    needs: ClassVar[str] = "the hub's parquet files, data/train-*.parquet"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """The row groups of the split's files."""
        parsed = parse_options(MagicBrushOptions, self.name, options)
        return row_groups(parsed.root, hub_files(parsed.root, parsed.split), _COLUMNS)

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read a row group."""
        parsed = parse_options(MagicBrushOptions, self.name, options)
        for row in read_rows(parsed.root, entry.place, _COLUMNS):
            yield row if isinstance(row, BadRow) else _turn(row, parsed)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do; files are known by name and size."""
        parsed = parse_options(MagicBrushOptions, self.name, options)
        return fingerprint_of(self.name, _VERSION, parsed, hub_files(parsed.root, parsed.split))


def _turn(row: Row, options: MagicBrushOptions) -> Record | BadRow:
    """The record of a row, or why there is none; a row without its ids goes by its place in the file."""
    key = row.key
    try:
        image, turn = text_field(row.values, "img_id"), row.values["turn_index"]
        if not isinstance(turn, int):
            raise BadRowError("missing_field", "The field turn_index is missing.")
        key = f"{image}-{turn}"
        source = _checked_source(row.values, options.root)
        notes: dict[str, Any] = {"img_id": image, "turn_index": turn, "split": options.split}
        if options.masks and row.values["mask_img"] is not None:
            notes["mask"] = mask_rle(read_mask(image_bytes(row.values["mask_img"], options.root), source))
        return Record(
            key=key,
            dataset=MagicBrushReader.name,
            task="edit",
            source=source,
            target=image_bytes(row.values["target_img"], options.root),
            instruction=text_field(row.values, "instruction", "empty_instruction"),
            meta=json.dumps(notes),
        )
    except BadRowError as error:
        return BadRow(key, error.reason, str(error))


def _checked_source(values: Mapping[str, Any], root: Path) -> bytes:
    """The source picture, when its mask is null or of its size."""
    source = image_bytes(values["source_img"], root)
    if values["mask_img"] is not None:
        size = picture_size(source)
        mask_size = _mask_size(image_bytes(values["mask_img"], root))
        if size != mask_size:
            sides = " and ".join(f"{width}x{height}" for width, height in (size, mask_size))
            raise BadRowError("mask_size", f"Source and mask differ in size: {sides} pixels.")
    return source


def _mask_size(data: bytes) -> tuple[int, int]:
    """Width and height of a mask."""
    try:
        return picture_size(data)
    except BadRowError as error:
        raise BadRowError("invalid_mask", str(error)) from None
