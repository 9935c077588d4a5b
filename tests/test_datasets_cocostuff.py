"""COCO-Stuff in its original form: label maps beside COCO's pictures."""

from __future__ import annotations

import io
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from insightedit.platform.datasets.cocostuff import NEVER_LABELLED, CocoStuffReader
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.datasets.segmentation import COLOURS
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, Record, decode_image, encode_png

LABELS = Path(__file__).resolve().parents[1].parent / "shared" / "samples" / "cocostuff" / "labels.txt"
READER = CocoStuffReader()
FEW = "0: unlabeled\n1: person\n2: bicycle\n3: Car\n12: street sign\n106: clouds\n157: sky-other\n"
NAMES = {1: "person", 2: "bicycle", 3: "car", 106: "clouds", 157: "sky-other"}
SIZE = (20, 30)


def _png(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def _values() -> np.ndarray[Any, Any]:
    """The upper half sky, below a person and a car; a rim without a class."""
    values = np.full(SIZE, 255)
    values[:10, 1:] = 156
    values[12:, 4:12] = 0
    values[14:, 15:28] = 2
    return values


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """As the archives unpack: 000000000009 has three classes, 000000000025 none."""
    root = tmp_path / "cocostuff"
    for folder in ("stuffthingmaps/train2017", "train2017"):
        (root / folder).mkdir(parents=True)
    (root / "labels.txt").write_text(FEW)
    for identity, values in ((25, np.full(SIZE, 255)), (9, _values())):
        (root / "train2017" / f"{identity:012d}.jpg").write_bytes(_jpeg(identity))
        (root / "stuffthingmaps/train2017" / f"{identity:012d}.png").write_bytes(_png(values))
    return root


def _read(root: Path, **options: object) -> list[Record | BadRow]:
    return list(records_of(READER, {"root": root, **options}))


def _first(root: Path, **options: object) -> Record:
    record = _read(root, **options)[0]
    assert isinstance(record, Record), record
    return record


def test_a_class_that_is_there_is_painted(root: Path) -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        record = _first(root, seed=seed, absent=0)
        assert (record.key, record.dataset, record.task) == ("train2017-000000000009", "cocostuff", "segment")
        assert record.source is not None
        assert record.source == _jpeg(9)
        assert record.target is not None
        label = {"person": 1, "car": 3, "sky-other": 157}[record.category]
        details = record.details()
        assert (details["label"], details["painted"], details["split"]) == (label, True, "train2017")
        assert record.category in record.instruction
        source, target = decode_image(record.source), decode_image(record.target)
        mask = _values() == label - 1
        expected = source.copy()
        expected[mask] = np.rint(0.5 * source[mask] + 0.5 * np.array(COLOURS[str(details["colour"])]))
        assert np.array_equal(target, expected)
        seen[record.category] += 1
    assert min(seen[name] for name in ("person", "car", "sky-other")) > 8


def test_a_fifth_asks_for_a_class_that_is_not_there(root: Path) -> None:
    records = [_first(root, seed=seed) for seed in range(400)]
    absent = [record for record in records if not record.details()["painted"]]
    assert 0.14 < len(absent) / len(records) < 0.26
    assert {record.category for record in absent} == {"bicycle", "clouds"}, "neither present nor never labelled"
    for record in absent:
        assert record.target == record.source == _jpeg(9)
        assert record.category in record.instruction
    assert all(record.target != record.source for record in records if record.details()["painted"])


def test_a_map_without_a_class_leaves_the_picture(root: Path) -> None:
    assert _read(root)[1] == Record(
        key="train2017-000000000025",
        dataset="cocostuff",
        task="segment",
        source=_jpeg(25),
        target=_jpeg(25),
        instruction="Leave the picture as it is.",
        meta='{"split": "train2017", "painted": false}',
    )


def test_where_every_class_is_there_one_is_painted(root: Path) -> None:
    (root / "labels.txt").write_text("1: person\n3: car\n12: street sign\n157: sky-other\n")
    assert _first(root, absent=1).details()["painted"] is True


@pytest.mark.parametrize(
    ("maps", "pictures"),
    [
        ("stuffthingmaps/val2017", "images/val2017"),
        ("annotations/val2017", "images/val2017"),
        ("val2017", "images/val2017"),
        ("val2017", "val2017"),
    ],
)
def test_the_layouts_in_use_are_found(root: Path, maps: str, pictures: str) -> None:
    before = [record for record in _read(root) if isinstance(record, Record)]
    for old, new, suffix in (("stuffthingmaps/train2017", maps, "png"), ("train2017", pictures, "jpg")):
        (root / new).mkdir(parents=True, exist_ok=True)
        for path in (root / old).glob(f"*.{suffix}"):
            shutil.move(path, root / new / path.name)
    after = [record for record in _read(root, split="val2017") if isinstance(record, Record)]
    assert [record.source for record in after] == [record.source for record in before]
    assert [record.key for record in after] == ["val2017-000000000009", "val2017-000000000025"]


def _grid(value: int) -> np.ndarray[Any, Any]:
    values = _values()
    values[0, 0] = value
    return values


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing_file"),
        (_png(_values()[:-1]), "mask_size"),
        (_png(_values().T), "mask_size"),
        (_png(_values())[:60], "invalid_mask"),
        (b"no picture", "invalid_mask"),
        (_png(_grid(180)), "invalid_mask"),
        (encode_png(np.random.default_rng(0).integers(0, 5, (*SIZE, 3), np.uint8)), "invalid_mask"),
    ],
)
def test_a_bad_map_is_set_aside(root: Path, content: bytes | None, reason: str) -> None:
    entries = READER.entries({"root": root})
    path = root / "stuffthingmaps/train2017/000000000009.png"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    (row,) = READER.read({"root": root}, entries[0])
    assert isinstance(row, BadRow)
    assert (row.key, row.reason) == ("train2017-000000000009", reason)
    assert row.detail.endswith(".")


def test_a_bad_picture_is_set_aside(root: Path) -> None:
    path = root / "train2017/000000000009.jpg"
    path.write_bytes(path.read_bytes()[:300])
    (broken, good) = _read(root)
    assert isinstance(broken, BadRow)
    assert broken.reason == "truncated_image"
    assert isinstance(good, Record)
    path.unlink()
    missing = _read(root)[0]
    assert isinstance(missing, BadRow)
    assert missing.reason == "missing_file"


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no \*\.png in any of stuffthingmaps/val2017"):
        READER.entries({"root": root, "split": "val2017"})
    with pytest.raises(UsageError, match="'absent'"):
        READER.entries({"root": root, "absent": 1.5})
    labels = root / "labels.txt"
    for content in ("person\n", "1: person\n: car\n", "1: person\nx: car\n", "1:\n"):
        labels.write_text(content)
        with pytest.raises(UsageError, match="an id, a colon and a name"):
            READER.entries({"root": root})
    labels.write_bytes(b"1: \xff\n")
    with pytest.raises(UsageError, match="cannot be read"):
        READER.entries({"root": root})
    labels.unlink()
    for ask in (READER.entries, READER.fingerprint):
        with pytest.raises(NotFoundError, match=r"labels\.txt; copy it from"):
            ask({"root": root})
    shutil.rmtree(root / "train2017")
    with pytest.raises(NotFoundError, match=r"no \*\.jpg in any of train2017, images/train2017"):
        READER.entries({"root": root})


def test_entries_are_single_records_that_other_processes_can_read(root: Path) -> None:
    options = {"root": str(root)}
    entries = READER.entries(options)
    assert entries == READER.entries(options)
    for entry in entries:
        copy = pickle.loads(pickle.dumps(entry))  # noqa: S301 - written right here
        assert list(READER.read(options, entry)) == list(READER.read(options, copy))
        assert entry.rows == len(list(READER.read(options, entry))) == 1


def test_the_fingerprint_follows_files_and_options(root: Path) -> None:
    first = READER.fingerprint({"root": root})
    assert first == READER.fingerprint({"root": str(root), "absent": 0.2})
    different = [READER.fingerprint({"root": root, **change}) for change in ({"seed": 1}, {"absent": 0.1})]
    (root / "labels.txt").write_text(FEW.replace("Car", "Van"))
    different.append(READER.fingerprint({"root": root}))
    (root / "stuffthingmaps/train2017/000000000025.png").write_bytes(_png(_values()))
    different.append(READER.fingerprint({"root": root}))
    (root / "train2017/000000000025.jpg").unlink()
    different.append(READER.fingerprint({"root": root}))
    assert len({first, *different}) == 6


def test_the_real_labels_name_every_value(root: Path) -> None:
    if not LABELS.is_file():
        pytest.skip("the shared samples are not here")
    shutil.copy(LABELS, root / "labels.txt")
    found: set[str] = set()
    for seed in range(30):
        record = _first(root, seed=seed, absent=0)
        found.add(record.category)
    assert found == {"person", "car", "sky-other"}
    (root / "stuffthingmaps/train2017/000000000009.png").write_bytes(_png(np.arange(600).reshape(SIZE) % 182))
    record = _first(root, absent=1)
    assert record.details()["painted"] is True, "only classes that were never labelled are absent"
    labels = dict(line.split(": ") for line in LABELS.read_text().splitlines())
    assert {labels[str(label)] for label in NEVER_LABELLED} == {
        *("street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk", "door", "blender"),
        "hair brush",
    }
