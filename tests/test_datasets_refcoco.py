"""RefCOCO and its kin in their original form: pickles of Python 2, and JSON."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from insightedit.platform.datasets.reading import records_of
from insightedit.platform.datasets.refcoco import GrefcocoReader, RefcocogReader, RefcocoPlusReader, RefcocoReader
from insightedit.platform.datasets.segmentation import COLOURS
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, Record, decode_image

SIZE = (24, 32)
MASKS = {11: (slice(2, 8), slice(2, 10)), 12: (slice(6, 16), slice(8, 20)), 13: (slice(18, 23), slice(25, 31))}


def _python2(value: Any) -> bytes:
    """Pickle as Python 2 did with protocol 2: its texts are bytes without an encoding."""
    return b"\x80\x02" + _python2_value(value) + b"."


def _python2_value(value: Any) -> bytes:
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return _python2_value(text) if text.isascii() else b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2_value, value)) + b"e"
    assert isinstance(value, dict), value
    return b"}(" + b"".join(_python2_value(k) + _python2_value(v) for k, v in value.items()) + b"u"


def _ref(ref_id: int, ann_id: Any, category_id: Any, sents: list[Any], split: str = "train") -> dict[str, Any]:
    return {
        "sent_ids": [10 * ref_id + n for n in range(len(sents))],
        "file_name": f"COCO_train2014_000000581857_{ref_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": 581857,
        "split": split,
        "sentences": [
            {"tokens": ["x"], "raw": sent, "sent_id": 10 * ref_id + n, "sent": sent} for n, sent in enumerate(sents)
        ],
        "category_id": category_id,
    }


def _instances() -> dict[str, Any]:
    def annotation(identity: int, category: int) -> dict[str, Any]:
        rows, columns = MASKS[identity]
        left, right, top, bottom = columns.start, columns.stop, rows.start, rows.stop
        corners = [left, top, right, top, right, bottom, left, bottom]
        common = {"area": 1.0, "iscrowd": 0, "image_id": 581857, "bbox": [left, top, 1, 1], "id": identity}
        return {**common, "category_id": category, "segmentation": [corners]}

    image = {
        "license": 1,
        "file_name": "COCO_train2014_000000581857.jpg",
        "height": SIZE[0],
        "width": SIZE[1],
        "id": 581857,
    }
    return {
        "images": [image, {"file_name": "gone.jpg", "height": 1, "width": 1, "id": 4}],
        "annotations": [annotation(11, 1), annotation(12, 18), annotation(13, 18)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "Dog"}],
    }


def _jpeg() -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (*SIZE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


REFS = [
    _ref(0, 11, 1, ["Man on left", "guy  in yellow"]),
    _ref(1, 12, 18, ["brown dog"], split="testA"),
    _ref(2, 12, 18, ["caf\u00e9 dog", b"dog by the caf\xc3\xa9", b"dog, 90\xb0 turned", "dog \u4e2d"]),
]
GREFS = [
    _ref(7, [11, 13], [1, 18], ["the man and the small dog"]) | {"no_target": False},
    _ref(8, [12, 13], [18, 18], ["Both dogs"]) | {"no_target": False},
    _ref(9, [-1], [-1], ["the cat"]) | {"no_target": True},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder `data` of the refer repository, with its pictures."""
    data = tmp_path / "refer" / "data"
    images = data / "images" / "mscoco" / "images" / "train2014"
    images.mkdir(parents=True)
    (images / "COCO_train2014_000000581857.jpg").write_bytes(_jpeg())
    for name in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        (data / name).mkdir()
        (data / name / "instances.json").write_text(json.dumps(_instances()))
    for name in ("refcoco/refs(unc).p", "refcoco+/refs(unc).p", "refcocog/refs(umd).p"):
        (data / name).write_bytes(_python2(REFS))
    (data / "grefcoco/grefs(unc).json").write_text(json.dumps(GREFS))
    return data


def _read(reader: RefcocoReader, root: Path, **options: object) -> list[Record | BadRow]:
    return list(records_of(reader, {"root": root, **options}))


def _records(reader: RefcocoReader, root: Path, **options: object) -> list[Record]:
    rows = _read(reader, root, **options)
    assert all(isinstance(row, Record) for row in rows), rows
    return [row for row in rows if isinstance(row, Record)]


def _check_painted(record: Record, annotations: list[int]) -> None:
    assert record.source is not None
    assert record.source == _jpeg()
    assert record.target is not None
    source, target = decode_image(record.source), decode_image(record.target)
    expected = source.copy()
    colour = np.array(COLOURS[str(record.details()["colour"])])
    for annotation in annotations:
        expected[MASKS[annotation]] = np.rint(0.5 * source[MASKS[annotation]] + 0.5 * colour)
    assert np.array_equal(target, expected)


@pytest.mark.parametrize(
    ("reader", "name"),
    [(RefcocoReader(), "refcoco"), (RefcocoPlusReader(), "refcoco+"), (RefcocogReader(), "refcocog")],
)
def test_what_a_ref_refers_to_is_painted(data: Path, reader: RefcocoReader, name: str) -> None:
    man, dog = _records(reader, data / name)
    assert reader.name == name
    assert (man.key, man.dataset, man.task, man.category) == ("0", name, "segment", "person")
    assert (dog.key, dog.category) == ("2", "dog")
    _check_painted(man, [11])
    _check_painted(dog, [12])
    details = man.details()
    assert str(details.pop("sentence")) in man.instruction
    assert details.pop("colour") in COLOURS
    assert details.pop("wording") in {"simple", "advanced"}
    assert details == {"split": "train", "ref_id": "0", "image_id": 581857, "ann_id": [11], "painted": True}


def test_the_sentence_is_drawn_by_seed_and_key(data: Path) -> None:
    seen: Counter[object] = Counter()
    for seed in range(60):
        record = _records(RefcocoReader(), data / "refcoco", seed=seed)[0]
        assert record == _records(RefcocoReader(), data / "refcoco", seed=seed)[0]
        seen[record.details()["sentence"]] += 1
    assert set(seen) == {"man on left", "guy in yellow"}
    assert min(seen.values()) > 15


def test_all_sentences_are_records_and_come_through_python_2(data: Path) -> None:
    records = _records(RefcocoReader(), data / "refcoco", sentences="all", wording="simple")
    assert [(record.key, record.details()["sentence"]) for record in records] == [
        ("0-0", "man on left"),
        ("0-1", "guy in yellow"),
        ("2-0", "caf\u00e9 dog"),
        ("2-1", "dog by the caf\u00e9"),
        ("2-2", "dog, 90\u00b0 turned"),
        ("2-3", "dog \u4e2d"),
    ]
    for record in records:
        assert str(record.details()["sentence"]) in record.instruction
        assert str(record.details()["colour"]) in record.instruction
        _check_painted(record, [11] if record.key.startswith("0") else [12])


def test_a_pickle_in_letters_is_read_too(data: Path) -> None:
    text = (
        b"(lp0\n(dp1\nS'ref_id'\np2\nI5\nsS'split'\nS'val'\nsS'image_id'\nL581857L\nsS'ann_id'\nI11\n"
        b"sS'sentences'\n(lp3\n(dp4\nS'sent'\nS'the man'\nsasa."
    )
    (data / "refcoco/refs(google).p").write_bytes(text)
    (record,) = _records(RefcocoReader(), data / "refcoco", split_by="google", split="val")
    assert record.key == "5"
    _check_painted(record, [11])


def test_grefs_merge_their_targets_or_have_none(data: Path) -> None:
    both, dogs, cat = _records(GrefcocoReader(), data / "grefcoco")
    _check_painted(both, [11, 13])
    _check_painted(dogs, [12, 13])
    assert [record.category for record in (both, dogs, cat)] == ["dog, person", "dog", ""]
    assert cat.target == cat.source == _jpeg()
    assert "the cat" in cat.instruction
    assert (cat.details()["painted"], cat.details()["ann_id"]) == (False, [-1])


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.open, (str(self._path), os.O_CREAT)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_runs(data: Path, tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    for value in (_Touch(made), [REFS[0], _Touch(made)]):
        content = pickle.dumps(value, protocol)
        (data / "refcoco/refs(unc).p").write_bytes(content)
        with pytest.raises(UsageError, match=r"refs\(unc\).p cannot be read as refs: it wants posix\.open"):
            _read(RefcocoReader(), data / "refcoco")
        assert not made.exists()
    pickle.loads(content)  # noqa: S301 - shows that the file would have been made
    assert made.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"(lp0\n",
        b".",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cbuiltins\nlist\n.",
        b"Pname\n.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02](K\x01h\x07e.",
        b"\x80\x04\x8e" + b"\xff" * 8,
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02K\x01}b.",
        b"X\x01\x00\x00\x00\xff.",
        b"I5\n.",
        b"}.",
    ],
)
def test_what_is_no_list_of_refs_is_one_clear_error(data: Path, content: bytes) -> None:
    (data / "refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(UsageError, match=r"refs\(unc\).p .*download it again"):
        _read(RefcocoReader(), data / "refcoco")


def _changed(change: dict[str, Any]) -> dict[str, Any]:
    return _ref(3, 11, 1, ["a man"]) | change


@pytest.mark.parametrize(
    ("ref", "key", "reason"),
    [
        ("text", "row-0", "invalid_json"),
        (_changed({"split": None}), "3", "missing_field"),
        (_changed({"ref_id": [1]}) | {"sentences": []}, "row-0", "empty_instruction"),
        (_changed({"sentences": None}), "3", "missing_field"),
        (_changed({"sentences": [7]}), "3", "invalid_json"),
        (_changed({"sentences": [{"raw": "a man"}]}), "3", "empty_instruction"),
        (_changed({"sentences": [{"sent": " "}]}), "3", "empty_instruction"),
        (_changed({"image_id": 5}), "3", "missing_field"),
        (_changed({"image_id": None}), "3", "missing_field"),
        (_changed({"image_id": 4}), "3", "missing_file"),
        (_changed({"ann_id": 99}), "3", "missing_field"),
        (_changed({"ann_id": [11, -1]}), "3", "missing_field"),
        (_changed({"ann_id": [[11]]}), "3", "missing_field"),
        (_changed({"ann_id": 12}), "3", "invalid_mask"),
        (_changed({"ann_id": 13}), "3", "mask_size"),
    ],
)
def test_a_bad_ref_is_set_aside(data: Path, ref: Any, key: str, reason: str) -> None:
    index = _instances()
    index["annotations"][1]["segmentation"] = [[1, 2, 3]]
    index["annotations"][2]["segmentation"] = {"size": [32, 24], "counts": [768]}
    (data / "grefcoco/instances.json").write_text(json.dumps(index))
    (data / "grefcoco/grefs(unc).json").write_text(json.dumps([ref]))
    for sentences in ("one", "all"):
        (row,) = _read(GrefcocoReader(), data / "grefcoco", sentences=sentences)
        assert isinstance(row, BadRow)
        assert row.key.startswith(key)
        assert row.reason == reason
        assert row.detail.endswith(".")


def test_a_broken_or_another_picture_is_set_aside(data: Path) -> None:
    path = data / "images/mscoco/images/train2014/COCO_train2014_000000581857.jpg"
    path.write_bytes(_jpeg()[:300])
    assert {row.reason for row in _read(RefcocoReader(), data / "refcoco") if isinstance(row, BadRow)} == {
        "truncated_image"
    }
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())
    assert [row.reason for row in _read(RefcocoReader(), data / "refcoco") if isinstance(row, BadRow)] == [
        "mask_size",
        "mask_size",
    ]


@pytest.mark.parametrize(
    "place",
    [
        "refcoco/train2014",
        "refcoco/images/train2014",
        "train2014",
        "images/train2014",
        "images/mscoco/train2014",
        "images/mscoco/images/train2014",
    ],
)
def test_pictures_are_found_where_people_have_them(data: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = data / "elsewhere"
    (data / "images/mscoco/images/train2014").rename(elsewhere)
    (data / place).parent.mkdir(parents=True, exist_ok=True)
    elsewhere.rename(data / place)
    assert len(_records(RefcocoReader(), data / "refcoco")) == 2
    monkeypatch.chdir(data / "refcoco")
    assert len(_records(RefcocoReader(), Path())) == 2


def test_pictures_can_be_named(data: Path, tmp_path: Path) -> None:
    before = RefcocoReader().fingerprint({"root": data / "refcoco"})
    (data / "images/mscoco/images").rename(tmp_path / "coco")
    with pytest.raises(NotFoundError, match="pictures are in none of"):
        RefcocoReader().entries({"root": data / "refcoco"})
    options = {"root": data / "refcoco", "images_root": tmp_path / "coco"}
    assert [row.key for row in records_of(RefcocoReader(), options)] == ["0", "2"]
    assert RefcocoReader().fingerprint(options) == before
    (tmp_path / "coco/train2014").rename(tmp_path / "coco/pictures")
    assert len(list(records_of(RefcocoReader(), options | {"images": "pictures"}))) == 2


def test_what_is_missing_is_named(data: Path) -> None:
    with pytest.raises(UsageError, match=r"no split 'val'; name one of testA, train\."):
        RefcocoReader().entries({"root": data / "refcoco", "split": "val"})
    with pytest.raises(NotFoundError, match=r"refs\(google\)\.p; put it there, or name another split_by"):
        RefcocoReader().entries({"root": data / "refcoco", "split_by": "google"})
    with pytest.raises(UsageError, match="'split_by'"):
        RefcocoReader().entries({"root": data / "refcoco", "split_by": "../unc"})
    (data / "refcoco/instances.json").write_text("[]")
    with pytest.raises(UsageError, match="instances"):
        RefcocoReader().entries({"root": data / "refcoco"})
    (data / "refcoco/instances.json").unlink()
    for ask in (RefcocoReader().entries, RefcocoReader().fingerprint):
        with pytest.raises(NotFoundError, match=r"instances\.json"):
            ask({"root": data / "refcoco"})


def test_entries_are_single_records_that_other_processes_can_read(data: Path) -> None:
    for reader, name in ((RefcocoReader(), "refcoco"), (GrefcocoReader(), "grefcoco")):
        options = {"root": str(data / name), "sentences": "all"}
        entries = reader.entries(options)
        assert entries == reader.entries(options)
        for entry in entries:
            copy = pickle.loads(pickle.dumps(entry))  # noqa: S301 - written right here
            assert list(reader.read(options, entry)) == list(reader.read(options, copy))
            assert entry.rows == len(list(reader.read(options, entry))) == 1


def test_the_fingerprint_follows_files_and_options(data: Path) -> None:
    root, reader = data / "refcoco", RefcocoReader()
    first = reader.fingerprint({"root": root})
    assert first == reader.fingerprint({"root": str(root)})
    different = [
        reader.fingerprint({"root": root, **change})
        for change in ({"seed": 1}, {"split": "testA"}, {"sentences": "all"}, {"wording": "simple"})
    ]
    different.append(RefcocoPlusReader().fingerprint({"root": data / "refcoco+"}))
    (root / "refs(unc).p").write_bytes(_python2(REFS).replace(b"Man on left", b"Men on left"))
    different.append(reader.fingerprint({"root": root}))
    (data / "images/mscoco/images/train2014/more.jpg").write_bytes(b"")
    different.append(reader.fingerprint({"root": root}))
    assert len({first, *different}) == 8
