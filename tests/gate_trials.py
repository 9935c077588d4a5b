"""Pairs of versions whose true difference is known, made of the scores of a real nano model.

`nano_scores.json` has what two states of one real training got on the 200 test scenes: after stage 2 and after stage 3,
S_i and S_n of both instructions of each scene, and its task. A trial draws scenes from it, with replacement, as many as
an evaluation has by default. What two versions then have in common is one of two extremes:

- `apart`: the second version gets the scores of another scene of the same task. It is as good, and succeeds and fails
  on its own: the most noise that two versions can have.
- `kin`: a scene's two real results, one for each version, in random order: versions that come from one another.

Then the second version is made better or worse by a known mean, in one of two ways:

- `steps`: random cases gain or lose one point of S_i or S_n.
- `edits`: random cases are followed to the letter (S_i of 5) or not at all (S_i of 0).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.results import CaseResult

Shared = Literal["apart", "kin"]
Way = Literal["steps", "edits"]
Scores = NDArray[np.int64]
"""(N, 2, 2): scenes, simple and advanced, S_i and S_n."""


@dataclass(frozen=True, slots=True)
class Real:
    """The real results."""

    tasks: tuple[str, ...]
    after_stage_2: Scores
    after_stage_3: Scores


@cache
def real() -> Real:
    """What is in the file."""
    content = json.loads((Path(__file__).parent / "nano_scores.json").read_text())
    two, three = (np.array(content[name]).reshape(-1, 2, 2) for name in ("after_stage_2", "after_stage_3"))
    return Real(tuple(content["tasks"]), two, three)


def trial(
    rng: np.random.Generator, scenes: int, by: float, shared: Shared, way: Way
) -> tuple[list[CaseResult], list[CaseResult]]:
    """A version that is better by a mean VIEScore, and the champion."""
    known = real()
    drawn = rng.integers(len(known.tasks), size=scenes)
    tasks = [known.tasks[row] for row in drawn]
    if shared == "apart":
        champion = known.after_stage_3[drawn]
        version = known.after_stage_3[[rng.choice(_rows(task)) for task in tasks]]
    else:
        both = np.stack([known.after_stage_2[drawn], known.after_stage_3[drawn]])
        order = rng.integers(2, size=scenes)
        version, champion = both[order, range(scenes)], both[1 - order, range(scenes)]
    return _table(_changed(rng, version, by, way), tasks), _table(champion, tasks)


@cache
def _rows(task: str) -> NDArray[np.int64]:
    return np.array([row for row, name in enumerate(real().tasks) if name == task])


def _changed(rng: np.random.Generator, scores: Scores, by: float, way: Way) -> Scores:
    """Scores whose mean VIEScore is expected to be higher by `by`: what each case can change is known beforehand."""
    if not by:
        return scores
    changed = scores.copy()
    if way == "edits":
        changed[..., 0] = 5 if by > 0 else 0
    else:
        # The point goes to S_i where it can, else to S_n.
        step, end = (1, 5) if by > 0 else (-1, 0)
        free = scores[..., 0] != end
        changed[..., 0] = np.where(free, scores[..., 0] + step, scores[..., 0])
        changed[..., 1] = np.where(free, scores[..., 1], np.clip(scores[..., 1] + step, 0, 5))
    possible = (changed - scores).sum(axis=-1).mean() / 10
    chosen = rng.random(scores.shape[:2]) < by / possible
    return np.where(chosen[..., None], changed, scores)


def _table(scores: Scores, tasks: list[str]) -> list[CaseResult]:
    return [
        CaseResult(
            case=f"{scene}-{wording}",
            scene=str(scene),
            seed=scene,
            task=tasks[scene],
            wording=wording,
            instruction="",
            viescore=int(s_i + s_n) / 10,
        )
        for scene, pair in enumerate(scores)
        for wording, (s_i, s_n) in zip(("simple", "advanced"), pair, strict=True)
    ]
