"""Step 8: instructions of each pair, simple ones and those that need reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, Protocol

from insightedit.platform.construction.photos import Change, Photo, Rejected, Words

ABOUT: Final = ("location", "colour", "quantity", "function")
"""What the reasoning of an advanced instruction may be about, as the paper names it."""


class Direction(NamedTuple):
    """A pair: an edit in one of its two directions."""

    photo: Photo
    change: Change
    way: Literal["there", "back"]

    @property
    def task(self) -> Literal["remove", "add", "replace"]:
        """What the pair does."""
        return "add" if self.change.task == "remove" and self.way == "back" else self.change.task

    @property
    def before(self) -> str:
        """What is called by name in the pair's source; nothing where a thing is added."""
        return "" if self.task == "add" else self.change.thing.name if self.way == "there" else self.change.new_name

    @property
    def after(self) -> str:
        """What is called by name in its target; nothing where a thing is removed."""
        return "" if self.task == "remove" else self.change.new_name if self.way == "there" else self.change.thing.name


class Writer(Protocol):
    """Writes instructions."""

    def words(self, pairs: Sequence[Direction]) -> list[Words | Rejected]:
        """The instructions of each pair.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        ...


def run_instructions(writer: Writer, photos: Sequence[Photo]) -> None:
    """Write instructions for both directions of every edit; an edit that has none in one of them falls out."""
    pairs = [Direction(photo, change, way) for photo in photos for change in photo.kept for way in ("there", "back")]
    for pair, words in zip(pairs, writer.words(pairs), strict=True):
        if not isinstance(words, Rejected):
            setattr(pair.change, pair.way, words)
        elif pair.change.kept:
            pair.photo.drop_change("instruct", pair.change, words)
