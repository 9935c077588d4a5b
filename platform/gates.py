"""The gates of a promotion: what decides, from the tables of two evaluations, whether a version may become champion.

Versions are compared case by case: the same picture, instruction and noise, edited by both. Scores are whole numbers
and many differences are 0, so no normal distribution is assumed; and the cases of one scene share picture and noise,
so only scenes count as independent. The test is therefore a sign-flip permutation test on scenes: if the two versions
are equally good, each scene's difference might as well have had the other sign, and the p-value is the share of random
sign choices whose sum is as high as the one seen. It is exact where the versions may be exchanged, whatever the scores'
distribution. Since flips leave the sum of squares as it is, it orders as a t statistic does, so that it also holds
for many scenes where only the means are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import UsageError
from insightedit.platform.results import SCORES, CaseResult, counted

Vector = NDArray[np.float64]
GateName = Literal["minimum", "judged", "better", "not-worse", "tasks", "latency"]

FLIPS: Final = 9999
"""Random sign choices: the least p-value is 1 in 10,000."""
_TIE: Final = 1e-9
"""Sums of tenths that are equal on paper differ by less than this."""
_NAMED_CASES: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one gate says."""

    gate: GateName
    passed: bool
    found: str
    """What it rests on, in words."""
    figures: dict[str, float] = field(default_factory=dict[str, float])
    cases: tuple[str, ...] = ()
    """The cases that weighed most against the version, the heaviest first, each with its weight in brackets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """The cases that both versions have a score for, and by how much the version's is higher (N,)."""

    cases: tuple[str, ...]
    scenes: NDArray[np.intp]
    """The number of each case's scene."""
    tasks: tuple[str, ...]
    gains: Vector
    unjudged: int
    """Cases that one of the two has no score for."""

    def of(self, task: str) -> Pairs:
        """Those of one task."""
        rows = [row for row, name in enumerate(self.tasks) if name == task]
        return Pairs(
            cases=tuple(self.cases[row] for row in rows),
            scenes=self.scenes[rows],
            tasks=tuple(self.tasks[row] for row in rows),
            gains=self.gains[rows],
            unjudged=0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A mean gain in VIEScore with its uncertainty."""

    gain: float
    low: float
    """Of the 95% interval, from the spread of scenes, within -1 and 1; likewise `high`."""
    high: float
    p: float
    """Of the one-sided test that the gain is above a bound."""
    cases: int
    scenes: int


def score(result: CaseResult) -> float | None:
    """The VIEScore that counts for a case: 0 where the version made no edit, None where the judge gave no score."""
    return counted(result, "viescore")


def paired(version: Sequence[CaseResult], champion: Sequence[CaseResult]) -> Pairs:
    """Put two evaluations beside each other.

    Raises:
        UsageError: they are not of the same cases and seeds.
    """
    others = {(one.case, one.seed): one for one in champion}
    if {(one.case, one.seed) for one in version} != set(others):
        raise UsageError("The two evaluations are not of the same cases and seeds: evaluate both versions again.")
    both = [(one, score(one), score(others[one.case, one.seed])) for one in version]
    known = [(one, mine, its) for one, mine, its in both if mine is not None and its is not None]
    numbers = {scene: number for number, scene in enumerate(dict.fromkeys(one.scene for one, _, _ in known))}
    return Pairs(
        cases=tuple(one.case for one, _, _ in known),
        scenes=np.array([numbers[one.scene] for one, _, _ in known], dtype=np.intp),
        tasks=tuple(one.task for one, _, _ in known),
        gains=np.array([mine - its for _, mine, its in known]),
        unjudged=len(both) - len(known),
    )


def compare(pairs: Pairs, bound: float = 0.0, sign: int = 1) -> Comparison:
    """Estimate the mean gain, and test whether it is above a bound.

    Args:
        pairs: at least one case.
        bound: what the gain must be above; negative for non-inferiority.
        sign: -1 tests whether the loss is above the bound.
    """
    numbers, scenes = np.unique(pairs.scenes, return_inverse=True)
    sums = _totals(scenes, sign * pairs.gains - bound)
    gain = float(pairs.gains.mean())
    # The mean is over cases, so a scene's share in it is the sum over its cases.
    spread = _spread(_totals(scenes, pairs.gains - gain)) / len(pairs.gains)
    return Comparison(
        gain=gain,
        low=max(gain - spread, -1.0),
        high=min(gain + spread, 1.0),
        p=float(sign_flip_p(sums)),
        cases=len(pairs.gains),
        scenes=len(numbers),
    )


def _spread(own: Vector) -> float:
    """Half the width of the 95% interval of a sum over scenes, by Student's t, as a task may have few of them.

    Args:
        own: (S,) each scene's deviation; one alone says nothing of its spread.
    """
    from scipy.special import stdtrit  # noqa: PLC0415 - half a second, which every command would take

    count = len(own)
    if count == 1:
        return math.inf
    return float(stdtrit(count - 1, 0.975) * np.sqrt((own**2).sum() * count / (count - 1)))


def _totals(scenes: NDArray[np.intp], values: Vector) -> Vector:
    """The sum of each scene's values."""
    return np.bincount(scenes, weights=values).astype(np.float64)


def sign_flip_p(sums: Vector) -> Vector:
    """One-sided p-values of the sign-flip test.

    Args:
        sums: (..., S) the sum of each scene's differences.

    Returns:
        (...) the share of sign choices, the one seen among them, that give a total as high.
    """
    totals = sums @ _signs(sums.shape[-1])
    seen = sums.sum(axis=-1, keepdims=True)
    return (1 + (totals >= seen - _TIE).sum(axis=-1)) / (1 + FLIPS)


@cache
def _signs(scenes: int) -> Vector:
    """Sign choices (S, FLIPS), always the same ones, so that a decision can be repeated."""
    return np.random.default_rng(0).choice(np.array([-1.0, 1.0]), size=(scenes, FLIPS))


def decide(
    version: Sequence[CaseResult], champion: Sequence[CaseResult] | None, config: PromotionConfig
) -> list[Verdict]:
    """What the gates say that rest on scores.

    Args:
        version: the evaluation of what wants to be champion.
        champion: that of the champion, on the same cases and seeds; None where there is none, and then only minimum
            scores are asked for, and that they are of nearly all cases.
        config: the gates' bounds.

    Raises:
        UsageError: the evaluations are of other cases, or a minimum is asked of a score that nobody gives.
    """
    verdicts = [_minimum(name, least, version) for name, least in config.minimum_scores().items()]
    if champion is None:
        unjudged = sum(score(one) is None for one in version)
        return [*verdicts, _judged(unjudged, len(version), "", config)] if unjudged else verdicts
    pairs = paired(version, champion)
    judged = _judged(pairs.unjudged, len(version), " for one of the two", config)
    if not pairs.cases:
        return [*verdicts, judged]
    return [*verdicts, judged, _compared(pairs, config), *_tasks(pairs, config)]


def latency_gate(version: float, champion: float, most: float) -> Verdict:
    """Whether an edit takes too long.

    Args:
        version: seconds of an edit.
        champion: seconds of an edit, measured alongside.
        most: the highest ratio of the two that passes.
    """
    ratio = version / champion
    return Verdict(
        gate="latency",
        passed=ratio <= most,
        found=(
            f"an edit takes {version:.3f} s and the champion's {champion:.3f} s, {ratio:.2f} times as long, and"
            f" {most:.2f} is the most"
        ),
        figures={"seconds": version, "champion_seconds": champion, "ratio": ratio, "most": most},
    )


def _minimum(name: str, least: float, results: Sequence[CaseResult]) -> Verdict:
    """Whether a mean score or metric is high enough; of an edit that was not made it is 0."""
    from insightedit.platform.metrics import METRICS  # noqa: PLC0415 - brings torch, which only a decision takes

    if name in METRICS and METRICS[name].better == "lower":
        raise UsageError(f"promotion.minimum asks for much {name}, of which less is better: leave it out.")
    made = {one.case: float(value) for one in results if (value := _value(name, one)) is not None}
    unmade = {one.case: 0.0 for one in results if one.unmade}
    if not made and len(unmade) < len(results):
        raise UsageError(
            f"The evaluation has {name} for no case: evaluate again, or leave it out of promotion.minimum."
        )
    values = made | unmade
    mean = sum(values.values()) / len(values)
    lowest = sorted(values, key=lambda case: values[case])[:_NAMED_CASES]
    shown = "VIEScore" if name == "viescore" else name
    return Verdict(
        gate="minimum",
        passed=mean > least,
        found=f"its {shown} is {mean:.3f} on {len(values)} cases, and a champion needs more than {least:.3f}",
        figures={name: mean, "least": least},
        cases=tuple(f"{case} ({values[case]:.2f})" for case in lowest),
    )


def _value(name: str, result: CaseResult) -> float | None:
    return counted(result, name) if name in ("viescore", *SCORES) else result.metrics.get(name)


def _judged(unjudged: int, cases: int, whose: str, config: PromotionConfig) -> Verdict:
    """Whether enough cases have scores: else a version could win by what the judge left out."""
    share = unjudged / cases
    return Verdict(
        gate="judged",
        passed=share <= config.max_unjudged,
        found=f"{share:.1%} of the cases have no score{whose}, and {config.max_unjudged:.1%} is the most",
        figures={"unjudged": share, "most": config.max_unjudged},
    )


def _compared(pairs: Pairs, config: PromotionConfig) -> Verdict:
    """Whether the version is better than the champion, or not worse by a margin."""
    better = config.compare == "better"
    tested = compare(pairs, config.margin if better else -config.margin)
    bound = f" by more than {config.margin:.3f}" if config.margin else ""
    wanted = f"it must be higher{bound}" if better else f"it must not be lower{bound}"
    return Verdict(
        gate=config.compare,
        passed=tested.p <= config.level,
        found=(
            f"its VIEScore differs from the champion's by {_in_words(tested)}, p = {tested.p:.4f}, and {wanted}"
            f" with p of at most {config.level:g}"
        ),
        figures=_figures(tested) | {"level": config.level},
        cases=_losses(pairs),
    )


def _tasks(pairs: Pairs, config: PromotionConfig) -> list[Verdict]:
    """Whether a task has fallen; the chance that noise alone makes one of them fall is kept at `task_level`."""
    names = sorted(set(pairs.tasks))
    level = config.task_level / len(names)
    verdicts: list[Verdict] = []
    for name in names:
        own = pairs.of(name)
        tested = compare(own, config.task_fall, sign=-1)
        verdicts.append(
            Verdict(
                gate="tasks",
                passed=tested.p > level,
                found=(
                    f"the task {name or 'without a name'} changed by {_in_words(tested)}, and a fall"
                    f" with p = {tested.p:.4f} counts as one from {level:.4f} down"
                ),
                figures=_figures(tested) | {"level": level},
                cases=_losses(own),
            )
        )
    return verdicts


def _in_words(tested: Comparison) -> str:
    return (
        f"{tested.gain:+.3f} (95% interval {tested.low:+.3f} to {tested.high:+.3f}) on {tested.cases} cases of"
        f" {tested.scenes} scenes"
    )


def _figures(tested: Comparison) -> dict[str, float]:
    return {
        "gain": tested.gain,
        "low": tested.low,
        "high": tested.high,
        "p": tested.p,
        "cases": tested.cases,
        "scenes": tested.scenes,
    }


def _losses(pairs: Pairs) -> tuple[str, ...]:
    """The cases on which the version lost most."""
    order = np.argsort(pairs.gains, kind="stable")[:_NAMED_CASES]
    return tuple(f"{pairs.cases[row]} ({pairs.gains[row]:+.2f})" for row in order if pairs.gains[row] < 0)
