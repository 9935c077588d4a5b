"""Questions to a language model, each with what makes its answer valid; answers are paid for once.

An answer that cannot be used is complained about once, in the same conversation; then the question counts as
unanswered. Good answers are kept on disk: a run that was killed asks only for what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

from insightedit.platform import chat
from insightedit.platform.chat import Answer, ChatModel, Conversation, NoReply, Turn
from insightedit.platform.chat.cache import AnswerCache, KeptAnswer
from insightedit.platform.chat.wording import AnswerError

LONGEST_ANSWER: Final = 4000
"""Characters of a wrong answer that are shown to the model again."""

Reason = Literal[chat.Reason, "unparsable"]
"""Why a question has no answer: the model gave none, or, asked twice, none that can be used."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question(Generic[T]):
    """A question.

    Attributes:
        key: under which its answer is kept; the same for the same question to the same model.
        name: of its kind.
        subject: what it is about, in words, kept beside its answer.
        conversation: gives it as it is put.
        read: makes what is wanted of an answer, or raises `AnswerError`.
        complaint: what is said about an answer, of what is wrong with it.
        wanted: what an answer has, in the plural or not: "scores".
    """

    key: str
    name: str
    subject: str
    conversation: Callable[[], Conversation]
    read: Callable[[str], T]
    complaint: Callable[[str], str]
    wanted: str


@dataclass(frozen=True, slots=True)
class Unanswered:
    """That a question has no answer of use.

    Attributes:
        reason: one of few, to be counted.
        detail: what happened, in one sentence.
    """

    reason: Reason
    detail: str


@dataclass(slots=True)
class Spending:
    """What asking took so far."""

    requests: int = 0
    """Sent to the model, every try counted."""
    retries: int = 0
    """Of them, tries again after the endpoint was not to be reached, overloaded or broken."""
    repairs: int = 0
    """Of them, answers that could not be used and that the model was asked to put right."""
    cached: int = 0
    """Answers that were there already."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


_OnWrong = Callable[[int, Conversation, str, AnswerError], None]
"""Is given a question's number, its conversation, the answer that cannot be used, and what is wrong with it."""


class Asker:
    """Asks a model."""

    def __init__(self, model: ChatModel, cache: AnswerCache) -> None:
        """Make ready.

        Args:
            model: who is asked.
            cache: where its answers are kept; it may be shared.
        """
        self._model = model
        self._cache = cache
        self._repairs = 0
        self._cached = 0

    @property
    def identity(self) -> str:
        """The model and how it is asked, which keys have to be made with."""
        return self._model.identity

    def spending(self) -> Spending:
        """What asking took so far."""
        usage = self._model.usage
        return Spending(
            requests=usage.requests,
            retries=usage.retries,
            repairs=self._repairs,
            cached=self._cached,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def ask(
        self, questions: Sequence[Question[T]], on_settled: Callable[[int], None] | None = None
    ) -> list[T | Unanswered]:
        """Have questions answered, each by itself; one without an answer of use stops no other.

        Args:
            questions: all of different keys, or what is the same is asked several times.
            on_settled: is told how many are settled, each time that one is.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        outcomes: dict[int, T | Unanswered] = {}
        complaints: list[tuple[int, Conversation]] = []

        def settle(number: int, outcome: T | Unanswered) -> None:
            outcomes[number] = outcome
            if on_settled is not None:
                on_settled(len(outcomes))

        def complain(number: int, conversation: Conversation, text: str, error: AnswerError) -> None:
            said = Turn("assistant", text[:LONGEST_ANSWER])
            complaints.append((number, (*conversation, said, Turn("user", questions[number].complaint(str(error))))))

        def give_up(number: int, _conversation: Conversation, _text: str, error: AnswerError) -> None:
            problem = f"Asked twice, the model gave no valid {questions[number].wanted}: {error}"
            settle(number, Unanswered("unparsable", problem))

        missing: list[int] = []
        for number, question in enumerate(questions):
            kept = self._kept(question)
            if kept is None:
                missing.append(number)
            else:
                self._cached += 1
                settle(number, kept[0])
        self._round(questions, [(number, questions[number].conversation()) for number in missing], settle, complain)
        self._repairs += len(complaints)
        self._round(questions, complaints, settle, give_up)
        return [outcomes[number] for number in range(len(questions))]

    def _kept(self, question: Question[T]) -> tuple[T] | None:
        kept = self._cache.get(question.key)
        try:
            return None if kept is None else (question.read(kept.text),)
        except AnswerError:  # an older version of this program read it otherwise
            return None

    def _round(
        self,
        questions: Sequence[Question[T]],
        asked: Sequence[tuple[int, Conversation]],
        settle: Callable[[int, T | Unanswered], None],
        on_wrong: _OnWrong,
    ) -> None:
        """Ask each once; good answers are kept as they come."""

        def take(place: int, answer: Answer) -> None:
            number, conversation = asked[place]
            question = questions[number]
            if isinstance(answer, NoReply):
                settle(number, Unanswered(answer.reason, answer.detail))
                return
            try:
                found = question.read(answer.text)
            except AnswerError as error:
                on_wrong(number, conversation, answer.text, error)
                return
            kept = KeptAnswer(
                model=self.identity, question=question.name, instruction=question.subject, text=answer.text
            )
            self._cache.put(question.key, kept)
            settle(number, found)

        if asked:
            self._model.ask([conversation for _, conversation in asked], take)
