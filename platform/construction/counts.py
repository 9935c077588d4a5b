"""What a construction comes to in figures: pairs, what each step turned down and why, and what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from insightedit.platform.construction.config import STEPS
from insightedit.platform.construction.output import count_pairs
from insightedit.platform.construction.photos import Change, Photo, Spent
from insightedit.platform.judges import ASPECTS


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """What became of pictures in one step."""

    photos: int
    """Pictures that it got."""
    rejected: dict[str, int]
    """What it turned down, by reason: pictures, things and edits."""
    spent: Spent

    def to_json(self) -> dict[str, Any]:
        """The figures under their names."""
        return {"photos": self.photos, "rejected": self.rejected, **self.spent.model_dump()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a construction comes to."""

    photos: int
    """Pictures, those that could not be read among them."""
    photos_with_pairs: int
    changes: int
    """Edits that were planned."""
    kept: int
    """Edits that passed every step; each is two pairs."""
    pairs: dict[str, int]
    """By task."""
    simple: int
    """Instructions."""
    advanced: int
    about: dict[str, int]
    """Advanced instructions by what their reasoning is about."""
    scores: dict[str, float]
    """Means over the edits that were kept."""
    steps: dict[str, StepCounts]
    seconds: float = 0.0
    """Of all runs together, by the clock."""
    truth: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """How right each step was, where the truth is known."""

    @property
    def pairs_per_hour(self) -> float:
        """How fast all went."""
        return sum(self.pairs.values()) / self.seconds * 3600 if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures under their names."""
        names = ("photos", "photos_with_pairs", "changes", "kept", "pairs", "simple", "advanced", "about", "scores")
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": self.seconds,
            "pairs_per_hour": self.pairs_per_hour,
            "steps": {name: step.to_json() for name, step in self.steps.items()},
            "truth": self.truth,
        }


def count(photos: Sequence[Photo], seconds: float, truth: dict[str, dict[str, float]]) -> Counts:
    """Count what became of photos.

    Args:
        photos: all of them.
        seconds: that the runs took by the clock.
        truth: how right each step was.
    """
    kept = [change for photo in photos for change in photo.kept]
    words = [words for change in kept for words in (change.there, change.back) if words is not None]
    advanced = [one for two in words for one in two.advanced]
    return Counts(
        photos=len(photos),
        photos_with_pairs=sum(bool(photo.kept) for photo in photos),
        changes=sum(len(photo.changes) for photo in photos),
        kept=len(kept),
        pairs=dict(sorted(count_pairs(photos).items())),
        simple=sum(len(two.simple) for two in words),
        advanced=len(advanced),
        about=dict(Counter(one.about for one in advanced).most_common()),
        scores=_mean_scores(kept),
        steps={name: found for name in ("read", *STEPS, "filter") if (found := _step(name, photos)) is not None},
        seconds=seconds,
        truth=truth,
    )


def _mean_scores(kept: Sequence[Change]) -> dict[str, float]:
    scored = [change.scores for change in kept if change.scores]
    return {aspect: sum(one[aspect].value for one in scored) / len(scored) for aspect in ASPECTS} if scored else {}


def _step(name: str, photos: Sequence[Photo]) -> StepCounts | None:
    """The figures of a step; None where it was not done."""
    rejected = Counter(one.reason for photo in photos for one in photo.rejections if one.step == name)
    spent = [photo.spent[name] for photo in photos if name in photo.spent]
    if not spent and not rejected and name != "read":
        return None
    total = Spent()
    for one in spent:
        total = total.plus(one)
    seen = len(photos) if name == "read" else len(spent)
    return StepCounts(photos=seen, rejected=dict(rejected.most_common()), spent=total)
