"""Steps 6 and 7: pictures without a thing, and with another one in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from insightedit.platform.construction.photos import Change, Mask, Photo, Picture, Rejected
from insightedit.platform.records import encode_png


class Job(NamedTuple):
    """An edit that is to be painted."""

    photo: Photo
    change: Change

    @property
    def mask(self) -> Mask:
        """Which pixels the thing has."""
        if self.change.thing.mask is None:
            raise ValueError(f"{self.change.thing.name} of {self.photo.key} has no mask.")
        return self.change.thing.mask.mask()


class Painter(Protocol):
    """Paints over a part of a picture."""

    def paint(self, jobs: Sequence[Job]) -> list[Picture | Rejected]:
        """The edited pictures, each of its picture's size.

        Raises:
            UsageError: the model cannot be loaded.
        """
        ...


def run_painting(painter: Painter, task: Literal["remove", "replace"], photos: Sequence[Photo]) -> None:
    """Paint the edits of one task; those that cannot be painted, or change nothing, fall out."""
    jobs = [Job(photo, change) for photo in photos for change in photo.kept if change.task == task]
    for job, painted in zip(jobs, painter.paint(jobs), strict=True):
        why = painted if isinstance(painted, Rejected) else None
        if not isinstance(painted, Rejected):
            if np.array_equal(painted, job.photo.pixels):
                why = Rejected("unchanged", "What was painted is the picture as it was.")
            job.change.painted = encode_png(painted)
        if why is not None:
            job.photo.drop_change(task, job.change, why)
