"""Wordings, masks and painting, which the segmentation datasets share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image, ImageDraw

from insightedit.platform.datasets.reading import attempt
from insightedit.platform.datasets.segmentation import (
    ADVANCED_WORDINGS,
    BEARERS,
    COLOURS,
    SIMPLE_WORDINGS,
    SegmentationOptions,
    Wish,
    by_id,
    find_folder,
    instance_mask,
    listed,
    make_wish,
    paint,
    paint_instances,
    polygon,
    rle_mask,
    rows_of,
    segment_record,
    size_of,
    tidy,
)
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, decode_image, encode_png

SIZE = (20, 30)


def _pixels() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(3).integers(0, 256, (*SIZE, 3), np.uint8)


def _mask() -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.random.default_rng(4).random(SIZE) < 0.3


def _encoded(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    rle: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def _runs(mask: np.ndarray[Any, Any]) -> list[int]:
    runs, current = [0], False
    for value in mask.T.ravel():
        if bool(value) != current:
            runs.append(0)
            current = not current
        runs[-1] += 1
    return runs


def test_the_colours_are_those_of_the_facts() -> None:
    assert COLOURS == {
        "red": (255, 0, 0),
        "purple": (128, 0, 128),
        "blue": (0, 0, 255),
        "green": (0, 128, 0),
        "yellow": (255, 255, 0),
        "white": (255, 255, 255),
        "black": (0, 0, 0),
        "gray": (128, 128, 128),
    }
    assert BEARERS.keys() == COLOURS.keys()
    bearers = [bearer for those in BEARERS.values() for bearer in those]
    assert len(set(bearers)) == len(bearers)


def test_every_wording_names_object_and_colour() -> None:
    assert len(set(SIMPLE_WORDINGS)) >= 11
    assert len(set(ADVANCED_WORDINGS)) >= 6
    for template in (*SIMPLE_WORDINGS, *ADVANCED_WORDINGS):
        assert template.count("{object}") == template.count("{color}") == 1
        assert template.format(object="THE OBJECT", color="red").endswith(".")


def test_simple_wishes_name_the_colour_and_advanced_ones_what_has_it() -> None:
    simple = [make_wish("Left  {Zebra}", random.Random(n), "simple") for n in range(300)]
    advanced = [make_wish("Left  {Zebra}", random.Random(n), "advanced") for n in range(300)]
    for wish in simple:
        assert f" {wish.colour}" in wish.instruction
        assert "the colour of" not in wish.instruction
    for wish in advanced:
        assert sum(f"the colour of {bearer}" in wish.instruction for bearer in BEARERS[wish.colour]) == 1
        assert wish.colour not in wish.instruction.replace("red paint", "")
    assert all("left {zebra}" in wish.instruction for wish in simple + advanced)
    assert {wish.colour for wish in simple} == {wish.colour for wish in advanced} == set(COLOURS)
    templates = {wish.instruction.replace(wish.colour, "{color}") for wish in simple}
    assert templates == {t.replace("{object}", "left {zebra}") for t in SIMPLE_WORDINGS}


def test_mixed_wishes_are_half_of_each_and_follow_their_generator() -> None:
    wishes = [make_wish("cat", random.Random(f"0:{n}"), "mixed") for n in range(2000)]
    assert wishes == [make_wish("cat", random.Random(f"0:{n}"), "mixed") for n in range(2000)]
    assert 0.45 < np.mean([wish.wording == "simple" for wish in wishes]) < 0.55
    for wish in wishes:
        assert ("the colour of" in wish.instruction) == (wish.wording == "advanced")


@pytest.mark.parametrize("colour", COLOURS)
def test_paint_mixes_half_and_half_on_the_mask_only(colour: str) -> None:
    pixels, mask = _pixels(), _mask()
    before = pixels.copy()
    painted = decode_image(paint(pixels, mask, colour))
    assert np.array_equal(pixels, before)
    assert np.array_equal(painted[~mask], pixels[~mask])
    for pixel, drawn in zip(pixels[mask], painted[mask], strict=True):
        for value, channel, result in zip(pixel, COLOURS[colour], drawn, strict=True):
            assert int(result) == round(0.5 * int(value) + 0.5 * channel)


def test_paint_refuses_another_size_and_an_empty_mask() -> None:
    with pytest.raises(BadRowError, match="30x19") as wrong:
        paint(_pixels(), np.ones((19, 30), np.bool_), "red")
    assert wrong.value.reason == "mask_size"
    with pytest.raises(BadRowError) as empty:
        paint(_pixels(), np.zeros(SIZE, np.bool_), "red")
    assert empty.value.reason == "invalid_mask"


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_both_kinds_of_rle_decode_as_pycocotools_encodes(density: float) -> None:
    for size in (SIZE, (1, 1), (400, 300)):
        mask = np.random.default_rng(7).random(size) < density
        encoded = _encoded(mask)
        assert np.array_equal(rle_mask(encoded, size), mask)
        assert np.array_equal(rle_mask({"size": list(size), "counts": _runs(mask)}, size), mask)
        assert np.array_equal(instance_mask(encoded, size), mask)


@pytest.mark.parametrize(
    "counts",
    [
        None,
        7,
        "",
        "oo",
        "garbage",
        "o" * 1000,
        "\u00e9",
        " ",
        "0\n",
        [],
        [5, 5],
        [601],
        [100, -100, 600],
        [100, 500.0],
        [True] * 600,
        {"a": 1},
    ],
)
def test_a_broken_rle_is_an_invalid_mask(counts: object) -> None:
    with pytest.raises(BadRowError) as error:
        rle_mask({"size": list(SIZE), "counts": counts}, SIZE)
    assert error.value.reason == "invalid_mask"


@pytest.mark.parametrize("size", [None, [30, 20], [20], "20x30", [1000000000, 1000000000]])
def test_an_rle_of_another_size_is_refused(size: object) -> None:
    with pytest.raises(BadRowError) as error:
        rle_mask({"size": size, "counts": [600]}, SIZE)
    assert error.value.reason == "mask_size"


def test_polygons_cover_what_they_enclose() -> None:
    square = [5, 4, 15, 4, 15, 12, 5, 12]
    expected = np.zeros(SIZE, np.bool_)
    expected[4:12, 5:15] = True
    assert np.array_equal(instance_mask([square], SIZE), expected)
    both = instance_mask([square, [12.0, 8.0, 25.5, 8.0, 25.5, 18.0, 12.0, 18.0]], SIZE)
    canvas = Image.new("1", (SIZE[1], SIZE[0]))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((5, 4, 14, 11), fill=1)
    draw.rectangle((12, 8, 24, 17), fill=1)
    assert (both ^ np.asarray(canvas)).sum() <= 12, "overlapping polygons are one mask, but for the rim"
    assert both[9, 13]


def test_polygons_and_rles_may_be_mixed_and_lines_are_left_out() -> None:
    mask = np.zeros(SIZE, np.bool_)
    mask[0, 0] = True
    found = instance_mask([_encoded(mask), [5, 4, 15, 4, 15, 12, 5, 12], [1, 1, 9, 9], []], SIZE)
    assert found[0, 0]
    assert found.sum() == 81
    assert not instance_mask([[1, 1, 9, 9]], SIZE).any()


@pytest.mark.parametrize(
    "part",
    [
        None,
        3,
        "text",
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, "6"],
        [1, 2, 3, 4, 5, None],
        [1, 2, 3, 4, 5, float("nan")],
        [1, 2, 3, 4, 5, float("inf")],
        [1, 2, 3, 4, 1e12, 6],
        [1, 2, 3, 4, 5, 10**400],
        [1, -21, 3, 4, 5, 6],
        [[1, 2], [3, 4], [5, 6]],
    ],
)
def test_a_broken_polygon_is_an_invalid_mask(part: object) -> None:
    for segmentation in ([part], [[5, 4, 15, 4, 15, 12], part]):
        with pytest.raises(BadRowError) as error:
            instance_mask(segmentation, SIZE)
        assert error.value.reason == "invalid_mask"


def test_a_polygon_may_leave_the_picture_a_little() -> None:
    assert polygon([-1, 0, 31.5, 0, 31, 20.5], SIZE) == [-1.0, 0.0, 31.5, 0.0, 31.0, 20.5]
    assert instance_mask([[-1, -1, 31, -1, 31, 21, -1, 21]], SIZE).all()


def test_instances_are_painted_together() -> None:
    pixels = _pixels()
    source = encode_png(pixels)
    boxes = [[[0, 0, 4, 0, 4, 4, 0, 4]], [[10, 10, 14, 10, 14, 14, 10, 14], [2, 2, 6, 2, 6, 6, 2, 6]]]
    painted = decode_image(paint_instances(source, boxes, SIZE, "black"))
    changed = (painted != pixels).any(-1)
    expected = np.zeros(SIZE, np.bool_)
    expected[0:4, 0:4] = expected[10:14, 10:14] = expected[2:6, 2:6] = True
    assert np.array_equal(changed, expected)
    for size in ((30, 20), (10**9, 10**9)):
        with pytest.raises(BadRowError) as error:
            paint_instances(source, boxes, size, "black")
        assert error.value.reason == "mask_size"


def test_a_record_without_a_target_keeps_its_source() -> None:
    wish = Wish("Paint it red.", "red", "simple")
    record = segment_record("d", "k", b"source", wish, target=None, meta={"n": 1})
    assert (record.source, record.target, record.task, record.category) == (b"source", b"source", "segment", "")
    assert json.loads(record.meta) == {"n": 1, "colour": "red", "wording": "simple", "painted": False}
    record = segment_record("d", "k", b"source", wish, target=b"target", category="cat", meta={})
    assert (record.target, record.category, record.details()["painted"]) == (b"target", "cat", True)


def test_an_attempt_gives_its_outcome_or_a_bad_row() -> None:
    assert attempt("k", tidy, " A\n b ") == "a b"
    assert attempt("k", polygon, [1], SIZE) == BadRow(
        "k", "invalid_mask", "A polygon is not a list of pairs of numbers."
    )
    with pytest.raises(ZeroDivisionError):
        attempt("k", lambda: 1 // 0)


def test_rows_are_found_by_their_ids(tmp_path: Path) -> None:
    rows = by_id([{"id": 5, "a": 1}, {"b": 1}, "text", {"id": 5, "a": 2}, {"id": ["x"]}])
    assert rows == {"5": {"id": 5, "a": 2}, "row-1": {"b": 1}, "row-2": "text", "row-4": {"id": ["x"]}}
    assert listed(rows, 5, "image") == {"id": 5, "a": 2}
    for identity, reason in (
        (6, "missing_field"),
        (None, "missing_field"),
        ([5], "missing_field"),
        ("row-2", "invalid_json"),
    ):
        with pytest.raises(BadRowError) as error:
            listed(rows, identity, "image")
        assert error.value.reason == reason
    assert rows_of({"images": [1]}, "images", tmp_path) == [1]
    for index in ({}, {"images": {}}, [], None):
        with pytest.raises(UsageError, match="'images'"):
            rows_of(index, "images", tmp_path)


@pytest.mark.parametrize("image", [{}, {"height": 3}, {"height": 3, "width": "4"}, {"height": True, "width": 4}])
def test_an_image_needs_its_size(image: dict[str, Any]) -> None:
    assert size_of({"height": 3, "width": 4}) == (3, 4)
    with pytest.raises(BadRowError) as error:
        size_of(image)
    assert error.value.reason == "missing_field"


def test_the_first_folder_that_exists_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    assert find_folder((tmp_path / name for name in "abc"), "pictures") == tmp_path / "b"
    with pytest.raises(NotFoundError, match=r"pictures are in none of .*/x, .*/y"):
        find_folder((tmp_path / name for name in "xy"), "pictures")


def test_options_have_defaults(tmp_path: Path) -> None:
    options = SegmentationOptions(root=tmp_path)
    assert (options.seed, options.wording) == (0, "mixed")
