"""Judging an editor on scenes that it has never seen: the cases, the figures, and what is kept of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from insightedit.platform.benchmarks import benchmark_cases
from insightedit.platform.cases import EditCase
from insightedit.platform.config import EvaluationConfig
from insightedit.platform.datasets.shapes_edits import Edit, sample_edit
from insightedit.platform.datasets.shapes_world import SPLITS, Split, render
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.judges import (
    ASPECTS,
    Costs,
    Failed,
    Judge,
    MadeEdit,
    Progress,
    Score,
    Scores,
    Verdict,
)
from insightedit.platform.judges.shapes import ShapesJudge, shapes_truth
from insightedit.platform.metrics import Comparison, Mean, Meter, means
from insightedit.platform.records import encode_png
from insightedit.platform.results import CaseResult

Pixels = NDArray[np.float32] | NDArray[np.uint8]
"""One picture (H, W, 3): float32 in [0, 1], or 8-bit as people get it."""

SHAPES_SCENES: Final = 200
"""Scenes of shapes where the config does not say how many."""


@dataclass(frozen=True, slots=True)
class JudgedEdit:
    """A case with what an editor made of it."""

    case: EditCase
    edit: NDArray[np.uint8]
    verdict: Verdict
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """By name; what could not be measured has no entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Means over the edits that were judged. S_i and S_n from 0 to 5, VIEScore (equation 1) from 0 to 1."""

    edits: int
    """Those with scores."""
    viescore: float
    instruction: float
    non_overedit: float
    failed: int = 0
    """Edits that the judge could not judge, which are in no mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How good an editor is on one set of cases. Two evaluations compare only if `cases` is the same in both."""

    cases: str
    """sha256 over scenes, instructions, noise seeds and who judged."""
    scenes: int
    overall: Figures
    simple: Figures | None
    """None where the benchmark does not say how instructions are worded; likewise `advanced`."""
    advanced: Figures | None
    by_task: Mapping[str, Figures]
    by_form: Mapping[str, Figures]
    """Of advanced instructions, by the reasoning they need."""
    held_out: Mapping[str, Figures]
    """By what no training scene has shown; `none` holds the rest."""
    copy_baseline: Figures
    """The source handed back unchanged, on as many of the edits as it says."""
    shuffled: Figures
    """The same editor on instructions of other scenes, on as many of the edits as it says."""
    before_training: Figures | None = None
    """The same model before stage 1, on as many of the edits as it says; None where nobody measured it."""
    judge: str = "shapes"
    """Who gave the scores: the exact judge of shapes, or a language model with its settings and questions."""
    costs: Costs = field(default_factory=Costs)
    """What asking a language model took, controls included."""
    measured: Mapping[str, Mean] = field(default_factory=dict[str, Mean])
    """Means of the metrics beside the scores (`insightedit.platform.metrics.METRICS`)."""
    unmeasured: Mapping[str, str] = field(default_factory=dict[str, str])
    """The metrics that no edit has, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """As `report.json` has it: the overall figures stand at the top."""
        content = {**asdict(replace(self, costs=Costs())), "costs": self.costs.to_json()}
        return {"scenes": content.pop("scenes"), **content.pop("overall"), **content}

    def wordings(self) -> dict[str, Figures]:
        """The figures by wording, of those that there are."""
        found = {"simple": self.simple, "advanced": self.advanced}
        return {name: figures for name, figures in found.items() if figures is not None}

    def tags(self) -> dict[str, str]:
        """What a model version says about it."""
        return {
            "viescore": f"{self.overall.viescore:.6f}",
            "instruction": f"{self.overall.instruction:.6f}",
            "non_overedit": f"{self.overall.non_overedit:.6f}",
            "evaluation.cases": self.cases,
            "evaluation.scenes": str(self.scenes),
            "evaluation.judge": self.judge,
        }

    def metrics(self) -> dict[str, float]:
        """The figures by dotted name, for a run's metrics."""
        groups: dict[str, Figures] = {"all": self.overall, **self.wordings()}
        groups |= {f"task.{name}": figures for name, figures in self.by_task.items()}
        groups |= {f"form.{name}": figures for name, figures in self.by_form.items()}
        groups |= {f"held_out.{name}": figures for name, figures in self.held_out.items()}
        groups |= {"copy_baseline": self.copy_baseline, "shuffled": self.shuffled}
        names = ("viescore", "instruction", "non_overedit")
        costs = {f"judge.{name}": float(value) for name, value in self.costs.to_json().items() if name != "failures"}
        return {
            **{f"{group}.{name}": getattr(figures, name) for group, figures in groups.items() for name in names},
            **(costs if any(costs.values()) else {}),
            **{f"metric.{name}": mean.mean for name, mean in self.measured.items()},
            "all.failed": float(self.overall.failed),
        }


def least_scenes(config: EvaluationConfig) -> int:
    """Scenes that an evaluation by this config has at least; 0 where only the benchmark knows how many it has."""
    return (config.scenes or SHAPES_SCENES) if config.benchmark.reader == "shapes" else 0


def evaluation_cases(config: EvaluationConfig, scenes: int | None = None) -> list[EditCase]:
    """The cases that a config asks for, the instructions of a scene one after the other.

    Args:
        config: which benchmark, split and seed.
        scenes: only the first scenes; all of them without it.

    Raises:
        UsageError: there is no such benchmark or split.
        NotFoundError: the benchmark's folder is missing.
        InsightEditError: a row of the benchmark cannot be read.
    """
    wanted = [count for count in (scenes, config.scenes) if count is not None]
    if config.benchmark.reader != "shapes":
        return benchmark_cases(config, min(wanted, default=None))
    if config.split not in SPLITS:
        raise UsageError(f"evaluation.split is {config.split!r}; it must be one of {', '.join(SPLITS)}.")
    if config.benchmark.options:
        raise UsageError(
            "evaluation.benchmark is shapes, which takes no options; set evaluation.split, scenes and seed."
        )
    count = min([*wanted, config.scenes or SHAPES_SCENES])
    return [case for number in range(count) for case in _shapes_cases(config, config.split, number)]


def _shapes_cases(config: EvaluationConfig, split: Split, number: int) -> list[EditCase]:
    """Both instructions of a scene."""
    # The numbers of `edit_records`: the same seed means the same scenes there and here.
    edit = sample_edit(config.seed * 2**32 + number, split)
    source, target = render(edit.source), render(edit.target)
    truth = shapes_truth(edit.source, edit.target)
    scene = f"{split}-{config.seed}-{number:06d}"
    return [
        EditCase(
            key=f"{scene}-{wording}",
            scene=scene,
            task=edit.task,
            form=edit.form,
            wording=wording,
            held_out=edit.held_out,
            instruction=instruction,
            seed=number,
            source=source,
            target=target,
            truth=truth,
            region=~np.logical_or.reduce(truth.keep_regions),
            caption=_new_shapes(edit),
        )
        for wording, instruction in (("simple", edit.simple), ("advanced", edit.advanced))
    ]


def _new_shapes(edit: Edit) -> str:
    """What the target shows and the source does not."""
    new = [shape for shape in edit.target.shapes if shape not in edit.source.shapes]
    return ", ".join(f"a {shape.size} {shape.colour} {shape.kind}" for shape in new)


def shuffled(cases: Sequence[EditCase]) -> list[EditCase]:
    """The same cases, each with an instruction that another scene was given: a control that must fail.

    Raises:
        UsageError: all cases are of one scene.
    """
    rng = random.Random(0)
    result: list[EditCase] = []
    for case in cases:
        # Another scene may have the same instruction; it would be right by chance.
        others = [
            other.instruction
            for other in cases
            if other.wording == case.wording and other.seed != case.seed and other.instruction != case.instruction
        ]
        if not others:
            raise UsageError(
                "As a control, instructions are shuffled between scenes, and these are all of one or all the same:"
                " evaluate on 2 scenes or more."
            )
        result.append(replace(case, key=f"{case.key}-shuffled", instruction=rng.choice(others)))
    return result


def judge(
    cases: Sequence[EditCase], edits: Iterable[Pixels], by: Judge | None = None, progress: Progress | None = None
) -> list[JudgedEdit]:
    """Have each case's edit judged as the 8-bit picture that people get, nothing pasted back.

    Args:
        cases: what was asked for.
        edits: what was made of it, (H, W, 3) each.
        by: who judges; the exact judge of shapes if None.
        progress: is told how many are judged.
    """
    made = [pixels_8bit(edit) for edit in edits]
    asked = [
        MadeEdit(source=case.source, edit=edit, instruction=case.instruction, truth=case.truth)
        for case, edit in zip(cases, made, strict=True)
    ]
    verdicts = (by or ShapesJudge()).judge(asked, progress)
    return [JudgedEdit(*one) for one in zip(cases, made, verdicts, strict=True)]


def measure(judged: Iterable[JudgedEdit], meter: Meter) -> list[JudgedEdit]:
    """The same edits with their metrics, measured on the 8-bit pictures that people get."""
    edits = list(judged)
    rows = meter.measure(
        Comparison(
            source=one.case.source,
            edit=one.edit,
            target=one.case.target,
            region=one.case.region,
            caption=one.case.caption,
        )
        for one in edits
    )
    return [replace(one, metrics=row) for one, row in zip(edits, rows, strict=True)]


def figures(judged: Iterable[JudgedEdit]) -> Figures:
    """Means of the scores of the edits that have some.

    Raises:
        InsightEditError: none of them has.
    """
    verdicts = [one.verdict for one in judged]
    scored = [verdict for verdict in verdicts if isinstance(verdict, Scores)]
    if not scored:
        reason = next((verdict.detail for verdict in verdicts if isinstance(verdict, Failed)), "There are none.")
        raise InsightEditError(f"None of {len(verdicts)} edits could be judged: {reason}")
    scores = [(one.viescore, one.instruction_adherence.value, one.non_overediting.value) for one in scored]
    viescore, instruction, non_overedit = (float(value) for value in np.mean(scores, axis=0))
    return Figures(
        edits=len(scored),
        viescore=viescore,
        instruction=instruction,
        non_overedit=non_overedit,
        failed=len(verdicts) - len(scored),
    )


def summarise(
    judged: Sequence[JudgedEdit], control: Sequence[JudgedEdit], copies: Sequence[JudgedEdit], by: Judge | None = None
) -> Evaluation:
    """Put the figures of an evaluation together.

    Args:
        judged: every case's edit.
        control: the edits of `shuffled` cases.
        copies: cases with their sources as the edits.
        by: who judged; the exact judge of shapes if None.

    Raises:
        InsightEditError: nothing could be judged.
    """
    cases = [one.case for one in judged]
    by = by or ShapesJudge()
    wordings = _grouped(judged, lambda case: (case.wording,))
    drawn = any(case.held_out for case in cases)
    return Evaluation(
        cases=cases_fingerprint(cases, by.identity),
        scenes=len({case.scene for case in cases}),
        overall=figures(judged),
        simple=wordings.get("simple"),
        advanced=wordings.get("advanced"),
        by_task=_grouped(judged, lambda case: (case.task,)),
        by_form=_grouped([one for one in judged if one.case.wording == "advanced"], lambda case: (case.form,)),
        held_out=_grouped(judged, lambda case: case.held_out or ("none",)) if drawn else {},
        copy_baseline=figures(copies),
        shuffled=figures(control),
        judge=by.identity,
        costs=by.costs,
        measured=means([one.metrics for one in judged]),
    )


def case_results(judged: Iterable[JudgedEdit]) -> list[CaseResult]:
    """The rows of an evaluation's table."""
    return [
        CaseResult(
            case=one.case.key,
            scene=one.case.scene,
            seed=one.case.seed,
            task=one.case.task,
            wording=one.case.wording,
            instruction=one.case.instruction,
            **_verdict_fields(one.verdict),
            metrics=one.metrics,
        )
        for one in judged
    ]


def _verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """What a row of the table says of a verdict."""
    if isinstance(verdict, Failed):
        return {"failure": f"judge {verdict.reason}: {verdict.detail}"}
    scores: dict[str, Score] = {aspect: getattr(verdict, aspect) for aspect in ASPECTS}
    return {
        **{aspect: score.value for aspect, score in scores.items()},
        "viescore": verdict.viescore,
        "explanations": {aspect: score.explanation for aspect, score in scores.items()},
    }


def cases_fingerprint(cases: Iterable[EditCase], judge: str = "shapes") -> str:
    """A sha256 that is the same only for the same pictures, instructions, noise and judge."""
    digest = hashlib.sha256(judge.encode())
    for case in cases:
        digest.update(f"{case.key}\0{case.instruction}\0{case.seed}\0".encode())
        digest.update(case.source.tobytes())
        if case.target is not None:
            digest.update(case.target.tobytes())
    return digest.hexdigest()


def write_cases(path: Path, judged: Iterable[JudgedEdit]) -> None:
    """Write every case with its pictures (PNG) and scores as one Parquet file."""
    rows: list[dict[str, Any]] = [
        {
            "key": one.case.key,
            "task": one.case.task,
            "form": one.case.form,
            "wording": one.case.wording,
            "held_out": list(one.case.held_out),
            "instruction": one.case.instruction,
            "seed": one.case.seed,
            "source": encode_png(one.case.source),
            "edit": encode_png(one.edit),
            "target": None if one.case.target is None else encode_png(one.case.target),
            **_score_columns(one.verdict),
        }
        for one in judged
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def _score_columns(verdict: Verdict) -> dict[str, Any]:
    """An edit's scores; nulls where it could not be judged, and raw ones only where the judge computes them."""
    scores = verdict if isinstance(verdict, Scores) else None
    return {
        "s_i": scores and scores.instruction_adherence.value,
        "s_n": scores and scores.non_overediting.value,
        "s_i_raw": scores and scores.instruction_adherence.raw,
        "s_n_raw": scores and scores.non_overediting.raw,
        "viescore": scores and scores.viescore,
    }


def unit_range(pixels: NDArray[np.uint8]) -> Pixels:
    """8-bit pixels as float32 in [0, 1]."""
    return np.divide(pixels, 255, dtype=np.float32)


def pixels_8bit(pixels: Pixels) -> NDArray[np.uint8]:
    """Pixels as 8-bit, for showing."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    return (pixels * 255).round().astype(np.uint8)


def _grouped(judged: Sequence[JudgedEdit], names: Callable[[EditCase], Iterable[str]]) -> dict[str, Figures]:
    groups: dict[str, list[JudgedEdit]] = {}
    for one in judged:
        for name in filter(None, names(one.case)):
            groups.setdefault(name, []).append(one)
    scored = {name: group for name, group in groups.items() if any(isinstance(one.verdict, Scores) for one in group)}
    return {name: figures(scored[name]) for name in sorted(scored)}
