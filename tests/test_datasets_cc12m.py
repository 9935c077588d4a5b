"""The reader of CC12M, from the list of addresses with a folder of pictures and from tars of img2dataset."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from insightedit.platform.datasets import cc12m
from insightedit.platform.datasets.cc12m import CC12MReader, Lines
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, Record

READER = CC12MReader()


def rows_of(root: Path, **options: object) -> list[Record | BadRow]:
    return list(records_of(READER, {"root": root, **options}))


def brief(rows: list[Record | BadRow]) -> list[tuple[str, str]]:
    """Key and caption of records, key and reason of bad rows."""
    return [(row.key, row.instruction if isinstance(row, Record) else row.reason) for row in rows]


def caption(key: str, text: str, source: bytes, url: str) -> Record:
    meta = json.dumps({"url": url})
    return Record(key=key, dataset="cc12m", task="caption", source=source, instruction=text, meta=meta)


def write_list(root: Path, content: str, pictures: dict[str, bytes]) -> None:
    (root / "cc12m.tsv").write_bytes(content.encode())
    (root / "images").mkdir()
    for name, data in pictures.items():
        path = root / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


LINES = "http://a/0\ta red house \nhttp://a/1\ttwo <PERSON>\r\nhttp://a/2\tcaf\u00e9\u2028au lait\n"


def test_a_line_and_its_picture_are_a_record(tmp_path: Path) -> None:
    pictures = {"00000/000000000.jpg": b"zero", "000000001.png": b"one", "00000/000000002.webp": b"two"}
    write_list(tmp_path, LINES, pictures)
    assert rows_of(tmp_path) == [
        caption("000000000", "a red house", b"zero", "http://a/0"),
        caption("000000001", "two <PERSON>", b"one", "http://a/1"),
        caption("000000002", "caf\u00e9\u2028au lait", b"two", "http://a/2"),
    ]


def test_a_header_does_not_count(tmp_path: Path) -> None:
    write_list(tmp_path, "url\tcaption\n" + LINES, {"00000/000000001.jpg": b"one"})
    assert rows_of(tmp_path)[1] == caption("000000001", "two <PERSON>", b"one", "http://a/1")
    assert READER.entries({"root": tmp_path})[0].rows == 3


def test_pictures_in_another_folder(tmp_path: Path) -> None:
    write_list(tmp_path, "http://a/0\ta house", {"000000000.jpg": b"zero"})
    (tmp_path / "images").rename(tmp_path / "files")
    assert rows_of(tmp_path, images="files") == [caption("000000000", "a house", b"zero", "http://a/0")]
    with pytest.raises(NotFoundError, match="'images'"):
        READER.entries({"root": tmp_path})


def test_a_row_without_a_picture_is_counted_unless_it_is_skipped(tmp_path: Path) -> None:
    write_list(tmp_path, LINES, {"00000/000000001.jpg": b"one"})
    kept = ("000000001", "two <PERSON>")
    assert brief(rows_of(tmp_path)) == [("000000000", "missing_file"), kept, ("000000002", "missing_file")]
    assert brief(rows_of(tmp_path, skip_missing=True)) == [kept]


def test_bad_lines_are_bad_rows(tmp_path: Path) -> None:
    write_list(tmp_path, "", {f"00000/{number:09d}.jpg": b"x" for number in range(5)})
    (tmp_path / "cc12m.tsv").write_bytes(b"http://a/0\n\nhttp://a/2\t \nhttp://a/3\tcaf\xe9\nhttp://a/4\tgood")
    assert brief(rows_of(tmp_path, skip_missing=True)) == [
        ("000000000", "missing_field"),
        ("000000001", "missing_field"),
        ("000000002", "empty_instruction"),
        ("000000003", "missing_field"),
        ("000000004", "good"),
    ]


@pytest.mark.parametrize("block", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("header", ["", "url\tcaption\n"])
def test_entries_are_ranges_of_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, count: int, end: str, header: str
) -> None:
    monkeypatch.setattr(cc12m, "_LINES", 3)
    monkeypatch.setattr(cc12m, "_BLOCK", block)
    lines = [f"http://a/{number}\t{'word ' * number}end" for number in range(count)]
    write_list(tmp_path, header + "\n".join(lines) + end, {f"{number:09d}.jpg": b"x" for number in range(count)})
    entries = READER.entries({"root": tmp_path})
    content = (tmp_path / "cc12m.tsv").read_text()
    read = [content[entry.place.start : entry.place.stop].splitlines() for entry in entries]
    assert read == [lines[start : start + 3] for start in range(0, count, 3)]
    assert [entry.place.first for entry in entries] == list(range(0, count, 3))
    assert [entry.rows for entry in entries] == [len(part) for part in read]
    assert [key for key, _ in brief(rows_of(tmp_path))] == [f"{number:09d}" for number in range(count)]


def test_entries_hold_five_hundred_lines(tmp_path: Path) -> None:
    line = "http://a/b\tc\n"
    write_list(tmp_path, line * 1203, {"00000/000001202.jpg": b"last"})
    size = len(line)
    entries = READER.entries({"root": tmp_path})
    assert [(entry.place, entry.rows) for entry in entries] == [
        (Lines(0, 500 * size, 0), 500),
        (Lines(500 * size, 1000 * size, 500), 500),
        (Lines(1000 * size, 1203 * size, 1000), 203),
    ]
    assert list(READER.read({"root": tmp_path}, entries[2]))[-1] == caption("000001202", "c", b"last", "http://a/b")


def test_a_list_that_is_no_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=r"cc12m\.tsv"):
        READER.entries({"root": tmp_path})
    write_list(tmp_path, "", {})
    with pytest.raises(UsageError, match="is empty"):
        READER.entries({"root": tmp_path})
    monkeypatch.setattr(cc12m, "_LARGEST", 100)
    (tmp_path / "cc12m.tsv").write_text("x" * 101)
    with pytest.raises(UsageError, match="lines of millions"):
        READER.entries({"root": tmp_path})


def test_a_list_that_went_away_is_a_bad_row(tmp_path: Path) -> None:
    write_list(tmp_path, LINES, {})
    (entry,) = READER.entries({"root": tmp_path})
    (tmp_path / "cc12m.tsv").unlink()
    for options in ({"root": tmp_path}, {"root": tmp_path, "skip_missing": True}):
        assert brief(list(READER.read(options, entry))) == [("cc12m.tsv", "invalid_archive")]


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """The files of a sample as img2dataset writes them."""
    details = {"caption": f"caption {number}", "url": f"http://a/{number}", "key": f"{number:09d}", "status": "success"}
    return {
        f"{number:09d}.jpg": f"picture {number}".encode() * 100,
        f"{number:09d}.txt": f"caption {number}".encode(),
        f"{number:09d}.json": json.dumps(details, indent=4).encode(),
    }


def sample_record(shard: str, number: int) -> Record:
    source = f"picture {number}".encode() * 100
    return caption(f"{shard}/{number:09d}", f"caption {number}", source, f"http://a/{number}")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_tars_are_records(tmp_path: Path, form: int) -> None:
    (tmp_path / "00001.tar").write_bytes(tar_of(sample(10000), form))
    (tmp_path / "00000.tar").write_bytes(tar_of(sample(0) | sample(12), form))
    (tmp_path / "00000_stats.json").write_text('{"count": 10000, "successes": 2, "failed_to_download": 9998}')
    (tmp_path / "00000.parquet").write_bytes(b"not looked at")
    entries = READER.entries({"root": tmp_path})
    assert [entry.place for entry in entries] == ["00000.tar", "00001.tar"]
    assert entries[0].rows == 2
    assert rows_of(tmp_path) == [
        sample_record("00000", 0),
        sample_record("00000", 12),
        sample_record("00001", 10000),
    ]


def test_tars_go_before_the_list(tmp_path: Path) -> None:
    write_list(tmp_path, LINES, {"000000000.jpg": b"zero"})
    (tmp_path / "00000.tar").write_bytes(tar_of(sample(3)))
    assert rows_of(tmp_path) == [sample_record("00000", 3)]


@pytest.mark.parametrize("stats", ["{", "[]", '{"successes": "many"}'])
def test_rows_are_guessed_by_size_where_nobody_counted(tmp_path: Path, stats: str) -> None:
    (tmp_path / "00000.tar").write_bytes(tar_of({"a.jpg": bytes(320_000)}))
    (tmp_path / "00000_stats.json").write_text(stats)
    assert [entry.rows for entry in READER.entries({"root": tmp_path})] == [10]


def test_a_caption_comes_from_the_text_or_else_from_the_json(tmp_path: Path) -> None:
    files = {
        "a.jpg": b"p",
        "a.json": b'{"caption": "from json"}',
        "b.jpg": b"p",
        "b.txt": b"from text",
        "b.json": b"{broken",
        "c.jpg": b"p",
        "c.json": b"{broken",
        "d.jpg": b"p",
        "d.json": b'{"caption": null}',
        "e.jpg": b"p",
        "f.txt": b"no picture",
        "g.jpg": b"p",
        "g.txt": b" ",
        "h.jpg": b"p",
        "h.txt": b"\xff",
        "i.jpg": b"p",
        "i.json": b"[1]",
        "sub/j.png": b"p",
        "sub/j.txt": b"in a folder",
        "sub/j.npy": b"not looked at",
    }
    (tmp_path / "00000.tar").write_bytes(tar_of(files))
    assert brief(rows_of(tmp_path)) == [
        ("00000/a", "from json"),
        ("00000/b", "from text"),
        ("00000/c", "invalid_json"),
        ("00000/d", "missing_field"),
        ("00000/e", "missing_field"),
        ("00000/f", "missing_file"),
        ("00000/g", "empty_instruction"),
        ("00000/h", "missing_field"),
        ("00000/i", "invalid_json"),
        ("00000/sub/j", "in a folder"),
    ]
    assert "00000/f" not in dict(brief(rows_of(tmp_path, skip_missing=True)))


def test_wherever_a_tar_is_torn_whole_samples_and_one_bad_row_come(tmp_path: Path) -> None:
    """Each sample takes three headers of 512 bytes and its contents in blocks of 512."""
    whole = tar_of(sample(0) | sample(1))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    # A sample is whole with its picture and its text; the file ends at the first of the blocks of zeros.
    readable = [member.offset_data + member.size for member in members if member.name.endswith(".txt")]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    for length in range(0, end, 97):
        (tmp_path / "00000.tar").write_bytes(whole[:length])
        *samples, torn = rows_of(tmp_path)
        assert [row.key for row in samples if isinstance(row, Record)] == [
            f"00000/{number:09d}" for number, needed in enumerate(readable) if needed <= length
        ], length
        assert all(isinstance(row, Record) for row in samples)
        assert isinstance(torn, BadRow)
        assert (torn.key, torn.reason) == ("00000.tar", "invalid_archive")


def test_a_header_that_is_no_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(tar_of(sample(0) | sample(1)))
    place = content.index(b"000000001.jpg")
    content[place : place + 512] = b"\xff" * 512
    (tmp_path / "00000.tar").write_bytes(content)
    first, torn = rows_of(tmp_path)
    assert first == sample_record("00000", 0)
    assert isinstance(torn, BadRow)
    assert torn.reason == "invalid_archive"


def test_a_file_in_a_tar_is_never_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cc12m, "_LARGEST", 2000)
    (tmp_path / "00000.tar").write_bytes(tar_of(sample(0) | {"1.jpg": bytes(2001)} | sample(2)))
    assert [key for key, _ in brief(rows_of(tmp_path))] == ["00000/000000000", "00000.tar"]


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, target in (("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("a.txt", tarfile.LNKTYPE, "a.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    (tmp_path / "00000.tar").write_bytes(buffer.getvalue())
    assert rows_of(tmp_path) == []


def test_an_empty_file_is_no_tar_but_an_empty_tar_is_one(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"")
    (tmp_path / "00001.tar").write_bytes(tar_of({}))
    assert brief(rows_of(tmp_path)) == [("00000.tar", "invalid_archive")]


def test_the_fingerprint_follows_list_pictures_tars_and_options(tmp_path: Path) -> None:
    options: dict[str, object] = {"root": tmp_path}
    write_list(tmp_path, LINES, {"00000/000000000.jpg": b"zero"})
    prints = [READER.fingerprint(options)]
    assert READER.fingerprint(options | {"skip_missing": False}) == prints[0]
    prints.append(READER.fingerprint(options | {"skip_missing": True}))
    (tmp_path / "images" / "00000" / "000000001.jpg").write_bytes(b"one")
    prints.append(READER.fingerprint(options))
    (tmp_path / "cc12m.tsv").write_text(LINES.replace("red", "big"))
    prints.append(READER.fingerprint(options))
    (tmp_path / "00000.tar").write_bytes(tar_of(sample(0)))
    prints.append(READER.fingerprint(options))
    (tmp_path / "00001.tar").write_bytes(tar_of(sample(1)))
    prints.append(READER.fingerprint(options))
    assert len(set(prints)) == 6


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'image'.*images, skip_missing"):
        READER.entries({"root": tmp_path, "image": "files"})
