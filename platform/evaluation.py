"""Judging an editor on scenes that it has never seen: the cases, the figures, and what is kept of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from insightedit.platform.config import EvaluationConfig
from insightedit.platform.datasets.shapes_edits import sample_edit
from insightedit.platform.datasets.shapes_world import SPLITS, render
from insightedit.platform.errors import UsageError
from insightedit.platform.judges.shapes import EditScore, judge_edit, shapes_keep_regions
from insightedit.platform.records import encode_png
from insightedit.platform.results import CaseResult

Pixels = NDArray[np.float32]
"""One picture (H, W, 3), float32 in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EditCase:
    """One edit to be judged: what is asked for, with which noise, and what would be right."""

    key: str
    scene: str
    """The source picture's; both instructions of a scene have the same."""
    task: str
    form: str
    """The form of reasoning that the advanced instruction of this scene needs."""
    wording: str
    """`simple` or `advanced`."""
    held_out: tuple[str, ...]
    """What of it no training scene has shown: `combination`, `wording`."""
    instruction: str
    seed: int
    """The noise's. Both instructions of a scene have the same."""
    source: NDArray[np.uint8]
    target: NDArray[np.uint8]
    keep_regions: tuple[NDArray[np.bool_], ...]


@dataclass(frozen=True, slots=True)
class JudgedEdit:
    """A case with what an editor made of it."""

    case: EditCase
    edit: Pixels
    score: EditScore


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Means over some edits. S_i and S_n from 0 to 5, VIEScore (equation 1) from 0 to 1."""

    edits: int
    viescore: float
    instruction: float
    non_overedit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How good an editor is on one set of cases. Two evaluations compare only if `cases` is the same in both."""

    cases: str
    """sha256 over scenes, instructions and noise seeds."""
    scenes: int
    overall: Figures
    simple: Figures
    advanced: Figures
    by_task: Mapping[str, Figures]
    by_form: Mapping[str, Figures]
    """Of advanced instructions, by the reasoning they need."""
    held_out: Mapping[str, Figures]
    """By what no training scene has shown; `none` holds the rest."""
    copy_baseline: Figures
    """The source handed back unchanged."""
    shuffled: Figures
    """The same editor on instructions of other scenes, on as many of the edits as it says."""
    before_training: Figures | None = None
    """The same model before stage 1, on as many of the edits as it says; None where nobody measured it."""

    def to_json(self) -> dict[str, Any]:
        """As `report.json` has it: the overall figures stand at the top."""
        content = asdict(self)
        return {"scenes": content.pop("scenes"), **content.pop("overall"), **content}

    def tags(self) -> dict[str, str]:
        """What a model version says about it."""
        return {
            "viescore": f"{self.overall.viescore:.6f}",
            "instruction": f"{self.overall.instruction:.6f}",
            "non_overedit": f"{self.overall.non_overedit:.6f}",
            "evaluation.cases": self.cases,
            "evaluation.scenes": str(self.scenes),
        }

    def metrics(self) -> dict[str, float]:
        """The figures by dotted name, for a run's metrics."""
        groups: dict[str, Figures] = {"all": self.overall, "simple": self.simple, "advanced": self.advanced}
        groups |= {f"task.{name}": figures for name, figures in self.by_task.items()}
        groups |= {f"form.{name}": figures for name, figures in self.by_form.items()}
        groups |= {f"held_out.{name}": figures for name, figures in self.held_out.items()}
        groups |= {"copy_baseline": self.copy_baseline, "shuffled": self.shuffled}
        names = ("viescore", "instruction", "non_overedit")
        return {f"{group}.{name}": getattr(figures, name) for group, figures in groups.items() for name in names}


def evaluation_cases(config: EvaluationConfig, scenes: int | None = None) -> list[EditCase]:
    """The cases that a config asks for, the simple and the advanced instruction of a scene one after the other.

    Args:
        config: which dataset, split and seed.
        scenes: only the first scenes; all of them without it.

    Raises:
        UsageError: the dataset has no exact truth, or no such split.
    """
    if config.reader != "shapes":
        raise UsageError(f"evaluation.reader is {config.reader!r}; only 'shapes' can be judged exactly.")
    if config.split not in SPLITS:
        raise UsageError(f"evaluation.split is {config.split!r}; it must be one of {', '.join(SPLITS)}.")
    cases: list[EditCase] = []
    for number in range(config.scenes if scenes is None else min(scenes, config.scenes)):
        # The numbers of `edit_records`: the same seed means the same scenes there and here.
        edit = sample_edit(config.seed * 2**32 + number, config.split)
        source, target = render(edit.source), render(edit.target)
        keep_regions = tuple(shapes_keep_regions(edit.source, edit.target))
        scene = f"{config.split}-{config.seed}-{number:06d}"
        cases.extend(
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
                keep_regions=keep_regions,
            )
            for wording, instruction in (("simple", edit.simple), ("advanced", edit.advanced))
        )
    return cases


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
            raise UsageError("evaluation.scenes is 1; instructions can be shuffled between 2 scenes or more.")
        result.append(replace(case, key=f"{case.key}-shuffled", instruction=rng.choice(others)))
    return result


def judge(cases: Sequence[EditCase], edits: Iterable[Pixels]) -> list[JudgedEdit]:
    """Score each case's edit (H, W, 3), nothing pasted back."""
    return [
        JudgedEdit(case, edit, judge_edit(unit_range(case.source), unit_range(case.target), edit, case.keep_regions))
        for case, edit in zip(cases, edits, strict=True)
    ]


def figures(judged: Iterable[JudgedEdit]) -> Figures:
    """Means of the scores of one edit or more."""
    scores = [(one.score.viescore, one.score.instruction, one.score.non_overedit) for one in judged]
    viescore, instruction, non_overedit = (float(value) for value in np.mean(scores, axis=0))
    return Figures(edits=len(scores), viescore=viescore, instruction=instruction, non_overedit=non_overedit)


def summarise(judged: Sequence[JudgedEdit], control: Sequence[JudgedEdit]) -> Evaluation:
    """Put the figures of an evaluation together.

    Args:
        judged: every case's edit.
        control: the edits of `shuffled` cases.
    """
    cases = [one.case for one in judged]
    return Evaluation(
        cases=cases_fingerprint(cases),
        scenes=len({case.scene for case in cases}),
        overall=figures(judged),
        simple=figures(one for one in judged if one.case.wording == "simple"),
        advanced=figures(one for one in judged if one.case.wording == "advanced"),
        by_task=_grouped(judged, lambda case: (case.task,)),
        by_form=_grouped([one for one in judged if one.case.wording == "advanced"], lambda case: (case.form,)),
        held_out=_grouped(judged, lambda case: case.held_out or ("none",)),
        copy_baseline=figures(judge(cases, (unit_range(case.source) for case in cases))),
        shuffled=figures(control),
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
            instruction_adherence=one.score.instruction,
            non_overediting=one.score.non_overedit,
            viescore=one.score.viescore,
        )
        for one in judged
    ]


def cases_fingerprint(cases: Iterable[EditCase]) -> str:
    """A sha256 that is the same only for the same pictures, instructions and noise."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.key}\0{case.instruction}\0{case.seed}\0".encode())
        digest.update(case.source.tobytes())
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
            "edit": encode_png(pixels_8bit(one.edit)),
            "target": encode_png(one.case.target),
            "s_i": one.score.instruction,
            "s_n": one.score.non_overedit,
            "s_i_raw": one.score.s_i_raw,
            "s_n_raw": one.score.s_n_raw,
            "viescore": one.score.viescore,
        }
        for one in judged
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def unit_range(pixels: NDArray[np.uint8]) -> Pixels:
    """8-bit pixels as float32 in [0, 1]."""
    return np.divide(pixels, 255, dtype=np.float32)


def pixels_8bit(pixels: Pixels) -> NDArray[np.uint8]:
    """Pixels in [0, 1] as 8-bit, for showing."""
    return (pixels * 255).round().astype(np.uint8)


def _grouped(judged: Sequence[JudgedEdit], names: Callable[[EditCase], Iterable[str]]) -> dict[str, Figures]:
    groups: dict[str, list[JudgedEdit]] = {}
    for one in judged:
        for name in names(one.case):
            groups.setdefault(name, []).append(one)
    return {name: figures(groups[name]) for name in sorted(groups)}
