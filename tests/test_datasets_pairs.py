"""People's own pairs: JSON Lines, CSV and parquet files, image folders, and folders of the Hugging Face hub."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from insightedit.platform import records
from insightedit.platform.datasets import pairs
from insightedit.platform.datasets.pairs import PairsReader, picture_size
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, encode_png

READER = PairsReader()


def _picture(seed: int, height: int = 6, width: int = 9) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the pictures before/N.png and after/N.png, and a mask."""
    folder = tmp_path / "pairs"
    for number in range(3):
        for seed, name in ((number, "before"), (10 + number, "after")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{number}.png").write_bytes(_picture(seed))
    (folder / "mask.png").write_bytes(_picture(20))
    (folder / "small.png").write_bytes(_picture(21, 6, 8))
    return folder


def _rows(count: int = 3, **names: str) -> list[dict[str, Any]]:
    """Rows of an index of the pictures, their fields renamed."""
    return [
        {
            names.get("source", "source"): f"before/{number}.png",
            names.get("target", "target"): f"after/{number}.png",
            names.get("instruction", "instruction"): f"edit number {number}",
        }
        for number in range(count)
    ]


def _json_lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read(root: Path, **options: object) -> list[Record | BadRow]:
    return list(records_of(READER, {"root": root, **options}))


def _records(root: Path, **options: object) -> list[Record]:
    rows = _read(root, **options)
    assert all(isinstance(row, Record) for row in rows), rows
    return [row for row in rows if isinstance(row, Record)]


def _expected(number: int, key: str, **more: Any) -> Record:
    return Record(
        key=key,
        dataset="pairs",
        task="edit",
        source=_picture(number),
        target=_picture(10 + number),
        instruction=f"edit number {number}",
        **more,
    )


def test_json_lines_are_read(root: Path) -> None:
    rows = _rows()
    rows[1] |= {"reply": "Done.", "category": "colour", "id": 7, "ok": True, "note": "x", "rate": 0.5}
    rows[2] |= {"reply": None, "mask": "", "tags": ["a"], "long": "x" * 2000, "none": None}
    text = _json_lines(rows).replace("\n", "\n\n", 1)
    (root / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    notes = json.dumps({"id": 7, "ok": True, "note": "x", "rate": 0.5})
    assert _records(root) == [
        _expected(0, "mine.jsonl:1"),
        _expected(1, "mine.jsonl:3", reply="Done.", category="colour", meta=notes),
        _expected(2, "mine.jsonl:4"),
    ]


def test_csv_is_read_with_texts_over_several_lines(root: Path) -> None:
    text = (
        "\ufeffid,source,target,instruction,reply\r\n"
        '1,before/0.png,after/0.png,"make it ""red"",\r\nthen blue",\r\n'
        "\r\n"
        '2,before/1.png,after/1.png,edit number 1,"Done, \u00fcnder a line\u2028separator"\r\n'
        "3,before/2.png,after/2.png,edit number 2"
    )
    (root / "mine.csv").write_bytes(text.encode())
    first, *others = _records(root)
    assert (first.key, first.instruction) == ("mine.csv:1", 'make it "red",\r\nthen blue')
    assert (first.source, first.target, first.details()) == (_picture(0), _picture(10), {"id": "1"})
    assert others == [
        _expected(1, "mine.csv:3", reply="Done, \u00fcnder a line\u2028separator", meta='{"id": "2"}'),
        _expected(2, "mine.csv:4", meta='{"id": "3"}'),
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_files_are_cut_into_entries_of_whole_rows(root: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_rows()[number % 3] | {"instruction": f"edit,\nnumber {number} \u2602"} for number in range(1203)]
    if suffix == "jsonl":
        (root / "mine.jsonl").write_text(_json_lines(rows), encoding="utf-8")
    else:
        lines = ['{source},{target},"{instruction}"\n'.format(**row) for row in rows]
        (root / "mine.csv").write_text("source,target,instruction\n" + "".join(lines), encoding="utf-8")
    entries = READER.entries({"root": root})
    assert [entry.rows for entry in entries] == [500, 500, 203]
    assert entries == READER.entries({"root": root})
    assert pickle.loads(pickle.dumps(entries)) == entries  # noqa: S301 - what was just made here
    records = [list(READER.read({"root": root}, entry)) for entry in reversed(entries)]
    inorder = [row for some in reversed(records) for row in some if isinstance(row, Record)]
    assert [row.key for row in inorder] == [f"mine.{suffix}:{number}" for number in range(1, 1204)]
    assert [row.instruction for row in inorder] == [row["instruction"] for row in rows]
    monkeypatch.setattr(pairs, "ROWS_EACH", 1000)
    assert _records(root) == inorder


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _write_parquet(path: Path, rows: Sequence[Mapping[str, object]], kind: Any, group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {name: kind if name.endswith("image") else None for name in rows[0]}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in names.items()}
    pq.write_table(pa.table(columns), path, row_group_size=group)


def _picture_rows(form: str, count: int = 3) -> list[dict[str, Any]]:
    """Rows with pictures as bytes, structs or paths."""

    def value(data: bytes, name: str) -> object:
        return {"bytes": data, "struct": {"bytes": data, "path": name}, "path": name}[form]

    return [
        {
            "source_image": value(_picture(number), f"before/{number}.png"),
            "edit_prompt": f"edit number {number}",
            "edited_image": value(_picture(10 + number), f"after/{number}.png"),
            "id": number,
            "scores": [1.5, 2.5],
        }
        for number in range(count)
    ]


@pytest.mark.parametrize(("form", "kind"), [("bytes", pa.binary()), ("struct", STRUCT), ("path", pa.string())])
def test_parquet_files_hold_pictures_or_their_paths(root: Path, form: str, kind: Any) -> None:
    _write_parquet(root / "mine.parquet", _picture_rows(form), kind)
    assert [entry.rows for entry in READER.entries({"root": root})] == [2, 1]
    assert _records(root) == [
        _expected(number, f"mine/{number:06d}", meta=json.dumps({"id": number})) for number in range(3)
    ]


def test_a_struct_without_bytes_names_a_file(root: Path) -> None:
    rows = _picture_rows("struct", 2)
    rows[0]["source_image"]["bytes"] = None
    rows[1]["edited_image"] = {"bytes": None, "path": "../after/0.png"}
    _write_parquet(root / "mine.parquet", rows, STRUCT)
    good, bad = _read(root)
    assert good == _expected(0, "mine/000000", meta='{"id": 0}')
    assert isinstance(bad, BadRow)
    assert (bad.key, bad.reason) == ("mine/000001", "missing_file")


def test_a_folder_of_the_hub_is_read_by_its_splits(tmp_path: Path) -> None:
    rows = _picture_rows("struct", 4)
    for name, some in (
        ("train-00000-of-00002", rows[:2]),
        ("train-00001-of-00002", rows[2:3]),
        ("training_notes", rows[:1]),
        ("test-00000-of-00001", rows[3:]),
    ):
        _write_parquet(tmp_path / "data" / f"{name}.parquet", some, STRUCT)
    train = ["data/train-00000-of-00002/000000", "data/train-00000-of-00002/000001", "data/train-00001-of-00002/000000"]
    assert [record.key for record in _records(tmp_path)] == train
    assert _records(tmp_path, split="train") == _records(tmp_path, format="hub")
    assert [record.key for record in _records(tmp_path, split="test")] == ["data/test-00000-of-00001/000000"]
    with pytest.raises(NotFoundError, match=r"'dev'.*train-00000-of-00002\.parquet"):
        _read(tmp_path, split="dev")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_image_folder_is_read_by_its_metadata(root: Path, suffix: str) -> None:
    (root / "notes.jsonl").write_text("not the index")
    names = {"source": "file_name", "target": "edited_file_name", "instruction": "text"}
    rows = _rows(2, **names)
    folder = root.rename(root.with_name("train")).parent
    path = folder / "train" / f"metadata.{suffix}"
    if suffix == "jsonl":
        path.write_text(_json_lines(rows))
    elif suffix == "csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    (folder / "test").mkdir()
    (folder / "test/metadata.jsonl").write_text("")
    keys = {"parquet": ["train/metadata/000000", "train/metadata/000001"]}
    expected = keys.get(suffix, [f"train/metadata.{suffix}:{number}" for number in (1, 2)])
    assert _records(folder) == [_expected(number, key) for number, key in enumerate(expected)]
    assert _records(folder, split="test") == []


@pytest.mark.parametrize(
    ("source", "target", "instruction"),
    [
        ("source", "target", "instruction"),
        ("source_img", "target_img", "instruction"),
        ("input_image", "edited_image", "edit_prompt"),
        ("original_image", "edited_image", "edit"),
        ("Source_Image_Path", "Target_Image_Path", "Prompt"),
        ("file_name", "target_file_name", "text"),
        ("input_file_name", "output_file_name", "text"),
    ],
)
def test_well_known_columns_are_found(root: Path, source: str, target: str, instruction: str) -> None:
    rows = _rows(1, source=source, target=target, instruction=instruction)
    (root / "mine.jsonl").write_text(_json_lines([{"original_prompt": "a cat", "edited_prompt": "a dog"} | rows[0]]))
    (record,) = _records(root)
    notes = {"original_prompt": "a cat", "edited_prompt": "a dog"}
    assert record == _expected(0, "mine.jsonl:1", meta=json.dumps(notes))


def test_columns_can_be_named(root: Path) -> None:
    row = {"a": "before/0.png", "b": "after/0.png", "c": "edit number 0", "d": "Done.", "e": "mask.png", "f": "add"}
    (root / "mine.jsonl").write_text(_json_lines([{"source": "decoy", "instruction": "decoy"} | row]))
    options = dict(zip(("source", "target", "instruction", "reply", "mask", "category"), "abcdef", strict=True))
    (record,) = _records(root, **options)
    assert (record.source, record.instruction) == (_picture(0), "edit number 0")
    assert (record.reply, record.category) == ("Done.", "add")
    assert record.details() == {"source": "decoy", "instruction": "decoy"}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(root: Path, suffix: str) -> None:
    rows = _rows(1, target="picture_after")
    path = root / f"mine.{suffix}"
    if suffix == "jsonl":
        path.write_text(_json_lines(rows))
    elif suffix == "csv":
        path.write_text("\n".join([",".join(rows[0]), ",".join(rows[0].values())]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    there = "source, picture_after, instruction"
    with pytest.raises(UsageError, match=f"mine.{suffix} is known as the target.*{there}.*option target"):
        READER.entries({"root": root})
    with pytest.raises(UsageError, match=f"mine.{suffix} has no column 'edited'.*{there}.*option target"):
        READER.entries({"root": root, "target": "edited"})
    assert len(READER.entries({"root": root, "target": "picture_after"})) == 1


@pytest.mark.parametrize(
    ("change", "reason", "named"),
    [
        ({"source": None}, "missing_field", "source"),
        ({"source": ""}, "missing_field", "source"),
        ({"source": 5}, "missing_field", ""),
        ({"target": "after/9.png"}, "missing_file", "after/9.png"),
        ({"target": "../pairs/after/0.png"}, "missing_file", "after/0.png"),
        ({"target": "/etc/passwd"}, "missing_file", "/etc/passwd"),
        ({"target": "after"}, "missing_file", "after"),
        ({"target": "a\0.png"}, "invalid_json", "target"),
        ({"target": {"path": "after/9.png"}}, "missing_file", "after/9.png"),
        ({"target": {"path": "\ud800"}}, "invalid_json", "path"),
        ({"instruction": None}, "missing_field", "instruction"),
        ({"instruction": ["a"]}, "missing_field", "instruction"),
        ({"instruction": "  "}, "empty_instruction", "instruction"),
        ({"instruction": "half a \ud83d"}, "invalid_json", "instruction"),
        ({"reply": 7}, "missing_field", "reply"),
        ({"mask": "nowhere.png"}, "missing_file", "nowhere.png"),
        ({"mask": "small.png"}, "mask_size", "8x6 and 9x6"),
        ({"mask": "mine.jsonl"}, "not_an_image", "cannot be read"),
    ],
)
def test_a_row_that_cannot_be_read_is_a_bad_row(root: Path, change: dict[str, object], reason: str, named: str) -> None:
    rows = [row | {"mask": "mask.png", "reply": "Done."} for row in _rows(2)]
    rows[0] |= change
    (root / "mine.jsonl").write_text(_json_lines(rows))
    bad, good = _read(root)
    assert isinstance(bad, BadRow)
    assert (bad.key, bad.reason) == ("mine.jsonl:1", reason)
    assert named in bad.detail
    assert good == _expected(1, "mine.jsonl:2", reply="Done.")


def test_lines_that_are_no_objects_are_told_by_their_number(root: Path) -> None:
    lines = [b"{", json.dumps(_rows(1)[0]).encode(), b"[1]", b'{"source": "\xff"}', b"[" * 100_000, b"{}", b"   "]
    (root / "mine.jsonl").write_bytes(b"\n".join(lines))
    rows = _read(root)
    assert [(row.key, row.reason) for row in rows if isinstance(row, BadRow)] == [
        ("mine.jsonl:1", "invalid_json"),
        ("mine.jsonl:3", "invalid_json"),
        ("mine.jsonl:4", "invalid_json"),
        ("mine.jsonl:5", "invalid_json"),
        ("mine.jsonl:6", "missing_field"),
    ]
    assert rows[1] == _expected(0, "mine.jsonl:2")


def test_rows_of_a_csv_with_too_few_or_too_many_cells_are_bad_rows(root: Path) -> None:
    text = "source,target,instruction\nbefore/0.png,after/0.png\nbefore/0.png,after/0.png,make it red, then blue\n"
    (root / "mine.csv").write_text(text + "before/1.png,after/1.png,edit number 1\n")
    few, many, good = _read(root)
    assert isinstance(few, BadRow)
    assert isinstance(many, BadRow)
    assert (few.key, few.reason) == ("mine.csv:1", "missing_field")
    assert (many.key, many.reason) == ("mine.csv:2", "missing_field")
    assert "4 cells" in many.detail
    assert good == _expected(1, "mine.csv:3")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("mine.csv", "source,target,instruction\na,b,caf\xe9\n".encode("latin-1"), "UTF-8"),
        ("mine.csv", b'source,target,instruction\na,b,"' + b"x\n" * 200_000, "field"),
        ("mine.jsonl", b"nothing\nof the sort\n", "JSON object"),
        ("mine.parquet", b"no parquet", "parquet"),
    ],
)
def test_a_file_that_is_something_else_is_named(root: Path, name: str, content: bytes, named: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"(?s){name}.*{named}"):
        READER.entries({"root": root})


def test_a_line_too_long_for_a_row_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "mine.jsonl").write_text(_json_lines(_rows()))
    monkeypatch.setattr(pairs, "LONGEST_LINE", 20)
    with pytest.raises(UsageError, match=r"mine\.jsonl has a line of more than 20 bytes"):
        READER.entries({"root": root})


def test_a_file_that_went_away_is_a_bad_row(root: Path) -> None:
    (root / "mine.jsonl").write_text(_json_lines(_rows()))
    (entry,) = READER.entries({"root": root})
    (root / "mine.jsonl").unlink()
    (bad,) = READER.read({"root": root}, entry)
    assert isinstance(bad, BadRow)
    assert (bad.key, bad.reason) == ("mine.jsonl:1", "missing_file")


def test_the_format_is_found_in_a_fixed_order_or_named(root: Path) -> None:
    with pytest.raises(NotFoundError, match=r"metadata\.jsonl.*\*\.csv"):
        READER.entries({"root": root})
    (root / "mine.csv").write_text("source,target,instruction\nbefore/0.png,after/0.png,edit number 0\n")
    assert [record.key for record in _records(root)] == ["mine.csv:1"]
    (root / "mine.jsonl").write_text(_json_lines(_rows(1)))
    assert [record.key for record in _records(root)] == ["mine.jsonl:1"]
    assert [record.key for record in _records(root, format="csv")] == ["mine.csv:1"]
    with pytest.raises(NotFoundError, match=r"data/\*\.parquet"):
        READER.entries({"root": root, "format": "hub"})
    with pytest.raises(UsageError, match="'format'"):
        READER.entries({"root": root, "format": "tsv"})


def test_empty_files_have_no_pairs(root: Path) -> None:
    (root / "empty.jsonl").write_text("")
    (root / "mine.jsonl").write_text(_json_lines(_rows(1)))
    assert [record.key for record in _records(root)] == ["mine.jsonl:1"]
    for text in ("", "source,target,instruction\n"):
        (root / "mine.csv").write_text(text)
        assert _read(root, format="csv") == []


def test_the_fingerprint_follows_files_and_options(root: Path) -> None:
    (root / "mine.jsonl").write_text(_json_lines(_rows()))
    options = {"root": root}
    seen = {READER.fingerprint(options)}
    assert READER.fingerprint(options) in seen
    seen.add(READER.fingerprint(options | {"instruction": "source"}))
    (root / "mine.jsonl").write_text(_json_lines(_rows()).replace("number 0", "number 9"))
    seen.add(READER.fingerprint(options))
    (root / "before/0.png").write_bytes(_picture(0, 7, 9))
    seen.add(READER.fingerprint(options))
    (root / "after/3.PNG").write_bytes(_picture(3))
    seen.add(READER.fingerprint(options))
    assert len(seen) == 5


def test_the_size_of_a_picture_is_read_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picture_size(_picture(0)[:60]) == (9, 6)
    with pytest.raises(BadRowError, match="cannot be read"):
        picture_size(b"no picture")
    monkeypatch.setattr(records, "MAX_PIXELS", 54)
    assert picture_size(_picture(0)) == (9, 6)
    monkeypatch.setattr(records, "MAX_PIXELS", 53)
    with pytest.raises(BadRowError) as caught:
        picture_size(_picture(0))
    assert caught.value.reason == "decompression_bomb"
