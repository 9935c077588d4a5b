"""ReasonSeg in its original form: pictures, each with polygons and questions."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from insightedit.platform.datasets.reading import records_of
from insightedit.platform.datasets.reasonseg import ReasonSegReader
from insightedit.platform.datasets.segmentation import COLOURS
from insightedit.platform.errors import NotFoundError
from insightedit.platform.records import BadRow, Record, decode_image

READER = ReasonSegReader()
SIZE = (40, 60)
QUESTIONS = ["What keeps the room warm in winter?", "the thing that keeps  the room warm"]


def _jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def _shape(label: str, left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "image_name": "4.jpg",
        "points": [[left, top], [right, top], [right, bottom], [left, bottom]],
        "group_id": None,
        "group_ids": [None],
        "flags": {},
    }


def _annotation(*shapes: Any, **fields: Any) -> dict[str, Any]:
    return {"text": QUESTIONS[:1], "is_sentence": True, "shapes": list(shapes), **fields}


TARGET = _shape("target", 10, 5, 40, 30)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ReasonSeg"
    (root / "train").mkdir(parents=True)
    _put(root, "4", _annotation(TARGET))
    return root


def _put(root: Path, stem: str, annotation: object, encoding: str = "utf-8") -> None:
    (root / "train" / f"{stem}.jpg").write_bytes(_jpeg())
    text = annotation if isinstance(annotation, str) else json.dumps(annotation, ensure_ascii=False, indent=2)
    (root / "train" / f"{stem}.json").write_bytes(text.encode(encoding))


def _read(root: Path, **options: object) -> list[Record | BadRow]:
    return list(records_of(READER, {"root": root, **options}))


def _one(root: Path, **options: object) -> Record:
    (record,) = _read(root, **options)
    assert isinstance(record, Record), record
    return record


def _check_painted(record: Record, mask: np.ndarray[Any, Any]) -> None:
    assert record.source is not None
    assert record.source == _jpeg()
    assert record.target is not None
    source, target = decode_image(record.source), decode_image(record.target)
    expected = source.copy()
    colour = np.array(COLOURS[str(record.details()["colour"])])
    expected[mask] = np.rint(0.5 * source[mask] + 0.5 * colour)
    assert np.array_equal(target, expected)


def _box(left: int, top: int, right: int, bottom: int) -> np.ndarray[Any, Any]:
    """Pillow's polygons hold their rim."""
    mask = np.zeros(SIZE, np.bool_)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def test_the_answer_is_painted(root: Path) -> None:
    record = _one(root, wording="simple")
    assert (record.key, record.dataset, record.task, record.category) == (
        "train-4",
        "reasonseg",
        "segment",
        "reasoning",
    )
    _check_painted(record, _box(10, 5, 40, 30))
    question, rest = record.instruction[: len(QUESTIONS[0])], record.instruction[len(QUESTIONS[0]) :]
    assert question == QUESTIONS[0]
    assert rest.startswith(" ")
    assert " the object" in rest
    details = record.details()
    assert f" {details.pop('colour')}" in rest
    assert details == {"split": "train", "is_sentence": True, "wording": "simple", "painted": True}


def test_one_of_the_questions_is_asked(root: Path) -> None:
    _put(root, "4", _annotation(TARGET, text=QUESTIONS, is_sentence=False))
    starts: Counter[bool] = Counter()
    for seed in range(60):
        record = _one(root, seed=seed)
        assert record == _one(root, seed=seed)
        first = record.instruction.startswith(QUESTIONS[0] + " ")
        assert first or record.instruction.startswith("the thing that keeps the room warm. ")
        assert record.details()["is_sentence"] is False
        starts[first] += 1
    assert min(starts.values()) > 15


def test_the_object_has_its_name_where_the_annotation_has_one(root: Path) -> None:
    _put(root, "4", _annotation(TARGET, Name="Fire Place"))
    record = _one(root)
    assert "fire place" in record.instruction
    assert "the object" not in record.instruction


@pytest.mark.parametrize("reverse", [False, True])
def test_polygons_are_drawn_largest_first(root: Path, reverse: bool) -> None:
    shapes = [
        TARGET,
        _shape("Ignore_region", 20, 10, 50, 20),
        _shape("target", 25, 12, 30, 16),
        _shape("Flag", 0, 0, 59, 39),
        _shape("another target", 52, 33, 56, 37),
    ]
    _put(root, "4", _annotation(*(shapes[::-1] if reverse else shapes)))
    mask = _box(10, 5, 40, 30) & ~_box(20, 10, 50, 20) | _box(25, 12, 30, 16) | _box(52, 33, 56, 37)
    _check_painted(_one(root), mask)


def test_a_void_that_is_larger_takes_nothing_away(root: Path) -> None:
    _put(root, "4", _annotation(TARGET, _shape("ignore", 0, 0, 59, 39)))
    _check_painted(_one(root), _box(10, 5, 40, 30))


def test_points_may_be_fractions_and_lines_are_left_out(root: Path) -> None:
    line = _shape("target", 0, 0, 1, 1) | {"points": [[50.5, 2.5], [55.5, 2.5]]}
    triangle = _shape("target", 0, 0, 1, 1) | {"points": [[10.2, 5.1], [50.7, 5.1], [10.2, 35.9]]}
    _put(root, "4", _annotation(line, triangle))
    record = _one(root)
    assert record.source is not None
    assert record.target is not None
    changed = (decode_image(record.source) != decode_image(record.target)).any(-1)
    area = 40.5 * 30.8 / 2
    assert abs(changed.sum() - area) < 60
    assert not changed[2, 50:].any()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_annotations_may_be_cp1252(root: Path, encoding: str) -> None:
    _put(root, "4", _annotation(TARGET, text=["Where is the caf\u00e9\u2019s door?"]), encoding)
    assert _one(root).instruction.startswith("Where is the caf\u00e9\u2019s door? ")


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("{", "invalid_json"),
        ("", "invalid_json"),
        ("[1]", "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ({"shapes": [TARGET]}, "missing_field"),
        ({"text": "a question", "shapes": [TARGET]}, "missing_field"),
        (_annotation(TARGET, text=[]), "empty_instruction"),
        (_annotation(TARGET, text=[" ", 7]), "empty_instruction"),
        (_annotation(TARGET, Name=7), "missing_field"),
        ({"text": QUESTIONS}, "missing_field"),
        (_annotation("text"), "invalid_json"),
        (_annotation({"points": []}), "missing_field"),
        (_annotation(TARGET | {"points": None}), "invalid_mask"),
        (_annotation(TARGET | {"points": [[1, 2], [3]]}), "invalid_mask"),
        (_annotation(TARGET | {"points": [[1, 2], [3, "4"], [5, 6]]}), "invalid_mask"),
        (_annotation(TARGET | {"points": [[1, 2], [3, float("nan")], [5, 6]]}), "invalid_mask"),
        (_annotation(TARGET | {"points": [[1, 2], [3, 1e9], [5, 6]]}), "invalid_mask"),
        (_annotation(), "invalid_mask"),
        (_annotation(_shape("ignore", 1, 1, 9, 9), _shape("flag", 1, 1, 9, 9)), "invalid_mask"),
    ],
)
def test_a_bad_annotation_is_set_aside(root: Path, annotation: object, reason: str) -> None:
    _put(root, "4", annotation)
    (row,) = _read(root)
    assert isinstance(row, BadRow)
    assert (row.key, row.reason) == ("train-4", reason)


def test_what_has_no_picture_or_annotation_is_set_aside(root: Path) -> None:
    (root / "train/10.jpg").write_bytes(_jpeg())
    (root / "train/2.json").write_text("{}")
    (root / "train/3.jpg").write_bytes(_jpeg()[:300])
    (root / "train/3.json").write_text(json.dumps(_annotation(TARGET)))
    (root / "train/notes.txt").write_text("not of the dataset")
    rows = _read(root)
    assert [row.key for row in rows] == ["train-10", "train-2", "train-3", "train-4"]
    assert [row.reason for row in rows if isinstance(row, BadRow)] == [
        "missing_file",
        "missing_file",
        "truncated_image",
    ]


def test_a_split_that_is_missing_is_named(root: Path) -> None:
    for ask in (READER.entries, READER.fingerprint):
        with pytest.raises(NotFoundError, match=r"ReasonSeg/val; put them"):
            ask({"root": root, "split": "val"})


def test_entries_are_single_records_that_other_processes_can_read(root: Path) -> None:
    _put(root, "30", _annotation(TARGET))
    options = {"root": str(root)}
    entries = READER.entries(options)
    assert entries == READER.entries(options)
    assert len(entries) == 2
    for entry in entries:
        copy = pickle.loads(pickle.dumps(entry))  # noqa: S301 - written right here
        assert list(READER.read(options, entry)) == list(READER.read(options, copy))
        assert entry.rows == len(list(READER.read(options, entry))) == 1


def test_the_fingerprint_follows_files_and_options(root: Path) -> None:
    first = READER.fingerprint({"root": root})
    assert first == READER.fingerprint({"root": str(root), "seed": 0})
    different = [READER.fingerprint({"root": root, **change}) for change in ({"seed": 1}, {"wording": "simple"})]
    (root / "train/notes.txt").write_text("not of the dataset")
    assert READER.fingerprint({"root": root}) == first
    path = root / "train/4.json"
    path.write_text(path.read_text().replace("winter", "summer"))
    different.append(READER.fingerprint({"root": root}))
    (root / "train/5.jpg").write_bytes(_jpeg())
    different.append(READER.fingerprint({"root": root}))
    assert len({first, *different}) == 5
