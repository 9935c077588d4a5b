"""COCO in its original form: captions, instances, and LLaVA's conversations."""

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

from insightedit.platform.datasets.coco import CocoReader
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.datasets.segmentation import BEARERS, COLOURS
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, Record, decode_image

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "samples" / "photos"
READER = CocoReader()
CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "animal", "id": 18, "name": "Dog"},
]


def _jpeg(seed: int, width: int = 32, height: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def _image(identity: int, width: int = 32, height: int = 24) -> dict[str, Any]:
    return {
        "license": 3,
        "file_name": f"{identity:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/train2017/{identity:012d}.jpg",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 11:18:45",
        "id": identity,
    }


def _box(x: int, y: int, width: int, height: int) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _annotation(identity: int, image: int, category: int, segmentation: object, crowd: int = 0) -> dict[str, Any]:
    return {
        "segmentation": segmentation,
        "area": 12.0,
        "iscrowd": crowd,
        "image_id": image,
        "bbox": [0, 0, 4, 3],
        "category_id": category,
        "id": identity,
    }


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _instances(root: Path, annotations: list[Any], images: list[Any]) -> None:
    index = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": CATEGORIES}
    _write(root / "annotations" / "instances_train2017.json", index)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures: two dogs and a person; a person and a crowd; nothing."""
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    images = [_image(9), _image(25), _image(30)]
    for image in images:
        (root / "train2017" / image["file_name"]).write_bytes(_jpeg(image["id"]))
    crowd = {"size": [24, 32], "counts": [0, 10, 758]}
    annotations = [
        _annotation(1768, 25, 1, _box(20, 10, 8, 8)),
        _annotation(1769, 9, 18, _box(2, 2, 6, 6)),
        _annotation(1770, 9, 1, {"size": [24, 32], "counts": [24 * 30, 24, 24]}),
        _annotation(1771, 9, 18, _box(12, 4, 5, 9)),
        _annotation(900100, 25, 1, crowd, crowd=1),
        _annotation(900101, 30, 18, crowd, crowd=1),
    ]
    _instances(root, annotations, images)
    captions = [
        {"image_id": 25, "id": 38, "caption": "A giraffe eats \u00e9clairs. "},
        {"image_id": 9, "id": 37, "caption": "A dog."},
        {"image_id": 9, "id": 41, "caption": "Two dogs\nat play"},
    ]
    _write(root / "annotations/captions_train2017.json", {"images": images, "annotations": captions})
    _write(
        root / "llava_instruct_150k.json",
        [
            {
                "id": "000000000025",
                "image": "000000000025.jpg",
                "conversations": [
                    {"from": "human", "value": "What is this?\n<image>"},
                    {"from": "gpt", "value": "A person.\nAnd a crowd."},
                    {"from": "human", "value": "How many?"},
                    {"from": "gpt", "value": " Many. "},
                ],
            },
            {
                "id": "000000000025",
                "image": "000000000025.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe\nit."},
                    {"from": "gpt", "value": "Fine."},
                ],
            },
        ],
    )
    return root


def _read(root: Path, **options: object) -> list[Record | BadRow]:
    return list(records_of(READER, {"root": root, **options}))


def _records(root: Path, **options: object) -> list[Record]:
    rows = _read(root, **options)
    assert all(isinstance(row, Record) for row in rows), rows
    return [row for row in rows if isinstance(row, Record)]


def _picture(root: Path, identity: int) -> bytes:
    return (root / "train2017" / f"{identity:012d}.jpg").read_bytes()


def _changed(record: Record) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    assert record.source is not None
    assert record.target is not None
    source, target = decode_image(record.source), decode_image(record.target)
    return source, target, (source != target).any(-1)


def test_captions_are_one_record_each(root: Path) -> None:
    assert _records(root, kinds=["captions"]) == [
        Record(
            key=f"caption-{identity}",
            dataset="coco",
            task="caption",
            source=_picture(root, image),
            instruction=caption,
            meta=json.dumps({"split": "train2017", "image_id": image}),
        )
        for identity, image, caption in (
            (38, 25, "A giraffe eats \u00e9clairs."),
            (37, 9, "A dog."),
            (41, 9, "Two dogs\nat play"),
        )
    ]


def test_all_objects_of_one_class_are_painted(root: Path) -> None:
    masks = {"dog": np.zeros((24, 32), np.bool_), "person": np.zeros((24, 32), np.bool_)}
    masks["dog"][2:8, 2:8] = masks["dog"][4:13, 12:17] = True
    masks["person"][:, 30] = True
    seen: Counter[str] = Counter()
    for seed in range(40):
        first, second = sorted(_records(root, kinds=["instances"], seed=seed), key=lambda record: record.key[-1:])[::-1]
        assert (first.key, second.key) == ("segment-9", "segment-25")
        assert second.category == "person"
        assert first.source == _picture(root, 9)
        assert first.task == "segment"
        details = first.details()
        source, target, changed = _changed(first)
        assert not changed[~masks[first.category]].any()
        inside = masks[first.category]
        expected = np.rint(0.5 * source[inside] + 0.5 * np.array(COLOURS[str(details["colour"])]))
        assert np.array_equal(target[inside], expected)
        assert first.category in first.instruction
        words = [str(details["colour"]), *BEARERS[str(details["colour"])]]
        assert any(word in first.instruction for word in words)
        assert details["instances"] == (2 if first.category == "dog" else 1)
        assert (details["image_id"], details["split"], details["painted"]) == (9, "train2017", True)
        seen[first.category] += 1
    assert min(seen["dog"], seen["person"]) > 8


def test_the_class_does_not_decide_the_wording(root: Path) -> None:
    pairs: Counter[tuple[str, object]] = Counter()
    for seed in range(200):
        for record in _records(root, kinds=["instances"], seed=seed):
            if record.key == "segment-9":
                pairs[record.category, record.details()["wording"]] += 1
    assert len(pairs) == 4
    assert min(pairs.values()) > 25


def test_pictures_without_objects_are_left_out(root: Path) -> None:
    assert [record.key for record in _records(root, kinds=["instances"])] == ["segment-25", "segment-9"]


def test_the_first_question_of_each_conversation_is_a_record(root: Path) -> None:
    source = _picture(root, 25)
    meta = json.dumps({"split": "train2017", "id": "000000000025"})
    assert _records(root, kinds=["conversations"]) == [
        Record(
            key="chat-000000",
            dataset="coco",
            task="chat",
            source=source,
            instruction="What is this?",
            reply="A person.\nAnd a crowd.",
            meta=meta,
        ),
        Record(
            key="chat-000001",
            dataset="coco",
            task="chat",
            source=source,
            instruction="Describe it.",
            reply="Fine.",
            meta=meta,
        ),
    ]


def test_all_questions_are_records_of_their_own(root: Path) -> None:
    found = _records(root, kinds=["conversations"], turns="all")
    assert [(record.key, record.instruction, record.reply) for record in found] == [
        ("chat-000000-0", "What is this?", "A person.\nAnd a crowd."),
        ("chat-000000-1", "How many?", "Many."),
        ("chat-000001-0", "Describe it.", "Fine."),
    ]
    assert found[1].details() == {"split": "train2017", "id": "000000000025", "turn": 1}


def test_by_default_everything_found_is_read(root: Path) -> None:
    assert Counter(record.task for record in _records(root)) == {"caption": 3, "segment": 2, "chat": 2}
    assert len({record.key for record in _records(root)}) == 7
    (root / "annotations/instances_train2017.json").unlink()
    (root / "llava_instruct_150k.json").rename(root / "annotations/llava_instruct_150k.json")
    assert Counter(record.task for record in _records(root)) == {"caption": 3, "chat": 2}


def test_another_split_has_no_conversations_unless_asked(root: Path) -> None:
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "val2017")
    (root / "annotations/captions_train2017.json").rename(root / "annotations/captions_val2017.json")
    assert Counter(record.task for record in _records(root, split="val2017")) == {"caption": 3}
    both = _records(root, split="val2017", kinds=["conversations", "captions"])
    assert Counter(record.task for record in both) == {"caption": 3, "chat": 2}


def test_entries_are_single_records_that_other_processes_can_read(root: Path) -> None:
    options = {"root": str(root)}
    entries = READER.entries(options)
    assert entries == READER.entries(options)
    copies = pickle.loads(pickle.dumps(entries))  # noqa: S301 - written right here
    for entry, copy in zip(entries, copies, strict=True):
        assert list(READER.read(options, entry)) == list(READER.read(options, copy))
        assert entry.rows == len(list(READER.read(options, entry))) == 1


@pytest.mark.parametrize(
    ("annotation", "key", "reason"),
    [
        ("text", "annotation-row-0", "invalid_json"),
        (_annotation(5, 9, 77, _box(1, 1, 3, 3)), "annotation-5", "missing_field"),
        ({"id": 5, "image_id": 9, "category_id": 1}, "annotation-5", "missing_field"),
        ({"id": 5, "segmentation": [], "category_id": 1}, "annotation-5", "missing_field"),
        (_annotation(5, 77, 1, _box(1, 1, 3, 3)), "segment-77", "missing_field"),
        (_annotation(5, 4, 1, _box(1, 1, 3, 3)), "segment-4", "missing_file"),
        (_annotation(5, 5, 1, _box(1, 1, 3, 3)), "segment-5", "missing_field"),
        (_annotation(5, 6, 1, _box(1, 1, 3, 3)), "segment-6", "missing_file"),
        (_annotation(5, 7, 1, _box(1, 1, 3, 3)), "segment-7", "truncated_image"),
        (_annotation(5, 8, 1, _box(1, 1, 3, 3)), "segment-8", "mask_size"),
        (_annotation(5, 9, 1, [[1, 1, 1, 1, 1, 1]]), "segment-9", "invalid_mask"),
        (_annotation(5, 9, 1, []), "segment-9", "invalid_mask"),
        (_annotation(5, 9, 1, "text"), "segment-9", "invalid_mask"),
        (_annotation(5, 9, 1, {"size": [24, 32], "counts": [5]}), "segment-9", "invalid_mask"),
        (_annotation(5, 9, 1, {"size": [32, 24], "counts": [768]}), "segment-9", "mask_size"),
    ],
)
def test_a_bad_annotation_is_set_aside(root: Path, annotation: object, key: str, reason: str) -> None:
    images = [_image(9), _image(4), {"id": 5, "file_name": "5.jpg"}, _image(7), _image(8, 24, 32)]
    images.append(_image(6) | {"file_name": "../annotations/instances_train2017.json"})
    (root / "train2017" / f"{7:012d}.jpg").write_bytes(_jpeg(7)[:300])
    (root / "train2017" / f"{8:012d}.jpg").write_bytes(_jpeg(8))
    _instances(root, [annotation], images)
    (row,) = _read(root, kinds=["instances"])
    assert isinstance(row, BadRow)
    assert (row.key, row.reason) == (key, reason)
    assert row.detail.endswith(".")


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ({"image_id": 9, "id": 3, "caption": " "}, "empty_instruction"),
        ({"image_id": 9, "id": 3}, "missing_field"),
        ({"image_id": 404, "id": 3, "caption": "A cat."}, "missing_field"),
        ({"id": 3, "caption": "A cat."}, "missing_field"),
        ({"image_id": 4, "id": 3, "caption": "A cat."}, "missing_file"),
    ],
)
def test_a_bad_caption_is_set_aside(root: Path, caption: dict[str, Any], reason: str) -> None:
    index = {"images": [_image(9), _image(4)], "annotations": [caption, {"image_id": 9, "id": 4, "caption": "A dog."}]}
    _write(root / "annotations/captions_train2017.json", index)
    bad, good = _read(root, kinds=["captions"])
    assert isinstance(bad, BadRow)
    assert (bad.key, bad.reason) == ("caption-3", reason)
    assert good.key == "caption-4"


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ("text", "invalid_json"),
        ({"id": "1", "conversations": []}, "missing_field"),
        ({"id": "1", "image": "000000000009.jpg"}, "missing_field"),
        ({"id": "1", "image": "000000000009.jpg", "conversations": []}, "missing_field"),
        ({"id": "1", "image": "000000000009.jpg", "conversations": [7, 8]}, "invalid_json"),
        ({"id": "1", "image": "000000000009.jpg", "conversations": [{"from": "human", "value": "a"}]}, "missing_field"),
        (
            {"image": "1.jpg", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "missing_file",
        ),
        (
            {"image": "1.jpg", "conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": "b"}]},
            "empty_instruction",
        ),
    ],
)
def test_a_bad_conversation_is_set_aside(root: Path, conversation: object, reason: str) -> None:
    _write(root / "llava_instruct_150k.json", [conversation])
    (row,) = _read(root, kinds=["conversations"])
    assert isinstance(row, BadRow)
    assert (row.key, row.reason) == ("chat-000000", reason)


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(NotFoundError, match=r"pictures of val2017 are in none of"):
        READER.entries({"root": root, "split": "val2017"})
    (root / "annotations/captions_train2017.json").unlink()
    with pytest.raises(NotFoundError, match=r"captions_train2017\.json; put it there"):
        READER.entries({"root": root, "kinds": ["captions"]})
    (root / "annotations/instances_train2017.json").unlink()
    (root / "llava_instruct_150k.json").unlink()
    with pytest.raises(NotFoundError, match="no annotations of train2017"):
        READER.entries({"root": root})
    with pytest.raises(UsageError, match="'kinds"):
        READER.entries({"root": root, "kinds": ["panoptic"]})


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": []}', "{"])
def test_a_broken_index_is_named(root: Path, content: str) -> None:
    for kind in ("captions", "instances"):
        (root / f"annotations/{kind}_train2017.json").write_text(content)
        with pytest.raises(UsageError, match=f"{kind}_train2017"):
            READER.entries({"root": root, "kinds": [kind]})
    (root / "llava_instruct_150k.json").write_text("{}")
    with pytest.raises(UsageError, match="llava_instruct_150k"):
        READER.entries({"root": root, "kinds": ["conversations"]})


def test_the_fingerprint_follows_files_and_options(root: Path) -> None:
    def fingerprint(**options: object) -> str:
        return READER.fingerprint({"root": root, **options})

    first = fingerprint()
    assert first == fingerprint()
    moved = root.rename(root.with_name("moved"))
    assert READER.fingerprint({"root": moved}) == first
    root = moved
    different = [
        fingerprint(seed=1),
        fingerprint(turns="all"),
        fingerprint(kinds=["captions"]),
        fingerprint(wording="simple"),
    ]
    path = root / "annotations/captions_train2017.json"
    path.write_text(path.read_text().replace("A dog", "A cat"))
    different.append(fingerprint())
    (root / "train2017" / f"{30:012d}.jpg").unlink()
    different.append(fingerprint())
    assert len({first, *different}) == 7


def test_a_real_photo_is_painted_and_kept(tmp_path: Path) -> None:
    if not PHOTOS.is_dir():
        pytest.skip("the shared samples are not here")
    photo = (PHOTOS / "0.jpg").read_bytes()
    height, width, _ = decode_image(photo).shape
    (tmp_path / "train2017").mkdir()
    image = _image(1, width, height)
    (tmp_path / "train2017" / image["file_name"]).write_bytes(photo)
    _instances(tmp_path, [_annotation(1, 1, 18, _box(10, 20, 40, 30))], [image])
    (record,) = _records(tmp_path)
    assert record.source == photo
    _, _, changed = _changed(record)
    assert changed[20:50, 10:50].mean() > 0.9
    changed[20:50, 10:50] = False
    assert not changed.any()
