"""The reader of MagicBrush, and what it and others share of reading parquet files of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from insightedit.platform.datasets.magicbrush import MagicBrushReader
from insightedit.platform.datasets.masks import mask_of
from insightedit.platform.datasets.parquet import RowGroup, image_bytes
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, encode_png

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("img_id", pa.string()),
        ("turn_index", pa.int32()),
        ("source_img", IMAGE),
        ("mask_img", IMAGE),
        ("instruction", pa.string()),
        ("target_img", IMAGE),
    ]
)
READER = MagicBrushReader()
FIRST = "train-00000-of-00051-3c85ce9e4996c78b.parquet"


def picture(colour: int, width: int = 9, height: int = 7) -> bytes:
    return encode_png(np.full((height, width, 3), colour, np.uint8))


def turn(image: str, index: int, **changes: Any) -> dict[str, Any]:
    """A row as the hub has it; the source of a later turn is what the turn before made."""
    row = {
        "img_id": image,
        "turn_index": index,
        "source_img": {"bytes": picture(index - 1), "path": f"{image}-output{index - 1}.png"},
        "mask_img": {"bytes": picture(255), "path": f"{image}-mask{index}.png"},
        "instruction": f"do {index}",
        "target_img": {"bytes": picture(index), "path": f"{image}-output{index}.png"},
    }
    return row | changes


def write(path: Path, rows: list[dict[str, Any]], group: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=group)


def only(root: Path, row: dict[str, Any]) -> Record | BadRow:
    """What a dataset of one row gives."""
    write(root / "data" / FIRST, [row])
    (result,) = records_of(READER, {"root": root})
    return result


def test_every_turn_is_a_record(tmp_path: Path) -> None:
    second = "train-00001-of-00051-aa.parquet"
    write(tmp_path / "data" / second, [turn("7", 1, instruction=" do this ")])
    write(tmp_path / "data" / FIRST, [turn("242679", 1), turn("242679", 2), turn("3", 1, mask_img=None)], group=2)
    write(tmp_path / "data" / "dev-00000-of-00004-bb.parquet", [turn("9", 1)])

    entries = READER.entries({"root": tmp_path})
    assert [(entry.place, entry.rows) for entry in entries] == [
        (RowGroup(f"data/{FIRST}", 0, 0), 2),
        (RowGroup(f"data/{FIRST}", 1, 2), 1),
        (RowGroup(f"data/{second}", 0, 0), 1),
    ]
    assert READER.entries({"root": tmp_path}) == entries
    meta = json.dumps({"img_id": "242679", "turn_index": 2, "split": "train"})
    records = list(records_of(READER, {"root": tmp_path}))
    assert [record.key for record in records] == ["242679-1", "242679-2", "3-1", "7-1"]
    assert records[1] == Record(
        key="242679-2",
        dataset="magicbrush",
        task="edit",
        source=picture(1),
        target=picture(2),
        instruction="do 2",
        meta=meta,
    )
    assert isinstance(records[3], Record)
    assert records[3].instruction == "do this"


def test_masks_are_handed_on_when_asked_for(tmp_path: Path) -> None:
    mask = np.zeros((7, 9, 3), np.uint8)
    mask[2:4, 5:9] = 255
    shown = {"bytes": encode_png(mask), "path": "7-mask1.png"}
    write(tmp_path / "data" / FIRST, [turn("7", 1, mask_img=shown), turn("7", 2, mask_img=None)])
    first, second = records_of(READER, {"root": tmp_path, "masks": True})
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (mask_of(first.details()["mask"], (7, 9)) == (mask[..., 0] > 0)).all()
    assert "mask" not in second.details()
    without = READER.fingerprint({"root": tmp_path})
    assert READER.fingerprint({"root": tmp_path, "masks": True}) == without


def test_another_split_and_files_in_the_root(tmp_path: Path) -> None:
    write(tmp_path / "dev-00000-of-00004-bb.parquet", [turn("9", 1)])
    (record,) = records_of(READER, {"root": tmp_path, "split": "dev"})
    assert isinstance(record, Record)
    assert (record.key, record.details()["split"]) == ("9-1", "dev")
    with pytest.raises(NotFoundError, match=r"no train-\*\.parquet"):
        READER.entries({"root": tmp_path})
    with pytest.raises(UsageError, match="'split'"):
        READER.entries({"root": tmp_path, "split": "test"})


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"mask_img": {"bytes": picture(0, width=8), "path": None}}, "5-1", "mask_size"),
        ({"mask_img": {"bytes": b"no picture", "path": None}}, "5-1", "invalid_mask"),
        ({"source_img": {"bytes": b"no picture", "path": None}}, "5-1", "not_an_image"),
        ({"source_img": None}, "5-1", "missing_field"),
        ({"target_img": None}, "5-1", "missing_field"),
        ({"target_img": {"bytes": None, "path": "lost.png"}}, "5-1", "missing_file"),
        ({"instruction": None}, "5-1", "missing_field"),
        ({"instruction": " "}, "5-1", "empty_instruction"),
        ({"turn_index": None}, f"data/{FIRST.removesuffix('.parquet')}/000000", "missing_field"),
        ({"img_id": None}, f"data/{FIRST.removesuffix('.parquet')}/000000", "missing_field"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path: Path, changes: dict[str, Any], key: str, reason: str) -> None:
    row = only(tmp_path, turn("5", 1, **changes))
    assert isinstance(row, BadRow)
    assert (row.key, row.reason) == (key, reason)
    assert row.detail


def test_a_mask_of_another_size_is_told_with_both_sizes(tmp_path: Path) -> None:
    row = only(tmp_path, turn("5", 1, mask_img={"bytes": picture(0, 8, 6), "path": None}))
    assert isinstance(row, BadRow)
    assert "9x7 and 8x6" in row.detail


def test_only_the_header_of_a_mask_is_read(tmp_path: Path) -> None:
    torn = {"bytes": picture(255)[:60], "path": None}
    assert isinstance(only(tmp_path, turn("5", 1, mask_img=torn)), Record)


def test_a_damaged_row_group_is_one_bad_row_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data" / FIRST
    write(path, [turn(str(number), 1) for number in range(4)], group=2)
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    first, *others = records_of(READER, {"root": tmp_path})
    assert isinstance(first, BadRow)
    assert (first.key, first.reason) == (f"data/{path.stem}/000000", "invalid_archive")
    assert FIRST in first.detail
    assert [row.key for row in others] == ["2-1", "3-1"]


def test_a_file_that_went_away_is_one_bad_row(tmp_path: Path) -> None:
    write(tmp_path / FIRST, [turn("1", 1)])
    (entry,) = READER.entries({"root": tmp_path})
    (tmp_path / FIRST).unlink()
    (row,) = READER.read({"root": tmp_path}, entry)
    assert isinstance(row, BadRow)
    assert row.reason == "invalid_archive"


def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / FIRST).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match=f"{FIRST} cannot be read as a parquet file"):
        READER.entries({"root": tmp_path})


def test_a_file_of_another_dataset_is_refused_by_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img_id": ["1"], "turn_index": [1]}), tmp_path / FIRST)
    with pytest.raises(UsageError, match="no column 'source_img'"):
        READER.entries({"root": tmp_path})


def test_the_fingerprint_follows_files_and_options(tmp_path: Path) -> None:
    write(tmp_path / FIRST, [turn("1", 1)])
    write(tmp_path / "dev-00000.parquet", [turn("1", 1)])
    before = READER.fingerprint({"root": tmp_path})
    assert READER.fingerprint({"root": tmp_path, "split": "train"}) == before
    assert READER.fingerprint({"root": tmp_path, "split": "dev"}) != before
    write(tmp_path / FIRST, [turn("1", 1), turn("1", 2)])
    assert READER.fingerprint({"root": tmp_path}) != before


def test_pictures_come_as_bytes_as_structs_or_as_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"file")
    assert image_bytes(b"plain", tmp_path) == b"plain"
    assert image_bytes({"bytes": b"in", "path": "a.png"}, tmp_path) == b"in"
    assert image_bytes({"bytes": None, "path": "a.png"}, tmp_path) == b"file"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing_field"),
        (3, "missing_field"),
        ({"bytes": None, "path": None}, "missing_field"),
        ({"bytes": None, "path": "../a.png"}, "missing_file"),
    ],
)
def test_a_value_that_is_no_picture_is_refused(tmp_path: Path, value: object, reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        image_bytes(value, tmp_path)
    assert caught.value.reason == reason
