"""Step 5: which edits a picture gets, and what comes in the place of a thing that is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.construction.photos import Change, Photo, Rejected


@dataclass(frozen=True, slots=True)
class Replacement:
    """What comes in the place of a thing: what an instruction calls it, and one sentence about it."""

    name: str
    caption: str


class Proposer(Protocol):
    """Thinks of other things that would fit where one is."""

    def replacements(self, photos: Sequence[Photo]) -> list[list[Replacement | Rejected]]:
        """A replacement for each thing of each picture.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        ...


Allowed = Callable[[Photo, Change], Rejected | None]
"""Says why an edit may not be made; None where it may."""


def run_proposals(
    proposer: Proposer | None, allowed: Allowed, config: ConstructionConfig, photos: Sequence[Photo]
) -> None:
    """Plan edits: every thing removed, and replaced where there is a painter for that."""
    for photo in photos:
        photo.changes = [Change(task="remove", thing=thing) for thing in photo.things]
    if proposer is not None and config.replacement != "none":
        for photo, found in zip(photos, proposer.replacements(photos), strict=True):
            photo.changes += _replacements(photo, found)
    for photo in photos:
        for change in photo.changes:
            if (why := allowed(photo, change)) is not None:
                photo.drop_change("propose", change, why)


def _replacements(photo: Photo, found: Sequence[Replacement | Rejected]) -> Iterator[Change]:
    for thing, new in zip(photo.things, found, strict=True):
        if isinstance(new, Rejected):
            photo.reject("propose", thing.name, new)
        elif new.name.lower() == thing.name.lower():
            photo.reject("propose", thing.name, Rejected("same_thing", f"It would be replaced by {new.name}."))
        else:
            yield Change(task="replace", thing=thing, new_name=new.name, new_caption=new.caption)
