"""The shapes world: its pictures, its splits, and instructions that mean exactly one target.

Instructions are checked by a resolver of their own: it parses the text, finds every reading in the source scene, and
must end at the target scene alone. It shares no code and no table with the generator.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from insightedit.platform.datasets import shapes_edits, shapes_language, shapes_world
from insightedit.platform.datasets.shapes import (
    Edit,
    Scene,
    Shape,
    Split,
    caption_records,
    compound_question,
    edit_records,
    question_answer,
    question_records,
    render,
    sample_edit,
    sample_scene,
    shape_masks,
    short_caption,
    split_of,
    statements,
    vocabulary_corpus,
)
from insightedit.platform.datasets.shapes_world import Ground

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "white"]
KINDS = ["circle", "ring", "square", "triangle", "star", "cross", "diamond", "heart"]
PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"]
HELD_OUT = {("red", "star"), ("green", "circle"), ("blue", "heart"), ("yellow", "square")}


@cache
def _edits(split: Split, count: int = 1500) -> list[Edit]:
    return [sample_edit(seed, split) for seed in range(count)]


# An independent resolver --------------------------------------------------------------------------------------------

KNOWN = {
    "cherry": "red", "tomato": "red", "carrot": "orange", "pumpkin": "orange", "banana": "yellow", "lemon": "yellow",
    "grass": "green", "frog": "green", "sky": "blue", "sea": "blue", "plum": "purple", "grape": "purple",
    "pig": "pink", "flamingo": "pink", "snow": "white", "milk": "white",
}  # fmt: skip
MIXED = {"redyellow": "orange", "blueyellow": "green", "bluered": "purple", "redwhite": "pink"}
OUTLINE = {"circle": 0, "ring": 0, "heart": 2, "triangle": 3, "square": 4, "diamond": 4, "star": 10, "cross": 12}
DOES = {
    "could roll": "circle ring",
    "looks like a ball": "circle",
    "fits on a finger": "ring",
    "looks like a box": "square",
    "looks like a tent": "triangle",
    "has three corners": "triangle",
    "shines in the night sky": "star",
    "means first aid": "cross",
    "flies like a kite": "diamond",
    "means love": "heart",
}
NAME = re.compile(
    rf"the (?:(small|large) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(KINDS)})"
    rf"(?: at the ({'|'.join(sorted(PLACES, key=len, reverse=True))}))?"
)


def _only(found: list[Shape]) -> Shape:
    assert len(found) == 1, found
    return found[0]


def _named(text: str, scene: Scene) -> Shape:
    """The one shape that a plain name fits."""
    match = NAME.fullmatch(text)
    assert match, text
    size, colour, kind, place = match.groups()
    return _only(
        [
            s
            for s in scene.shapes
            if s.kind == kind
            and colour in (None, s.colour)
            and size in (None, s.size)
            and place in (None, PLACES[s.cell])
        ]
    )


def _at(shape: Shape) -> tuple[int, int]:
    return divmod(shape.cell, 3)


def _mix(first: str, second: str) -> str:
    return MIXED["".join(sorted((first, second)))]


def _best(scene: Scene, key: Callable[[Shape], float]) -> Shape:
    """The one shape with the smallest key."""
    values = sorted(key(s) for s in scene.shapes)
    return _only([s for s in scene.shapes if key(s) == values[0]])


def _side(side: str, scene: Scene, x: Shape) -> list[Shape]:
    axis, sign = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}[side]
    return [s for s in scene.shapes if sign * (_at(s)[axis] - _at(x)[axis]) > 0]


def _far(word: str, scene: Scene, x: Shape) -> Shape:
    sign = 1 if word == "nearest to" else -1
    return _best(dataclasses.replace(scene, shapes=_others(scene, x)), lambda s: sign * math.dist(_at(s), _at(x)))


def _others(scene: Scene, x: Shape) -> tuple[Shape, ...]:
    return tuple(s for s in scene.shapes if s != x)


def _opposed(scene: Scene, x: Shape) -> Shape:
    row, column = _at(x)
    return _only([s for s in _others(scene, x) if _at(s) == (2 - row, 2 - column)])


def _alone(scene: Scene, attribute: str) -> Shape:
    count = Counter(getattr(s, attribute) for s in scene.shapes)
    return _only([s for s in scene.shapes if count[getattr(s, attribute)] == 1])


def _odd(scene: Scene) -> Shape:
    assert len(scene.shapes) > 2
    assert len({s.colour for s in scene.shapes}) == 2
    return _alone(scene, "colour")


def _of_two(side: str, kinds: str, scene: Scene) -> Shape:
    kind = "cross" if kinds == "crosses" else kinds.removesuffix("s")
    two = [s for s in scene.shapes if s.kind == kind]
    assert len(two) == 2
    key: dict[str, Callable[[Shape], float]] = {
        "left": lambda s: _at(s)[1],
        "right": lambda s: -_at(s)[1],
        "upper": lambda s: _at(s)[0],
        "lower": lambda s: -_at(s)[0],
    }
    return _best(dataclasses.replace(scene, shapes=tuple(two)), key[side])


def _end(end: str, scene: Scene) -> Shape:
    keys: dict[str, Callable[[Shape], float]] = {
        "leftmost": lambda s: _at(s)[1],
        "rightmost": lambda s: -_at(s)[1],
        "highest": lambda s: _at(s)[0],
        "lowest": lambda s: -_at(s)[0],
        "smallest": lambda s: s.size == "large",
        "biggest": lambda s: s.size == "small",
    }
    return _best(scene, keys[end])


def _same(name: str, scene: Scene) -> Shape:
    x = _named(name, scene)
    return _only([s for s in _others(scene, x) if s.colour == x.colour])


def _coloured(colour: str, scene: Scene) -> Shape:
    return _only([s for s in scene.shapes if s.colour == colour])


def _most(word: str, scene: Scene) -> Shape:
    sign = -1 if word == "most" else 1
    return _best(scene, lambda s: sign * OUTLINE[s.kind])


def _doing(what: str, scene: Scene) -> Shape:
    return _only([s for s in scene.shapes if s.kind in DOES[what].split()])


_THE = "(?:the one|the shape|what is)"
_X = r"(the [a-z ]+)"
_C = f"({'|'.join(COLOURS)})"
_SHAPE_RULES: list[tuple[str, Callable[..., Shape]]] = [
    (rf"{_THE} (left of|right of|above|below) {_X}", lambda s, a, x: _only(_side(a, s, _named(x, s)))),
    (rf"{_THE} (nearest to|farthest from) {_X}", lambda s, a, x: _far(a, s, _named(x, s))),
    (rf"{_THE} opposite {_X}", lambda s, x: _opposed(s, _named(x, s))),
    (r"the (\w+(?:most|est)) (?:one|shape)|the one that is (\w+(?:most|est))", lambda s, a, b: _end(a or b, s)),
    (r"the (?:only )?(?:one|shape) in a corner", lambda s: _only([x for x in s.shapes if x.cell in (0, 2, 6, 8)])),
    (r"the (?:one|shape) in an odd colour|the odd one in colour", _odd),
    (rf"the (?:one that has|one in|shape in) the same colour as {_X}", lambda s, x: _same(x, s)),
    (rf"the (?:one|shape) in the mix of {_C} and {_C}", lambda s, a, b: _coloured(_mix(a, b), s)),
    (rf"the (?:one|shape) in {_C} mixed with {_C}", lambda s, a, b: _coloured(_mix(a, b), s)),
    (r"the (?:one in|shape that has|shape in) the colour of (?:an? |the )?(\w+)", lambda s, a: _coloured(KNOWN[a], s)),
    (r"(?:the one that is )?the only (?:one|shape) of its kind", lambda s: _alone(s, "kind")),
    (r"the (left|right|upper|lower)(?: one)? of (?:the two|both) (\w+)", lambda s, a, k: _of_two(a, k, s)),
    (r"(?:the one with|the shape with|what has) the (most|fewest) corners", lambda s, a: _most(a, s)),
    (rf"(?:the one that|the shape that|what) ({'|'.join(DOES)})", lambda s, a: _doing(a, s)),
]  # fmt: skip


def _shapes_meant(text: str, scene: Scene) -> set[Shape]:
    if re.fullmatch("(?:the two|both shapes|the two shapes) of the same kind", text):
        two = [s for s in scene.shapes if sum(s.kind == t.kind for t in scene.shapes) > 1]
        assert len(two) == 2
        return set(two)
    for pattern, rule in _SHAPE_RULES:
        match = re.fullmatch(pattern, text)
        if match:
            return {rule(scene, *match.groups())}
    if NAME.fullmatch(text):
        return {_named(text, scene)}
    first, _, second = text.partition(" and ")
    return {_named(first, scene), _named(second, scene)}


def _place_meant(text: str, scene: Scene) -> int:
    if text.removeprefix("the ") in PLACES:
        return PLACES.index(text.removeprefix("the "))
    match = re.fullmatch(
        r"the (?:place|spot|spot that is) (opposite|just (?:left of|right of|above|below)|between) (.*)", text
    )
    assert match, text
    how, rest = match.groups()
    if how == "between":
        first, second = (_at(_named(part, scene)) for part in rest.split(" and "))
        row, column = (first[0] + second[0]) / 2, (first[1] + second[1]) / 2
    else:
        row, column = _at(_named(rest, scene))
        steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
        down, right = steps.get(how.removeprefix("just "), (2 - 2 * row, 2 - 2 * column))
        row, column = row + down, column + right
    assert row in (0, 1, 2)
    assert column in (0, 1, 2)
    return int(3 * row + column)


def _colour_meant(text: str, scene: Scene) -> str:
    if text in COLOURS:
        return text
    match = re.fullmatch(rf"(?:the colour of )?(?:the mix of )?{_C} (?:and|mixed with) {_C}", text)
    if match:
        return _mix(match[1], match[2])
    match = re.fullmatch(r"the (?:colour of|same colour as|colour that) (.*?)(?: has)?", text)
    assert match, text
    word = match[1].split()[-1]
    return KNOWN[word] if word in KNOWN else _named(match[1], scene).colour


def _new_meant(text: str, scene: Scene) -> tuple[str | None, str, str]:
    """Size (None if unsaid), colour and kind of a new shape."""
    match = re.fullmatch(rf"(?:an?|some) (small )?{_C} shape(?:, one)? that (.*)", text)
    if match:
        return (match[1] or "").strip() or None, match[2], DOES[match[3]]
    match = re.fullmatch(rf"an? (small )?(?:{_C} )?({'|'.join(KINDS)})(?: in (.*))?", text)
    assert match, text
    size, colour, kind, described = match.groups()
    assert (colour is None) != (described is None)
    return (size or "").strip() or None, colour or _colour_meant(described, scene), kind


_INSTRUCTIONS: dict[str, list[str]] = {
    "remove": ["remove {it}", "take away {it}", "erase {it}", "take {it} away"],
    "add": ["add {new} at {place}", "draw {new} at {place}", "at {place} draw {new}", "at {place} add {new}"],
    "replace": [
        "replace {it} with {new}",
        "change {it} into {new}",
        "put {new} in place of {it}",
        "in place of {it} draw {new}",
        "in place of {it} put {new}",
    ],
    "recolour": ["make {it} {colour}", "paint {it} {colour}", "turn {it} {colour}", "change {it} to {colour}"],
    "move": [
        "move {it} to {place}",
        "shift {it} to {place}",
        "put {it} at {place}",
        "to {place} shift {it}",
        "to {place} move {it}",
    ],
}


def _applied(task: str, said: dict[str, str], scene: Scene) -> Scene:
    """The target that the parts of an instruction mean. Raises where a part means nothing, or more than one thing."""
    its = _shapes_meant(said["it"], scene) if "it" in said else set[Shape]()
    shapes = [s for s in scene.shapes if s not in its]
    if task == "add":
        size, colour, kind = _new_meant(said["new"], scene)
        shapes.append(Shape(kind, colour, size or "large", _place_meant(said["place"], scene)))  # pyright: ignore[reportArgumentType] - parsed
    if task == "replace":
        size, colour, kind = _new_meant(said["new"], scene)
        assert size is None, "a replaced shape keeps its size"
        shapes += [dataclasses.replace(s, colour=colour, kind=kind) for s in its]
    if task == "recolour":
        shapes += [dataclasses.replace(s, colour=_colour_meant(said["colour"], scene)) for s in its]
    if task == "move":
        shapes += [dataclasses.replace(s, cell=_place_meant(said["place"], scene)) for s in its]
    return Scene(scene.ground, tuple(shapes))


def _readings(instruction: str, scene: Scene) -> set[tuple[str, Scene]]:
    """Every target that some reading of an instruction means: every task, and every way to cut it in parts."""
    found: set[tuple[str, Scene]] = set()
    for task, templates in _INSTRUCTIONS.items():
        for said in itertools.chain.from_iterable(_cuts(template, instruction) for template in templates):
            try:
                found.add((task, _applied(task, said, scene)))
            except (AssertionError, KeyError, ValueError):
                continue
    return found


def _cuts(template: str, text: str) -> list[dict[str, str]]:
    """Every way to fill a template's one or two slots so that it becomes the text."""
    start, *rest = re.split(r"{(\w+)}", template)
    end = rest[-1]
    if not (text.startswith(start) and text.endswith(end)):
        return []
    middle = text[len(start) : len(text) - len(end)]
    if len(rest) == 2:
        return [{rest[0]: middle}]
    first, between, second, _ = rest
    places = [found.start() for found in re.finditer(f"(?={re.escape(between)})", middle)]
    return [{first: middle[:place], second: middle[place + len(between) :]} for place in places]


@pytest.mark.parametrize("split", SPLITS)
def test_every_instruction_means_its_target_and_no_other(split: Split) -> None:
    for edit in _edits(split):
        for instruction in (edit.simple, edit.advanced):
            assert _readings(instruction, edit.source) == {(edit.task, edit.target)}, (instruction, edit)


# Pictures -----------------------------------------------------------------------------------------------------------


def _inside(kind: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points lie in a shape of radius 1, y downwards; polygons by counting crossed edges."""
    radius = np.hypot(x, y)
    if kind == "circle":
        return radius <= 1
    if kind == "ring":
        return (radius <= 1) & (radius >= 0.5)
    if kind == "heart":
        lobes = np.minimum(np.hypot(x - 0.48, y + 0.38), np.hypot(x + 0.48, y + 0.38)) <= 0.52
        return lobes | _polygon([(-1, -0.38), (1, -0.38), (1.0, -0.2955), (0, 0.98), (-1.0, -0.2955)], x, y)
    inner = math.cos(2 * math.pi / 5) / math.cos(math.pi / 5)
    a, b, c = 0.34, 0.86, 1.02
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(-b, -b), (b, -b), (b, b), (-b, b)],
        "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
        "diamond": [(0, -c), (c, 0), (0, c), (-c, 0)],
        "cross": [
            *[(a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1)],
            *[(-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a), (-a, -1)],
        ],
        "star": [
            (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
            for k, r in enumerate(itertools.chain.from_iterable([(1, inner)] * 5))
        ],
    }
    return _polygon(corners[kind], x, y)


def _polygon(corners: list[tuple[float, float]], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside = np.zeros(x.shape, np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "radius"), [("small", 3.3), ("large", 4.9)])
@pytest.mark.parametrize("cell", [0, 4, 5])
def test_masks_and_coverage_equal_a_high_resolution_drawing(kind: str, size: str, radius: float, cell: int) -> None:
    fine = 40
    ticks = (np.arange(32 * fine) + 0.5) / fine
    y, x = np.meshgrid(
        (ticks - (6, 16, 26)[cell // 3]) / radius, (ticks - (6, 16, 26)[cell % 3]) / radius, indexing="ij"
    )
    share = _inside(kind, x, y).reshape(32, fine, 32, fine).mean(axis=(1, 3))
    drawn = shapes_world.coverage(kind, size, cell)  # pyright: ignore[reportArgumentType] - parametrized
    assert np.abs(drawn - share).max() < 0.07
    shape = Shape(kind, "red", size, cell)  # pyright: ignore[reportArgumentType] - parametrized
    (mask,) = shape_masks(Scene(Ground("plain", ((60, 60, 60), (60, 60, 60))), (shape,)))
    certain = (share > 1 / 40) | (share == 0)  # a pixel that is only grazed may fall between the samples
    assert np.array_equal(mask[certain], share[certain] > 0)
    assert certain.mean() > 0.97


def test_a_picture_is_its_ground_and_its_shapes_blended_by_coverage() -> None:
    rng = random.Random(5)
    for scene in (sample_scene(rng, "train") for _ in range(50)):
        expected = render(dataclasses.replace(scene, shapes=())).astype(np.float64)
        for shape in scene.shapes:
            share = shapes_world.coverage(shape.kind, shape.size, shape.cell)[..., None]
            expected = expected * (1 - share) + np.asarray(shapes_world.RGB[shape.colour]) * share
        picture = render(scene)
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
        assert np.abs(picture - expected).max() <= 1.01  # the ground of a gradient was rounded on its own
        assert not np.any(np.sum(shape_masks(scene), axis=0) > 1)


def test_every_kind_colour_and_size_stands_out() -> None:
    """Two kinds differ by a good part of a pixel at least, two colours and a colour and a ground by their values."""
    for size in shapes_world.SIZES:
        drawn = [shapes_world.coverage(kind, size, 4) for kind in shapes_world.KINDS]
        assert all(np.abs(one - other).max() > 0.35 for one, other in itertools.combinations(drawn, 2))
    colours = [np.asarray(rgb) for rgb in shapes_world.RGB.values()]
    grounds = [np.asarray(tone) for tones in shapes_world.TONES for tone in tones]
    assert all(np.abs(one - other).max() >= 90 for one, other in itertools.combinations(colours, 2))
    assert all(np.abs(colour - ground).max() >= 65 for colour in colours for ground in grounds)
    small, large = (
        [shapes_world.coverage(kind, size, 4).sum() for kind in shapes_world.KINDS] for size in ("small", "large")
    )
    assert all(2 * one < other for one, other in zip(small, large, strict=True))


def test_an_edits_reply_says_what_changes_and_nothing_else() -> None:
    places = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "middle", "right")]
    for record in edit_records("train", 200, 1):
        meta = json.loads(record.meta)
        scene, target = (
            {f"{places[s['cell']]} {s['size']} {s['colour']} {s['kind']}" for s in meta[key]["shapes"]}
            for key in ("scene", "target_scene")
        )
        assert len(re.findall(r"\w+|,", record.reply)) <= 22  # 24 tokens with start and end
        removed, added = set[str](), set[str]()
        for change in record.reply.split(", "):
            place = " ".join(change.split()[:2])
            before, after = change.removeprefix(f"{place} ").split(f" {place} ")
            removed |= {f"{place} {before}"} - {f"{place} nothing"}
            added |= {f"{place} {after}"} - {f"{place} nothing"}
            assert place in places
            assert before != after
        assert (removed, added) == (scene - target, target - scene)


@pytest.mark.parametrize("split", SPLITS)
def test_an_edit_changes_only_its_cells(split: Split) -> None:
    for edit in _edits(split, 300):
        changed = {s.cell for s in set(edit.source.shapes) ^ set(edit.target.shapes)}
        assert edit.source.ground == edit.target.ground
        pixels = (render(edit.source) != render(edit.target)).any(axis=-1)
        allowed = np.zeros((32, 32), np.bool_)
        for cell in changed:
            row, column = divmod(cell, 3)
            allowed[1 + 10 * row : 11 + 10 * row, 1 + 10 * column : 11 + 10 * column] = True
        assert pixels.any()
        assert not (pixels & ~allowed).any()
        assert len(changed) == {"move": 2}.get(edit.task, 2 if edit.form == "pair" else 1)


# Sampling -----------------------------------------------------------------------------------------------------------


def test_every_task_and_form_comes_up() -> None:
    edits = _edits("train")
    tasks, forms = Counter(e.task for e in edits), Counter(e.form for e in edits)
    assert set(tasks) == {"remove", "add", "replace", "recolour", "move"}
    assert min(tasks.values()) > 0.85 * len(edits) / 5
    assert set(forms) == set(shapes_language.WORDINGS)
    assert len(forms) >= 14
    assert min(forms.values()) > len(edits) / 100
    possible = {(task, form) for task, groups in shapes_edits.FORMS.items() for group in groups for form in group}
    assert {(e.task, e.form) for e in _edits("train", 4000)} == possible


def test_an_advanced_instruction_does_not_name_what_it_reasons_about() -> None:
    for edit in _edits("train"):
        assert edit.simple != edit.advanced
        if edit.form in shapes_language.SHAPES_FORMS:
            for gone in set(edit.source.shapes) - set(edit.target.shapes):
                named = shapes_language.name(gone, edit.source)
                assert not re.search(rf"\bthe {named}\b(?! at| left| right)", edit.advanced), edit


def test_nothing_moves_to_a_place_that_depends_on_itself() -> None:
    moves = [edit for edit in _edits("train") if edit.task == "move" and edit.form in shapes_language.PLACE_FORMS]
    for edit in moves:
        (moved,) = set(edit.source.shapes) - set(edit.target.shapes)
        assert len(re.findall(rf"\bthe {shapes_language.name(moved, edit.source)}\b(?! at the)", edit.advanced)) <= 1, (
            edit
        )
    assert len(moves) > 50


def test_draws_are_a_function_of_seed_and_split() -> None:
    for split in SPLITS:
        again = [sample_edit(seed, split) for seed in range(50)]
        assert again == _edits(split)[:50]
        assert list(edit_records(split, 3, 9)) == list(edit_records(split, 3, 9))
        assert list(caption_records(split, 3, 9)) == list(caption_records(split, 3, 9))
        assert list(question_records(split, 3, 9)) == list(question_records(split, 3, 9))
    assert _edits("train")[:5] != _edits("validation")[:5]
    first = sample_edit(11, "train").source.fingerprint()
    assert first == "e9bc97bd27dcc48a28b7c24bd8d3708d818b3ce38f921ca80fa02f5508fd9147", "raise WORLD_VERSION"


def test_splits_share_no_scene() -> None:
    rng = random.Random(3)
    held: dict[str, set[str]] = {}
    for split in SPLITS:
        scenes = [sample_scene(rng, split) for _ in range(1000)]
        scenes += [scene for edit in _edits(split) for scene in (edit.source, edit.target)]
        assert {split_of(scene) for scene in scenes} == {split}
        held[split] = {scene.fingerprint() for scene in scenes}
    for first, second in itertools.combinations(SPLITS, 2):
        assert not held[first] & held[second]


def test_scenes_are_regular() -> None:
    rng = random.Random(4)
    scenes = [sample_scene(rng, split) for split in SPLITS for _ in range(500)]
    scenes += [scene for split in SPLITS for edit in _edits(split, 500) for scene in (edit.source, edit.target)]
    assert {len(scene.shapes) for scene in scenes} == {2, 3, 4}
    assert not any({0, 2, 6, 8} <= {s.cell for s in scene.shapes} for scene in scenes)


def test_held_out_combinations_are_in_the_test_alone() -> None:
    for split in SPLITS:
        for edit in _edits(split):
            pairs = {(s.colour, s.kind) for scene in (edit.source, edit.target) for s in scene.shapes}
            assert bool(pairs & HELD_OUT) == ("combination" in edit.held_out)
            assert split == "test" or not edit.held_out
    share = Counter(held for edit in _edits("test") for held in edit.held_out)
    assert 0.1 < share["combination"] / 1500 < 0.35
    assert 0.1 < share["wording"] / 1500 < 0.35


def _wording_pattern(wording: str) -> re.Pattern[str]:
    """A wording with its slots open; a colour's slot takes what can stand for a colour, so that "to" is no "into"."""
    colour = rf"(?:{'|'.join(COLOURS)}|the (?:mix|colour|same) .*)$"
    return re.compile(
        r"\b" + re.sub(r"\\\{(\w+)\\\}", lambda m: colour if m[1] == "colour" else r".+?", re.escape(wording))
    )


HELD_WORDINGS = {
    "remove": r"^take the .* away$|^take (?:what|both) .* away$",
    "add": r"^at the .* add ",
    "replace": r"^in place of .* put ",
    "recolour": rf"^change .* to (?:(?:{'|'.join(COLOURS)})$|the (?:mix|colour|same)|\w+ mixed)",
    "move": r"^to the .* move ",
    "relative": r"what is (?:left|right|above|below)",
    "extreme": r"the one that is (?:leftmost|rightmost|highest|lowest)",
    "distance": r"what is (?:nearest|farthest)",
    "opposite": r"what is opposite",
    "corner": r"the one in a corner",
    "odd_colour": r"the shape in an odd colour",
    "same_colour": r"the one in the same colour as",
    "mixture": r"the one in \w+ mixed with",
    "known_colour": r"the shape in the colour of",
    "only_one": r"the one that is the only one",
    "one_of_two": r"of both",
    "pair": r"the two shapes of the same kind",
    "use": rf"what (?:{'|'.join(DOES)})",
    "corners": r"what has the (?:most|fewest)",
    "size": r"the one that is (?:smallest|biggest)",
    "at_opposite": r"the spot that is opposite",
    "at_beside": r"the spot that is just",
    "at_between": r"the spot that is between",
    "new_mixture": r"the colour of \w+ mixed",
    "new_known_colour": r"the colour that (?:an? |the )?(?:" + "|".join(KNOWN) + r") has",
    "new_same_colour": r"the colour that the (?:" + "|".join(KINDS) + r") has",
    "new_kind": r", one that",
}  # fmt: skip


def test_each_forms_held_out_wording_is_in_the_test_alone() -> None:
    assert set(HELD_WORDINGS) == set(shapes_language.WORDINGS) | set(shapes_edits.TEMPLATES)
    rng = random.Random(8)
    seen = [text for split in ("train", "validation") for e in _edits(split) for text in (e.simple, e.advanced)]
    for scene in (sample_scene(rng, "train") for _ in range(300)):
        seen += [short_caption(scene, rng), *statements(scene, rng, 8), *question_answer(scene, rng)]
        seen += [text for hard in (False, True) * 4 for text in compound_question(scene, rng, hard=hard)]
    seen += vocabulary_corpus()
    for form, pattern in HELD_WORDINGS.items():
        assert not [text for text in seen if re.search(pattern, text)][:3], form
    for edit in _edits("test", 4000):
        marked = "wording" in edit.held_out
        assert bool(re.search(HELD_WORDINGS[edit.task], edit.simple)) == marked, edit
        assert bool(re.search(HELD_WORDINGS[edit.form], edit.advanced)) == marked, edit
    tested = {edit.form for edit in _edits("test", 4000) if "wording" in edit.held_out}
    assert tested == set(shapes_language.WORDINGS)


def test_held_out_wordings_use_known_words() -> None:
    words = {word for text in vocabulary_corpus() for word in re.findall(r"\w+", text)}
    assert len(words) <= 250
    for edit in _edits("test"):
        assert not set(re.findall(r"\w+", f"{edit.simple} {edit.advanced}")) - words


def test_texts_are_short() -> None:
    simple = [len(e.simple.split()) for e in _edits("test")]
    advanced = sorted(len(e.advanced.split()) for e in _edits("test"))
    assert max(simple) <= 20
    assert max(advanced) <= 28
    assert advanced[int(0.95 * len(advanced))] <= 18
    rng = random.Random(6)
    captions = [short_caption(sample_scene(rng, "train"), rng) for _ in range(2000)]
    assert max(len(re.findall(r"\w+|,", caption)) for caption in captions) <= 22  # 24 tokens with start and end


# Sentences about one picture ----------------------------------------------------------------------------------------


def _full(shape: Shape) -> str:
    return f"{shape.size} {shape.colour} {shape.kind} {PLACES[shape.cell]}"


def _described(text: str) -> tuple[str, ...]:
    return tuple(text.replace("the ", "").split(" and "))


def _true_answer(phrase: str, scene: Scene) -> tuple[str, ...] | None:
    """What a phrase means, in the words of an answer; None for what is not a phrase of a form."""
    for meant in (
        lambda: tuple(_full(s) for s in sorted(_shapes_meant(phrase, scene), key=lambda s: s.cell)),
        lambda: (PLACES[_place_meant(phrase, scene)],),
        lambda: (_colour_meant(phrase, scene),),
        lambda: (DOES[phrase.rpartition("shape that ")[2]],),
    ):
        try:
            return meant()
        except (AssertionError, KeyError, ValueError):
            continue
    return None


def test_questions_are_answered_truly() -> None:
    rng = random.Random(1)
    for scene in (sample_scene(rng, "train") for _ in range(600)):
        question, answer = question_answer(scene, rng)
        match = re.fullmatch("(?:which|where|what) is (.*)", question)
        assert match
        assert _true_answer(match[1], scene) in {_described(answer), (answer.split()[-1],)}, (question, answer)


@pytest.mark.parametrize("hard", [False, True])
def test_compound_questions_are_answered_truly(hard: bool) -> None:
    rng = random.Random(3)
    parts: Counter[int] = Counter()
    for scene in (sample_scene(rng, "train") for _ in range(1500)):
        question, answer = compound_question(scene, rng, hard=hard)
        # "and" stands in phrases too: a question begins with its own word.
        asked = re.split(r" and (?=(?:which|where|what) is )", question)
        parts[len(asked)] += 1
        answers = []
        for one in asked:
            match = re.fullmatch("(which|where|what) is (.*)", one)
            assert match
            answers.append(_compound_answer(match[1], match[2], scene))
        assert answer == " and ".join(answers), question
    assert min(parts[1], parts[2]) > 300


def test_hard_questions_are_about_pairs_and_whatever_compares_shapes() -> None:
    rng = random.Random(4)
    scenes = [sample_scene(rng, "train") for _ in range(1500)]
    asked: dict[bool, list[str]] = {
        hard: [compound_question(scene, rng, hard=hard)[0] for scene in scenes] for hard in (False, True)
    }

    def share(form: str, hard: bool) -> float:
        patterns = [_wording_pattern(wording).pattern for wording in shapes_language.WORDINGS[form][:-1]]
        return sum(any(re.search(pattern, text) for pattern in patterns) for text in asked[hard]) / len(scenes)

    for form in shapes_language.COMPARING:
        assert share(form, True) > 1.5 * share(form, False), form
    assert share("pair", False) == 0 < share("pair", True)


def _compound_answer(word: str, phrase: str, scene: Scene) -> str:
    """The answer to one part of a compound question."""
    if word == "where":
        place = phrase.removeprefix("the ")
        return place if place in PLACES else PLACES[_place_meant(phrase, scene)]
    if word == "which":
        shapes = _shapes_meant(phrase.removeprefix("the ") if NAME.fullmatch(phrase[4:]) else phrase, scene)
        return " and ".join(_full(shape) for shape in sorted(shapes, key=lambda shape: shape.cell))
    if match := re.fullmatch(r"(?:an?|some) (?:(small|large) )?(%s) (.*)" % "|".join(COLOURS), phrase):  # noqa: UP031
        size, colour, thing = match.groups()
        kind = thing if thing in KINDS else DOES[thing.rpartition("shape that ")[2]]
        assert (colour, kind) not in HELD_OUT
        return f"{size or 'large'} {colour} {kind}"
    return phrase if phrase in COLOURS else _colour_meant(phrase, scene)


def test_statements_are_true_and_cover_every_form() -> None:
    rng = random.Random(2)
    asked: Counter[str] = Counter()
    for scene in (sample_scene(rng, "train") for _ in range(1200)):
        said = statements(scene, rng, 5)
        assert len(said) == 5
        for text in said:
            if _plainly_true(text, scene):
                continue
            match = re.fullmatch(r"(.*) is (.*?)", text)
            assert match, text
            meant = _true_answer(match[1], scene)
            assert meant in {_described(match[2]), (match[2].split()[-1],)}, text
            asked.update(
                form
                for form, words in shapes_language.WORDINGS.items()
                for w in words
                if _wording_pattern(w).match(text)
            )
    assert set(asked) == set(shapes_language.WORDINGS)


def _plainly_true(text: str, scene: Scene) -> bool:  # noqa: PLR0911 - a case for each sentence
    """Whether a sentence without reasoning holds."""
    described = {_full(s) for s in scene.shapes}
    number = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "ten": 10, "twelve": 12}
    if set(text.split(", ")) == described:
        return True
    if match := re.fullmatch(r"there are (\w+) shapes", text):
        return number[match[1]] == len(scene.shapes)
    if match := re.fullmatch(r"there is a (.*)", text):
        return match[1] in described
    if match := re.fullmatch(r"an? (\w+) has (\w+) corners", text):
        return number[match[2]] == OUTLINE[match[1]]
    if match := re.fullmatch(r"the (.*) is opposite the (.*)", text):
        return PLACES.index(match[1]) == 8 - PLACES.index(match[2])
    if match := re.fullmatch(r"nothing is at the (.*)", text):
        return PLACES.index(match[1]) not in {s.cell for s in scene.shapes}
    if match := re.fullmatch(r"the (\w+) at the (.*) is (\w+) and (\w+)", text):
        return f"{match[3]} {match[4]} {match[1]} {match[2]}" in described
    match = re.fullmatch(r"the (\w+) is at the (.*)", text)
    return match is not None and (match[1], match[2]) in {(s.kind, PLACES[s.cell]) for s in scene.shapes}


def test_nothing_said_of_one_picture_speaks_of_an_edit() -> None:
    rng = random.Random(9)
    verbs = {"remove", "erase", "take", "add", "draw", "replace", "change", "put", "paint", "turn", "move", "shift"}
    for scene in (sample_scene(rng, "train") for _ in range(500)):
        texts = [short_caption(scene, rng), *statements(scene, rng, 8), *question_answer(scene, rng)]
        texts += [text for hard in (False, True) * 4 for text in compound_question(scene, rng, hard=hard)]
        assert not verbs & {word for text in texts for word in text.split()}


# Scenes as data -----------------------------------------------------------------------------------------------------


def test_a_scene_survives_json_and_pickle_and_forgets_the_order_of_its_shapes() -> None:
    scene = sample_edit(1, "test").source
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    assert pickle.loads(pickle.dumps(scene)) == scene  # noqa: S301 - its own bytes
    turned = Scene(scene.ground, scene.shapes[::-1])
    assert turned == scene
    assert turned.fingerprint() == scene.fingerprint()


@pytest.mark.parametrize("cells", [(3, 3), (0, 9), (-1, 2)])
def test_two_shapes_need_two_cells_of_the_grid(cells: tuple[int, int]) -> None:
    ground = Ground("plain", shapes_world.TONES[0])
    with pytest.raises(ValueError, match="different cells"):
        Scene(ground, tuple(Shape("ring", "blue", "large", cell) for cell in cells))
