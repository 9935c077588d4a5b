"""Step 1: a caption for each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from insightedit.platform.construction.photos import Photo, Rejected


class Captioner(Protocol):
    """Says in words what a picture shows."""

    def captions(self, photos: Sequence[Photo]) -> list[str | Rejected]:
        """A caption for each picture.

        Raises:
            UsageError: the model cannot be loaded, or lets nobody in.
        """
        ...


def run_captions(captioner: Captioner, photos: Sequence[Photo]) -> None:
    """Caption pictures; one without a caption is out."""
    for photo, caption in zip(photos, captioner.captions(photos), strict=True):
        if isinstance(caption, Rejected):
            photo.drop("caption", caption)
        else:
            photo.caption = caption
