"""The steps that a config names, each as one function over photos; heavy libraries come with who needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from insightedit.platform.chat.cache import AnswerCache
from insightedit.platform.chat.choosing import build_chat
from insightedit.platform.construction import shapes
from insightedit.platform.construction.asked import AskedWords
from insightedit.platform.construction.asking import Asker
from insightedit.platform.construction.captions import run_captions
from insightedit.platform.construction.config import (
    STEPS,
    CocoMasksConfig,
    ConstructionConfig,
    DiffusionConfig,
    GroundedMasksConfig,
    OpenCvConfig,
    PainterConfig,
    ReplacementConfig,
    StepName,
    StepOfWords,
)
from insightedit.platform.construction.instructions import run_instructions
from insightedit.platform.construction.masks import CocoMasker, Detector, Masker, run_boxes, run_masks
from insightedit.platform.construction.objects import run_objects
from insightedit.platform.construction.painting import Painter, run_painting
from insightedit.platform.construction.photos import Change, Photo, Spent
from insightedit.platform.construction.proposals import run_proposals
from insightedit.platform.construction.quality import run_judge
from insightedit.platform.judges.mllm import MllmJudge
from insightedit.platform.judges.shapes import ShapesJudge

Run = Callable[[Sequence[Photo]], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One step, ready to run.

    Attributes:
        run: does it for photos.
        spent: what its model took so far, but for the time.
    """

    run: Run
    spent: Callable[[], Spent] = Spent


def step_names(config: ConstructionConfig) -> list[StepName]:
    """The steps that a config has."""
    idle: set[StepName] = set()
    if not isinstance(config.masks, GroundedMasksConfig):
        idle.add("detect")
    if config.replacement == "none":
        idle.add("replace")
    return [name for name in STEPS if name not in idle]


def make_step(name: StepName, config: ConstructionConfig, answers: Path) -> Step:
    """Make a step, with the model that it needs.

    Args:
        name: which.
        config: who does it.
        answers: folder of what language models answered before.

    Raises:
        UsageError: a model cannot be loaded, or the variable with its API key is not set.
        NotFoundError: a file or folder is missing.
    """
    if name in ("caption", "objects", "propose", "instruct"):
        return _step_of_words(name, config, answers)
    if name == "masks":
        return Step(partial(run_masks, _masker(config), config))
    if name == "detect":
        return Step(partial(run_boxes, _detector(config)))
    if name == "judge":
        return _judging(config, answers)
    task: Literal["remove", "replace"] = "remove" if name == "remove" else "replace"
    chosen = config.removal if name == "remove" else config.replacement
    return Step(partial(run_painting, _painter(chosen, config.seed, config.pool(name).threads), task))


def _step_of_words(name: StepOfWords, config: ConstructionConfig, answers: Path) -> Step:
    chosen = config.words_of(name)
    asker = None if isinstance(chosen, str) else Asker(build_chat(chosen), AnswerCache(answers))
    who = shapes.ShapesWords(config) if asker is None else AskedWords(asker, config)
    runs: dict[StepOfWords, Run] = {
        "caption": partial(run_captions, who),
        "objects": partial(run_objects, who),
        "propose": partial(run_proposals, who, shapes.allowed, config),
        "instruct": partial(run_instructions, who),
    }
    return Step(runs[name]) if asker is None else Step(runs[name], asker.spent)


def _detector(config: ConstructionConfig) -> Detector:
    if not isinstance(config.masks, GroundedMasksConfig):
        raise ValueError("Only masks of models need a detector.")
    from insightedit.platform.construction.grounding import GroundingDetector  # noqa: PLC0415

    return GroundingDetector(config.masks, config.pool("detect").threads)


def _masker(config: ConstructionConfig) -> Masker:
    masks = config.masks
    if isinstance(masks, CocoMasksConfig):
        return CocoMasker(masks.coco)
    if isinstance(masks, GroundedMasksConfig):
        from insightedit.platform.construction.grounding import Sam2Segmenter  # noqa: PLC0415

        return Sam2Segmenter(masks, config.pool("masks").threads)
    return shapes.ShapesMasker()


def _painter(chosen: PainterConfig | ReplacementConfig, seed: int, threads: int) -> Painter:
    if isinstance(chosen, OpenCvConfig | DiffusionConfig):
        from insightedit.platform.construction.painters import DiffusionPainter, OpenCvPainter  # noqa: PLC0415

        if isinstance(chosen, OpenCvConfig):
            return OpenCvPainter(chosen, threads)
        return DiffusionPainter(chosen, seed, threads)
    return shapes.ShapesPainter()


def _judging(config: ConstructionConfig, answers: Path) -> Step:
    if isinstance(config.judge, str):
        return Step(partial(run_judge, ShapesJudge(), shapes.truth_of, config))
    judge = MllmJudge(build_chat(config.judge), AnswerCache(answers))
    return Step(partial(run_judge, judge, _nothing_known, config), lambda: Spent.of(judge.costs))


def _nothing_known(_photo: Photo, _change: Change) -> None:
    """What is known of an edit that a language model judges."""
