"""The reader of InstructPix2Pix in its two forms, the first one also on real pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from insightedit.platform.datasets.instructpix2pix import InstructPix2PixReader, Pair
from insightedit.platform.datasets.parquet import RowGroup
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, Record, decode_image

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples" / "instructpix2pix"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("original_prompt", pa.string()),
        ("original_image", IMAGE),
        ("edit_prompt", pa.string()),
        ("edited_prompt", pa.string()),
        ("edited_image", IMAGE),
    ]
)
READER = InstructPix2PixReader()
FILE = "train-00000-of-00262-57cebf95b4a9170c.parquet"
PROMPT = '{"input": "a fox", "edit": "make it a cat", "output": "a cat"}'


def write_folder(root: Path, folder: str, seeds: tuple[int, ...], prompt: str = PROMPT) -> None:
    (root / folder).mkdir()
    (root / folder / "prompt.json").write_text(prompt)
    for seed in seeds:
        for half in (0, 1):
            (root / folder / f"{seed}_{half}.jpg").write_bytes(f"{folder} {seed} {half}".encode())


def edit(folder: str, seed: int, meta: str = '{"original_prompt": "a fox", "edited_prompt": "a cat"}') -> Record:
    return Record(
        key=f"{folder}/{seed}",
        dataset="instructpix2pix",
        task="edit",
        source=f"{folder} {seed} 0".encode(),
        target=f"{folder} {seed} 1".encode(),
        instruction="make it a cat",
        meta=meta,
    )


def rows_of(root: Path) -> list[Record | BadRow]:
    return list(records_of(READER, {"root": root}))


def reasons_of(root: Path) -> list[tuple[str, str]]:
    """Key and reason of every bad row."""
    return [(row.key, row.reason) for row in rows_of(root) if isinstance(row, BadRow)]


def test_every_pair_of_the_folders_is_a_record(tmp_path: Path) -> None:
    write_folder(tmp_path, "0000001", (30, 4))
    write_folder(tmp_path, "0000000", (7,))
    (tmp_path / "0000001" / "metadata.jsonl").write_text('{"seed": 30, "clip_sim_0": 0.3}\n')
    (tmp_path / "0000002").mkdir()
    assert [entry.place for entry in READER.entries({"root": tmp_path})] == [
        Pair("0000000", "7"),
        Pair("0000001", "30"),
        Pair("0000001", "4"),
    ]
    assert rows_of(tmp_path) == [edit("0000000", 7), edit("0000001", 30), edit("0000001", 4)]


def test_seeds_json_says_which_pairs_and_in_which_order(tmp_path: Path) -> None:
    write_folder(tmp_path, "0000000", (7, 8))
    write_folder(tmp_path, "0000001", (9,))
    (tmp_path / "seeds.json").write_text('[["0000001", ["9"]], ["0000000", [8, 8]], ["0000005", ["1"]]]')
    *records, missing = rows_of(tmp_path)
    assert records == [edit("0000001", 9), edit("0000000", 8)]
    assert isinstance(missing, BadRow)
    assert (missing.key, missing.reason) == ("0000005/1", "missing_file")


@pytest.mark.parametrize(
    ("prompt", "meta"),
    [
        ('{"edit": "make it a cat"}', "{}"),
        ('{"caption": "a fox", "edit": " make it a cat "}', '{"original_prompt": "a fox"}'),
    ],
)
def test_captions_may_be_missing(tmp_path: Path, prompt: str, meta: str) -> None:
    write_folder(tmp_path, "0000000", (7,), prompt)
    assert rows_of(tmp_path) == [edit("0000000", 7, meta)]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ('{"edit": ', "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ('["make it a cat"]', "invalid_json"),
        ("{}", "missing_field"),
        ('{"edit": 3}', "missing_field"),
        ('{"edit": " "}', "empty_instruction"),
    ],
)
def test_a_bad_prompt_spoils_its_folder_only(tmp_path: Path, prompt: str, reason: str) -> None:
    write_folder(tmp_path, "0000000", (7, 8), prompt)
    write_folder(tmp_path, "0000001", (9,))
    assert reasons_of(tmp_path) == [("0000000/7", reason), ("0000000/8", reason)]
    assert rows_of(tmp_path)[2:] == [edit("0000001", 9)]


@pytest.mark.parametrize("lost", ["7_0.jpg", "7_1.jpg", "prompt.json"])
def test_a_lost_file_is_a_bad_row_that_names_it(tmp_path: Path, lost: str) -> None:
    write_folder(tmp_path, "0000000", (7,))
    (tmp_path / "0000000" / lost).unlink()
    (row,) = rows_of(tmp_path)
    assert isinstance(row, BadRow)
    assert (row.key, row.reason) == ("0000000/7", "missing_file")
    assert lost in row.detail


@pytest.mark.parametrize(
    "seeds",
    [
        "3",
        '{"0000000": ["7"]}',
        '["0000000"]',
        '[["0000000", "7"]]',
        '[["0000000", ["7"], 1]]',
        '[["..", ["7"]]]',
        '[["../up", ["7"]]]',
        '[["0000000", ["../7"]]]',
        '[["a\\u0000", ["7"]]]',
        '[["0000000", [null, "7 "]]]',
        "[[",
    ],
)
def test_a_wrong_seeds_json_is_refused_by_name(tmp_path: Path, seeds: str) -> None:
    write_folder(tmp_path, "0000000", (7,))
    (tmp_path / "seeds.json").write_text(seeds)
    with pytest.raises(UsageError, match=r"seeds\.json"):
        READER.entries({"root": tmp_path})


def test_a_folder_with_neither_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"prompt\.json .* nor data/train-\*\.parquet"):
        READER.entries({"root": tmp_path})
    with pytest.raises(NotFoundError, match="nowhere"):
        READER.entries({"root": tmp_path / "nowhere"})


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=group)


def hub_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "original_prompt": f"a fox {number}",
        "original_image": {"bytes": f"source {number}".encode(), "path": None},
        "edit_prompt": f"make it {number} cats",
        "edited_prompt": f"cats {number}",
        "edited_image": {"bytes": f"target {number}".encode(), "path": None},
    }
    return row | changes


@pytest.mark.parametrize("folder", ["data", "."])
def test_parquet_files_of_the_hub(tmp_path: Path, folder: str) -> None:
    write_parquet(tmp_path / folder / FILE, [hub_row(number) for number in range(3)])
    file = FILE if folder == "." else f"data/{FILE}"
    assert [(entry.place, entry.rows) for entry in READER.entries({"root": tmp_path})] == [
        (RowGroup(file, 0, 0), 2),
        (RowGroup(file, 1, 2), 1),
    ]
    stem = file.removesuffix(".parquet")
    assert rows_of(tmp_path) == [
        Record(
            key=f"{stem}/{number:06d}",
            dataset="instructpix2pix",
            task="edit",
            source=f"source {number}".encode(),
            target=f"target {number}".encode(),
            instruction=f"make it {number} cats",
            meta=json.dumps({"original_prompt": f"a fox {number}", "edited_prompt": f"cats {number}"}),
        )
        for number in range(3)
    ]


def test_bad_rows_of_a_parquet_file_go_by_their_number(tmp_path: Path) -> None:
    rows = [
        hub_row(0, original_image=None),
        hub_row(1),
        hub_row(2, edited_image={"bytes": None, "path": None}),
        hub_row(3, edit_prompt=""),
        hub_row(4, original_prompt=None, edited_prompt=None),
    ]
    write_parquet(tmp_path / FILE, rows)
    stem = FILE.removesuffix(".parquet")
    assert reasons_of(tmp_path) == [
        (f"{stem}/000000", "missing_field"),
        (f"{stem}/000002", "missing_field"),
        (f"{stem}/000003", "empty_instruction"),
    ]
    last = rows_of(tmp_path)[4]
    assert isinstance(last, Record)
    assert last.meta == "{}"


def test_many_rows_of_one_group_come_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, [hub_row(number) for number in range(100)], group=1000)
    assert [row.source for row in rows_of(tmp_path) if isinstance(row, Record)] == [
        f"source {number}".encode() for number in range(100)
    ]


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    write_folder(tmp_path, "0000000", (7, 8))
    prints = [READER.fingerprint({"root": tmp_path})]
    (tmp_path / "0000000" / "metadata.jsonl").write_text("{}")
    assert READER.fingerprint({"root": tmp_path}) == prints[0]
    (tmp_path / "0000000" / "prompt.json").write_text(PROMPT.replace("cat", "dog"))
    prints.append(READER.fingerprint({"root": tmp_path}))
    (tmp_path / "0000000" / "7_0.jpg").write_bytes(b"another")
    prints.append(READER.fingerprint({"root": tmp_path}))
    (tmp_path / "seeds.json").write_text('[["0000000", ["8"]], ["0000009", ["1"]]]')
    prints.append(READER.fingerprint({"root": tmp_path}))
    shutil.rmtree(tmp_path / "0000000")
    (tmp_path / "seeds.json").unlink()
    write_parquet(tmp_path / FILE, [hub_row(0)])
    prints.append(READER.fingerprint({"root": tmp_path}))
    assert len(set(prints)) == 5
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy)
    assert READER.fingerprint({"root": copy}) == prints[-1]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples lie beside the repository, and are not there")
def test_real_pairs() -> None:
    records = [row for row in rows_of(SAMPLES) if isinstance(row, Record)]
    assert [record.key for record in records] == ["0000132/127380018", "0000132/1818564940"]
    for record in records:
        assert record.instruction == "Make it look like a painting"
        for half, data in enumerate((record.source, record.target)):
            assert data
            assert data == (SAMPLES / f"{record.key}_{half}.jpg").read_bytes()
            assert decode_image(data).shape == (512, 512, 3)
