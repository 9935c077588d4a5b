"""How a new model version takes over from the one that is served: loading, then a share of the edits, then all.

Nothing here waits, asks or starts anything: a rollout is told what was seen and when, and says what it has come to.
What is seen of both versions is compared, so that a slow hour or a broken disk is not held against the new one alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from insightedit.serve.settings import RolloutSettings

State = Literal["loading", "canary", "full", "rolled_back"]
"""`canary`: some edits are made by the new version. `full` and `rolled_back` are the two ends."""

SECONDS_KEPT = 200
"""How many edits' times a tally holds, the newest: enough for a median."""
_ERRORS_OF_MEAN = 2.0
"""Standard errors by which a difference must be beyond its margin: what chance gives once in forty times."""


class Tally(BaseModel):
    """What was seen of one version since the rollout began to send it edits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    answers: int = 0
    failures: int = 0
    """Edits that it failed at and the other version did not."""
    seconds: tuple[float, ...] = ()
    """Time of an edit, the newest of them."""
    accepted: int = 0
    rejected: int = 0
    """What users said of its edits."""

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            answers=self.answers + other.answers,
            failures=self.failures + other.failures,
            seconds=(*self.seconds, *other.seconds),
            accepted=self.accepted + other.accepted,
            rejected=self.rejected + other.rejected,
        )

    def answered(self, seconds: float) -> Tally:
        """With one more edit."""
        update = {"answers": self.answers + 1, "seconds": (*self.seconds, seconds)[-SECONDS_KEPT:]}
        return self.model_copy(update=update)

    def failed(self) -> Tally:
        """With one more failure."""
        return self.model_copy(update={"failures": self.failures + 1})

    def judged(self, accepted: bool) -> Tally:
        """With one more of its edits accepted or rejected by its user."""
        name = "accepted" if accepted else "rejected"
        return self.model_copy(update={name: getattr(self, name) + 1})


class Evidence(BaseModel):
    """What was seen of both versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    new: Tally = Tally()
    old: Tally = Tally()
    pairs: tuple[tuple[float, float], ...] = ()
    """Quality, 0 to 1, of the same edit by the new and by the old version."""

    def __add__(self, other: Evidence) -> Evidence:
        """Both together."""
        return Evidence(new=self.new + other.new, old=self.old + other.old, pairs=self.pairs + other.pairs)

    @classmethod
    def total(cls, parts: Iterable[Evidence]) -> Evidence:
        """All together."""
        return sum(parts, Evidence())


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A version on its way, as far as it has come."""

    version: str
    old: str
    """The version that it takes over from."""
    entry: int
    """The audit entry that asked for it."""
    since: float
    """When its state began, in seconds of any clock that only goes forward."""
    state: State = "loading"
    reason: str = ""
    """Why it was rolled back."""

    @classmethod
    def begun(cls, version: str, old: str, entry: int, now: float) -> Self:
        """A rollout that begins to load its version."""
        return cls(version=version, old=old, entry=entry, since=now)

    @property
    def over(self) -> bool:
        """Whether it has come to an end."""
        return self.state in ("full", "rolled_back")

    def waited(self, now: float, settings: RolloutSettings) -> Rollout:
        """After some time: a version that does not load is given up."""
        if self.state == "loading" and now - self.since > settings.load_seconds:
            return self.failed(f"it did not load within {settings.load_seconds:g} seconds", now)
        return self

    def loaded(self, now: float) -> Rollout:
        """After its replicas have come up and made edits."""
        return replace(self, state="canary", since=now) if self.state == "loading" else self

    def full(self, now: float) -> Rollout:
        """After it was given all edits."""
        return self if self.over else replace(self, state="full", since=now)

    def failed(self, reason: str, now: float) -> Rollout:
        """After something that rules the version out."""
        return self if self.over else replace(self, state="rolled_back", since=now, reason=reason)

    def seen(self, evidence: Evidence, now: float, settings: RolloutSettings) -> Rollout:
        """After looking at what was seen of it: rolled back, full, or still on its way."""
        reason = why_worse(evidence, settings)
        if reason is not None:
            return self.failed(reason, now)
        if self.state != "canary":
            return self
        seconds, edits = now - self.since, evidence.new.answers + evidence.new.failures
        enough = edits >= settings.min_requests and seconds >= settings.min_seconds
        if enough or seconds >= settings.max_seconds:
            return self.full(now)
        return self


def why_worse(evidence: Evidence, settings: RolloutSettings) -> str | None:
    """In what the new version is worse than the old one; None while nothing says so."""
    new, old = evidence.new, evidence.old
    return (
        _fails_more(new, settings)
        or _is_slower(new.seconds, old.seconds, settings)
        or _is_of_less_quality(evidence.pairs, settings)
        or _is_rejected_more(new, old, settings)
    )


def _fails_more(new: Tally, settings: RolloutSettings) -> str | None:
    edits = new.answers + new.failures
    if new.failures >= settings.min_failures and new.failures > settings.max_failed * edits:
        return f"{new.failures} of {edits} edits failed by it and not by the old version"
    return None


def _is_slower(new: Sequence[float], old: Sequence[float], settings: RolloutSettings) -> str | None:
    if min(len(new), len(old)) < settings.min_timed:
        return None
    ours, theirs = statistics.median(new), statistics.median(old)
    if ours > settings.max_slowdown * theirs + settings.slack_seconds:
        return f"an edit takes {ours:.2f} seconds by it and {theirs:.2f} by the old version"
    return None


def _is_of_less_quality(pairs: Sequence[tuple[float, float]], settings: RolloutSettings) -> str | None:
    if len(pairs) < max(settings.min_pairs, 2):
        return None
    losses = [old - new for new, old in pairs]
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    if statistics.mean(losses) - _ERRORS_OF_MEAN * error > settings.quality_margin:
        ours, theirs = (statistics.mean(values) for values in zip(*pairs, strict=True))
        return f"its quality is {ours:.2f} and the old version's {theirs:.2f}, on the same {len(pairs)} edits"
    return None


def _is_rejected_more(new: Tally, old: Tally, settings: RolloutSettings) -> str | None:
    ours, theirs = new.accepted + new.rejected, old.accepted + old.rejected
    if min(ours, theirs) < settings.min_verdicts:
        return None
    mine, other = new.rejected / ours, old.rejected / theirs
    both = (new.rejected + old.rejected) / (ours + theirs)
    error = math.sqrt(both * (1 - both) * (1 / ours + 1 / theirs))
    if mine - other - _ERRORS_OF_MEAN * error > settings.reject_margin:
        return f"users reject {mine:.0%} of its edits and {other:.0%} of the old version's"
    return None
