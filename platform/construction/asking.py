"""Questions about pictures to a language model: what cannot be answered is turned down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from insightedit.platform.chat import ChatModel, Conversation, Turn, asking
from insightedit.platform.chat.cache import AnswerCache
from insightedit.platform.construction.photos import Picture, Rejected, Spent
from insightedit.platform.judges import picture_hash

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

    def to(self, identity: str) -> asking.Question[T]:
        """The question to the model of this identity."""
        parts = [identity, self.name, self.text, *map(picture_hash, self.pictures)]
        return asking.Question(
            key=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            name=self.name,
            subject=self.text,
            conversation=self.conversation,
            read=self.read,
            complaint=lambda problem: _COMPLAINT.format(problem=problem),
            wanted="answer",
        )


class Asker:
    """Asks a model."""

    def __init__(self, chat: ChatModel, cache: AnswerCache) -> None:
        """Make ready.

        Args:
            chat: the model.
            cache: where its answers are kept; it may be shared.
        """
        self._asker = asking.Asker(chat, cache)

    def spent(self) -> Spent:
        """What asking took so far, but for the time."""
        return Spent.of(self._asker.spending())

    def ask(self, questions: Sequence[Question[T]]) -> list[T | Rejected]:
        """Have questions answered, each by itself; one without a valid answer stops no other.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        answers = self._asker.ask([question.to(self._asker.identity) for question in questions])
        return [
            Rejected(answer.reason, answer.detail) if isinstance(answer, asking.Unanswered) else answer
            for answer in answers
        ]
