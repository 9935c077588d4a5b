"""Construction by the shapes world's truth: every pair beside the scene that it should be, and stopping anywhere."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from insightedit.jobs.check import check
from insightedit.jobs.construct import Constructed, construct
from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig, RunConfig, load_preset
from insightedit.platform.construction import pipeline, shapes
from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.construction.output import read_photos
from insightedit.platform.construction.photos import Advanced, Photo, Rle, to_rows
from insightedit.platform.construction.precision import precision_of
from insightedit.platform.construction.sources import blocks_of, read_block
from insightedit.platform.construction.steps import step_names
from insightedit.platform.datasets.shapes import Scene, render, shape_masks, split_of
from insightedit.platform.datasets.shapes_edits import FORMS
from insightedit.platform.datasets.shapes_language import SHAPES_FORMS
from insightedit.platform.datasets.shapes_world import COLOURS, KINDS
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import RECORD_SCHEMA, encode_png
from insightedit.platform.shards import PreparedData
from insightedit.platform.storage import Store
from insightedit.platform.workdir import Workdir

COUNT, EACH = 20, 8
SETTINGS = (
    f"construction.images={{reader: shapes, options: {{kind: caption, split: train, count: {COUNT}, seed: 3}}}}",
    f"construction.images_per_block={EACH}",
    "construction.sample=3",
    "data.encode=while_training",
)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with connected(cpus=8):
        yield


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_preset("nano", SETTINGS)


@pytest.fixture(scope="module")
def done(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Constructed:
    folder = tmp_path_factory.mktemp("constructed")
    return construct(config, folder / "mine", Workdir.open(folder / "work"))


def pairs_in(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("pairs/*.json")):
        for pair in json.loads(path.read_text()).values():
            yield path, pair


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"))


def test_every_picture_is_in_pairs_or_turned_down(done: Constructed) -> None:
    counts, photos = done.counts, list(read_photos(Store.at(done.folder)))
    assert [photo.key for photo in photos] == [f"train-3-{number:06d}-caption" for number in range(COUNT)]
    assert counts.photos == COUNT
    assert all(photo.kept or photo.rejections for photo in photos)
    changes = [change for photo in photos for change in photo.changes]
    assert len(changes) == counts.changes > counts.kept > COUNT
    refused = [one for photo in photos for one in photo.rejections]
    assert sum(not change.kept for change in changes) == len([one for one in refused if one.step == "propose"])
    assert counts.pairs == Counter(pair["task_type"] for _, pair in pairs_in(done.folder))
    assert counts.pairs["remove"] == counts.pairs["add"] > 0
    assert set(counts.about) >= {"location", "colour", "function"}
    assert list(counts.steps) == ["read", *step_names(ConstructionConfig())]
    assert all(step.spent.seconds > 0 for name, step in counts.steps.items() if name != "read")


def test_every_pair_is_what_it_says(done: Constructed) -> None:
    """Pictures, masks and words of each pair beside the scene, by another way than they were made."""
    photos = {photo.name: photo for photo in read_photos(Store.at(done.folder))}
    for path, pair in pairs_in(done.folder):
        scene = Scene.from_json(cast(dict[str, object], photos[path.stem].truth))
        forward = pair["origin_img_path"].startswith("images/")
        photo, edit = (
            pixels(done.folder / pair[end]) for end in ("origin_img_path", "target_img_path")[:: 1 if forward else -1]
        )
        assert np.array_equal(photo, render(scene))
        differ = (photo != edit).any(axis=-1)
        rle = pair["segmentation"]
        mask = shapes_mask(rle)
        if pair["task_type"] in ("remove", "add"):
            assert np.array_equal(differ, differ & mask)
            assert differ.sum() > 0.6 * mask.sum()
        (owner,) = [s for s, own in zip(scene.shapes, shape_masks(scene), strict=True) if np.array_equal(own, mask)]
        named = pair["class_origin" if forward else "class_target"]
        assert owner.colour in named
        assert owner.kind in named
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert pair["bbox"] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        for name in filter(None, (pair["class_origin"], pair["class_target"])):
            assert {word for word in name.split() if word in (*KINDS, *COLOURS)} <= set(pair["instruction"][0].split())
        assert ("qwen_VIE_SC" in pair) == forward


def shapes_mask(rle: dict[str, Any]) -> np.ndarray[Any, Any]:
    import pycocotools.mask as coco_mask

    return np.asarray(coco_mask.decode({"size": rle["size"], "counts": rle["counts"].encode()}), bool)


def test_no_scene_of_the_test_becomes_training_data(done: Constructed) -> None:
    for photo in read_photos(Store.at(done.folder)):
        for change in photo.kept:
            found = shapes.intended(photo, change)
            assert isinstance(found, tuple)
            assert split_of(found[0]) == "train"


def test_advanced_removals_mean_one_shape(done: Constructed) -> None:
    """Of all phrases that the scene allows, those that are in the instruction pick the shape and no other."""
    checked = 0
    for photo in read_photos(Store.at(done.folder)):
        scene = shapes.scene_of(photo)
        for change in photo.kept:
            if change.task == "remove" and change.there is not None:
                shape = shapes.shape_named(scene, change.thing.name)
                for one in change.there.advanced:
                    assert change.thing.name not in one.text
                    assert (shape,) in {answer for text, answer in phrases(scene) if text in one.text}
                    checked += 1
    assert checked > COUNT


def phrases(scene: Scene) -> Iterator[tuple[str, Any]]:
    for form in FORMS["remove"][0]:
        for phrase in SHAPES_FORMS[form](scene):
            yield from {(phrase.say(random.Random(seed)), phrase.answer) for seed in range(8)}


def test_beside_the_truth_every_step_is_right(done: Constructed) -> None:
    """The shapes world errs nowhere; and where a step does, the figures say so."""
    shares = {(step, what): value for step, found in done.counts.truth.items() for what, value in found.items()}
    assert {share for (_, what), share in shares.items() if "(of)" not in what} == {1.0}
    assert {step for step, _ in shares} == {"caption", "objects", "masks", "remove", "replace", "instruct", "judge"}
    assert shares["judge", "right (of)"] == done.counts.kept
    store = Store.at(done.folder)
    photos = [photo for photo in read_photos(store) if photo.kept]
    for photo in photos:
        photo.caption = photo.caption.replace("red", "blue")
        photo.things[0].mask = Rle.of(np.zeros((32, 32), np.bool_))
        for change in photo.kept:
            assert change.there is not None
            change.there.advanced = [Advanced(text="remove the yellow submarine", about="other")]
            change.thing = photo.things[-1]
        photo.changes[0].scores = None
    wrong = precision_of(photos, store, by_truth=True)
    assert 0.5 < wrong["caption"]["precision"] < 1
    assert wrong["masks"]["overlap"] < 1
    assert wrong["instruct"]["advanced"] == 0
    assert wrong["instruct"]["simple"] < 1
    assert wrong["judge"]["right"] < 1


def test_it_reads_back_as_advancededit(done: Constructed, tmp_path: Path) -> None:
    for options in ({"pattern": "pairs/*.json"}, {}):
        dataset = DatasetConfig(reader="advancededit", options={"root": str(done.folder), **options})
        found = check(dataset, tmp_path / "check")
        assert found.quarantined == 0
        pairs = list(pairs_in(done.folder))
        advanced = sum("reasoning_instruction1" in pair for _, pair in pairs)
        assert found.records == len(pairs) + advanced


def test_shards_hold_scores_and_reasons(done: Constructed) -> None:
    assert done.shards is not None
    data = PreparedData.open(done.shards.store)
    rows = [row for shard in range(len(data.manifest.shards)) for row in data.read(shard).to_pylist()]
    assert len(rows) == done.shards.rows == data.manifest.rows
    assert set(RECORD_SCHEMA.names) <= set(rows[0])
    notes = [json.loads(row["meta"]) for row in rows]
    scored = [note for note in notes if "scores" in note]
    assert scored
    for note in scored:
        assert (
            set(note["explanations"])
            == set(note["scores"])
            == {"instruction_follow", "non-overedit", "naturalness", "no_artifacts"}
        )
        assert "edited region" in note["explanations"]["instruction_follow"]
    assert {note["about"] for note in notes if note["wording"] == "advanced"} >= {"location", "colour"}


def test_the_report_is_there(done: Constructed) -> None:
    folder = done.report.parent
    page = done.report.read_text()
    assert "train-3-000000-caption" in page
    with Image.open(folder / "steps.png") as sheet:
        assert sheet.height > 3 * 300
    lines = [json.loads(line) for line in (folder / "rejections.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} <= {"other_split", "outside_world", "enough", "same_name", "no_things"}
    assert json.loads((folder / "report.json").read_text())["pairs"] == done.counts.pairs


def test_a_second_call_does_nothing_again(done: Constructed, config: RunConfig, tmp_path: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in done.folder.rglob("*")
        if path.parent.name in ("pairs", "edits", "blocks", "images")
    }
    again = construct(config, done.folder, Workdir.open(tmp_path))
    assert again.counts.pairs == done.counts.pairs
    assert again.shards is not None
    assert again.shards.reused
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_are_refused(done: Constructed, config: RunConfig, tmp_path: Path) -> None:
    other = load_preset("nano", (*SETTINGS, "construction.objects_each=1"))
    with pytest.raises(UsageError, match=r"construction.objects_each differs\); name another folder"):
        construct(other, done.folder, Workdir.open(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        construct(config, tmp_path / "full", Workdir.open(tmp_path))


def test_stopped_after_a_block_it_goes_on(done: Constructed, config: RunConfig, tmp_path: Path) -> None:
    """What was done stays untouched, what is missing is made, and all is as if it had never stopped."""
    out = tmp_path / "mine"
    work = pipeline.Construction(config.construction, out, tmp_path / "answers")
    for at in pipeline.construct(work):
        if at.blocks == 1:
            break
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/000000*")}
    assert first
    shutil.rmtree(out / "work", ignore_errors=True)
    last = list(pipeline.construct(work))[-1]
    assert last.blocks == last.total == -(-COUNT // EACH)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    for kind in ("pairs", "edits", "images"):
        names = sorted(path.name for path in (done.folder / kind).iterdir())
        assert sorted(path.name for path in (out / kind).iterdir()) == names
        assert all((out / kind / name).read_bytes() == (done.folder / kind / name).read_bytes() for name in names)


def test_a_step_is_not_done_twice(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose block was put down gives it again, whatever it would do now; half a file is none."""
    work = pipeline.Construction(config.construction, tmp_path / "out", tmp_path)
    block = blocks_of(config.construction)[1]
    rows = to_rows(1, read_block(config.construction.images, block))
    made = pipeline.Worker("caption", work)(rows)

    def poisoned(*_: object) -> list[str]:
        raise AssertionError

    monkeypatch.setattr(shapes.ShapesWords, "captions", poisoned)
    again = pipeline.Worker("caption", work)(rows)
    assert again.equals(made)
    (file,) = (tmp_path / "out/work/caption").iterdir()
    file.rename(file.with_name(f".tmp-{file.name}"))
    with pytest.raises(AssertionError):
        pipeline.Worker("caption", work)(rows)


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    """A folder of pictures, good and bad: a photo each, with the reason where it is out."""
    for number, name in enumerate(("a.png", "deep/b.jpg", "c.PNG")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40 + 2 * number, 20)).save(path, "JPEG" if name.endswith("jpg") else "PNG")
    noise = encode_png(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    (tmp_path / "torn.png").write_bytes(noise[:-2000])
    (tmp_path / "words.jpg").write_bytes(b"no picture")
    (tmp_path / "letter.txt").write_bytes(b"no picture at all")
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    config = ConstructionConfig.model_validate({"images": {"place": str(tmp_path), "shorter_side": 10}, **ELSEWHERE})
    photos = list(itertools.chain.from_iterable(read_block(config.images, block) for block in blocks_of(config)))
    reasons = {photo.key: [one.reason for one in photo.rejections] for photo in photos}
    assert reasons == {
        "a.png": [], "deep/b.jpg": [], "c.PNG": [], "turned.jpg": [],
        "torn.png": ["truncated_image"], "words.jpg": ["not_an_image"],
    }  # fmt: skip
    assert {photo.key: photo.pixels.shape[:2] for photo in photos if not photo.out} == {
        "a.png": (10, 20), "deep/b.jpg": (10, 21), "c.PNG": (10, 22), "turned.jpg": (20, 10),
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    nothing = ConstructionConfig.model_validate({"images": {"place": str(tmp_path / "empty")}, **ELSEWHERE})
    with pytest.raises(NotFoundError, match="There are no pictures"):
        blocks_of(nothing)


ELSEWHERE: dict[str, Any] = {
    "words": {"local": "a"},
    "masks": {"coco": "a.json"},
    "removal": {"opencv": "telea"},
    "replacement": "none",
    "judge": {"local": "a"},
}


@pytest.mark.parametrize("step", list(ELSEWHERE))
def test_the_truth_is_not_asked_about_other_pictures(step: str) -> None:
    if step == "replacement":
        step = "words"
    with pytest.raises(ValueError, match=f"{step} is shapes, which knows only the pictures of the reader shapes"):
        ConstructionConfig.model_validate({"images": {"place": "photos"}, **ELSEWHERE, step: "shapes"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": {"place": "a", "reader": "coco"}}, "one of place .* and reader"),
        ({"masks": {"mask": "a"}}, "it must be shapes, or have the field coco"),
        ({"removal": {"opencv": "magic"}}, "telea"),
        ({"replacement": {"opencv": "telea"}}, "OpenCV draws nothing"),
        ({"min_scores": {"beauty": 3}}, "min_scores"),
    ],
)
def test_wrong_settings_are_named(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConstructionConfig.model_validate(content)


def test_photos_survive_their_rows(config: RunConfig) -> None:
    from insightedit.platform.construction.photos import from_rows

    photos = read_block(config.construction.images, blocks_of(config.construction)[0])
    things = shapes.ShapesWords(config.construction).objects(photos[:1])[0]
    assert isinstance(things, list)
    photos[0].things = things
    number, again = from_rows(to_rows(4, photos))
    assert number == 4
    assert [photo.model_dump() for photo in again] == [photo.model_dump() for photo in photos]
    assert [photo.data for photo in again] == [photo.data for photo in photos]
    assert isinstance(again[0], Photo)
