"""Step 2: the things in a picture that could be edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from insightedit.platform.construction.photos import Photo, Rejected, Thing


class ObjectFinder(Protocol):
    """Lists the things in a captioned picture."""

    def objects(self, photos: Sequence[Photo]) -> list[list[Thing] | Rejected]:
        """Name, category and a caption of each thing of each picture.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        ...


def run_objects(finder: ObjectFinder, photos: Sequence[Photo]) -> None:
    """List things; of two of one name neither can be told from the other, and a picture without any is out."""
    for photo, found in zip(photos, finder.objects(photos), strict=True):
        if isinstance(found, Rejected):
            photo.drop("objects", found)
            continue
        names = [thing.name.lower() for thing in found]
        for thing in found:
            if names.count(thing.name.lower()) > 1:
                why = Rejected("same_name", f"Several things are called {thing.name}; none of them can be meant alone.")
                photo.reject("objects", thing.name, why)
            else:
                photo.things.append(thing)
        if not photo.things:
            photo.drop("objects", Rejected("no_objects", "Nothing in the picture has a name of its own."))
