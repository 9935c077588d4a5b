"""Scores out of what a language model wrote.

Models wrap JSON into fences and prose, forget quotes and brackets, and write `4/5`. All that is read, by a library
that mends JSON. The scores themselves are taken strictly: what is no whole number from 0 to 5 is invalid, never
rounded or clamped, since a model that says 7 may mean 7 of 10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import json_repair

from insightedit.platform.chat.wording import AnswerError, without_thoughts
from insightedit.platform.judges import TOP_SCORE, Aspect, Score

_NUMBER_CUT_OFF: Final = re.compile(r":\s*\"?[\d.]+\s*\Z")
"""A number at the very end of half a JSON: 3 may have become 3.5."""
_BARE_WORDS: Final = re.compile(r"([\"']\s*:\s*)(\d[^,\"'}\]\n]*)")
"""A number without quotes and what stands behind it: of a bare `4 / 10` the library would keep the 4."""
_FULL_MARKS: Final = re.compile(rf"(\d+)(?:\.0*)?\s*(?:(?:/|out of|of)\s*{TOP_SCORE}(?:\.0*)?)?\s*(?:points?)?", re.I)
"""A score in words: `4`, `4.0`, `4/5`, `4 out of 5`, `4 points`."""
_EXPLANATIONS: Final = ("explanation", "reasoning", "reason", "rationale", "justification", "comment")
_SCORES: Final = ("score", "value", "rating", "grade")


def read_answer(text: str, aspects: Iterable[Aspect]) -> dict[Aspect, Score]:
    """Read the scores of an answer.

    Args:
        text: what the model wrote.
        aspects: what it was asked to score.

    Raises:
        AnswerError: a score is missing or invalid.
    """
    fields = _fields(_NUMBER_CUT_OFF.sub(":", without_thoughts(text)))
    if not fields:
        raise AnswerError("there is no JSON object in it.")
    return {aspect: _score(aspect, fields) for aspect in aspects}


def _fields(text: str) -> dict[str, Any]:
    """The fields of every object in a text by their plain names; a later object overrules an earlier one."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        found = _loaded(text[start:])
    except (ValueError, RecursionError):  # of brackets without end
        return {}
    fields: dict[str, Any] = {}
    for one in cast(list[Any], found) if isinstance(found, list) else [found]:
        if isinstance(one, Mapping):
            fields |= _flattened(cast(Mapping[str, Any], one))
    return fields


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return json_repair.loads(_BARE_WORDS.sub(r'\1"\2"', text), skip_json_loads=True)


def _flattened(value: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their plain names, those of a wrapper such as `scores` beside its own."""
    named = {_plain(name): one for name, one in value.items()}
    wrapped = {
        # In `{"scores": {...}, "explanations": {...}}` the same names stand twice.
        _plain(name) + (_EXPLANATIONS[0] if wrapper.startswith(_EXPLANATIONS) else ""): one
        for wrapper, inside in named.items()
        if isinstance(inside, Mapping)
        for name, one in cast(Mapping[str, Any], inside).items()
        if _plain(name) not in (*_EXPLANATIONS, *_SCORES)
    }
    return wrapped | named


def _plain(name: str) -> str:
    """A name without what models vary: `Non-Overediting` is non_overediting."""
    return re.sub(r"[^a-z]", "", name.lower())


def _score(aspect: Aspect, fields: Mapping[str, Any]) -> Score:
    name = _plain(aspect)
    given = next((fields[one] for one in (name, f"{name}score") if one in fields), None)
    explanation = next((fields[name + end] for end in _EXPLANATIONS if name + end in fields), "")
    if isinstance(given, Mapping):
        inner = {_plain(key): one for key, one in cast(Mapping[str, Any], given).items()}
        explanation = next((inner[one] for one in _EXPLANATIONS if one in inner), explanation)
        given = next((inner[one] for one in _SCORES if one in inner), None)
    if given is None or given == "":
        raise AnswerError(f"the score of {aspect} is missing.")
    value = _whole(given)
    if value is None or value not in range(TOP_SCORE + 1):
        raise AnswerError(f"the score of {aspect} is {given!r}, and must be a whole number from 0 to {TOP_SCORE}.")
    return Score(value, _words(explanation))


def _whole(value: object) -> int | None:
    """A number if it is a whole one, however it is written."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        match = _FULL_MARKS.fullmatch(value.strip())
        return int(match[1]) if match else None
    return value if isinstance(value, int) else None


def _words(explanation: object) -> str:
    if isinstance(explanation, Sequence) and not isinstance(explanation, str):
        return " ".join(str(one) for one in cast(Sequence[object], explanation))
    return str(explanation).strip()
