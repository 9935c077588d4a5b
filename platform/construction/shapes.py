"""Every step by the truth of the shapes world: what an ideal model would say, find and paint."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, cast, get_args

from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.construction.instructions import Direction
from insightedit.platform.construction.masks import Masked
from insightedit.platform.construction.painting import Job
from insightedit.platform.construction.photos import Advanced, Change, Photo, Picture, Rejected, Thing, Words
from insightedit.platform.construction.proposals import Replacement
from insightedit.platform.datasets.shapes_edits import word_edit
from insightedit.platform.datasets.shapes_language import article, describe, description, name
from insightedit.platform.datasets.shapes_world import (
    COLOURS,
    KINDS,
    Colour,
    Kind,
    Scene,
    Shape,
    is_regular,
    render,
    shape_masks,
    split_of,
)
from insightedit.platform.errors import UsageError
from insightedit.platform.judges import Truth
from insightedit.platform.judges.shapes import shapes_truth

ABOUT_FORM: Final = {
    **dict.fromkeys(("relative", "extreme", "distance", "opposite", "corner"), "location"),
    **dict.fromkeys(("at_opposite", "at_beside", "at_between"), "location"),
    **dict.fromkeys(("odd_colour", "same_colour", "mixture", "known_colour"), "colour"),
    **dict.fromkeys(("new_mixture", "new_known_colour", "new_same_colour"), "colour"),
    **dict.fromkeys(("only_one", "one_of_two", "pair", "corners"), "quantity"),
    **dict.fromkeys(("use", "new_kind"), "function"),
    "size": "size",
}
"""What each form of reasoning is about."""


def scene_of(photo: Photo) -> Scene:
    """The scene that a picture shows.

    Raises:
        UsageError: it is none of the shapes world.
    """
    if photo.truth is None:
        raise UsageError(
            f"{photo.key} shows no known scene, which a step of construction that is set to shapes needs; name another."
        )
    return Scene.from_json(photo.truth)


def picture_of(photo: Photo) -> Picture:
    """The picture of a photo whose file is not at hand."""
    return render(scene_of(photo))


def shape_named(scene: Scene, words: str) -> Shape | None:
    """The shape of a scene that a name means: "red circle", "small red circle", "red circle at the top left"."""
    found = [shape for shape in scene.shapes if words.lower() in _names(shape, scene)]
    return found[0] if len(found) == 1 else None


def _names(shape: Shape, scene: Scene) -> Iterator[str]:
    yield name(shape, scene)
    yield describe(shape)
    yield f"{shape.colour} {shape.kind}"
    yield f"{shape.size} {shape.colour} {shape.kind}"


def intended(photo: Photo, change: Change) -> tuple[Scene, Shape, Shape | None] | Rejected:
    """What an edit should come to: the scene after it, the shape that it is about, and the one in its place."""
    scene = scene_of(photo)
    shape = shape_named(scene, change.thing.name)
    if shape is None:
        return Rejected("not_found", f"The scene has no one shape called {change.thing.name}.")
    new = None
    if change.task == "replace":
        colour, _, kind = change.new_name.lower().rpartition(" ")
        if colour not in get_args(Colour) or kind not in get_args(Kind):
            return Rejected("not_a_shape", f"{change.new_name} is no colour and kind of the shapes world.")
        new = replace(shape, kind=cast(Kind, kind), colour=cast(Colour, colour))
    others = tuple(other for other in scene.shapes if other != shape)
    return Scene(scene.ground, (*others, new) if new else others), shape, new


def truth_of(photo: Photo, change: Change) -> Truth | None:
    """What is known of an edit; None where it is about nothing that is there."""
    found = intended(photo, change)
    return None if isinstance(found, Rejected) else shapes_truth(scene_of(photo), found[0])


class ShapesWords:
    """Captioner, finder of objects, proposer and writer of the shapes world."""

    def __init__(self, config: ConstructionConfig) -> None:
        self._seed = config.seed
        self._advanced = config.advanced_each

    def captions(self, photos: Sequence[Photo]) -> list[str | Rejected]:
        """See `captions.Captioner`."""
        return [description(scene_of(photo)) for photo in photos]

    def objects(self, photos: Sequence[Photo]) -> list[list[Thing] | Rejected]:
        """See `objects.ObjectFinder`."""
        scenes = [scene_of(photo) for photo in photos]
        return [
            [Thing(name=name(shape, scene), category=shape.kind, caption=describe(shape)) for shape in scene.shapes]
            for scene in scenes
        ]

    def replacements(self, photos: Sequence[Photo]) -> list[list[Replacement | Rejected]]:
        """See `proposals.Proposer`."""
        return [[self._replacement(photo, thing) for thing in photo.things] for photo in photos]

    def words(self, pairs: Sequence[Direction]) -> list[Words | Rejected]:
        """See `instructions.Writer`."""
        return [self._words(pair) for pair in pairs]

    def _replacement(self, photo: Photo, thing: Thing) -> Replacement | Rejected:
        """Another shape that makes a scene of the same split."""
        rng = random.Random(f"{self._seed}:replace:{photo.key}:{thing.name}")
        shape = shape_named(scene_of(photo), thing.name)
        if shape is None:
            return Rejected("not_found", f"The scene has no one shape called {thing.name}.")
        for _ in range(_TRIES):
            kind, colour = rng.choice([one for one in KINDS if one != shape.kind]), rng.choice(COLOURS)
            change = Change(task="replace", thing=thing, new_name=f"{colour} {kind}")
            found = intended(photo, change)
            if not isinstance(found, Rejected) and _fits(scene_of(photo), found[0]) is None:
                text = f"{article(shape.size)}{shape.size} {colour} {kind}"
                return Replacement(change.new_name, text)
        return Rejected("outside_world", "No other shape makes a scene of the same split.")

    def _words(self, pair: Direction) -> Words | Rejected:
        found = intended(pair.photo, pair.change)
        if isinstance(found, Rejected):
            return found
        target, shape, new = found
        source = scene_of(pair.photo)
        if pair.way == "back":
            source, shape, new = target, new or shape, shape
        its = () if pair.task == "add" else (shape,)
        rng = random.Random(f"{self._seed}:words:{pair.photo.key}:{pair.change.named}:{pair.way}")
        simple, advanced = word_edit(pair.task, source, its, new or shape, rng, self._advanced)
        return Words(
            simple=[simple], advanced=[Advanced(text=one.text, about=ABOUT_FORM[one.form]) for one in advanced]
        )


_TRIES: Final = 40
"""Draws of another shape; three in five scenes are of the split for training."""


class ShapesMasker:
    """The exact masks of shapes."""

    def masks(self, photos: Sequence[Photo]) -> list[list[Masked | Rejected]]:
        """See `masks.Masker`."""
        return [[self._mask(scene_of(photo), thing) for thing in photo.things] for photo in photos]

    def _mask(self, scene: Scene, thing: Thing) -> Masked | Rejected:
        shape = shape_named(scene, thing.name)
        if shape is None:
            return Rejected("not_found", f"The scene has no one shape called {thing.name}.")
        return Masked(shape_masks(scene)[scene.shapes.index(shape)], 1.0)


class ShapesPainter:
    """Draws the scene that an edit should come to."""

    def paint(self, jobs: Sequence[Job]) -> list[Picture | Rejected]:
        """See `painting.Painter`."""
        return [self._paint(job) for job in jobs]

    def _paint(self, job: Job) -> Picture | Rejected:
        found = intended(job.photo, job.change)
        if isinstance(found, Rejected):
            return found
        return render(found[0])


def allowed(photo: Photo, change: Change) -> Rejected | None:
    """Why an edit of a known scene may not be in a dataset; None where it may, or where nothing is known.

    A pair is trained on in both directions: its target must be of its source's split too, or the test is seen.
    """
    if photo.truth is None:
        return None
    found = intended(photo, change)
    return found if isinstance(found, Rejected) else _fits(scene_of(photo), found[0])


def _fits(source: Scene, target: Scene) -> Rejected | None:
    """Why a scene may not stand beside another in a dataset; None where it may."""
    if not is_regular(target):
        return Rejected(
            "outside_world", "The world shows scenes of two to four shapes, and not all four corners taken."
        )
    if split_of(target) != split_of(source):
        return Rejected("other_split", f"The scene belongs to the split {split_of(target)}.")
    return None
