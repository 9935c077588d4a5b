"""Edits in the shapes world: a source scene, a target scene, and instructions that determine the target.

What an instruction leaves unsaid follows two rules: a shape that is moved, recoloured or replaced keeps its size and
whatever else is not spoken of, and an added shape is large. So each instruction determines its target to the pixel.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from insightedit.platform.datasets.shapes_language import (
    COLOUR_FORMS,
    KIND_FORMS,
    PLACE_FORMS,
    PLACES,
    SHAPES_FORMS,
    Phrase,
    article,
    name,
    question_answer,
    short_caption,
    statements,
)
from insightedit.platform.datasets.shapes_world import (
    COLOURS,
    HELD_OUT_SHARE,
    KINDS,
    Scene,
    Shape,
    Split,
    draw_scene,
    has_held_out_combination,
    is_regular,
    sample_scene,
    split_of,
)

Task = Literal["remove", "add", "replace", "recolour", "move"]
TASKS: Final[tuple[Task, ...]] = get_args(Task)

TEMPLATES: Final[dict[Task, tuple[str, ...]]] = {
    "remove": ("remove {it}", "take away {it}", "erase {it}", "take {it} away"),
    "add": ("add {new} at {place}", "draw {new} at {place}", "at {place} add {new}"),
    "replace": (
        "replace {it} with {new}",
        "change {it} into {new}",
        "put {new} in place of {it}",
        "in place of {it} put {new}",
    ),
    "recolour": ("make {it} {colour}", "paint {it} {colour}", "turn {it} {colour}", "change {it} to {colour}"),
    "move": ("move {it} to {place}", "shift {it} to {place}", "put {it} at {place}", "to {place} move {it}"),
}
"""Wordings of each task; the last one is held out, like the last of each form of reasoning."""
FRONTED: Final[dict[Task, tuple[str, ...]]] = {
    "add": ("at {place} draw {new}",),
    "replace": ("in place of {it} draw {new}",),
    "move": ("to {place} shift {it}",),
}
"""Further wordings for training: without one that begins with the place, none that is held out and does so could be
understood. The foundation's vocabulary is drawn without them."""
FRONTED_SHARE: Final = 0.15
"""Of the edits of such a task."""

_ROWS: Final = ("top", "middle", "bottom")
_COLUMNS: Final = ("left", "middle", "right")

_SINGLE = tuple(form for form in SHAPES_FORMS if form != "pair")
_ATTRIBUTES = (*COLOUR_FORMS, *KIND_FORMS)
FORMS: Final[dict[Task, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "remove": (tuple(SHAPES_FORMS), ()),
    "add": (tuple(PLACE_FORMS), _ATTRIBUTES),
    "replace": (_SINGLE, _ATTRIBUTES),
    "recolour": (tuple(SHAPES_FORMS), tuple(COLOUR_FORMS)),
    "move": (_SINGLE, tuple(PLACE_FORMS)),
}
"""Forms of reasoning for each task, in two groups; two in three draws take the first where there is a second."""

_FIND: Final[dict[str, Callable[[Scene], Iterator[Phrase[Any]]]]] = {
    **SHAPES_FORMS,
    **PLACE_FORMS,
    **COLOUR_FORMS,
    **KIND_FORMS,
}


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit with a plain instruction and one that needs reasoning; both determine the same target.

    Attributes:
        form: the form of reasoning of the advanced instruction, a key of `shapes_language.WORDINGS`.
        held_out: what of it no train or validation record shows: "combination" of colour and kind, "wording".
    """

    task: Task
    form: str
    source: Scene
    target: Scene
    simple: str
    advanced: str
    held_out: tuple[Literal["combination", "wording"], ...] = ()


def sample_edit(seed: int, split: Split, *, fronted: bool = True) -> Edit:
    """Draw the edit that belongs to a seed and a split: tasks are equally likely, and so are a task's forms.

    Args:
        seed: which edit.
        split: of the scenes.
        fronted: whether the wordings of train and validation have `FRONTED` among them.
    """
    rng = random.Random(f"{split}:{seed}")
    test = split == "test"
    task = rng.choice(TASKS)
    first, second = FORMS[task]
    form = rng.choice(second if second and rng.random() < 1 / 3 else first)
    combination, wording = test and rng.random() < HELD_OUT_SHARE, test and rng.random() < HELD_OUT_SHARE
    templates = TEMPLATES[task][-1:] if wording else TEMPLATES[task][:-1]
    if fronted and not test and task in FRONTED and random.Random(f"fronted:{split}:{seed}").random() < FRONTED_SHARE:
        templates = FRONTED[task]
    while True:
        source = draw_scene(rng, held_out=combination)
        if split_of(source) != split:
            continue
        edit = _draw_edit(task, form, source, templates, rng, held_out=wording)
        if edit is None or not is_regular(edit.target) or split_of(edit.target) != split:
            continue
        if combination or not has_held_out_combination(edit.target):
            return replace(edit, held_out=("combination",) * combination + ("wording",) * wording)


@dataclass(frozen=True, slots=True)
class Worded:
    """An advanced instruction, and the form of reasoning that it needs."""

    text: str
    form: str


def word_edit(
    task: Task, source: Scene, its: tuple[Shape, ...], new: Shape, rng: random.Random, count: int
) -> tuple[str, list[Worded]]:
    """Word an edit that is given: a simple instruction, and advanced ones, each of another form of reasoning.

    Args:
        task: what is done.
        source: the scene before.
        its: the shapes that are edited; none for add.
        new: what is put in, or of which a part is taken; for remove it does not matter.
        rng: chooses wordings, none of them held out.
        count: advanced instructions at most; a scene may offer fewer.
    """
    plain = _plain_slots(task, its, new, source)
    templates = TEMPLATES[task][:-1]
    advanced: list[Worded] = []
    forms = [form for group in FORMS[task] for form in group]
    for form in rng.sample(forms, len(forms)):
        phrases = [phrase for phrase in _FIND[form](source) if _picks(phrase, its, new)]
        if phrases and len(advanced) < count:
            slots = plain | _advanced_slot(task, rng.choice(phrases), new, rng, held_out=False)
            advanced.append(Worded(rng.choice(templates).format(**slots), form))
    return rng.choice(templates).format(**plain), advanced


def _picks(phrase: Phrase[Any], its: tuple[Shape, ...], new: Shape) -> bool:
    """Tell whether a phrase picks what an edit is about, and does not mention on the way what it changes."""
    if phrase.form in SHAPES_FORMS:
        return phrase.answer == its
    wanted = new.cell if phrase.form in PLACE_FORMS else new.colour if phrase.form in COLOUR_FORMS else new.kind
    return phrase.answer == wanted and not set(phrase.anchors) & set(its)


def outcome(edit: Edit) -> str:
    """Say what an edit comes to, without reasoning: each place that changes, before and after.

    "top left large red circle top left nothing, bottom middle nothing bottom middle large red circle" is a move. A
    place comes first, and always as row and column: a text encoder that reads from left to right says little of a place
    that comes last, and words that keep their positions are learnt faster.
    """
    before, after = ({shape.cell: shape for shape in scene.shapes} for scene in (edit.source, edit.target))
    changed = [cell for cell in range(len(PLACES)) if before.get(cell) != after.get(cell)]
    return ", ".join(" ".join(_lies(at.get(cell), cell) for at in (before, after)) for cell in changed)


def _lies(shape: Shape | None, cell: int) -> str:
    """Say what lies in a cell: "top left large red circle", "bottom middle nothing"."""
    content = "nothing" if shape is None else f"{shape.size} {shape.colour} {shape.kind}"
    return f"{_ROWS[cell // 3]} {_COLUMNS[cell % 3]} {content}"


def _draw_edit(
    task: Task, form: str, scene: Scene, templates: tuple[str, ...], rng: random.Random, *, held_out: bool
) -> Edit | None:
    """Draw an edit of a scene whose advanced instruction has the form; None where the scene offers none."""
    phrases = list(_FIND[form](scene))
    if not phrases:
        return None
    phrase = rng.choice(phrases)
    its = _draw_its(task, phrase, scene, rng)
    new = _draw_new(phrase, scene, rng)
    if its is None or not _changes(task, its, new):
        return None
    plain = _plain_slots(task, its, new, scene)
    advanced = plain | _advanced_slot(task, phrase, new, rng, held_out=held_out)
    # The only wording there is needs no draw, so that what training knows besides changes no edit of the test.
    template, other_template = (templates[0] if held_out else rng.choice(templates) for _ in range(2))
    target = _apply(task, scene, its, new)
    return Edit(task, form, scene, target, template.format(**plain), other_template.format(**advanced))


def _draw_its(task: Task, phrase: Phrase[Any], scene: Scene, rng: random.Random) -> tuple[Shape, ...] | None:
    """Return the shapes to edit: none for add; never one that the phrase mentions on the way."""
    if task == "add":
        return ()
    if phrase.form in SHAPES_FORMS:
        return phrase.answer
    free = [shape for shape in scene.shapes if shape not in phrase.anchors]
    return (rng.choice(free),) if free else None


def _draw_new(phrase: Phrase[Any], scene: Scene, rng: random.Random) -> Shape:
    """Draw the shape that add puts in, and of which the other tasks take a part; the phrase fixes one property."""
    taken = {shape.cell for shape in scene.shapes}
    return Shape(
        kind=phrase.answer if phrase.form in KIND_FORMS else rng.choice(KINDS),
        colour=phrase.answer if phrase.form in COLOUR_FORMS else rng.choice(COLOURS),
        size="small" if rng.random() < 0.4 else "large",
        cell=phrase.answer if phrase.form in PLACE_FORMS else rng.choice([c for c in range(9) if c not in taken]),
    )


def _changes(task: Task, its: tuple[Shape, ...], new: Shape) -> bool:
    """Tell whether every edited shape changes: its colour when recoloured, its kind when replaced."""
    if task == "recolour":
        return all(shape.colour != new.colour for shape in its)
    return task != "replace" or its[0].kind != new.kind


def _apply(task: Task, scene: Scene, its: tuple[Shape, ...], new: Shape) -> Scene:
    """Edit a scene."""
    shapes = tuple(shape for shape in scene.shapes if shape not in its)
    if task == "add":
        shapes += (new,)
    elif task == "replace":
        shapes += tuple(replace(shape, kind=new.kind, colour=new.colour) for shape in its)
    elif task == "recolour":
        shapes += tuple(replace(shape, colour=new.colour) for shape in its)
    elif task == "move":
        shapes += tuple(replace(shape, cell=new.cell) for shape in its)
    return Scene(scene.ground, shapes)


def _adjectives(task: Task, new: Shape, *colour: str) -> str:
    """Return what stands before the kind of a new shape: its size if an added one is small, its colour."""
    words = ("small",) * (task == "add" and new.size == "small") + colour
    return "".join(f"{word} " for word in words)


def _plain_slots(task: Task, its: tuple[Shape, ...], new: Shape, scene: Scene) -> dict[str, str]:
    words = f"{_adjectives(task, new, new.colour)}{new.kind}"
    return {
        "it": " and ".join(f"the {name(shape, scene)}" for shape in its),
        "new": article(words) + words,
        "colour": new.colour,
        "place": f"the {PLACES[new.cell]}",
    }


def _advanced_slot(
    task: Task, phrase: Phrase[Any], new: Shape, rng: random.Random, *, held_out: bool
) -> dict[str, str]:
    """Word the one part of the instruction that needs reasoning."""
    if phrase.form in KIND_FORMS:
        words = _adjectives(task, new, new.colour)
        return {"new": phrase.say(rng, held_out=held_out, a=article(words), adjectives=words)}
    said = phrase.say(rng, held_out=held_out)
    if phrase.form in SHAPES_FORMS:
        return {"it": said}
    if phrase.form in PLACE_FORMS:
        return {"place": said}
    words = f"{_adjectives(task, new)}{new.kind}"
    return {"colour": said, "new": f"{article(words)}{words} in {said}"}


def vocabulary_corpus() -> list[str]:
    """Return texts that hold every word of the world's language, to train a tokenizer on."""
    rng = random.Random("vocabulary")
    edits = [sample_edit(seed, "train", fronted=False) for seed in range(1500)]
    scenes = [sample_scene(rng, "train") for _ in range(1500)]
    texts = [text for edit in edits for text in (edit.simple, edit.advanced)]
    texts += [text for scene in scenes for text in (short_caption(scene, rng), *statements(scene, rng, 3))]
    texts += [text for scene in scenes for text in question_answer(scene, rng)]
    return texts
