"""The steps' real implementations, on tiny models saved in their real layouts, on annotations, and on OpenCV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build_sources
from tiny_vision import save_detector, save_inpainter, save_segmenter

from insightedit.platform.construction.config import (
    ConstructionConfig,
    DiffusionConfig,
    GroundedMasksConfig,
    OpenCvConfig,
)
from insightedit.platform.construction.grounding import GroundingDetector, Sam2Segmenter, distinct_boxes
from insightedit.platform.construction.masks import CocoMasker, Masked, run_boxes, run_masks
from insightedit.platform.construction.painters import DiffusionPainter, OpenCvPainter, grown
from insightedit.platform.construction.painting import Job, run_painting
from insightedit.platform.construction.photos import Change, Photo, Picture, Rejected, Rle, Thing
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import encode_png

HEIGHT, WIDTH = 48, 80


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> GroundedMasksConfig:
    folder = tmp_path_factory.mktemp("vision")
    detector, segmenter = save_detector(folder / "detector"), save_segmenter(folder / "segmenter")
    return GroundedMasksConfig(detector=detector, segmenter=segmenter)


@pytest.fixture(scope="module")
def inpainters(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """By the channels of their UNet: Stable Diffusion as it is, and its version for inpainting."""
    folder = tmp_path_factory.mktemp("inpaint")
    plain = build_sources(folder, "epsilon").diffusion
    return {4: plain, 9: save_inpainter(folder / "nine", plain)}


def slope() -> Picture:
    """A picture that grows brighter to the right: what is missing in it can be told from its surroundings."""
    grey = np.broadcast_to(np.linspace(40, 200, WIDTH), (HEIGHT, WIDTH))
    return np.repeat(grey[..., None], 3, axis=2).round().astype(np.uint8)


def photo_with(*names: str, pixels: Picture | None = None, key: str = "a/b.png") -> Photo:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Photo(
        name="000000-000",
        key=key,
        data=encode_png(noise if pixels is None else pixels),
        things=[Thing(name=name) for name in names],
    )


def spot(top: int = 10, left: int = 30, size: int = 12) -> np.ndarray[Any, Any]:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[top : top + size, left : left + size] = True
    return mask


# Where things are ---------------------------------------------------------------------------------------------------


def test_a_detector_finds_one_box_for_each_name(models: GroundedMasksConfig) -> None:
    photos = [photo_with("red circle", "blue star"), photo_with("dog")]
    run_boxes(GroundingDetector(models), photos)
    for photo in photos:
        assert photo.rejections == []
        for thing in photo.things:
            assert thing.box is not None
            x, y, width, height = thing.box
            assert 0 <= x < x + width <= WIDTH
            assert 0 <= y < y + height <= HEIGHT
            assert thing.score is not None
            assert 0.35 < thing.score <= 1
    # A name is asked for by itself: what else is asked about the picture changes nothing.
    alone = photo_with("red circle")
    run_boxes(GroundingDetector(models), [alone])
    assert alone.things[0].box == photos[0].things[0].box


def test_a_detector_tells_none_and_several_apart(models: GroundedMasksConfig, tmp_path: Path) -> None:
    unsure = models.model_copy(update={"box_threshold": 1.0})
    photo = photo_with("red circle")
    run_boxes(GroundingDetector(unsure), [photo])
    assert [(one.step, one.reason) for one in photo.rejections] == [("detect", "not_found"), ("detect", "no_things")]
    assert photo.out
    many = models.model_copy(update={"detector": save_detector(tmp_path / "many", queries=12), "box_threshold": 0.0})
    photo = photo_with("red circle")
    run_boxes(GroundingDetector(many), [photo])
    assert photo.rejections[0].reason == "several"


def test_boxes_about_one_thing_count_once() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 10, 9]], np.float32)
    assert distinct_boxes(boxes, np.array([0.5, 0.9, 0.4, 0.6], np.float32)) == [1, 2]
    assert distinct_boxes(boxes[:0], np.zeros(0, np.float32)) == []


def test_a_segmenter_outlines_boxes_in_the_pictures_own_size(models: GroundedMasksConfig) -> None:
    photo = photo_with("red circle", "blue star")
    photo.things[0].box, photo.things[1].box = (8.0, 6.0, 40.0, 24.0), (50.0, 3.0, 20.0, 30.0)
    segmenter = Sam2Segmenter(models)
    asked: list[Any] = []
    network: Any = segmenter._model  # pyright: ignore[reportPrivateUsage]
    network.register_forward_pre_hook(lambda _, args, given: asked.append(given), with_kwargs=True)
    (found,) = segmenter.masks([photo])
    # The model looks at a square of 64 pixels.
    expected = [[8 * 64 / 80, 6 * 64 / 48, 48 * 64 / 80, 30 * 64 / 48], [40.0, 4.0, 56.0, 44.0]]
    torch.testing.assert_close(asked[0]["input_boxes"], torch.tensor([expected]))
    assert asked[0]["pixel_values"].shape == (1, 3, 64, 64)
    for one in found:
        assert isinstance(one, Masked)
        assert one.mask.shape == (HEIGHT, WIDTH)
        assert 0 <= one.score <= 1


@pytest.mark.parametrize("lost", ["detector", "segmenter"])
def test_a_model_that_is_not_there_is_named(models: GroundedMasksConfig, tmp_path: Path, lost: str) -> None:
    config = models.model_copy(update={lost: str(tmp_path)})
    kind: Any = {"detector": GroundingDetector, "segmenter": Sam2Segmenter}[lost]
    with pytest.raises(UsageError, match=f"construction.masks.{lost} is .*cannot be loaded"):
        kind(config)


def coco_index(path: Path) -> str:
    """Two pictures of COCO's: a dog and two birds in one, a crowd of sheep in the other."""
    box = [[30.0, 10.0, 42.0, 10.0, 42.0, 22.0, 30.0, 22.0]]
    rows: list[tuple[int, int, Any, int]] = [
        (1, 1, box, 0),
        (1, 2, box, 0),
        (1, 2, box, 0),
        (2, 3, box, 1),
        (2, 1, [], 0),
    ]
    content = {
        "images": [
            {"id": number, "file_name": f"train/{name}.png", "height": HEIGHT, "width": WIDTH}
            for number, name in ((1, "b"), (2, "c"))
        ],
        "categories": [{"id": number, "name": name} for number, name in ((1, "dog"), (2, "bird"), (3, "sheep"))],
        "annotations": [
            {"id": number, "image_id": image, "category_id": kind, "segmentation": polygons, "iscrowd": crowd}
            for number, (image, kind, polygons, crowd) in enumerate(rows)
        ],
    }
    path.write_text(json.dumps(content))
    return str(path)


def test_cocos_annotations_give_masks(tmp_path: Path) -> None:
    masker = CocoMasker(coco_index(tmp_path / "instances.json"))
    found, other, unknown = masker.masks(
        [photo_with("brown dog", "left bird", "cat"), photo_with("sheep", key="c.png"), photo_with("dog", key="d.png")]
    )
    assert isinstance(found[0], Masked)
    assert np.array_equal(found[0].mask, spot())
    reasons = [one.reason for one in (*found[1:], *other, *unknown) if isinstance(one, Rejected)]
    assert reasons == ["several", "not_found", "not_found", "not_annotated"]
    with pytest.raises(NotFoundError, match="There is no file"):
        CocoMasker(str(tmp_path / "lost.json"))


def test_masks_of_a_wrong_size_fall_out() -> None:
    class Given:
        def masks(self, photos: Any) -> Any:
            empty, full = np.zeros((HEIGHT, WIDTH), bool), np.ones((HEIGHT, WIDTH), bool)
            return [[Masked(mask, 0.5) for mask in (empty, full, *[spot()] * 6)] for _ in photos]

    photo = photo_with(*(f"thing {number}" for number in range(8)))
    run_masks(Given(), ConstructionConfig(objects_each=3), [photo])
    assert [one.reason for one in photo.rejections] == ["too_small", "too_large", "enough", "enough", "enough"]
    assert len(photo.things) == 3
    for thing in photo.things:
        assert thing.mask is not None
        assert np.array_equal(thing.mask.mask(), spot())


# Painting -----------------------------------------------------------------------------------------------------------


def job(pixels: Picture, mask: np.ndarray[Any, Any], task: Any = "remove") -> Job:
    photo = photo_with(pixels=pixels)
    change = Change(task=task, thing=Thing(name="red circle", mask=Rle.of(mask)), new_name="dog", new_caption="a dog")
    photo.changes.append(change)
    return Job(photo, change)


@pytest.mark.parametrize("method", ["telea", "navier_stokes"])
def test_opencv_restores_what_was_behind_a_thing(method: Any) -> None:
    behind, covered = slope(), slope()
    covered[spot()] = (250, 20, 20)
    (painted,) = OpenCvPainter(OpenCvConfig(opencv=method)).paint([job(covered, spot())])
    assert isinstance(painted, np.ndarray)
    hole = grown(spot(), OpenCvConfig(opencv="telea").grow)
    assert np.array_equal(painted[~hole], covered[~hole])
    error = np.abs(painted.astype(int) - behind).mean(axis=-1)[spot()]
    assert error.mean() < 6
    assert np.abs(covered.astype(int) - behind).mean(axis=-1)[spot()].mean() > 60


def test_a_thing_that_fills_the_picture_cannot_be_removed() -> None:
    (painted,) = OpenCvPainter(OpenCvConfig(opencv="telea")).paint([job(slope(), np.ones((HEIGHT, WIDTH), bool))])
    assert isinstance(painted, Rejected)
    assert painted.reason == "nothing_left"


def test_a_mask_grows_by_a_share_of_the_picture() -> None:
    assert np.array_equal(grown(spot(), 0.0), spot())
    wider = grown(spot(top=10, left=30, size=12), 2 / HEIGHT)
    rows, columns = np.flatnonzero(wider.any(1)), np.flatnonzero(wider.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (8, 23, 28, 43)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_diffusion_model_paints_within_the_mask(inpainters: dict[int, str], channels: int) -> None:
    config = DiffusionConfig(diffusion=inpainters[channels], side=32, steps=2)
    jobs = [job(slope(), spot()), job(slope(), spot(), "replace"), job(slope(), spot())]
    first, other, again = DiffusionPainter(config).paint(jobs)
    assert isinstance(first, np.ndarray)
    assert isinstance(other, np.ndarray)
    hole = grown(spot(), config.grow)
    assert np.array_equal(first[~hole], slope()[~hole])
    assert (first[spot()] != slope()[spot()]).any()
    # The same edit has the same noise wherever it is painted; another one has another.
    assert isinstance(again, np.ndarray)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_edit_that_changes_nothing_falls_out() -> None:
    class Idle:
        def paint(self, jobs: Any) -> Any:
            return [one.photo.pixels for one in jobs]

    photo = job(slope(), spot()).photo
    run_painting(Idle(), "remove", [photo])
    assert not photo.kept
    assert [one.reason for one in photo.rejections] == ["unchanged"]


def test_an_inpainting_model_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="which is no inpainting model"):
        DiffusionPainter(DiffusionConfig(diffusion=str(tmp_path)))
