"""Captions, objects, replacements and instructions from a language model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar, cast

from insightedit.platform.chat.wording import AnswerError, load_answer, without_thoughts
from insightedit.platform.construction.asking import Asker, Question
from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.construction.instructions import ABOUT, Direction
from insightedit.platform.construction.photos import Advanced, Photo, Rejected, Thing, Words
from insightedit.platform.construction.prompts import (
    CAPTION,
    HIDDEN,
    INSTRUCTIONS,
    OBJECTS,
    PLACED,
    REPLACEMENTS,
    SIMPLE,
    WHAT,
)
from insightedit.platform.construction.proposals import Replacement
from insightedit.platform.records import decode_image

_LONGEST_NAME: Final = 60
_LONGEST_TEXT: Final = 1500
_ARTICLE: Final = re.compile(r"^(?:the|an?|one)\s+", re.IGNORECASE)

T = TypeVar("T")


class AskedWords:
    """Captioner, finder of objects, proposer and writer that asks a language model."""

    def __init__(self, asker: Asker, config: ConstructionConfig) -> None:
        self._asker = asker
        # Some of the things that it names will not be found.
        self._most = 2 * config.objects_each
        self._advanced = config.advanced_each
        self._caption = config.caption_prompt or CAPTION

    def captions(self, photos: Sequence[Photo]) -> list[str | Rejected]:
        """See `captions.Captioner`."""
        return self._asker.ask([Question("caption", self._caption, (photo.pixels,), _read_caption) for photo in photos])

    def objects(self, photos: Sequence[Photo]) -> list[list[Thing] | Rejected]:
        """See `objects.ObjectFinder`."""
        read = partial(_read_things, most=self._most)
        texts = [OBJECTS.format(caption=photo.caption, most=self._most) for photo in photos]
        pairs = zip(photos, texts, strict=True)
        return self._asker.ask([Question("objects", text, (photo.pixels,), read) for photo, text in pairs])

    def replacements(self, photos: Sequence[Photo]) -> list[list[Replacement | Rejected]]:
        """See `proposals.Proposer`."""
        questions: list[Question[dict[str, Replacement]]] = []
        for photo in photos:
            things = "\n".join(f"- {thing.name}: {thing.caption}" for thing in photo.things)
            text = REPLACEMENTS.format(caption=photo.caption, things=things)
            questions.append(Question("replacements", text, (photo.pixels,), _read_replacements))
        answers = self._asker.ask(questions)
        return [_by_thing(photo, answer) for photo, answer in zip(photos, answers, strict=True)]

    def words(self, pairs: Sequence[Direction]) -> list[Words | Rejected]:
        """See `instructions.Writer`."""
        return self._asker.ask([self._question(pair) for pair in pairs])

    def _question(self, pair: Direction) -> Question[Words]:
        names = {"before": pair.before, "after": pair.after}
        edited = decode_image(pair.change.painted)
        pictures = (pair.photo.pixels, edited) if pair.way == "there" else (edited, pair.photo.pixels)
        simple = [text.format(**names) for text in SIMPLE[pair.task]]
        caption = pair.change.new_caption if pair.after == pair.change.new_name != "" else pair.change.thing.caption
        # What comes anew is nowhere to be seen: its name has to be said.
        hidden = pair.before
        text = INSTRUCTIONS.format(
            what=WHAT[pair.task].format(**names, caption=caption),
            simple=simple[0],
            count=self._advanced,
            rule=HIDDEN.format(name=hidden) if hidden else PLACED,
        )
        read = partial(_read_instructions, simple=simple, hidden=hidden, count=self._advanced)
        return Question("instructions", text, pictures, read)


def _by_thing(photo: Photo, found: dict[str, Replacement] | Rejected) -> list[Replacement | Rejected]:
    if isinstance(found, Rejected):
        return [found for _ in photo.things]
    missing = Rejected("missing", "The model proposed nothing for it.")
    return [found.get(thing.name.lower(), missing) for thing in photo.things]


def _read_caption(text: str) -> str:
    caption = " ".join(without_thoughts(text).split())
    if len(caption.split()) < 3:
        raise AnswerError("it is no description of the picture.")
    return caption[:_LONGEST_TEXT]


def _read_things(text: str, most: int) -> list[Thing]:
    things = [
        Thing(name=name, category=_text(row, "category", 40).lower(), caption=_text(row, "caption") or name)
        for row in _rows(text, "objects")
        if (name := _name(row, "name"))
    ]
    return things[:most]


def _read_replacements(text: str) -> dict[str, Replacement]:
    found: dict[str, Replacement] = {}
    for row in _rows(text, "replacements"):
        name, new = _name(row, "name"), _name(row, "new_name")
        if name and new:
            found[name] = Replacement(new, _text(row, "new_caption") or new)
    if not found:
        raise AnswerError("no replacement in it has a name and a new_name.")
    return found


def _read_instructions(text: str, simple: Sequence[str], hidden: str, count: int) -> Words:
    """The advanced instructions of an answer; one that says outright what it should hint at is none."""
    advanced: list[Advanced] = []
    for row in _rows(text, "instructions"):
        said, about = _text(row, "text"), _text(row, "about", 40).lower().replace("color", "colour")
        if said and not (hidden and re.search(rf"\b{re.escape(hidden)}\b", said, re.IGNORECASE)):
            advanced.append(Advanced(text=said, about=about if about in ABOUT else "other"))
    if not advanced:
        problem = f'each instruction says "{hidden}" outright.' if hidden else "no instruction in it has a text."
        raise AnswerError(problem)
    return Words(simple=list(simple), advanced=advanced[:count])


def _rows(text: str, field: str) -> list[Mapping[str, Any]]:
    """The objects of a list in an answer, whether it stands alone or in the field that was asked for.

    Raises:
        AnswerError: there is no such list.
    """
    found = load_answer(text)
    if isinstance(found, Mapping):
        found = cast(Mapping[str, Any], found).get(field)
    if not isinstance(found, list):
        raise AnswerError(f"there is no list {field} in it.")
    rows = [cast(Mapping[str, Any], row) for row in cast(list[Any], found) if isinstance(row, Mapping)]
    if found and not rows:
        raise AnswerError(f"the list {field} does not hold objects.")
    return rows


def _name(row: Mapping[str, Any], field: str) -> str:
    """A name without its article, in small letters; nothing where it is none."""
    name = _ARTICLE.sub("", _text(row, field, 2 * _LONGEST_NAME)).strip(" .").lower()
    return name if len(name) <= _LONGEST_NAME else ""


def _text(row: Mapping[str, Any], field: str, longest: int = _LONGEST_TEXT) -> str:
    """A text of an answer on one line, without half characters, which escapes can say; nothing where it is none."""
    value = row.get(field)
    if not isinstance(value, str):
        return ""
    return " ".join(value.replace("\0", " ").encode("utf-8", "ignore").decode().split())[:longest]
