"""How right each step was, beside the truth of the shapes world, whoever did it.

Every figure is computed from what came out and the scene, not from how it was made: masks against drawn shapes,
pictures against drawn scenes, instructions by what their words pick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Final

import numpy as np

from insightedit.platform.construction import shapes
from insightedit.platform.construction.output import edit_file
from insightedit.platform.construction.photos import Advanced, Change, Photo
from insightedit.platform.datasets.shapes_language import SHAPES_FORMS, WORDINGS, name
from insightedit.platform.datasets.shapes_world import COLOURS, KINDS, Scene, Shape, shape_masks
from insightedit.platform.judges import MadeEdit, Scores
from insightedit.platform.judges.shapes import ShapesJudge
from insightedit.platform.records import decode_image
from insightedit.platform.storage import Store

Figures = dict[str, float]
RIGHT: Final = 4
"""An edit counts as right when the exact judge gives it this or more for S_i and for S_n."""
_NAMES: Final = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(KINDS)})")


def precision_of(photos: Sequence[Photo], store: Store, *, by_truth: bool) -> dict[str, Figures]:
    """Figures of each step by its name; none where no truth is known.

    Args:
        photos: of the blocks that are done.
        store: the folder of the dataset, which has the edits that were kept.
        by_truth: whether the judge was the shapes world's, whose scores say how right each painter was.
    """
    known = [photo for photo in photos if photo.truth is not None]
    figures = {
        "caption": _captions(known),
        "objects": _objects(known),
        "masks": _masks(known),
        "remove": _painted(known, "remove") if by_truth else {},
        "replace": _painted(known, "replace") if by_truth else {},
        "instruct": _instructions(known),
        "judge": _kept(known, store),
    }
    return {step: found for step, found in figures.items() if found}


def _shares(**pairs: Sequence[float]) -> Figures:
    """Means by name, and over how many; none of what there is nothing of."""
    found: Figures = {}
    for what, values in pairs.items():
        if values:
            found |= {what: fmean(values), f"{what} (of)": float(len(values))}
    return found


def _captions(photos: Sequence[Photo]) -> Figures:
    """Shapes that are named by colour and kind: those said that are there, and those there that are said."""
    said_there: list[float] = []
    there_said: list[float] = []
    for photo in photos:
        if photo.caption:
            said = set(_NAMES.findall(photo.caption.lower()))
            there = {(shape.colour, shape.kind) for shape in shapes.scene_of(photo).shapes}
            said_there += [one in there for one in sorted(said)]
            there_said += [one in said for one in sorted(there)]
    return _shares(precision=said_there, recall=there_said)


def _objects(photos: Sequence[Photo]) -> Figures:
    """Names that mean one shape of the scene, and shapes that have such a name."""
    means_one: list[float] = []
    is_named: list[float] = []
    for photo in photos:
        listed = sorted(_listed(photo))
        if listed:
            scene = shapes.scene_of(photo)
            meant = [shapes.shape_named(scene, one) for one in listed]
            means_one += [shape is not None for shape in meant]
            is_named += [shape in meant for shape in scene.shapes]
    return _shares(precision=means_one, recall=is_named)


def _listed(photo: Photo) -> set[str]:
    """The names that a photo's objects had, those among them that later steps turned down."""
    later = {one.what for one in photo.rejections if one.step in ("detect", "masks")}
    return {thing.name for thing in photo.things} | (later - {photo.key})


def _masks(photos: Sequence[Photo]) -> Figures:
    """Intersection over union with the shape that a thing's name means."""
    overlaps: list[float] = []
    for photo in photos:
        scene = shapes.scene_of(photo)
        for thing in photo.things:
            shape = shapes.shape_named(scene, thing.name)
            if thing.mask is not None and shape is not None:
                true, found = shape_masks(scene)[scene.shapes.index(shape)], thing.mask.mask()
                overlaps.append(float((true & found).sum() / np.maximum((true | found).sum(), 1)))
    return _shares(overlap=overlaps)


def _painted(photos: Sequence[Photo], task: str) -> Figures:
    """Edits of a task that came out as they should, of all that were judged."""
    judged = [change.scores for photo in photos for change in photo.changes if change.task == task and change.scores]
    semantic = ("instruction_adherence", "non_overediting")
    return _shares(right=[all(scores[aspect].value >= RIGHT for aspect in semantic) for scores in judged])


def _instructions(photos: Sequence[Photo]) -> Figures:
    """Of removals and replacements: instructions whose words pick what is edited, and nothing else."""
    simple: list[float] = []
    advanced: list[float] = []
    for photo in photos:
        scene = shapes.scene_of(photo)
        for change in photo.kept:
            shape = shapes.shape_named(scene, change.thing.name)
            if change.there is not None and shape is not None:
                simple += [_picks(text, scene, shape) for text in change.there.simple]
                advanced += [_picks(text, scene, shape) for text in _about_the_thing(change, change.there.advanced)]
    return _shares(simple=simple, advanced=advanced)


def _about_the_thing(change: Change, advanced: Sequence[Advanced]) -> Iterator[str]:
    """Those instructions that hint at what is edited; others of a replacement hint at what comes in its place."""
    for one in advanced:
        if change.task == "remove" or change.new_name in one.text:
            yield one.text


def _picks(text: str, scene: Scene, shape: Shape) -> bool:
    """Whether the longest phrase in a text that means something in a scene means this shape alone."""
    found = [(words, answer) for words, answer in _phrases(scene) if re.search(rf"\b{re.escape(words)}\b", text)]
    longest = max((len(words) for words, _ in found), default=0)
    answers = {answer for words, answer in found if len(words) == longest}
    return answers == {(shape,)}


def _phrases(scene: Scene) -> Iterator[tuple[str, tuple[Shape, ...]]]:
    """Every phrase that means shapes of a scene, in every wording, with what it means."""
    for shape in scene.shapes:
        yield f"the {name(shape, scene)}", (shape,)
    for form, find in SHAPES_FORMS.items():
        for phrase in find(scene):
            for wording in WORDINGS[form]:
                yield wording.format(**phrase.slots), phrase.answer


def _kept(photos: Sequence[Photo], store: Store) -> Figures:
    """The pairs that came out: their exact scores, whoever painted and judged them."""
    judge = ShapesJudge()
    right: list[float] = []
    score: list[float] = []
    for photo in photos:
        made = [edit for place in range(len(photo.changes)) if (edit := _made(photo, place, store)) is not None]
        for verdict in judge.judge(made):
            if isinstance(verdict, Scores):
                values = (verdict.instruction_adherence.value, verdict.non_overediting.value)
                right.append(min(values) >= RIGHT)
                score.append(verdict.viescore)
    return _shares(right=right, viescore=score)


def _made(photo: Photo, place: int, store: Store) -> MadeEdit | None:
    """An edit that was kept, with its truth; None for one that was not, or whose thing is not there."""
    change = photo.changes[place]
    truth = shapes.truth_of(photo, change) if change.kept else None
    if truth is None:
        return None
    source = shapes.picture_of(photo)
    return MadeEdit(source=source, edit=decode_image(store.read(edit_file(photo, place))), instruction="", truth=truth)
