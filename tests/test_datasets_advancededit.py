"""AdvancedEdit: the JSON files of each step of InsightEdit's data pipeline, and the pictures that they name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from insightedit.platform.datasets.advancededit import AdvancedEditReader
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, Record, decode_image, encode_png

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared/samples/advancededit"
READER = AdvancedEditReader()

PHOTO = "/gpfs/public/vl/photography/pexels/img/20240402/7.jpg"
BARE = "/gpfs/public/vl/SensiEdit/imgs/remove_res_image/20240402/7_1_straw_hat.png"
CAP = "/gpfs/public/vl/SensiEdit/imgs/replace_res_image/20240402/7_1_straw_hat_to_red_cap.png"

REMOVE_ADD = """{
    "0": {
        "target_img_path": "%(bare)s",
        "origin_img_path": "%(photo)s",
        "mask_json_path": " ",
        "instruction": [
            "remove the straw hat",
        ],
        "task_type": "remove",
        "detailed_caption": "A straw hat [wide, light,], worn by a girl.",
        "img_caption": "A girl, ]standing at {the sea,}.",
        "class_origin": "straw_hat",
        "class_target": "",
        "bbox": [3, 2, 6, 3],
        "segmentation": {
            "size": [8, 12],
            "counts": "j035000000000f0",
        },
    },
    "1": {
        "target_img_path": "%(photo)s",
        "origin_img_path": "%(bare)s",
        "mask_json_path": " ",
        "instruction": [
            "add the straw hat"
        ],
        "task_type": "add",
        "detailed_caption": "A straw hat [wide, light,], worn by a girl.",
        "img_caption": "A girl, ]standing at {the sea,}.",
        "class_origin": "",
        "class_target": "straw_hat",
        "bbox": [3, 2, 6, 3],
        "segmentation": {
            "size": [8, 12],
            "counts": "j035000000000f0"
        }
    },
}
"""
CAPTIONS = {"detailed_caption": "A straw hat [wide, light,], worn by a girl."}
CAPTIONS["img_caption"] = "A girl, ]standing at {the sea,}."


def _picture(seed: int, height: int = 8, width: int = 12) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def _write(path: Path, content: str | bytes | Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, indent=4)
        path.write_text(text % {"photo": PHOTO, "bare": BARE, "cap": CAP} if "%(" in text else text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "advancededit"
    for seed, path in enumerate((PHOTO, BARE, CAP)):
        _write(folder / "20240402" / Path(path).name, _picture(seed))
    return folder


def _read(root: Path, **options: object) -> list[Record | BadRow]:
    return list(records_of(READER, {"root": root, **options}))


def _records(root: Path, **options: object) -> list[Record]:
    rows = _read(root, **options)
    assert all(isinstance(row, Record) for row in rows), rows
    return [row for row in rows if isinstance(row, Record)]


def _replaced(**change: object) -> dict[str, Any]:
    """The two directions of a replacement, as the recaption step leaves them."""
    forward = {
        "target_img_path": CAP,
        "origin_img_path": PHOTO,
        "instruction": ["change the straw hat to red cap", "replace the straw hat with red cap"],
        "task_type": "replace",
        "detailed_caption": "A straw hat.",
        "img_caption": "A girl at the sea.",
        "class_origin": "straw hat",
        "class_target": "red cap",
        "detailed_caption_origin": "A straw hat.",
        "detailed_caption_target": "A red cap.",
        "bbox": [3, 2, 6, 3],
        "segmentation": {"size": [8, 12], "counts": "j035000000000f0"},
        "reasoning_instruction1": "What does the girl wear? Make it a red cap.",
        "reasoning_instruction2": "Find what shades her face and make it a red cap.",
    }
    backward = forward | {
        "target_img_path": PHOTO,
        "origin_img_path": CAP,
        "instruction": ["change the red cap to straw hat", "replace the red cap with straw hat"],
        "class_origin": "red cap",
        "class_target": "straw hat",
        "reasoning_instruction1": "What is red here? Make it a straw hat.",
        "reasoning_instruction2": "Find what is red and make it one of straw.",
    }
    return {"0": forward | change, "1": backward}


SCORES = {
    "qwen_VIE_SC": {"instruction_follow": 3, "non-overedit": 5, "reasoning": "Not very clear."},
    "qwen_VIE_PQ": {"naturalness": 4, "no_artifacts": 4.5, "reasoning": "Good."},
}


def test_pairs_of_the_construction_step_are_read_as_they_stand(root: Path) -> None:
    _write(root / "7.json", REMOVE_ADD)
    meta = CAPTIONS | {"bbox": [3, 2, 6, 3], "mask_size": [8, 12], "wording": "simple"}
    assert [(record.key, record.details()) for record in _records(root)] == [
        ("7-0-simple", {"class_origin": "straw_hat"} | meta),
        ("7-1-simple", {"class_target": "straw_hat"} | meta),
    ]
    removed, added = _records(root)
    photo, bare = _picture(0), _picture(1)
    assert removed == Record(
        key="7-0-simple",
        dataset="advancededit",
        task="edit",
        source=photo,
        target=bare,
        instruction="remove the straw hat",
        category="remove",
        meta=removed.meta,
    )
    assert (added.source, added.target) == (bare, photo)
    assert (added.instruction, added.category) == ("add the straw hat", "add")


def test_a_pair_gives_a_record_for_each_wording_that_it_has(root: Path) -> None:
    _write(root / "7.json", _replaced())
    _write(root / "8.json", REMOVE_ADD)
    records = _records(root)
    assert [record.key for record in records] == [
        "7-0-simple", "7-0-advanced", "7-1-simple", "7-1-advanced", "8-0-simple", "8-1-simple",
    ]  # fmt: skip
    simple, advanced = records[:2]
    assert (simple.source, simple.target) == (advanced.source, advanced.target) == (_picture(0), _picture(2))
    details = advanced.details()
    assert details["detailed_caption_target"] == "A red cap."
    assert (details["wording"], simple.details() | {"wording": "advanced"}) == ("advanced", details)
    assert _records(root, wording="simple") == [record for record in records if record.key.endswith("simple")]
    assert _records(root, wording="advanced") == [records[1], records[3]]


def test_one_of_several_instructions_is_taken_by_seed_and_key(root: Path) -> None:
    pair = _replaced()["0"]
    _write(root / "7.json", {str(number): pair | {"class_origin": f"hat {number}"} for number in range(40)})
    _write(root / "8.json", {str(number): pair | {"task_type": f"kind {number}"} for number in range(40)})
    assert len(_records(root)) == 2 + 80, "what is the same pair is one pair"
    first = [record.instruction for record in _records(root, wording="simple")]
    assert set(first) == set(pair["instruction"])
    assert first == [record.instruction for record in _records(root)[::2]]
    assert first != [record.instruction for record in _records(root, wording="simple", seed=1)]
    advanced = {record.instruction for record in _records(root, wording="advanced")}
    assert advanced == {pair["reasoning_instruction1"], pair["reasoning_instruction2"]}


def test_scores_are_kept_and_both_directions_of_an_edit_are_filtered_by_them(root: Path) -> None:
    _write(root / "7.json", _replaced(**SCORES))
    forward, backward = _records(root, wording="simple")
    scores = {"instruction_follow": 3, "non-overedit": 5, "naturalness": 4, "no_artifacts": 4.5}
    assert forward.details()["scores"] == scores
    assert "scores" not in backward.details()
    for least, kept in (
        ({"instruction_follow": 3}, 2),
        ({"instruction_follow": 3.5}, 0),
        ({"non-overedit": 5, "no_artifacts": 4.5}, 2),
        ({"non-overedit": 5, "naturalness": 5}, 0),
    ):
        assert len(_read(root, wording="simple", min_scores=least)) == kept, least


@pytest.mark.parametrize("missing", [None, "absent", "text", {"naturalness": None}])
def test_scores_may_be_null_or_missing(root: Path, missing: object) -> None:
    change = {} if missing == "absent" else {"qwen_VIE_PQ": missing}
    _write(root / "7.json", _replaced(qwen_VIE_SC=SCORES["qwen_VIE_SC"], **change))
    assert _records(root)[0].details()["scores"] == {"instruction_follow": 3, "non-overedit": 5}
    assert len(_read(root, min_scores={"non-overedit": 5})) == 4
    assert _read(root, min_scores={"naturalness": 0}) == []


def test_the_steps_of_the_pipeline_are_read_together(root: Path) -> None:
    plain, advanced = _replaced(), _replaced()
    for pair in plain.values():
        del pair["reasoning_instruction1"], pair["reasoning_instruction2"]
    scored = {"0": plain["0"] | SCORES | {"qwen_VIE_PQ": None}, "1": plain["1"]}
    _write(root / "2_mask_generation/7.json", {"image_path": PHOTO, "annotations": []})
    _write(root / "3_editing_pair_construction/remove_add/json_file/7.json", REMOVE_ADD)
    _write(root / "3_editing_pair_construction/replace/json_file/7.json", plain)
    _write(root / "4_instruction_recaption/replace/7.json", advanced)
    _write(root / "5_quality_evaluation/7.json", scored)
    _write(root / "5_quality_evaluation/8.json", scored)
    assert [entry.place[0] for entry in READER.entries({"root": root})] == [
        "2_mask_generation/7.json",
        "5_quality_evaluation/8.json",
    ]
    records = _records(root)
    step = "3_editing_pair_construction"
    assert [record.key for record in records] == [
        f"{step}/remove_add/json_file/7-0-simple",
        f"{step}/remove_add/json_file/7-1-simple",
        f"{step}/replace/json_file/7-0-simple",
        f"{step}/replace/json_file/7-0-advanced",
        f"{step}/replace/json_file/7-1-simple",
        f"{step}/replace/json_file/7-1-advanced",
        "5_quality_evaluation/8-0-simple",
        "5_quality_evaluation/8-1-simple",
    ]
    assert records[3].details()["scores"] == {"instruction_follow": 3, "non-overedit": 5}
    only = _records(root, pattern="4_instruction_recaption/**/*.json")
    assert len(only) == 4


def test_files_without_pairs_give_nothing(root: Path) -> None:
    _write(root / "1_1.json", '{\n    "img_path": "./7.jpg",\n    "caption": "A girl.",\n    }')
    _write(root / "1_2.json", {"object_list": [{"category": "Person"}], "img_caption": "A girl."})
    _write(root / "2.json", {"image_path": PHOTO, "annotations": [{"class_name": "hat", "bbox": [1, 2, 3, 4]}]})
    _write(root / "list.json", "[1, 2, 3]")
    assert len(READER.entries({"root": root})) == 4
    assert _read(root) == []


def test_a_byte_order_mark_and_numbers_that_are_none_are_forgiven(root: Path) -> None:
    text = json.dumps(_replaced(bbox=[1, 2, 3, 4], qwen_VIE_PQ={"naturalness": 5, "no_artifacts": float("nan")}))
    _write(root / "7.json", b"\xef\xbb\xbf" + text.replace('"bbox": [1', ' "bbox": [-Infinity').encode())
    details = _records(root)[0].details()
    assert (details["scores"], details["bbox"]) == ({"naturalness": 5}, [None, 2, 3, 4])


@pytest.mark.parametrize(
    ("change", "reason", "named"),
    [
        ({"origin_img_path": " "}, "missing_file", "origin_img_path"),
        ({"target_img_path": ""}, "missing_file", "target_img_path"),
        ({"target_img_path": None}, "missing_field", "target_img_path"),
        ({"target_img_path": "/gpfs/elsewhere/9.png"}, "missing_file", "/gpfs/elsewhere/9.png"),
        ({"target_img_path": "../../../etc/passwd"}, "missing_file", "etc/passwd"),
        ({"origin_img_path": "7.jpg\0"}, "invalid_json", "origin_img_path"),
        ({"origin_img_path": "x" * 3000}, "missing_file", "xxx"),
        ({"origin_img_path": "readme.txt"}, "not_an_image", "cannot be read"),
        ({"task_type": None}, "missing_field", "task_type"),
        ({"instruction": None, "reasoning_instruction1": None, "reasoning_instruction2": ""}, "missing_field",
         "instruction"),
        ({"instruction": [" "], "reasoning_instruction1": "", "reasoning_instruction2": None}, "empty_instruction",
         "instruction"),
        ({"instruction": ["a \ud83d hat"]}, "invalid_json", "instruction"),
        ({"segmentation": {"size": [12, 8], "counts": "j035000000000f0"}}, "mask_size", "12, 8"),
        ({"segmentation": {"size": [8, 12], "counts": "j03500000000f0"}}, "invalid_mask", "pixels"),
        ({"segmentation": {"size": [8, 12], "counts": "j035000000000f"}}, "invalid_mask", ""),
        ({"segmentation": {"size": [8, 12]}}, "invalid_mask", "counts"),
        ({"segmentation": "j035000000000f0"}, "invalid_mask", "segmentation"),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_be_read_is_one_bad_row(
    root: Path, change: dict[str, object], reason: str, named: str
) -> None:
    _write(root / "readme.txt", "no picture")
    _write(root / "7.json", _replaced(**change))
    bad, *others = _read(root, wording="both" if len(change) > 1 else "simple")
    assert isinstance(bad, BadRow)
    assert (bad.key, bad.reason) == ("7-0", reason)
    assert named in bad.detail
    assert others
    assert all(isinstance(row, Record) for row in others)


def test_broken_files_are_bad_rows_and_the_others_are_read(root: Path) -> None:
    _write(root / "6.json", b'{"0": {"origin_img_path": "a')
    _write(root / "7.json", {"0": ["no", "pair"], "1": _replaced()["1"], "note": 1})
    _write(root / "8.json", b"\xff\xfe{}")
    _write(root / "9.json", b"[" * 100_000)
    rows = _read(root, wording="advanced")
    assert [(row.key, row.reason) for row in rows if isinstance(row, BadRow)] == [
        ("6.json", "invalid_json"),
        ("7-0", "invalid_json"),
        ("8.json", "invalid_json"),
        ("9.json", "invalid_json"),
    ]
    assert [row.key for row in rows if isinstance(row, Record)] == ["7-1-advanced"]


def test_pictures_are_found_by_the_longest_end_of_their_path(tmp_path: Path) -> None:
    root = tmp_path / "advancededit"
    for number, name in enumerate(("photos/20240401/7.jpg", "photos/20240402/7.jpg", "photos/7.jpg", "edited/7_1.png")):
        _write(root / name, _picture(number))
    paths = {
        "/gpfs/pexels/20240401/7.jpg": 0,
        "./InsightEdit/assets/photos/20240402/7.jpg": 1,
        "../photos/20240402/7.jpg": 1,
        "20240499/7.jpg": 2,
        "photos/7.jpg": 2,
    }
    pair = _replaced()["0"] | {"target_img_path": "../data/target_imgs/7_1.png"}
    for path, number in paths.items():
        _write(root / "7.json", {"0": pair | {"origin_img_path": path}})
        for record in _records(root, images=["photos", "edited"]):
            assert record.source == _picture(number), path
            assert record.target == _picture(3)
    _write(root / "7.json", {"0": pair | {"origin_img_path": "/x/photos/7.jpg", "target_img_path": "edited/7_1.png"}})
    assert len(_records(root)) == 2
    (bad,) = _read(root, images="photos")
    assert isinstance(bad, BadRow)
    assert "edited/7_1.png" in bad.detail
    assert "images" in bad.detail


def test_the_photo_is_shrunk_to_the_size_that_the_pipeline_paints(root: Path) -> None:
    _write(root / "7.json", REMOVE_ADD)
    big = np.full((200, 301, 3), 60, np.uint8)
    big[:, 150:] = 200
    _write(root / "20240402/7.jpg", encode_png(big))
    (root / "7.json").write_text((root / "7.json").read_text().replace("[8, 12]", "[200, 301]"))
    _write(root / "20240402/7_1_straw_hat.png", _picture(1, 40, 60))
    bad = _read(root)
    assert [row.reason for row in bad if isinstance(row, BadRow)] == ["invalid_mask"] * 2, "counts are of 8x12 pixels"
    (root / "7.json").write_text((root / "7.json").read_text().replace('"segmentation"', '"other"'))
    removed, added = _records(root)
    assert (removed.target, added.source) == (_picture(1, 40, 60),) * 2
    assert removed.source == added.target
    assert removed.source is not None
    pixels = decode_image(removed.source)
    assert pixels.shape == (40, 60, 3)
    assert (pixels[:, :26] == 60).all()
    assert (pixels[:, 34:] == 200).all()


def test_pictures_of_other_shapes_stay_as_they_are(root: Path) -> None:
    _write(root / "7.json", REMOVE_ADD)
    _write(root / "20240402/7_1_straw_hat.png", _picture(1, 8, 8))
    assert (_records(root)[0].source, _records(root)[0].target) == (_picture(0), _picture(1, 8, 8))


def test_the_fingerprint_follows_files_and_options(root: Path) -> None:
    _write(root / "7.json", _replaced())
    options = {"root": root}
    seen = {READER.fingerprint(options)}
    assert READER.fingerprint(options) in seen
    assert READER.fingerprint(options | {"wording": "both"}) in seen
    for change in ({"seed": 1}, {"wording": "simple"}, {"min_scores": {"naturalness": 3}}, {"images": "20240402"}):
        seen.add(READER.fingerprint(options | change))
    _write(root / "7.json", _replaced(class_origin="another hat"))
    seen.add(READER.fingerprint(options))
    _write(root / "20240402/7.jpg", _picture(0, 9, 12))
    seen.add(READER.fingerprint(options))
    _write(root / "8.json", "{}")
    seen.add(READER.fingerprint(options))
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"pattern": "/etc/*.json"}, UsageError, "pattern"),
        ({"pattern": "../*.json"}, UsageError, "pattern"),
        ({"pattern": "*.jsonl"}, NotFoundError, r"\*\.jsonl"),
        ({"min_scores": {"beauty": 1}}, UsageError, "min_scores"),
        ({"wording": "long"}, UsageError, "wording"),
        ({"root": "/nowhere"}, NotFoundError, "/nowhere"),
    ],
)
def test_wrong_options_are_named(root: Path, change: dict[str, object], error: type[Exception], named: str) -> None:
    _write(root / "7.json", _replaced())
    with pytest.raises(error, match=named):
        READER.entries({"root": root, **change})


needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples of the authors' data are not here")


@needs_samples
def test_the_samples_of_the_pipeline_are_read_and_their_blank_paths_told() -> None:
    rows = _read(SAMPLES)
    assert all(isinstance(row, BadRow) for row in rows)
    assert [(row.key, row.reason) for row in rows if isinstance(row, BadRow)] == [
        *((f"3_pairs_remove_add-{number}", "missing_file") for number in range(10)),
        *((f"5_quality-{number}", "missing_file") for number in range(12)),
    ]
    assert all("origin_img_path" in row.detail for row in rows if isinstance(row, BadRow))


@needs_samples
def test_the_sample_pair_with_its_paths_filled_in_lines_up(tmp_path: Path) -> None:
    pairs = json.loads((SAMPLES / "3_pairs_remove_add.json").read_text())
    folder = "/gpfs/public/vl/remove_res_image/20240402"
    ends = {"origin_img_path": PHOTO.replace("7.jpg", "1543.jpg"), "target_img_path": f"{folder}/1543_3_guitar.png"}
    pairs["2"].update(ends)
    pairs["3"].update(zip(ends, reversed(ends.values()), strict=True))
    _write(tmp_path / "1543.json", {"2": pairs["2"], "3": pairs["3"]})
    painted = (SAMPLES / "1543_3_acoustic_guitar.png").read_bytes()
    _write(tmp_path / "20240402/1543.jpg", (SAMPLES / "1543.jpg").read_bytes())
    _write(tmp_path / "20240402/1543_3_guitar.png", painted)
    removed, added = _records(tmp_path)
    assert [removed.key, added.key] == ["1543-2-simple", "1543-3-simple"]
    assert [removed.instruction, added.instruction] == ["remove the acoustic guitar", "add the acoustic guitar"]
    assert [removed.target, added.source] == [painted, painted]
    assert added.target == removed.source
    assert removed.details()["mask_size"] == [3744, 5616]
    assert removed.source is not None
    x, y, width, height = (round(number * 960 / 5616) for number in pairs["2"]["bbox"])
    source = decode_image(removed.source).astype(np.int16)
    assert source.shape == (640, 960, 3)
    changed = np.abs(source - np.asarray(Image.open(SAMPLES / "1543_3_acoustic_guitar.png").convert("RGB")))
    inside = changed[y : y + height, x : x + width].mean()
    assert inside > 10
    changed[y - 8 : y + height + 8, x - 8 : x + width + 8] = 0
    assert changed.mean() < 2, "outside of the mask the photo was left alone"
