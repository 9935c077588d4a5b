"""The judge that asks a multimodal language model: VIEScore as the paper has it.

Every edit is two questions, see `insightedit.platform.judges.prompts`. An answer without valid scores is complained
about once, in the same conversation; then the edit counts as failed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from insightedit.platform.chat import Answer, ChatModel, Conversation, NoReply, Turn
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
from insightedit.platform.judges.answers import AnswerError, read_answer
from insightedit.platform.judges.cache import AnswerCache, KeptAnswer
from insightedit.platform.judges.prompts import CONSISTENCY, QUESTIONS, Question

LONGEST_ANSWER: Final = 4000
"""Characters of a wrong answer that are shown to the model again."""

_Outcome = Mapping[Aspect, Score] | Failed
"""Of one question."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question about an edit."""

    key: str
    """The same for the same question about the same pictures and instruction."""
    question: Question
    edit: MadeEdit

    def conversation(self) -> Conversation:
        """The question as it is put."""
        pictures = _side_by_side(self.edit) if self.question is CONSISTENCY else (self.edit.edit,)
        return (Turn("user", self.question.prompt(self.edit.instruction), pictures),)


_Settle = Callable[[_Asked, _Outcome], None]
"""Is told the outcome of a question."""
_OnWrong = Callable[[_Asked, Conversation, str, AnswerError], None]
"""Is given a question, its conversation, the answer without valid scores, and what is wrong with it."""


class MllmJudge:
    """Judges edits by asking a model; see `insightedit.platform.judges.Judge`."""

    def __init__(self, chat: ChatModel, cache: AnswerCache) -> None:
        """Make ready.

        Args:
            chat: the model.
            cache: where its answers are kept; it may be shared with other judges.
        """
        self._chat = chat
        self._cache = cache
        self._repairs = 0
        self._cached = 0
        self._failures = Counter[Reason]()

    @property
    def identity(self) -> str:
        """The model, how it is asked, and the wording of the questions."""
        wording = hashlib.sha256("".join(question.fingerprint() for question in QUESTIONS).encode()).hexdigest()
        return f"{self._chat.identity}, questions {wording[:16]}"

    @property
    def costs(self) -> Costs:
        """What this judge took since it was made."""
        usage = self._chat.usage
        return Costs(
            requests=usage.requests,
            retries=usage.retries,
            repairs=self._repairs,
            cached=self._cached,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            failures=self._failures.copy(),
        )

    def judge(self, edits: Sequence[MadeEdit], progress: Progress | None = None) -> list[Verdict]:
        """Score edits, the same question about the same pictures asked once.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        wanted = [[self._asked(question, edit) for question in QUESTIONS] for edit in edits]
        distinct = {asked.key: asked for pair in wanted for asked in pair}
        outcomes: dict[str, _Outcome] = {}

        def settle(asked: _Asked, outcome: _Outcome) -> None:
            outcomes[asked.key] = outcome
            if progress is not None:
                progress(len(outcomes) * len(edits) // len(distinct), len(edits))

        missing: list[_Asked] = []
        for asked in distinct.values():
            scores = self._kept(asked)
            if scores is None:
                missing.append(asked)
            else:
                self._cached += 1
                settle(asked, scores)
        self._ask(missing, settle)
        verdicts = [_verdict([outcomes[asked.key] for asked in pair]) for pair in wanted]
        self._failures.update(verdict.reason for verdict in verdicts if isinstance(verdict, Failed))
        return verdicts

    def _asked(self, question: Question, edit: MadeEdit) -> _Asked:
        pictures = (edit.source, edit.edit) if question is CONSISTENCY else (edit.edit,)
        # Quality is asked without the request: the same picture is the same question.
        instruction = edit.instruction if question is CONSISTENCY else ""
        parts = [self._chat.identity, question.fingerprint(), instruction, *map(picture_hash, pictures)]
        return _Asked(hashlib.sha256(json.dumps(parts).encode()).hexdigest(), question, edit)

    def _kept(self, asked: _Asked) -> Mapping[Aspect, Score] | None:
        kept = self._cache.get(asked.key)
        try:
            return None if kept is None else read_answer(kept.text, asked.question.aspects)
        except AnswerError:  # an older version of this program read it otherwise
            return None

    def _ask(self, missing: Sequence[_Asked], settle: _Settle) -> None:
        """Ask, and ask those once more whose answers are wrong."""
        complaints: list[tuple[_Asked, Conversation]] = []

        def complain(asked: _Asked, conversation: Conversation, text: str, error: AnswerError) -> None:
            wrong = Turn("assistant", text[:LONGEST_ANSWER])
            complaints.append((asked, (*conversation, wrong, Turn("user", asked.question.complaint(str(error))))))

        def give_up(asked: _Asked, _conversation: Conversation, _text: str, error: AnswerError) -> None:
            settle(asked, Failed("unparsable", f"Asked twice, the model gave no valid scores: {error}"))

        self._round([(asked, asked.conversation()) for asked in missing], settle, complain)
        self._repairs += len(complaints)
        self._round(complaints, settle, give_up)

    def _round(self, asked: Sequence[tuple[_Asked, Conversation]], settle: _Settle, on_wrong: _OnWrong) -> None:
        """Ask each question once; good answers are kept as they come."""

        def take(number: int, answer: Answer) -> None:
            one, conversation = asked[number]
            if isinstance(answer, NoReply):
                settle(one, Failed(answer.reason, answer.detail))
                return
            try:
                scores = read_answer(answer.text, one.question.aspects)
            except AnswerError as error:
                on_wrong(one, conversation, answer.text, error)
                return
            self._cache.put(
                one.key,
                KeptAnswer(
                    model=self._chat.identity,
                    question=one.question.name,
                    instruction=one.edit.instruction,
                    text=answer.text,
                ),
            )
            settle(one, scores)

        if asked:
            self._chat.ask([conversation for _, conversation in asked], take)


def _side_by_side(edit: MadeEdit) -> tuple[Picture, Picture]:
    """Source and edit at the source's size: an editor may answer at its own."""
    height, width = edit.source.shape[:2]
    if edit.edit.shape == edit.source.shape:
        return edit.source, edit.edit
    resized = Image.fromarray(edit.edit).resize((width, height), Image.Resampling.LANCZOS)
    return edit.source, np.asarray(resized)


def _verdict(outcomes: Sequence[_Outcome]) -> Verdict:
    """An edit's scores, or the first thing that went wrong."""
    scores: dict[Aspect, Score] = {}
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            return outcome
        scores |= outcome
    return scores_by_aspect(scores)
