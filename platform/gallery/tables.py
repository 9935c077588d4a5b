"""A dataset in figures, and its pairs that can be shown, out of the facts of its records."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

from insightedit.platform.gallery.survey import Facts
from insightedit.platform.gallery.wording import KINDS, Kind, keywords, signs_of_reasoning, words
from insightedit.platform.judges import ASPECTS, Aspect, Score

VOCABULARY_OF: Final = 1000
"""Instructions that the vocabulary is counted in: larger samples have more words, so all datasets have the same."""
_SCORES: Final[Mapping[str, Aspect]] = dict(
    zip(("instruction_follow", "non-overedit", "naturalness", "no_artifacts"), ASPECTS, strict=True)
)
"""What AdvancedEdit calls the scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An edit that can be shown."""

    key: str
    kind: Kind
    simple: str
    """Empty where it has none."""
    advanced: str
    source: bytes
    target: bytes
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def instructions(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(text for text in (self.simple, self.advanced) if text)

    @property
    def keyword(self) -> str:
        """What it is about, in one word; empty where that is not found."""
        return next(iter(keywords(self.kind, self.simple)), "")

    @property
    def scores(self) -> dict[Aspect, Score]:
        """The dataset's own, with the judge's words where it has them."""
        values: dict[str, Any] = self.details.get("scores") or {}
        said: dict[str, str] = self.details.get("explanations") or {}
        return {
            aspect: Score(round(values[name]), said.get(name, "")) for name, aspect in _SCORES.items() if name in values
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean over pairs."""

    mean: float
    pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFigures:
    """A dataset in figures, of those records that were read."""

    name: str
    reader: str
    records: int
    bad: int
    """Rows that cannot be used."""
    about: int
    """How many records the dataset has, about."""
    tasks: Mapping[str, int]
    kinds: Mapping[str, int]
    """Edits by kind."""
    resolution: tuple[int, int]
    """Width and height of the median picture, in pixels, by area."""
    smallest: tuple[int, int]
    largest: tuple[int, int]
    instruction_words: float
    """Words of an instruction, on average."""
    words_by_wording: Mapping[str, float]
    vocabulary: int
    """Different words in `vocabulary_of` instructions."""
    vocabulary_of: int
    reasoning: float
    """Share of instructions with a sign of reasoning (`insightedit.platform.gallery.wording`)."""
    labelled: float | None
    """Share of instructions that the dataset itself calls advanced; None where it has no such word."""
    agreement: float | None
    """Share of instructions for which the sign says what the dataset's own word says."""
    signs: Mapping[str, int]
    outside: Mapping[str, Mean]
    """`psnr` in dB and `ssim` of target and source outside the mask; empty where the dataset has no masks."""
    whole: Mapping[str, Mean]
    """The same over the whole picture."""


def figures_of(name: str, reader: str, facts: Sequence[Facts], bad: int, about: int, seed: int) -> DatasetFigures:
    """The figures of a dataset.

    Args:
        name: what it is called in the report.
        reader: which read it.
        facts: of its records, at least one.
        bad: rows that cannot be used.
        about: records that it has, about.
        seed: chooses the instructions that the vocabulary is counted in.
    """
    sizes = sorted((one.size for one in facts if one.size[0]), key=lambda size: (size[0] * size[1], size)) or [(0, 0)]
    found = [signs_of_reasoning(one.instruction) for one in facts]
    worded = [(one.wording == "advanced", bool(signs)) for one, signs in zip(facts, found, strict=True) if one.wording]
    sample = random.Random(seed).sample(facts, min(VOCABULARY_OF, len(facts)))
    lengths = [len(words(one.instruction)) for one in facts]
    return DatasetFigures(
        name=name,
        reader=reader,
        records=len(facts),
        bad=bad,
        about=about,
        tasks=dict(Counter(one.task for one in facts).most_common()),
        kinds=_kinds(facts),
        resolution=sizes[len(sizes) // 2],
        smallest=sizes[0],
        largest=sizes[-1],
        instruction_words=fmean(lengths),
        words_by_wording={
            wording: fmean(length for one, length in zip(facts, lengths, strict=True) if one.wording == wording)
            for wording in sorted({one.wording for one in facts if one.wording}, reverse=True)
        },
        vocabulary=len({word for one in sample for word in words(one.instruction)}),
        vocabulary_of=len(sample),
        reasoning=fmean(bool(signs) for signs in found),
        labelled=fmean(label for label, _ in worded) if worded else None,
        agreement=fmean(label == sign for label, sign in worded) if worded else None,
        signs=dict(Counter(sign for signs in found for sign in signs).most_common()),
        outside=_means([one.outside for one in _one_each(facts)]),
        whole=_means([one.whole for one in _one_each(facts)]),
    )


def keyword_counts(facts: Sequence[Facts]) -> dict[str, Counter[str]]:
    """How often each keyword is in simple instructions: of removals and additions, and of replacements."""
    counts = {"Removal and addition": Counter[str](), "Replacement": Counter[str]()}
    for one in facts:
        if one.kind != "other" and one.wording != "advanced":
            heading = "Replacement" if one.kind == "replacement" else "Removal and addition"
            counts[heading].update(keywords(one.kind, one.instruction))
    return counts


def pairs_of(facts: Sequence[Facts]) -> list[Pair]:
    """The pairs whose pictures were taken along, in the order in which they were read."""
    groups: dict[str, list[Facts]] = {}
    for one in facts:
        if one.source is not None and one.target is not None:
            groups.setdefault(one.key, []).append(one)
    return [_pair(key, group) for key, group in groups.items()]


def _pair(key: str, group: Sequence[Facts]) -> Pair:
    """One pair; an instruction of which the dataset does not say it counts as simple unless it shows reasoning."""
    said: dict[str, str] = {}
    for one in group:
        wording = one.wording or ("advanced" if signs_of_reasoning(one.instruction) else "simple")
        said.setdefault(wording, one.instruction)
    first = group[0]
    return Pair(
        key=key,
        kind=first.kind,
        simple=said.get("simple", ""),
        advanced=said.get("advanced", ""),
        source=first.source or b"",
        target=first.target or b"",
        details=first.details,
    )


def _kinds(facts: Sequence[Facts]) -> dict[str, int]:
    counts = Counter(one.kind for one in _one_each(facts) if one.task == "edit")
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _one_each(facts: Sequence[Facts]) -> list[Facts]:
    """One record of each pair."""
    return list({one.key: one for one in facts}.values())


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    names = ("psnr", "ssim")
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: Mean(mean=fmean(values), pairs=len(values)) for name, values in found.items() if values}
