"""What instructions are about: the kind of edit, its keywords, and whether one has to reason to follow it.

Rules over words, without any model, so that every dataset is held against the same ones:

- **Kind.** The dataset's own name of it where it has one; else the first verb that says removal, addition or
  replacement ("erase", "insert", "swap").
- **Keywords.** The thing's name: of what follows the verb, up to the first preposition, the last word, made singular. A
  replacement has two, before and after "with", "into", "to" or "by". Colours and sizes are no names of things.
- **Reasoning.** An instruction counts when it has one of the signs below: it asks, describes a thing by a clause or by
  what it is for, compares, excludes, counts, refers to another thing's property, or leaves the thing without its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

Kind = Literal["removal", "replacement", "addition", "other"]
KINDS: Final[tuple[Kind, ...]] = ("removal", "replacement", "addition", "other")

_WORD: Final = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|\d+")


def _set(*lines: str) -> frozenset[str]:
    """The words in lines of words."""
    return frozenset(word for line in lines for word in line.split())


_NAMES: Final[Mapping[str, Kind]] = {
    "remove": "removal",
    "removal": "removal",
    "delete": "removal",
    "add": "addition",
    "addition": "addition",
    "insert": "addition",
    "replace": "replacement",
    "replacement": "replacement",
    "swap": "replacement",
}
"""What datasets call the kinds."""
_VERBS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("remove", "delete", "erase", "eliminate", "take", "rid", "clear", "wipe"), "removal"),
    **dict.fromkeys(("add", "insert", "place", "put", "draw", "include", "attach", "introduce"), "addition"),
    **dict.fromkeys(
        ("replace", "swap", "substitute", "exchange", "switch", "change", "turn", "transform", "convert"), "replacement"
    ),
}
_SWAP: Final = "<swap>"
_INSTEAD: Final = re.compile(r"\b(?:in (?:place|exchange)(?: of| for)|instead of)\b")
_SWAPS: Final = frozenset({_SWAP, "with", "into", "to", "by", "for"})
"""What stands between the two things of a replacement."""
_PREPOSITIONS: Final = _set(
    "about above across after against along among around as at before behind below beneath beside between beyond by",
    "down during for from in inside into near next of off on onto out outside over past so that through to toward",
    "towards under underneath until upon using where which while who whose with within without",
)
_ENDS: Final = _PREPOSITIONS | _SWAPS | _VERBS.keys() | {".", ";"}
"""What ends the name of a thing."""
_PARTICLES: Final = frozenset(
    {"away", "out", "off", "up", "down", "back", "completely", "please", "here", "there", "it"}
)
_MEASURES: Final = _set("bunch couple group kind number pair piece set slice sort type")
_NO_NAMES: Final = _set(
    "a an the this that these those some any all both every each another other one ones his her its their my your our"
    " red orange yellow green blue purple pink brown black white gray grey golden gold silver dark light bright"
    " small large big little tiny huge tall short long new old more few several many two three four five six"
)
_PLURAL_FORMS: Final = {"men": "man", "women": "woman", "children": "child", "people": "person", "leaves": "leaf"}
_ALWAYS: Final = _set(
    "bus chess clothes dress glass glasses grass headphones jeans lens pants scissors shorts stairs sunglasses"
)
"""Words in s that stay as they are."""

_SIGNS: Final[Mapping[str, re.Pattern[str]]] = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "asks": r"\?|\b(?:can|could|would|will) you\b|\b(?:identify|locate|spot|find|notice|figure out|look for)\b",
        "clause": r"\b(?:who|whose|what|which|whatever)\b|\b(?:one|thing|object|item|shape|part|animal|piece)s? that\b"
        r"|\b(?:the|a|an) [\w-]+ (?:that|where)\b",
        "use": r"\b(?:used?|meant|designed|intended|suitable|needed) (?:to|for|as)\b|\b(?:able to|capable of)\b"
        r"|\b(?:could|can|would|might)\b(?! you)",
        "compares": r"\b(?:most|least|more|fewer|fewest|less|than|same|different|opposite|odd|biggest)\b"
        r"|\b(?:larg|small|bigg|tall|short|long|high|low|near|clos|bright|dark|old|young|far|farth|furth|left|right|top)(?:e?st|most)\b",
        "excludes": r"\b(?:except|besides|apart from|other than|neither|nothing but|not|only|without any)\b",
        "counts": r"\b(?:first|second|third|fourth|last|number|count|how many|as many|pair|twice|half)\b",
        "relates": r"\b(?:between|colou?r of|in the colou?r|kind of|mix(?:ed|ture)?|of the two|missing|alone)\b",
        "unnamed": r"\b(?:animal|creature|element|feature|item|object|one|place|shape|spot|structure|thing)s?"
        r"(?: just)? (?:above|at|behind|below|beside|by|in|left|near|next|on|right|under)\b",
    }.items()
}
"""What shows that an instruction needs more than the names in it."""


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def kind_of(category: str, instruction: str) -> Kind:
    """The kind of an edit, by the dataset's own name of it or else by its first verb that says it."""
    if category:
        return _NAMES.get(category.strip().lower(), "other")
    if _INSTEAD.search(instruction.lower()):
        return "replacement"
    for word in words(instruction):
        if word in _VERBS:
            return _VERBS[word]
    return "other"


def keywords(kind: Kind, instruction: str) -> list[str]:
    """The names of the things that a simple instruction is about, singular, in its order."""
    named = (_name(part) for phrase in _phrases(kind, instruction) for part in _parts(phrase))
    return list(dict.fromkeys(name for name in named if name))


def signs_of_reasoning(instruction: str) -> tuple[str, ...]:
    """The signs that one has to reason to follow an instruction; none where its words name what is to be done."""
    return tuple(name for name, pattern in _SIGNS.items() if pattern.search(instruction))


def _phrases(kind: Kind, instruction: str) -> list[list[str]]:
    """What follows the verb, and in a replacement what stands for the other thing, up to the next preposition."""
    marked = _INSTEAD.sub(" ~ ", instruction.lower())
    said = [_SWAP if word == "~" else word for word in re.findall(rf"{_WORD.pattern}|[~,.;]", marked)]
    verb = next((place for place, word in enumerate(said) if word in _VERBS), None)
    starts = [] if verb is None else [verb]
    if kind == "replacement":
        starts += [place for place, word in enumerate(said) if word in _SWAPS and _is_swap(word, place, verb)][:1]
    return [_phrase(said[start + 1 :]) for start in sorted(starts)]


def _is_swap(word: str, place: int, verb: int | None) -> bool:
    return word == _SWAP or (verb is not None and place > verb)


def _phrase(said: Sequence[str]) -> list[str]:
    """The words up to the first preposition; what only measures ("a pair of") is passed over."""
    found: list[str] = []
    for word in said:
        if not found and word in _PARTICLES | {"of"}:
            continue
        if word == "of" and found and found[-1] in _MEASURES:
            found = []
        elif word in _ENDS:
            break
        else:
            found.append(word)
    return found


def _parts(phrase: Iterable[str]) -> list[list[str]]:
    """Things that are listed with "and" or commas."""
    parts: list[list[str]] = [[]]
    for word in phrase:
        if word in {"and", "or", ","}:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _name(part: Sequence[str]) -> str:
    """The last word that can be a thing's name, singular; empty where there is none."""
    said = [word for word in part if word not in _PARTICLES]
    last = said[-1] if said else ""
    return "" if last in _NO_NAMES or last.isdecimal() else _singular(last)


def _singular(word: str) -> str:
    if word in _PLURAL_FORMS:
        return _PLURAL_FORMS[word]
    if word in _ALWAYS or not word.endswith("s") or word.endswith(("ss", "us", "is")) or len(word) < 4:
        return word
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "sses")) else word[:-1]
