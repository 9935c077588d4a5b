"""Step 9: VIEScore of every edit, and which of them are good enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from insightedit.platform.construction.config import Aspect, ConstructionConfig
from insightedit.platform.construction.photos import Change, Graded, Photo, Rejected
from insightedit.platform.judges import ASPECTS, Failed, Judge, MadeEdit, Score, Scores, Truth
from insightedit.platform.records import decode_image

TruthOf = Callable[[Photo, Change], Truth | None]
"""What is known of an edit, where the judge wants to know it."""


def run_judge(judge: Judge, truth_of: TruthOf, config: ConstructionConfig, photos: Sequence[Photo]) -> None:
    """Judge every edit in its first direction, by its simple instruction; the weak ones fall out."""
    jobs = [(photo, change) for photo in photos for change in photo.kept if change.there is not None]
    verdicts = judge.judge([_made(photo, change, truth_of) for photo, change in jobs]) if jobs else []
    for (photo, change), verdict in zip(jobs, verdicts, strict=True):
        if isinstance(verdict, Failed):
            photo.drop_change("judge", change, Rejected(verdict.reason, verdict.detail))
            continue
        change.scores = _graded(verdict)
        if (why := too_low(change, config)) is not None:
            photo.drop_change("filter", change, why)


def too_low(change: Change, config: ConstructionConfig) -> Rejected | None:
    """Why a judged edit is not kept; None where it is."""
    scores = change.scores or {}
    for aspect, least in config.min_scores.items():
        if scores[aspect].value < least:
            return Rejected(f"low_{aspect}", f"{scores[aspect].value} of 5: {scores[aspect].explanation}")
    return None


def _made(photo: Photo, change: Change, truth_of: TruthOf) -> MadeEdit:
    instruction = change.there.simple[0] if change.there else ""
    edited = decode_image(change.painted)
    return MadeEdit(source=photo.pixels, edit=edited, instruction=instruction, truth=truth_of(photo, change))


def _graded(scores: Scores) -> dict[Aspect, Graded]:
    found: dict[Aspect, Score] = {aspect: getattr(scores, aspect) for aspect in ASPECTS}
    return {aspect: Graded(value=score.value, explanation=score.explanation) for aspect, score in found.items()}
