"""Words from language models: behind an endpoint that misbehaves as real ones do, and from a local model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from knowing_endpoint import Knowing
from PIL import Image
from stand_in_endpoint import Drop, Say, StandIn, Status, in_turn
from tiny_models import build_sources

from insightedit.platform.chat.cache import AnswerCache
from insightedit.platform.chat.choosing import build_chat
from insightedit.platform.chat.config import EndpointConfig, LocalModelConfig
from insightedit.platform.chat.endpoint import Backoff, ChatEndpoint
from insightedit.platform.chat.wording import AnswerError, load_answer
from insightedit.platform.construction.asked import AskedWords
from insightedit.platform.construction.asking import Asker, Question
from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.construction.photos import Photo, Rejected, Rle
from insightedit.platform.construction.sources import blocks_of, read_block
from insightedit.platform.construction.steps import make_step, step_names
from insightedit.platform.datasets.shapes import Scene, render, sample_scene, shape_masks
from insightedit.platform.datasets.shapes_language import name
from insightedit.platform.errors import UsageError
from insightedit.platform.records import encode_png

TIMES = 8
"""Scenes are shown as pictures of 256 pixels."""


def scenes(count: int) -> list[Scene]:
    rng = random.Random("asked")
    return [sample_scene(rng, "train") for _ in range(count)]


def save_photos(folder: Path, made: Sequence[Scene]) -> None:
    """Scenes as large pictures in a folder, with their masks as COCO's annotations."""
    (folder / "photos").mkdir(parents=True)
    images: list[object] = []
    annotations: list[object] = []
    names = sorted({name(shape, scene) for scene in made for shape in scene.shapes})
    for number, scene in enumerate(made):
        large = np.kron(render(scene), np.ones((TIMES, TIMES, 1), np.uint8))
        Image.fromarray(large).save(folder / f"photos/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 256, "width": 256})
        for shape, mask in zip(scene.shapes, shape_masks(scene), strict=True):
            large_mask = np.kron(mask, np.ones((TIMES, TIMES), np.uint8)) > 0
            kind = names.index(name(shape, scene))
            rle = Rle.of(large_mask).model_dump()
            annotations.append({"id": len(annotations), "image_id": number, "category_id": kind, "segmentation": rle})
    categories = [{"id": number, "name": one} for number, one in enumerate(names)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps(content))


def asked_config(folder: Path, url: str) -> ConstructionConfig:
    asked = {"endpoint": url, "model": "knowing", "timeout": 20, "parallel": 8}
    return ConstructionConfig.model_validate(
        {
            "images": {"place": str(folder / "photos")},
            "words": asked,
            "masks": {"coco": str(folder / "instances.json")},
            "removal": {"opencv": "telea"},
            "replacement": "none",
            "judge": asked,
        }
    )


def run_all(config: ConstructionConfig, answers: Path) -> list[Photo]:
    """All steps in this process, one after the other."""
    photos = [photo for block in blocks_of(config) for photo in read_block(config.images, block)]
    for step in step_names(config):
        made = make_step(step, config, answers)
        made.run([photo for photo in photos if not photo.out])
        photos[0].spent[step] = made.spent()
    return photos


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the endpoint's pauses between tries."""
    monkeypatch.setattr(ChatEndpoint.__init__, "__defaults__", (Backoff(0.01, 0.05),))


def test_a_misbehaving_endpoint_gives_pairs_all_the_same(tmp_path: Path, quick: None) -> None:
    made = scenes(5)
    save_photos(tmp_path, made)
    with StandIn(Knowing(made, refused=made[3])) as endpoint:
        photos = run_all(asked_config(tmp_path, endpoint.url), tmp_path / "answers")
    spent = photos[0].spent
    assert spent["caption"].requests > len(made)
    assert sum(one.retries for one in spent.values()) > len(made)
    assert sum(one.repairs for one in spent.values()) > 0
    assert spent["objects"].prompt_tokens > 0
    refused = photos.pop(3)
    assert [(one.step, one.reason) for one in refused.rejections] == [("caption", "refused")]
    for scene, photo in zip([made[place] for place in (0, 1, 2, 4)], photos, strict=True):
        assert photo.caption.startswith("The picture shows")
        assert {thing.name for thing in photo.things} <= {name(shape, scene) for shape in scene.shapes}
        assert ("masks", "not_found", "yellow submarine") in {(r.step, r.reason, r.what) for r in photo.rejections}
        assert photo.kept
        for change in photo.kept:
            assert change.there is not None
            assert change.back is not None
            assert change.there.simple == [f"remove the {change.thing.name}"]
            assert change.back.simple == [f"add the {change.thing.name}"]
            # What says outright what it should hint at is left out.
            assert [one.about for one in change.there.advanced] == ["function", "colour"]
            assert change.scores is not None
            assert {aspect: one.explanation for aspect, one in change.scores.items()} == {
                aspect: f"Seen: {aspect}." for aspect in change.scores
            }
    # What was answered is not asked again: a run after this one needs no endpoint.
    with StandIn(in_turn(Drop())) as gone:
        again = run_all(asked_config(tmp_path, gone.url).model_copy(), tmp_path / "answers")
    assert [photo.changes for photo in again if photo.kept] == [photo.changes for photo in photos]
    assert again[0].spent["instruct"].requests == 0
    assert again[0].spent["instruct"].cached == 2 * sum(len(photo.changes) for photo in photos)
    assert [one.reason for one in again[3].rejections] == ["unreachable"]


def test_an_endpoint_that_lets_nobody_in_stops_the_run(tmp_path: Path, quick: None) -> None:
    save_photos(tmp_path, scenes(1))
    with StandIn(in_turn(Status(401))) as endpoint, pytest.raises(UsageError, match="wants an API key"):
        run_all(asked_config(tmp_path, endpoint.url), tmp_path / "answers")


def test_replacements_are_found_by_the_names_of_things(tmp_path: Path, quick: None) -> None:
    (scene,) = scenes(1)
    save_photos(tmp_path, [scene])
    with StandIn(Knowing([scene], behaves=True)) as endpoint:
        config = asked_config(tmp_path, endpoint.url)
        (photo,) = (photo for block in blocks_of(config) for photo in read_block(config.images, block))
        assert not isinstance(config.words, str)
        words = AskedWords(Asker(build_chat(config.words), AnswerCache(tmp_path)), config)
        (things,) = words.objects([photo])
        assert isinstance(things, list)
        photo.things = things[:2]
        (found,) = words.replacements([photo])
    assert [None if isinstance(one, Rejected) else one.name for one in found] == ["golden bell"] * 2


def test_a_local_model_that_knows_nothing_gives_reasons(tmp_path: Path) -> None:
    local = LocalModelConfig(local=build_sources(tmp_path / "sources").mllm, max_tokens=8, batch=2)
    photo = Photo(name="a", key="a", data=encode_png(np.zeros((32, 32, 3), np.uint8)))
    words = AskedWords(Asker(build_chat(local), AnswerCache(tmp_path / "answers")), ConstructionConfig())
    (found,) = words.objects([photo])
    assert isinstance(found, Rejected)
    assert found.reason in ("unparsable", "empty")


def chat_at(url: str) -> ChatEndpoint:
    return ChatEndpoint(EndpointConfig(endpoint=url, model="m", parallel=1))


def test_a_wrong_answer_is_complained_about_once(tmp_path: Path, quick: None) -> None:
    def read(text: str) -> int:
        if not text.isdecimal():
            raise AnswerError("it is no number.")
        return int(text)

    picture = np.zeros((4, 4, 3), np.uint8)
    questions = [Question("count", f"How many {what}?", (picture,), read) for what in ("dogs", "cats")]
    with StandIn(in_turn(Say("many"), Say("3"))) as endpoint:
        asker = Asker(chat_at(endpoint.url), AnswerCache(tmp_path))
        assert asker.ask(questions) == [3, 3]
        assert endpoint.asked[-1].texts[1] == "many"
        assert "it is no number." in endpoint.asked[-1].texts[2]
    assert (asker.spent().requests, asker.spent().repairs, asker.spent().cached) == (4, 2, 0)
    assert asker.ask(questions[:1]) == [3]
    assert asker.spent().cached == 1
    with StandIn(in_turn(Say("many"))) as endpoint:
        (found,) = Asker(chat_at(endpoint.url), AnswerCache(tmp_path / "other")).ask(questions[:1])
    assert isinstance(found, Rejected)
    assert found == Rejected("unparsable", "Asked twice, the model gave no valid answer: it is no number.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Sure! ```json\n{"a": [1, 2,]}\n``` Anything else?', {"a": [1, 2]}),
        ('<think>{"a": 0}</think>[{"a": 1}]', [{"a": 1}]),
        ('{"a": "cut o', {"a": "cut o"}),
    ],
)
def test_json_is_read_as_models_write_it(text: str, expected: object) -> None:
    assert load_answer(text) == expected


@pytest.mark.parametrize("text", ["", "no", "<think>{}"])
def test_what_is_no_json_is_said(text: str) -> None:
    with pytest.raises(AnswerError):
        load_answer(text)
