"""What the gateway asks of whatever edits images: an edit, by which version, and whether it is well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol

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
    sleeps: bool = False
    """Whether its replicas may all be gone until the next edit: then nobody asks them how they are."""


class Canary(BaseModel):
    """A version that makes a share of the edits, until it has shown that it is not worse."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    share: float
    sticky: bool = False
    """Whether a caller's user has all edits by the same version."""


class RolloutStatus(BaseModel):
    """How far a new version has come, as people read it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: str
    old: str
    """The version that it takes over from."""
    entry: int
    """The audit entry that asked for it."""
    state: Literal["loading", "canary", "full", "rolled_back"]
    since: float
    """When that began, in seconds since the epoch."""
    reason: str = ""
    """Why it was rolled back."""
    answers: int = 0
    """Edits that it made for users."""
    failures: int = 0
    """Edits that it failed at; the old version made them."""
    pairs: int = 0
    """Edits that both made, whose quality is compared."""
    quality: float | None = None
    """Its quality on them, 0 to 1."""
    old_quality: float | None = None


class VersionTable(BaseModel):
    """Which versions are served, and which one an edit gets that names none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: str
    versions: dict[str, VersionEntry]
    """Those that people may name."""
    others: dict[str, VersionEntry] = {}
    """Loaded as well, but nobody's choice: a canary, and versions on their way out."""
    canary: Canary | None = None
    """One of the others."""
    rollout: RolloutStatus | None = None
    """The last one, also when it is over."""

    def entry(self, version: str) -> VersionEntry | None:
        """A loaded version's."""
        return self.versions.get(version) or self.others.get(version)

    def choose(self, model: str | None, draw: float) -> str:
        """The version for a request, which may be the canary where it names no version by its number.

        Args:
            model: as `resolve` takes it.
            draw: from 0 to 1; below the canary's share it gets the edit.

        Raises:
            ApiError: 404, naming what is served.
        """
        version = self.resolve(model)
        if self.canary is None or version != self.default or _named(model) == version:
            return version
        return self.canary.version if draw < self.canary.share else version

    def resolve(self, model: str | None) -> str:
        """The version that a request's `model` means.

        Args:
            model: `3`, `champion`, `insightedit`, `insightedit/3`, `insightedit@champion`, also after `models:/`.

        Raises:
            ApiError: 404, naming what is served.
        """
        name = _named(model)
        if not name:
            return self.default
        for version, entry in self.versions.items():
            if name == version or name in entry.aliases:
                return version
        served = ", ".join(self.versions)
        message = f"model {name[:80]!r} is not served here; served are {served}."
        raise ApiError(404, "model_not_found", message, "model")


def _named(model: str | None) -> str:
    """The number or alias in a request's `model`; empty where it names none."""
    return (model or "").removeprefix("models:/").removeprefix(MODEL_NAME).lstrip("@/")


class Backend(Protocol):
    """Edits images. The gateway's own is `routing.ReplicaBackend`; tests bring theirs."""

    table: VersionTable
    """What is served; another one may be put in its place at any time."""

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
