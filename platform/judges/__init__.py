"""Who scores edits: the interface that every judge has, and what it hands on.

A judge gives four integer scores from 0 to 5, the paper's VIEScore, each with its explanation, or says why it could
not. `insightedit.platform.judges.choosing` makes the judge that a config names.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.chat import asking
from insightedit.platform.chat.asking import Spending

Picture: TypeAlias = NDArray[np.uint8]
"""Pixels (H, W, 3), RGB, as people get them."""

Aspect = Literal["instruction_adherence", "non_overediting", "naturalness", "no_artifacts"]
"""What is scored. The first two are semantic consistency, the others perceptual quality."""
ASPECTS: Final[tuple[Aspect, ...]] = get_args(Aspect)
TOP_SCORE: Final = 5

Reason = Literal[asking.Reason, "no_edit"]
"""Why an edit has no scores: the model gave no answer, or, asked twice, none with valid scores; or there is no edit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What is known of an edit in the world of shapes."""

    target: Picture
    """What the edit should be."""
    keep_regions: tuple[NDArray[np.bool_], ...]
    """Masks (H, W) of what must not change."""
    ground: Picture
    """What lies behind the shapes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeEdit:
    """One edit to be judged."""

    source: Picture
    edit: Picture
    """What the editor made of it, nothing pasted back; it may be of another size."""
    instruction: str
    truth: Truth | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """One score.

    Attributes:
        value: 0 is worst, 5 best.
        explanation: the judge's own words; empty where it gave none.
        raw: before rounding, where the judge computes it.
    """

    value: int
    explanation: str
    raw: float | None = None

    def __post_init__(self) -> None:
        if self.value not in range(TOP_SCORE + 1):
            raise ValueError(f"A score must be an integer from 0 to {TOP_SCORE}, and {self.value} is none.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The four scores of one edit."""

    instruction_adherence: Score
    """S_i, how far the instruction was followed."""
    non_overediting: Score
    """S_n, how far the rest was left alone."""
    naturalness: Score
    no_artifacts: Score

    @property
    def viescore(self) -> float:
        """The edit's VIEScore for a benchmark, 0 to 1."""
        return viescore(self.instruction_adherence.value, self.non_overediting.value)

    @property
    def original_viescore(self) -> float:
        """The edit's VIEScore as its authors aggregate it, 0 to 1."""
        return original_viescore(
            (self.instruction_adherence.value, self.non_overediting.value),
            (self.naturalness.value, self.no_artifacts.value),
        )


@dataclass(frozen=True, slots=True)
class Failed:
    """An edit that could not be judged.

    Attributes:
        reason: one of few, to be counted.
        detail: what happened, in one sentence.
    """

    reason: Reason
    detail: str


Verdict: TypeAlias = Scores | Failed
"""What a judge says about one edit."""


@dataclass(slots=True)
class Costs(Spending):
    """What judging took so far."""

    failures: Counter[Reason] = field(default_factory=Counter[Reason])
    """Edits without scores, by reason."""

    def to_json(self) -> dict[str, Any]:
        """The figures under their names."""
        return {**asdict(self), "failures": dict(self.failures)}


Progress = Callable[[int, int], None]
"""Is told how many edits of how many are judged."""


class Judge(Protocol):
    """Scores edits."""

    @property
    def identity(self) -> str:
        """What the scores depend on beside the edits; figures of two judges do not compare."""
        ...

    @property
    def costs(self) -> Costs:
        """What this judge took since it was made."""
        ...

    def judge(self, edits: Sequence[MadeEdit], progress: Progress | None = None) -> list[Verdict]:
        """Score edits, each by itself; one that cannot be judged stops no other.

        Args:
            edits: the edits.
            progress: is told how far it is.

        Raises:
            UsageError: this judge cannot judge such edits at all, or is not let in anywhere.
        """
        ...


def viescore(s_i: float, s_n: float) -> float:
    """Join instruction adherence and non-overediting, each 0 to 5, to a score from 0 to 1 (equation 1)."""
    return (s_n / TOP_SCORE + s_i / TOP_SCORE) / 2


def original_viescore(consistency: Sequence[float], quality: Sequence[float]) -> float:
    """Join scores as VIEScore's authors do: sqrt(SC * PQ), each of the two the least of its scores (arXiv 2312.14867).

    Theirs run from 0 to 10 and the result likewise; here scores run from 0 to 5 and the result from 0 to 1.

    Args:
        consistency: the scores of semantic consistency.
        quality: the scores of perceptual quality.
    """
    return math.sqrt(min(consistency) * min(quality)) / TOP_SCORE


def scores_by_aspect(scores: Mapping[Aspect, Score]) -> Scores:
    """The scores of all four aspects as one object."""
    return Scores(**{aspect: scores[aspect] for aspect in ASPECTS})


def picture_hash(picture: Picture) -> str:
    """A sha256 over a picture's size and pixels."""
    digest = hashlib.sha256(repr(picture.shape).encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()
