"""Questions to a language model, each with what makes its answer valid; answers are paid for once.

An answer that cannot be used is complained about once, in the same conversation; then the question counts as failed.
Good answers are kept on disk: a run that was killed asks only for what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from insightedit.platform.chat import Answer, ChatModel, Conversation, NoReply, Turn
from insightedit.platform.chat.wording import AnswerError
from insightedit.platform.construction.photos import Picture, Rejected, Spent
from insightedit.platform.judges import picture_hash
from insightedit.platform.judges.cache import AnswerCache, KeptAnswer

LONGEST_ANSWER: Final = 4000
"""Characters of a wrong answer that are shown to the model again."""
_COMPLAINT: Final = "That answer cannot be used: {problem} Answer again, in exactly the form that was asked for."

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """A question about pictures.

    Attributes:
        name: of its kind.
        text: the words.
        pictures: shown before them.
        read: makes what is wanted of an answer, or raises `AnswerError`.
    """

    name: str
    text: str
    pictures: tuple[Picture, ...]
    read: Callable[[str], T]

    def conversation(self) -> Conversation:
        """The question as it is put."""
        return (Turn("user", self.text, self.pictures),)


class Asker:
    """Asks a model."""

    def __init__(self, chat: ChatModel, cache: AnswerCache) -> None:
        """Make ready.

        Args:
            chat: the model.
            cache: where its answers are kept; it may be shared.
        """
        self._chat = chat
        self._cache = cache
        self._repairs = 0
        self._cached = 0

    def spent(self) -> Spent:
        """What asking took so far, but for the time."""
        usage = self._chat.usage
        return Spent(
            requests=usage.requests,
            retries=usage.retries,
            repairs=self._repairs,
            cached=self._cached,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def ask(self, questions: Sequence[Question[T]]) -> list[T | Rejected]:
        """Have questions answered, each by itself; one without a valid answer stops no other.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        outcomes: dict[int, T | Rejected] = {}
        wrong: dict[int, tuple[Conversation, str]] = {}
        missing: list[int] = []
        for number, question in enumerate(questions):
            kept = self._kept(question)
            if kept is None:
                missing.append(number)
            else:
                outcomes[number] = kept[0]
        first = [(number, questions[number].conversation()) for number in missing]
        self._round(questions, first, outcomes, wrong)
        self._repairs += len(wrong)
        second = [(number, conversation) for number, (conversation, _) in wrong.items()]
        still: dict[int, tuple[Conversation, str]] = {}
        self._round(questions, second, outcomes, still)
        for number, (_, problem) in still.items():
            outcomes[number] = Rejected("unparsable", f"Asked twice, the model gave no valid answer: {problem}")
        return [outcomes[number] for number in range(len(questions))]

    def _round(
        self,
        questions: Sequence[Question[T]],
        asked: Sequence[tuple[int, Conversation]],
        outcomes: dict[int, T | Rejected],
        wrong: dict[int, tuple[Conversation, str]],
    ) -> None:
        """Ask each once; a wrong answer's conversation goes on with a complaint."""

        def take(place: int, answer: Answer) -> None:
            number, conversation = asked[place]
            if isinstance(answer, NoReply):
                outcomes[number] = Rejected(answer.reason, answer.detail)
                return
            try:
                outcomes[number] = questions[number].read(answer.text)
            except AnswerError as error:
                said = Turn("assistant", answer.text[:LONGEST_ANSWER])
                complaint = Turn("user", _COMPLAINT.format(problem=error))
                wrong[number] = ((*conversation, said, complaint), str(error))
                return
            self._keep(questions[number], answer.text)

        if asked:
            self._chat.ask([conversation for _, conversation in asked], take)

    def _kept(self, question: Question[T]) -> tuple[T] | None:
        kept = self._cache.get(self._key(question))
        if kept is None:
            return None
        try:
            found = question.read(kept.text)
        except AnswerError:  # an older version of this program read it otherwise
            return None
        self._cached += 1
        return (found,)

    def _keep(self, question: Question[T], text: str) -> None:
        kept = KeptAnswer(model=self._chat.identity, question=question.name, instruction=question.text, text=text)
        self._cache.put(self._key(question), kept)

    def _key(self, question: Question[T]) -> str:
        parts = [self._chat.identity, question.name, question.text, *map(picture_hash, question.pictures)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
