"""What a comparison of methods finds out: figures of each, paired differences, and answers to questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from insightedit.platform.errors import InsightEditError
from insightedit.platform.intervals import Estimate, estimate_over_seeds
from insightedit.platform.methods import MEASURES, ComparisonConfig, QuestionConfig
from insightedit.platform.metrics import METRICS
from insightedit.platform.results import CaseResult, counted

WORDINGS: Final = ("all", "simple", "advanced")
Verdict = Literal["better", "worse", "not shown"]

Rows = Mapping[int, Sequence[CaseResult]]
"""A method's results by seed. A method that is not trained has one seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a method was given."""

    title: str
    seeds: tuple[int, ...]
    samples: int | None = None
    """In one training, over all its stages; None for what was not trained here."""
    seconds: float | None = None
    """Of the steps of one training, the mean over seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodFigures:
    """A method's figures with intervals over scenes and seeds."""

    trained: Trained
    figures: Mapping[str, Mapping[str, Estimate]]
    """By measure and wording; what no case has is not there."""
    by_seed: Mapping[str, Mapping[int, float]]
    """Means of all cases, by measure and seed."""
    failed: int
    """Edits that could not be made, whose scores count as 0, or not be judged; over all seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much a method's figure is above another's on the same cases."""

    against: str
    measure: str
    estimate: Estimate
    verdict: Verdict
    """`better` or `worse` where the interval excludes 0, with regard to whether more is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question, and the differences that answer it."""

    question: QuestionConfig
    differences: Sequence[Difference]

    @property
    def said(self) -> str:
        """The answer in words, as far as the intervals say something."""
        counts = {kind: sum(one.verdict == kind for one in self.differences) for kind in ("better", "worse")}
        if not self.differences:
            return "Not measured."
        if counts["better"] == len(self.differences):
            return "Yes, by every measure."
        if counts["worse"] == len(self.differences):
            return "No, the opposite by every measure."
        if not any(counts.values()):
            return "Not shown: every interval holds 0."
        rest = len(self.differences) - sum(counts.values())
        return (
            f"Partly: {counts['better']} of {len(self.differences)} better, {counts['worse']} worse, {rest} not shown."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodComparison:
    """A whole comparison."""

    name: str
    scenes: int
    cases: str
    """sha256 over scenes, instructions, noise seeds and who judged."""
    judge: str
    methods: Mapping[str, MethodFigures]
    answers: Sequence[Answer]
    missing: Mapping[str, str] = field(default_factory=dict[str, str])
    """Metrics that no edit has, with the reason."""
    pending: Sequence[str] = ()
    """Methods and seeds that were asked for and are not done."""

    @property
    def one_seed(self) -> bool:
        """Whether intervals say nothing of what another training would give."""
        trained = [one.trained for one in self.methods.values() if one.trained.samples is not None]
        return any(len(one.seeds) == 1 for one in trained)

    def to_json(self) -> dict[str, Any]:
        """As `comparison.json` has it."""
        answers = [
            {
                **one.question.model_dump(mode="json"),
                "said": one.said,
                "differences": [asdict(d) for d in one.differences],
            }
            for one in self.answers
        ]
        return {
            "name": self.name,
            "scenes": self.scenes,
            "cases": self.cases,
            "judge": self.judge,
            "one_seed": self.one_seed,
            "methods": {name: asdict(one) for name, one in self.methods.items()},
            "answers": answers,
            "missing": dict(self.missing),
            "pending": list(self.pending),
        }


def method_figures(trained: Trained, rows: Rows) -> MethodFigures:
    """A method's figures."""
    figures: dict[str, dict[str, Estimate]] = {}
    by_seed: dict[str, dict[int, float]] = {}
    for measure in MEASURES:
        found = {wording: _estimate(_values(rows, measure, wording)) for wording in WORDINGS}
        if known := {wording: one for wording, one in found.items() if one is not None}:
            figures[measure] = known
            means = {seed: _estimate(_values({seed: one}, measure, "all")) for seed, one in rows.items()}
            by_seed[measure] = {seed: one.mean for seed, one in means.items() if one is not None}
    failed = sum(bool(row.failure) for one in rows.values() for row in one)
    return MethodFigures(trained=trained, figures=figures, by_seed=by_seed, failed=failed)


def answers(config: ComparisonConfig, rows: Mapping[str, Rows]) -> list[Answer]:
    """Answer a comparison's questions as far as their methods have results."""
    result: list[Answer] = []
    for question in config.questions:
        against = [name for name in question.against if name in rows]
        if question.method in rows and against:
            found = [
                difference(
                    _paired(config, rows, question.method, other), question.method, other, measure, question.wording
                )
                for other in against
                for measure in question.measures
            ]
            result.append(Answer(question=question, differences=[one for one in found if one is not None]))
    return result


def _paired(config: ComparisonConfig, rows: Mapping[str, Rows], method: str, other: str) -> Mapping[str, Rows]:
    """Two methods' results; of trainings those whose seeds both have, as long as some are pending.

    One training beside several others would look like as many of its own.
    """
    pair = {name: rows[name] for name in (method, other)}
    if not all(config.methods[name].is_trained for name in pair):
        return pair
    shared = [seed for seed in pair[method] if seed in pair[other]]
    return {name: {seed: own[seed] for seed in shared} for name, own in pair.items()}


def difference(rows: Mapping[str, Rows], method: str, other: str, measure: str, wording: str) -> Difference | None:
    """The paired difference of two methods; None where no case has both figures.

    Trainings with the same seed are paired. What was not trained has one seed, which is paired with each of the
    other's.

    Raises:
        InsightEditError: the methods were not given the same cases.
    """
    ours, theirs = rows[method], rows[other]
    pairs = _seed_pairs(ours, theirs)
    values: list[tuple[float, str, int]] = []
    for number, (own, its) in enumerate(pairs):
        by_case = {row.case: row for row in theirs[its]}
        if by_case.keys() != {row.case for row in ours[own]}:
            raise InsightEditError(f"{method} and {other} were judged on other cases; compare under another --name.")
        for row in ours[own]:
            first, second = value_of(row, measure), value_of(by_case[row.case], measure)
            if first is not None and second is not None and wording in ("all", row.wording):
                values.append((first - second, row.scene, number))
    found = _estimate(values)
    if found is None:
        return None
    return Difference(against=other, measure=measure, estimate=found, verdict=_verdict(found, measure))


def value_of(row: CaseResult, measure: str) -> float | None:
    """A metric of a case, or a score as it counts."""
    return row.metrics.get(measure) if measure in METRICS else counted(row, measure)


def lower_is_better(measure: str) -> bool:
    """Whether less of a measure is better."""
    return measure in METRICS and METRICS[measure].better == "lower"


def _seed_pairs(ours: Rows, theirs: Rows) -> list[tuple[int, int]]:
    if len(ours) == 1 or len(theirs) == 1:
        return [(own, its) for own in ours for its in theirs]
    return [(seed, seed) for seed in ours if seed in theirs]


def _verdict(found: Estimate, measure: str) -> Verdict:
    if found.interval is None or found.interval[0] <= 0 <= found.interval[1]:
        return "not shown"
    return "better" if (found.mean > 0) != lower_is_better(measure) else "worse"


def _values(rows: Rows, measure: str, wording: str) -> list[tuple[float, str, int]]:
    """Values with scene and seed of the cases that have one."""
    return [
        (value, row.scene, seed)
        for seed, results in rows.items()
        for row in results
        if wording in ("all", row.wording) and (value := value_of(row, measure)) is not None
    ]


def _estimate(values: Iterable[tuple[float, str, int]]) -> Estimate | None:
    known = list(values)
    if not known:
        return None
    numbers, scenes, seeds = (list(column) for column in zip(*known, strict=True))
    return estimate_over_seeds(numbers, scenes, seeds)
