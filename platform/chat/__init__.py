"""Multimodal language models that are asked questions: the interface of one behind an endpoint and of a local one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALLEST_SIDE = 224
"""Pixels that the shorter side of a picture has at least when it is shown: much smaller ones are refused or not seen
by many models."""

Reason = Literal["unreachable", "timeout", "overloaded", "server_error", "rejected", "refused", "empty"]
"""Why there is no answer: nobody was there; not in time; 429 until patience ended; a broken server likewise; the
request itself was turned down; the model declined; it said nothing."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says.

    Attributes:
        role: who says it.
        text: the words.
        pictures: uint8 (H, W, 3) each, shown before the words.
    """

    role: Literal["user", "assistant"]
    text: str
    pictures: tuple[NDArray[np.uint8], ...] = ()


Conversation: TypeAlias = tuple[Turn, ...]
"""The turns so far; the last one is the user's."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said."""

    text: str


@dataclass(frozen=True, slots=True)
class NoReply:
    """That the model said nothing of use.

    Attributes:
        reason: one of few, to be counted.
        detail: what happened, in one sentence.
    """

    reason: Reason
    detail: str


Answer: TypeAlias = Reply | NoReply
OnAnswer = Callable[[int, Answer], None]
"""Is given each answer as it comes, with the number of its conversation."""


@dataclass(slots=True)
class Usage:
    """What asking took so far."""

    requests: int = 0
    """Every try counted."""
    retries: int = 0
    """Of them, tries after the first."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatModel(Protocol):
    """Answers conversations."""

    @property
    def identity(self) -> str:
        """The model and how it is asked: all that an answer depends on beside the conversation."""
        ...

    @property
    def usage(self) -> Usage:
        """What this model took since it was made."""
        ...

    def ask(self, conversations: Sequence[Conversation], on_answer: OnAnswer) -> None:
        """Have conversations answered, in any order; one without an answer stops no other.

        Args:
            conversations: the conversations.
            on_answer: is called once for each.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        ...


def shown(picture: NDArray[np.uint8], longest: int) -> Image.Image:
    """A picture as a model is shown it: large ones reduced, tiny ones enlarged by whole multiples.

    Args:
        picture: uint8 (H, W, 3).
        longest: pixels of the longer side, at most.
    """
    image = Image.fromarray(picture)
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    times = min(-(-SMALLEST_SIDE // min(image.size)), longest // max(image.size))
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return image
