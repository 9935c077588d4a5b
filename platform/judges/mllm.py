"""The judge that asks a multimodal language model: VIEScore as the paper has it.

Every edit is two questions, see `insightedit.platform.judges.prompts`. An answer without valid scores is complained
about once, in the same conversation; then the edit counts as failed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
from PIL import Image

from insightedit.platform.chat import ChatModel, Conversation, Turn
from insightedit.platform.chat.asking import Asker, Unanswered
from insightedit.platform.chat.asking import Question as Asked
from insightedit.platform.chat.cache import AnswerCache
from insightedit.platform.judges import (
    Aspect,
    Costs,
    Failed,
    MadeEdit,
    Picture,
    Progress,
    Reason,
    Score,
    Verdict,
    picture_hash,
    scores_by_aspect,
)
from insightedit.platform.judges.answers import read_answer
from insightedit.platform.judges.prompts import CONSISTENCY, QUESTIONS, Question


class MllmJudge:
    """Judges edits by asking a model; see `insightedit.platform.judges.Judge`."""

    def __init__(self, chat: ChatModel, cache: AnswerCache) -> None:
        """Make ready.

        Args:
            chat: the model.
            cache: where its answers are kept; it may be shared with other judges.
        """
        self._asker = Asker(chat, cache)
        self._failures = Counter[Reason]()

    @property
    def identity(self) -> str:
        """The model, how it is asked, and the wording of the questions."""
        wording = hashlib.sha256("".join(question.fingerprint() for question in QUESTIONS).encode()).hexdigest()
        return f"{self._asker.identity}, questions {wording[:16]}"

    @property
    def costs(self) -> Costs:
        """What this judge took since it was made."""
        return Costs(**asdict(self._asker.spending()), failures=self._failures.copy())

    def judge(self, edits: Sequence[MadeEdit], progress: Progress | None = None) -> list[Verdict]:
        """Score edits, the same question about the same pictures asked once.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        wanted = [[self._asked(question, edit) for question in QUESTIONS] for edit in edits]
        distinct = {asked.key: asked for pair in wanted for asked in pair}

        def settled(count: int) -> None:
            if progress is not None:
                progress(count * len(edits) // len(distinct), len(edits))

        outcomes = dict(zip(distinct, self._asker.ask(list(distinct.values()), settled), strict=True))
        verdicts = [_verdict([outcomes[asked.key] for asked in pair]) for pair in wanted]
        self._failures.update(verdict.reason for verdict in verdicts if isinstance(verdict, Failed))
        return verdicts

    def _asked(self, question: Question, edit: MadeEdit) -> Asked[Mapping[Aspect, Score]]:
        """A question about an edit."""
        pictures = (edit.source, edit.edit) if question is CONSISTENCY else (edit.edit,)
        # Quality is asked without the request: the same picture is the same question.
        instruction = edit.instruction if question is CONSISTENCY else ""
        parts = [self._asker.identity, question.fingerprint(), instruction, *map(picture_hash, pictures)]
        return Asked(
            key=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            name=question.name,
            subject=edit.instruction,
            conversation=partial(_conversation, question, edit),
            read=partial(read_answer, aspects=question.aspects),
            complaint=question.complaint,
            wanted="scores",
        )


def _conversation(question: Question, edit: MadeEdit) -> Conversation:
    """A question about an edit as it is put."""
    pictures = _side_by_side(edit) if question is CONSISTENCY else (edit.edit,)
    return (Turn("user", question.prompt(edit.instruction), pictures),)


def _side_by_side(edit: MadeEdit) -> tuple[Picture, Picture]:
    """Source and edit at the source's size: an editor may answer at its own."""
    height, width = edit.source.shape[:2]
    if edit.edit.shape == edit.source.shape:
        return edit.source, edit.edit
    resized = Image.fromarray(edit.edit).resize((width, height), Image.Resampling.LANCZOS)
    return edit.source, np.asarray(resized)


def _verdict(outcomes: Sequence[Mapping[Aspect, Score] | Unanswered]) -> Verdict:
    """An edit's scores, or the first thing that went wrong."""
    scores: dict[Aspect, Score] = {}
    for outcome in outcomes:
        if isinstance(outcome, Unanswered):
            return Failed(outcome.reason, outcome.detail)
        scores |= outcome
    return scores_by_aspect(scores)
