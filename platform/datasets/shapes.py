"""The shapes dataset: records of the shapes world, drawn from a seed.

`shapes_world` holds scenes and their pictures, `shapes_language` what can be said of one, `shapes_edits` the edits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Final, Literal

from pydantic import Field

from insightedit.platform.datasets.reading import Entry, Options, fingerprint_of, parse_options
from insightedit.platform.datasets.shapes_edits import Edit, outcome, sample_edit, vocabulary_corpus
from insightedit.platform.datasets.shapes_language import (
    compound_question,
    description,
    plain_question,
    question_answer,
    reasoning_question,
    short_caption,
    statements,
)
from insightedit.platform.datasets.shapes_world import (
    SPLITS,
    Ground,
    Scene,
    Shape,
    Split,
    render,
    sample_scene,
    shape_masks,
    split_of,
)
from insightedit.platform.records import Record, RecordTask, encode_png

__all__ = [
    "SPLITS",
    "Edit",
    "Ground",
    "Scene",
    "Shape",
    "ShapesOptions",
    "ShapesReader",
    "Split",
    "Wording",
    "caption_records",
    "compound_question",
    "description",
    "edit_records",
    "outcome",
    "plain_question",
    "question_answer",
    "question_records",
    "reasoning_question",
    "render",
    "sample_edit",
    "sample_scene",
    "shape_masks",
    "short_caption",
    "split_of",
    "statements",
    "vocabulary_corpus",
]

Wording = Literal["both", "simple", "advanced"]

DATASET: Final = "shapes"
QUESTIONS_EACH: Final = 4
"""Questions about one scene."""
WORLD_VERSION: Final = 4
"""Raised whenever the same seed gives other records, so that shards prepared before are seen to be stale."""


def edit_records(split: Split, count: int, seed: int, wording: Wording = "both", *, start: int = 0) -> Iterator[Record]:
    """Draw edits as records; the reply of each says what its instruction comes to.

    Args:
        split: which scenes.
        count: how many edits; with both wordings each gives two records of the same pictures, simple first.
        seed: which edits; the edit of a number depends on nothing but split, seed and number.
        wording: which instructions.
        start: number of the first edit.
    """
    wordings = ("simple", "advanced") if wording == "both" else (wording,)
    for number in range(start, start + count):
        edit = sample_edit(seed * 2**32 + number, split)
        source, target = encode_png(render(edit.source)), encode_png(render(edit.target))
        meta = {
            "scene": edit.source.to_json(),
            "target_scene": edit.target.to_json(),
            "form": edit.form,
            "held_out": list(edit.held_out),
            "pair": number,
        }
        for which in wordings:
            yield Record(
                key=f"{split}-{seed}-{number:06d}-{which}",
                dataset=DATASET,
                task="edit",
                source=source,
                target=target,
                instruction=edit.simple if which == "simple" else edit.advanced,
                reply=outcome(edit),
                category=edit.task,
                meta=json.dumps(meta | {"wording": which}),
            )


def caption_records(split: Split, count: int, seed: int, *, start: int = 0) -> Iterator[Record]:
    """Draw single scenes with a caption as records, arguments as in `edit_records`."""
    for number in range(start, start + count):
        rng = random.Random(f"caption:{split}:{seed}:{number}")
        scene = sample_scene(rng, split)
        yield Record(
            key=f"{split}-{seed}-{number:06d}-caption",
            dataset=DATASET,
            task="caption",
            source=encode_png(render(scene)),
            instruction=short_caption(scene, rng),
            meta=json.dumps({"scene": scene.to_json()}),
        )


def question_records(split: Split, count: int, seed: int, *, start: int = 0) -> Iterator[Record]:
    """Draw single scenes with questions and their answers as records, arguments as in `edit_records`.

    Each scene gives `QUESTIONS_EACH` records of the same picture.
    """
    for number in range(start, start + count):
        rng = random.Random(f"question:{split}:{seed}:{number}")
        scene = sample_scene(rng, split)
        source, meta = encode_png(render(scene)), json.dumps({"scene": scene.to_json()})
        for which in range(QUESTIONS_EACH):
            question, answer = question_answer(scene, rng)
            yield Record(
                key=f"{split}-{seed}-{number:06d}-question-{which}",
                dataset=DATASET,
                task="chat",
                source=source,
                instruction=question,
                reply=answer,
                meta=meta,
            )


class ShapesOptions(Options):
    """What to draw. `count` is the number of edits, of captioned scenes or of scenes with questions."""

    kind: Literal["edit", "caption", "question"]
    split: Split
    count: int = Field(gt=0)
    seed: int = Field(ge=0)
    wording: Wording = "both"

    @property
    def records_each(self) -> int:
        """Records that one edit or scene gives."""
        if self.kind == "question":
            return QUESTIONS_EACH
        return 2 if self.kind == "edit" and self.wording == "both" else 1


class ShapesReader:
    """Reader of the shapes world; see `insightedit.platform.datasets.Reader`. An entry is an edit or a scene."""

    name: ClassVar[str] = DATASET
    tasks: ClassVar[tuple[RecordTask, ...]] = ("caption", "edit", "chat")
    needs: ClassVar[str] = "nothing: drawn from a seed"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """The numbers of all edits or scenes."""
        parsed = parse_options(ShapesOptions, self.name, options)
        return [Entry(number, parsed.records_each) for number in range(parsed.count)]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record]:
        """Draw one edit or scene."""
        parsed = parse_options(ShapesOptions, self.name, options)
        if parsed.kind == "edit":
            yield from edit_records(parsed.split, 1, parsed.seed, parsed.wording, start=entry.place)
        else:
            draw = caption_records if parsed.kind == "caption" else question_records
            yield from draw(parsed.split, 1, parsed.seed, start=entry.place)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        return fingerprint_of(self.name, WORLD_VERSION, parse_options(ShapesOptions, self.name, options), ())
