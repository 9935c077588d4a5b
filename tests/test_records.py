"""The record, its schema, pictures in and out, and the registry of readers."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from insightedit.platform.config import PictureConfig
from insightedit.platform.datasets import READERS, reader_named, records_of
from insightedit.platform.errors import UsageError
from insightedit.platform.ingest import checked_record
from insightedit.platform.pictures import decode_squares
from insightedit.platform.records import (
    RECORD_SCHEMA,
    BadRowError,
    Record,
    decode_image,
    encode_png,
    from_table,
    to_table,
)

EDITS: dict[str, object] = {"kind": "edit", "split": "train", "count": 5, "seed": 4}


def shapes(options: dict[str, object]) -> list[Record]:
    return [row for row in records_of(READERS["shapes"], options) if isinstance(row, Record)]


def _picture() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)


def test_records_survive_arrow_and_parquet() -> None:
    picture = encode_png(_picture())
    records = [
        Record(
            key="a", dataset="d", task="edit", source=picture, target=picture, instruction="remove it", meta='{"n": 1}'
        ),
        Record(key="b", dataset="d", task="chat", source=None, instruction="hello", reply="hi", category="talk"),
    ]
    table = to_table(records)
    assert table.schema == RECORD_SCHEMA
    file = io.BytesIO()
    pq.write_table(table, file)
    read = pq.read_table(io.BytesIO(file.getvalue()))
    assert from_table(read.append_column("extra", pa.array([1, 2]))) == records
    assert records[0].details() == {"n": 1}


def test_a_row_that_is_no_record_is_refused_by_name() -> None:
    row = Record(key="a", dataset="d", task="caption", source=None, instruction="x").row()
    with pytest.raises(UsageError, match="'paint'"):
        Record.from_row(row | {"task": "paint"})
    del row["target"]
    with pytest.raises(UsageError, match="'target'"):
        Record.from_row(row)


def test_png_is_lossless_and_other_modes_become_rgb() -> None:
    picture = _picture()
    assert np.array_equal(decode_image(encode_png(picture)), picture)
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0]).save(buffer, "PNG")
    assert np.array_equal(decode_image(buffer.getvalue()), np.repeat(picture[..., :1], 3, axis=-1))


@pytest.mark.parametrize("broken", [b"", b"not a picture", encode_png(_picture())[:80]])
def test_a_broken_picture_is_one_clear_error(broken: bytes) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        decode_image(broken)


def test_any_entry_of_a_reader_gives_its_records_alone() -> None:
    reader = READERS["shapes"]
    everything = shapes(EDITS)
    entries = reader.entries(EDITS)
    assert len(everything) == sum(entry.rows for entry in entries) == 10
    assert list(reader.read(EDITS, entries[3])) == everything[6:8]
    assert len({record.key for record in everything}) == 10


def test_captions_have_no_target() -> None:
    options = EDITS | {"kind": "caption"}
    records = shapes(options)[1:]
    assert [record.key for record in records] == [f"train-4-{number:06d}-caption" for number in range(1, 5)]
    assert all(record.target is None and record.task == "caption" and record.instruction for record in records)


def test_simple_and_advanced_records_share_their_pictures() -> None:
    simple, advanced = shapes(EDITS)[:2]
    assert (simple.source, simple.target) == (advanced.source, advanced.target)
    assert (simple.key, advanced.key) == ("train-4-000000-simple", "train-4-000000-advanced")
    assert simple.instruction != advanced.instruction
    details = [json.loads(record.meta) for record in (simple, advanced)]
    assert [detail.pop("wording") for detail in details] == ["simple", "advanced"]
    assert details[0] == details[1]
    only = shapes(EDITS | {"wording": "advanced"})
    assert only[0] == advanced
    assert len(only) == 5


def test_the_fingerprint_follows_the_options() -> None:
    reader = READERS["shapes"]
    assert reader.fingerprint(EDITS) == reader.fingerprint(dict(reversed(EDITS.items())) | {"wording": "both"})
    assert reader.fingerprint(EDITS) != reader.fingerprint(EDITS | {"seed": 5})


@pytest.mark.parametrize(
    ("change", "named"), [({"sede": 1}, "sede"), ({"split": "dev"}, "split"), ({"count": 0}, "count")]
)
def test_a_wrong_option_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=f"'{named}'"):
        READERS["shapes"].entries(EDITS | change)


def test_an_unknown_reader_is_named() -> None:
    with pytest.raises(UsageError, match=r"'shape'.*shapes"):
        reader_named("shape")


def test_pictures_are_brought_into_form() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 64))
    files: dict[str, bytes] = {}
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files[kind] = buffer.getvalue()
    record = Record(key="a", dataset="d", task="edit", source=files["JPEG"], target=files["PNG"], instruction="x")
    assert checked_record(record, PictureConfig()) == record
    assert checked_record(record, PictureConfig(shorter_side=64)) == record
    for form in ("keep", "png", "jpeg", "webp"):
        formed = checked_record(record, PictureConfig(shorter_side=16, format=form))
        for data in (formed.source, formed.target):
            assert data is not None
            with Image.open(io.BytesIO(data)) as made:
                assert made.size == (24, 16)
                assert made.format == ("PNG" if form == "keep" else form.upper())


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "WEBP", "GIF", "BMP"])
def test_whatever_a_decoder_raises_the_row_is_bad(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, kind)
    data = buffer.getvalue()
    for keep in (2, len(data) // 3, len(data) // 2):
        with contextlib.suppress(BadRowError):
            decode_image(data[:keep] + bytes(len(data) - keep))
        with contextlib.suppress(BadRowError):
            decode_image(data[:keep])


def test_squares_are_the_whole_picture_whatever_its_format() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)).resize((160, 96))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    for kind, mode in (("PNG", "RGB"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGB")):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind)
        squares = decode_squares([buffer.getvalue()] * 2, 32)
        assert squares.shape == (2, 32, 32, 3)
        wanted = np.asarray(image.convert(mode).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(squares[1] - (wanted if mode == "L" else expected)).mean() < 6
