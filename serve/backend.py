"""What the gateway asks of whatever edits images: an edit, by which version, and whether it is well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from insightedit.serve.schema import ApiError, SchedulerName
from insightedit.serve.uploads import Pixels

MODEL_NAME = "insightedit"


@dataclass(frozen=True, kw_only=True, slots=True)
class EditJob:
    """One edit, whole: the same job gives the same image wherever and however often it is done.

    What is None is the model version's own.
    """

    prompt: str
    pixels: Pixels
    seed: int
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    negative_prompt: str | None = None
    image_branch_scale: float | None = None
    """Weight of the image branch; 1 where it is None."""
    scheduler: SchedulerName | None = None
    priority: int = 0
    """Edits of a higher priority go first."""
    partials: int = 0
    """How many images of the edit in progress are handed out, spread evenly over its steps."""


PartialTaker = Callable[[int, Pixels], Awaitable[None]]
"""Takes a partial image: its index from 0, and the image at its source's size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EditOutcome:
    """An edited image at its source's size, what it took (seconds), and what was read and written (tokens)."""

    pixels: Pixels
    steps: int
    queue_seconds: float
    condition_seconds: float
    edit_seconds: float
    text_tokens: int
    image_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What the conditioner gives: `EditConditions` by name as float32, seconds and positions read."""

    arrays: dict[str, NDArray[np.float32]]
    seconds: float
    text_tokens: int
    image_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Edited:
    """What the editor gives: the image at its source's size, seconds, steps and latent positions written."""

    pixels: Pixels
    seconds: float
    steps: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Partial:
    """What the editor gives on the way: an image of the edit in progress at its source's size, by its index from 0."""

    index: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Refusal:
    """The model cannot do this edit. A value, not an exception: nothing has failed."""

    message: str
    param: str


class VersionInfo(BaseModel):
    """What the replicas of a version say of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int | None
    """Side in pixels of the square whose area an image has inside the model; None for the image's own size."""
    num_inference_steps: int
    guidance_scale: float
    image_guidance_scale: float


class VersionEntry(BaseModel):
    """A model version that is being served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    application: str
    """The Serve application that holds its conditioner and editor."""
    aliases: tuple[str, ...] = ()


class VersionTable(BaseModel):
    """Which versions are served, and which one an edit gets that names none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: str
    versions: dict[str, VersionEntry]

    def resolve(self, model: str | None) -> str:
        """The version that a request's `model` means.

        Args:
            model: `3`, `champion`, `insightedit`, `insightedit/3`, `insightedit@champion`, also after `models:/`.

        Raises:
            ApiError: 404, naming what is served.
        """
        name = (model or "").removeprefix("models:/").removeprefix(MODEL_NAME).lstrip("@/")
        if not name:
            return self.default
        for version, entry in self.versions.items():
            if name == version or name in entry.aliases:
                return version
        served = ", ".join(self.versions)
        message = f"model {name[:80]!r} is not served here; served are {served}."
        raise ApiError(404, "model_not_found", message, "model")


class Backend(Protocol):
    """Edits images. The gateway's own is `routing.ReplicaBackend`; tests bring theirs."""

    @property
    def table(self) -> VersionTable:
        """What is served."""
        ...

    async def edit(self, version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        """Do an edit. Whoever cancels the task that awaits it takes the edit out of the engine at its next step.

        Args:
            version: of the model, resolved.
            job: the edit.
            on_partial: takes up to `job.partials` images of the edit in progress, in order.

        Raises:
            ApiError: 400 for what the model refuses, 429 when every place is taken, 503 when nobody can do it.
        """
        ...

    async def describe(self, version: str) -> VersionInfo:
        """What a version is, as said by its replicas now.

        Raises:
            ApiError: 503, they do not answer.
        """
        ...
