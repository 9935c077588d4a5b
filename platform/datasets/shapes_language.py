"""The language of the shapes world: names, captions, and phrases that need reasoning.

A phrase picks something of a scene by reasoning: a shape ("the one that could roll"), a place ("the place opposite
the red circle"), a colour ("the mix of blue and yellow") or a kind ("a shape that means love"). Every kind of
reasoning is a form; its finder lists all the phrases that hold for a scene and pick exactly one answer. Instructions
(`shapes_edits`) and the sentences about single images here use the same phrases, so that what a language model learns
from images alone carries over to edits. Of each form's wordings the last one is held out: only instructions of the
test split use it, and nothing in this module's sentences does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Final, Generic, Literal, TypeVar

from insightedit.platform.datasets.shapes_world import (
    COLOURS,
    CORNER_CELLS,
    HELD_OUT_COMBINATIONS,
    KINDS,
    MIDDLE_CELL,
    SIZES,
    Colour,
    Kind,
    Scene,
    Shape,
)

PLACES: Final = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""Names of the nine cells."""
PLURALS: Final[dict[Kind, str]] = {kind: "crosses" if kind == "cross" else f"{kind}s" for kind in KINDS}
CORNERS: Final[dict[Kind, int]] = {
    "circle": 0,
    "ring": 0,
    "heart": 2,
    "triangle": 3,
    "square": 4,
    "diamond": 4,
    "star": 10,
    "cross": 12,
}
"""Corners of each kind's outline."""
NUMBERS: Final = {0: "no", 1: "one", 2: "two", 3: "three", 4: "four", 10: "ten", 12: "twelve"}
MIXTURES: Final[dict[Colour, tuple[Colour, Colour]]] = {
    "orange": ("red", "yellow"),
    "green": ("blue", "yellow"),
    "purple": ("red", "blue"),
    "pink": ("red", "white"),
}
"""Paints that make a colour."""
THINGS: Final[dict[Colour, tuple[str, str]]] = {
    "red": ("a cherry", "a tomato"),
    "orange": ("a carrot", "a pumpkin"),
    "yellow": ("a banana", "a lemon"),
    "green": ("grass", "a frog"),
    "blue": ("the sky", "the sea"),
    "purple": ("a plum", "a grape"),
    "pink": ("a pig", "a flamingo"),
    "white": ("snow", "milk"),
}
"""What everybody knows the colour of."""
USES: Final[tuple[tuple[str, frozenset[Kind]], ...]] = (
    ("could roll", frozenset({"circle", "ring"})),
    ("looks like a ball", frozenset({"circle"})),
    ("fits on a finger", frozenset({"ring"})),
    ("looks like a box", frozenset({"square"})),
    ("looks like a tent", frozenset({"triangle"})),
    ("has three corners", frozenset({"triangle"})),
    ("shines in the night sky", frozenset({"star"})),
    ("means first aid", frozenset({"cross"})),
    ("flies like a kite", frozenset({"diamond"})),
    ("means love", frozenset({"heart"})),
)
"""What a shape can do or stands for, and the kinds that do."""

WORDINGS: Final[dict[str, tuple[str, ...]]] = {
    # phrases that pick shapes
    "relative": ("the one {side} the {x}", "the shape {side} the {x}", "what is {side} the {x}"),
    "extreme": ("the {end} one", "the {end} shape", "the one that is {end}"),
    "distance": ("the one {far} the {x}", "the shape {far} the {x}", "what is {far} the {x}"),
    "opposite": ("the one opposite the {x}", "the shape opposite the {x}", "what is opposite the {x}"),
    "corner": ("the only one in a corner", "the only shape in a corner", "the one in a corner"),
    "odd_colour": ("the one in an odd colour", "the odd one in colour", "the shape in an odd colour"),
    "same_colour": (
        "the one that has the same colour as the {x}",
        "the shape in the same colour as the {x}",
        "the one in the same colour as the {x}",
    ),
    "mixture": (
        "the one in the mix of {a} and {b}",
        "the shape in {a} mixed with {b}",
        "the one in {a} mixed with {b}",
    ),
    "known_colour": (
        "the one in the colour of {thing}",
        "the shape that has the colour of {thing}",
        "the shape in the colour of {thing}",
    ),
    "only_one": ("the only one of its kind", "the only shape of its kind", "the one that is the only one of its kind"),
    "one_of_two": (
        "the {side} one of the two {kinds}",
        "the {side} of the two {kinds}",
        "the {side} one of both {kinds}",
    ),
    "pair": ("the two of the same kind", "both shapes of the same kind", "the two shapes of the same kind"),
    "use": ("the one that {use}", "the shape that {use}", "what {use}"),
    "corners": ("the one with the {most} corners", "the shape with the {most} corners", "what has the {most} corners"),
    "size": ("the {end} one", "the {end} shape", "the one that is {end}"),
    # phrases that pick a place
    "at_opposite": (
        "the place opposite the {x}",
        "the spot opposite the {x}",
        "the spot that is opposite the {x}",
    ),
    "at_beside": (
        "the place just {side} the {x}",
        "the spot just {side} the {x}",
        "the spot that is just {side} the {x}",
    ),
    "at_between": (
        "the place between the {x} and the {y}",
        "the spot between the {x} and the {y}",
        "the spot that is between the {x} and the {y}",
    ),
    # phrases that pick a colour
    "new_mixture": ("the mix of {a} and {b}", "{a} mixed with {b}", "the colour of {a} mixed with {b}"),
    "new_known_colour": ("the colour of {thing}", "the same colour as {thing}", "the colour that {thing} has"),
    "new_same_colour": ("the colour of the {x}", "the same colour as the {x}", "the colour that the {x} has"),
    # phrases that pick a kind
    "new_kind": (
        "{a}{adjectives}shape that {use}",
        "some {adjectives}shape that {use}",
        "{a}{adjectives}shape, one that {use}",
    ),
}
"""Wordings of each form; the last one is held out."""

_Answer = TypeVar("_Answer")
_PickKind = Literal["shapes", "place", "colour", "kind"]


@dataclass(frozen=True, slots=True)
class Phrase(Generic[_Answer]):
    """A phrase that holds for a scene: its form, what fills the wording's slots, what it picks.

    `anchors` are the shapes that it mentions on the way.
    """

    form: str
    slots: dict[str, str]
    answer: _Answer
    anchors: tuple[Shape, ...] = ()

    def say(self, rng: random.Random, *, held_out: bool = False, **slots: str) -> str:
        """Word the phrase, in the held-out wording or in one of the others."""
        wordings = WORDINGS[self.form]
        wording = wordings[-1] if held_out else rng.choice(wordings[:-1])
        return wording.format(**self.slots, **slots)


ShapesPhrase = Phrase[tuple[Shape, ...]]
PlacePhrase = Phrase[int]
ColourPhrase = Phrase[Colour]
KindPhrase = Phrase[Kind]


# Plain names --------------------------------------------------------------------------------------------------------


def describe(shape: Shape) -> str:
    """Say everything about a shape: "large red circle top left"."""
    return f"{shape.size} {shape.colour} {shape.kind} {PLACES[shape.cell]}"


def name(shape: Shape, scene: Scene) -> str:
    """Name a shape by colour and kind, and as far as that is not unique by size or place.

    "red circle", "small red circle", "red circle at the top left".
    """
    alike = [other for other in scene.shapes if (other.colour, other.kind) == (shape.colour, shape.kind)]
    if len(alike) == 1:
        return f"{shape.colour} {shape.kind}"
    if sum(other.size == shape.size for other in alike) == 1:
        return f"{shape.size} {shape.colour} {shape.kind}"
    return f"{shape.colour} {shape.kind} at the {PLACES[shape.cell]}"


def article(word: str) -> str:
    """Return "a " or "an ", as the word wants it."""
    return "an " if word[0] in "aeio" else "a "


# Forms that pick shapes ---------------------------------------------------------------------------------------------


def _relative(scene: Scene) -> Iterator[ShapesPhrase]:
    """The only shape on one side of another, in whatever row or column."""
    for x in scene.shapes:
        sides = {
            "left of": [s for s in scene.shapes if s.column < x.column],
            "right of": [s for s in scene.shapes if s.column > x.column],
            "above": [s for s in scene.shapes if s.row < x.row],
            "below": [s for s in scene.shapes if s.row > x.row],
        }
        for side, found in sides.items():
            if len(found) == 1:
                yield Phrase("relative", {"side": side, "x": name(x, scene)}, tuple(found), (x,))


def _extreme(scene: Scene) -> Iterator[ShapesPhrase]:
    columns, rows = [s.column for s in scene.shapes], [s.row for s in scene.shapes]
    for end, values, value in (
        ("leftmost", columns, min(columns)),
        ("rightmost", columns, max(columns)),
        ("highest", rows, min(rows)),
        ("lowest", rows, max(rows)),
    ):
        if values.count(value) == 1:
            yield Phrase("extreme", {"end": end}, (scene.shapes[values.index(value)],))


def _distance(scene: Scene) -> Iterator[ShapesPhrase]:
    """The nearest and the farthest from another, centre to centre."""
    for x in scene.shapes:
        others = [s for s in scene.shapes if s is not x]
        squares = [(s.row - x.row) ** 2 + (s.column - x.column) ** 2 for s in others]
        for far, value in (("nearest to", min(squares)), ("farthest from", max(squares))):
            if len(others) > 1 and squares.count(value) == 1:
                yield Phrase("distance", {"far": far, "x": name(x, scene)}, (others[squares.index(value)],), (x,))


def _opposite(scene: Scene) -> Iterator[ShapesPhrase]:
    """Across the middle of the picture."""
    at = {s.cell: s for s in scene.shapes}
    for x in scene.shapes:
        if x.cell != MIDDLE_CELL and 8 - x.cell in at:
            yield Phrase("opposite", {"x": name(x, scene)}, (at[8 - x.cell],), (x,))


def _corner(scene: Scene) -> Iterator[ShapesPhrase]:
    found = [s for s in scene.shapes if s.cell in CORNER_CELLS]
    if len(found) == 1:
        yield Phrase("corner", {}, tuple(found))


def _odd_colour(scene: Scene) -> Iterator[ShapesPhrase]:
    """One colour, where all the others share another."""
    count = Counter(s.colour for s in scene.shapes)
    if len(scene.shapes) > 2 and len(count) == 2:
        odd = [s for s in scene.shapes if count[s.colour] == 1]
        if len(odd) == 1:
            yield Phrase("odd_colour", {}, tuple(odd))


def _same_colour(scene: Scene) -> Iterator[ShapesPhrase]:
    for x in _lone_kinds(scene):
        found = [s for s in scene.shapes if s is not x and s.colour == x.colour]
        if len(found) == 1:
            yield Phrase("same_colour", {"x": x.kind}, tuple(found), (x,))


def _mixture(scene: Scene) -> Iterator[ShapesPhrase]:
    for shape in _lone_colours(scene):
        if shape.colour in MIXTURES:
            a, b = MIXTURES[shape.colour]
            yield Phrase("mixture", {"a": a, "b": b}, (shape,))
            yield Phrase("mixture", {"a": b, "b": a}, (shape,))


def _known_colour(scene: Scene) -> Iterator[ShapesPhrase]:
    for shape in _lone_colours(scene):
        for thing in THINGS[shape.colour]:
            yield Phrase("known_colour", {"thing": thing}, (shape,))


def _only_one(scene: Scene) -> Iterator[ShapesPhrase]:
    found = _lone_kinds(scene)
    if len(found) == 1:
        yield Phrase("only_one", {}, tuple(found))


def _one_of_two(scene: Scene) -> Iterator[ShapesPhrase]:
    for kind in KINDS:
        found = [s for s in scene.shapes if s.kind == kind]
        if len(found) != 2:
            continue
        left, right = sorted(found, key=lambda s: s.column)
        upper, lower = sorted(found, key=lambda s: s.row)
        if left.column < right.column:
            yield Phrase("one_of_two", {"side": "left", "kinds": PLURALS[kind]}, (left,))
            yield Phrase("one_of_two", {"side": "right", "kinds": PLURALS[kind]}, (right,))
        if upper.row < lower.row:
            yield Phrase("one_of_two", {"side": "upper", "kinds": PLURALS[kind]}, (upper,))
            yield Phrase("one_of_two", {"side": "lower", "kinds": PLURALS[kind]}, (lower,))


def _pair(scene: Scene) -> Iterator[ShapesPhrase]:
    count = Counter(s.kind for s in scene.shapes)
    found = tuple(s for s in scene.shapes if count[s.kind] > 1)
    if len(found) == 2:
        yield Phrase("pair", {}, found)


def _use(scene: Scene) -> Iterator[ShapesPhrase]:
    for use, kinds in USES:
        found = [s for s in scene.shapes if s.kind in kinds]
        if len(found) == 1:
            yield Phrase("use", {"use": use}, tuple(found))


def _corners(scene: Scene) -> Iterator[ShapesPhrase]:
    corners = [CORNERS[s.kind] for s in scene.shapes]
    for most, value in (("most", max(corners)), ("fewest", min(corners))):
        if corners.count(value) == 1:
            yield Phrase("corners", {"most": most}, (scene.shapes[corners.index(value)],))


def _size(scene: Scene) -> Iterator[ShapesPhrase]:
    sizes = [s.size for s in scene.shapes]
    for size in SIZES:
        if sizes.count(size) == 1:
            end = "smallest" if size == "small" else "biggest"
            yield Phrase("size", {"end": end}, (scene.shapes[sizes.index(size)],))


def _lone_kinds(scene: Scene) -> list[Shape]:
    count = Counter(s.kind for s in scene.shapes)
    return [s for s in scene.shapes if count[s.kind] == 1]


def _lone_colours(scene: Scene) -> list[Shape]:
    count = Counter(s.colour for s in scene.shapes)
    return [s for s in scene.shapes if count[s.colour] == 1]


# Forms that pick a free place ---------------------------------------------------------------------------------------


def _at_opposite(scene: Scene) -> Iterator[PlacePhrase]:
    taken = {s.cell for s in scene.shapes}
    for x in scene.shapes:
        if x.cell != MIDDLE_CELL and 8 - x.cell not in taken:
            yield Phrase("at_opposite", {"x": name(x, scene)}, 8 - x.cell, (x,))


def _at_beside(scene: Scene) -> Iterator[PlacePhrase]:
    taken = {s.cell for s in scene.shapes}
    for x in scene.shapes:
        for side, inside, cell in (
            ("left of", x.column > 0, x.cell - 1),
            ("right of", x.column < 2, x.cell + 1),
            ("above", x.row > 0, x.cell - 3),
            ("below", x.row < 2, x.cell + 3),
        ):
            if inside and cell not in taken:
                yield Phrase("at_beside", {"side": side, "x": name(x, scene)}, cell, (x,))


def _at_between(scene: Scene) -> Iterator[PlacePhrase]:
    """Half the way from one shape to another, where that is a cell."""
    taken = {s.cell for s in scene.shapes}
    for x, y in combinations(scene.shapes, 2):
        cell = (x.cell + y.cell) // 2
        if (x.row + y.row) % 2 == 0 and (x.column + y.column) % 2 == 0 and cell not in taken:
            yield Phrase("at_between", {"x": name(x, scene), "y": name(y, scene)}, cell, (x, y))
            yield Phrase("at_between", {"x": name(y, scene), "y": name(x, scene)}, cell, (x, y))


# Forms that pick a colour or a kind ---------------------------------------------------------------------------------


def _new_mixture(scene: Scene) -> Iterator[ColourPhrase]:
    del scene  # knowledge of the world
    for colour, (a, b) in MIXTURES.items():
        yield Phrase("new_mixture", {"a": a, "b": b}, colour)
        yield Phrase("new_mixture", {"a": b, "b": a}, colour)


def _new_known_colour(scene: Scene) -> Iterator[ColourPhrase]:
    del scene  # knowledge of the world
    for colour in COLOURS:
        for thing in THINGS[colour]:
            yield Phrase("new_known_colour", {"thing": thing}, colour)


def _new_same_colour(scene: Scene) -> Iterator[ColourPhrase]:
    for x in _lone_kinds(scene):
        yield Phrase("new_same_colour", {"x": x.kind}, x.colour, (x,))


def _new_kind(scene: Scene) -> Iterator[KindPhrase]:
    del scene  # knowledge of the world
    for use, kinds in USES:
        if len(kinds) == 1:
            yield Phrase("new_kind", {"use": use}, next(iter(kinds)))


SHAPES_FORMS: Final[dict[str, Callable[[Scene], Iterator[ShapesPhrase]]]] = {
    "relative": _relative,
    "extreme": _extreme,
    "distance": _distance,
    "opposite": _opposite,
    "corner": _corner,
    "odd_colour": _odd_colour,
    "same_colour": _same_colour,
    "mixture": _mixture,
    "known_colour": _known_colour,
    "only_one": _only_one,
    "one_of_two": _one_of_two,
    "pair": _pair,
    "use": _use,
    "corners": _corners,
    "size": _size,
}
PLACE_FORMS: Final[dict[str, Callable[[Scene], Iterator[PlacePhrase]]]] = {
    "at_opposite": _at_opposite,
    "at_beside": _at_beside,
    "at_between": _at_between,
}
COLOUR_FORMS: Final[dict[str, Callable[[Scene], Iterator[ColourPhrase]]]] = {
    "new_mixture": _new_mixture,
    "new_known_colour": _new_known_colour,
    "new_same_colour": _new_same_colour,
}
KIND_FORMS: Final[dict[str, Callable[[Scene], Iterator[KindPhrase]]]] = {"new_kind": _new_kind}
COMPARING: Final = frozenset({"distance", "opposite", "odd_colour", "same_colour", "only_one", "pair"})
"""Forms that compare the shapes of a scene with one another: the hardest to learn, and most of them seldom hold."""


# Sentences about one image ------------------------------------------------------------------------------------------


def short_caption(scene: Scene, rng: random.Random) -> str:
    """Describe every shape, in any order."""
    return ", ".join(describe(shape) for shape in rng.sample(scene.shapes, len(scene.shapes)))


def statements(scene: Scene, rng: random.Random, n: int) -> list[str]:
    """Say `n` true things about a scene, most of them by reasoning, all in wordings that are not held out."""
    said: list[str] = []
    for _ in range(n):
        topic = rng.choices(("reference", "plain"), (5, 2))[0]
        if topic == "plain":
            said.append(_plain_statement(scene, rng))
            continue
        _, phrase, answer = _reference(scene, rng)
        said.append(f"{phrase} is {answer}")
    return said


def question_answer(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask about a scene; most questions need reasoning."""
    return (plain_question if rng.random() < 0.15 else reasoning_question)(scene, rng)


def plain_question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask what a name stands for: ("which is the red circle", "large red circle top left")."""
    shape = rng.choice(scene.shapes)
    return f"which is the {name(shape, scene)}", describe(shape)


def reasoning_question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask what a phrase picks: ("which is the one that could roll", "large red circle top left")."""
    question, phrase, answer = _reference(scene, rng)
    return f"{question} is {phrase}", answer.replace("the ", "")


def compound_question(scene: Scene, rng: random.Random, *, hard: bool = False) -> tuple[str, str]:
    """Ask for what requests are made of: shapes, a place, or one of them with another, a colour or a kind of shape.

    ("which is the lowest one and what is a red ring", "large blue star bottom and large red ring")

    Args:
        scene: what is asked about.
        rng: what draws.
        hard: ask of pairs too, and of most shapes by the forms of `COMPARING`.
    """
    ask_shapes = partial(_ask_shapes, hard=hard)
    topics = rng.choice(
        (
            (ask_shapes,),
            (_ask_place,),
            (ask_shapes, _ask_place),
            (ask_shapes, _ask_thing),
            (ask_shapes, _ask_colour),
            (_ask_thing, _ask_place),
        )
    )
    asked = [ask(scene, rng) for ask in rng.sample(topics, len(topics))]
    return " and ".join(question for question, _ in asked), " and ".join(answer for _, answer in asked)


def _ask_shapes(scene: Scene, rng: random.Random, *, hard: bool) -> tuple[str, str]:
    """Which shapes a name stands for or, as often or with `hard` more often, a phrase."""
    forms = {form: find for form, find in SHAPES_FORMS.items() if hard or form != "pair"}
    phrase = _draw_phrase(forms, scene, rng, hard=hard) if rng.random() < (0.8 if hard else 0.5) else None
    if phrase is None:
        return plain_question(scene, rng)
    return f"which is {phrase.say(rng)}", " and ".join(describe(shape) for shape in phrase.answer)


def _ask_place(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Where a place is, which is said or needs reasoning."""
    phrase = _draw_phrase(PLACE_FORMS, scene, rng) if rng.random() < 0.4 else None
    if phrase is None:
        place = rng.choice(PLACES)
        return f"where is the {place}", place
    return f"where is {phrase.say(rng)}", PLACES[phrase.answer]


def _ask_colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """What a colour is, which is said or, as often, needs reasoning."""
    phrase = _draw_phrase(COLOUR_FORMS, scene, rng) if rng.random() < 0.5 else None
    if phrase is None:
        colour = rng.choice(COLOURS)
        return f"what is {colour}", colour
    return f"what is {phrase.say(rng)}", phrase.answer


def _ask_thing(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """What a shape of a size, a colour and a kind is: large unless it is said, its kind at times by what it is for."""
    phrase = rng.choice(list(_new_kind(scene))) if rng.random() < 0.4 else None
    kind = phrase.answer if phrase else rng.choice(KINDS)
    colour = rng.choice([colour for colour in COLOURS if (colour, kind) not in HELD_OUT_COMBINATIONS])
    size = rng.choice(("", "", *SIZES))
    adjectives = f"{size} {colour} ".lstrip()
    a = article(adjectives)
    said = phrase.say(rng, a=a, adjectives=adjectives) if phrase else f"{a}{adjectives}{kind}"
    return f"what is {said}", f"{size or 'large'} {colour} {kind}"


def description(scene: Scene) -> str:
    """Describe every shape in the order of the cells: "large red circle top left, small blue star middle"."""
    return ", ".join(describe(shape) for shape in scene.shapes)


def _reference(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """Draw a phrase that holds for a scene: question word, phrase, and what it picks."""
    pick: _PickKind = rng.choices(("shapes", "place", "colour", "kind"), (12, 3, 2, 1))[0]
    if pick == "shapes":
        phrase = _draw_phrase(SHAPES_FORMS, scene, rng)
        if phrase is not None:
            answer = " and ".join(f"the {describe(shape)}" for shape in phrase.answer)
            return "which", phrase.say(rng), answer
    if pick == "place":
        place = _draw_phrase(PLACE_FORMS, scene, rng)
        if place is not None:
            return "where", place.say(rng), f"the {PLACES[place.answer]}"
    if pick == "kind":
        kind = rng.choice(list(_new_kind(scene)))
        return "what", kind.say(rng, a="a ", adjectives=""), f"{article(kind.answer)}{kind.answer}"
    colour = _draw_phrase(COLOUR_FORMS, scene, rng) or rng.choice(list(_new_mixture(scene)))
    return "what", colour.say(rng), colour.answer


def _draw_phrase(
    forms: dict[str, Callable[[Scene], Iterator[Phrase[_Answer]]]],
    scene: Scene,
    rng: random.Random,
    *,
    hard: bool = False,
) -> Phrase[_Answer] | None:
    """Draw a form, then one of its phrases; another form where there is none."""
    order = rng.sample(list(forms), len(forms))
    if hard:
        order.sort(key=lambda form: rng.random() < 0.75 and form not in COMPARING)
    for form in order:
        found = list(forms[form](scene))
        if found:
            return rng.choice(found)
    return None


def _plain_statement(scene: Scene, rng: random.Random) -> str:
    """Say something that needs looking or plain knowledge only."""
    shape = rng.choice(scene.shapes)
    cell = rng.randrange(9)
    return rng.choice(
        (
            f"the {name(shape, scene)} is the {describe(shape)}",
            f"there is {article(shape.size)}{describe(shape)}",
            f"there are {NUMBERS[len(scene.shapes)]} shapes",
            f"the {shape.kind} at the {PLACES[shape.cell]} is {shape.size} and {shape.colour}",
            f"a {shape.kind} has {NUMBERS[CORNERS[shape.kind]]} corners",
            f"the {PLACES[8 - cell]} is opposite the {PLACES[cell]}",
            _what_lies_at(scene, cell),
            short_caption(scene, rng),
        )
    )


def _what_lies_at(scene: Scene, cell: int) -> str:
    shape = next((s for s in scene.shapes if s.cell == cell), None)
    return f"nothing is at the {PLACES[cell]}" if shape is None else f"the {shape.kind} is at the {PLACES[cell]}"
