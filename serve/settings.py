"""What a server allows, and how its parts scale."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Limits(_Settings):
    """What one request may ask for. The page and the error messages name these numbers."""

    body_bytes: Count = 20 * 2**20
    """Size of a whole request, checked before it is parsed."""
    pixels: Count = 16_000_000
    """Pixels of an uploaded image, checked before it is decoded."""
    side: Annotated[int, Field(ge=1, le=16383)] = 8192
    """Longest side of an uploaded image in pixels. WebP holds 16383 at most."""
    aspect: Annotated[float, Field(ge=1)] = 8.0
    """How many times its shorter side an image's longer one may be. Inside the model, thin images grow."""
    prompt_chars: Annotated[int, Field(ge=1, le=32000)] = 4000
    """Length of an instruction, and of a negative prompt, in characters."""
    steps: Count = 200
    """Denoising steps of one edit."""
    in_flight: Count = 16
    """Edits that one gateway replica works on or keeps waiting; beyond them it answers 429."""
    retry_after: Count = 2
    """Seconds that a refused client is asked to wait."""
    edit_seconds: Seconds = 120.0
    """Time for one edit, waiting and retries included. Replicas get longer than this to drain."""
    attempts: Count = 6
    """Dispatches of one piece of work, counting those to replicas that died under it."""


class Scaling(_Settings):
    """How many replicas one deployment has, and what each takes."""

    min_replicas: Count = 1
    max_replicas: Count = 2
    target_ongoing: Annotated[float, Field(gt=0)] = 2.0
    """Requests in hand for each replica, above which Serve adds a replica."""
    max_ongoing: Count = 4
    """Requests that one replica takes before the next ones wait at the caller."""
    max_queued: Count = 16
    """Requests that wait at one caller; beyond them it answers 429."""
    cpus: Annotated[float, Field(ge=0)] = 0.25
    """Logical CPUs that Ray counts for a replica. Its torch runs on one thread whatever this is."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    place: dict[str, str] = {}
    """Labels of the nodes that replicas may run on, as in Ray's label selectors: `{group: serve}`."""


class EngineSettings(_Settings):
    """How edits are denoised. In exact mode only `max_batch` and `cache_bytes` may differ from what they are here."""

    max_batch: Count = 8
    """Edits that take their steps together, or in turn in exact mode; further ones wait, the highest priority first."""
    cache_bytes: Annotated[int, Field(ge=0)] = 2**28
    """Memory for the conditions of earlier edits, and as much for their source latents: an edit of the same image and
    instruction, or of the same image, does not compute them again."""
    threads: Count = 1
    """Threads of the CPU that a step may use."""
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    """Keep the channels of a pixel side by side in memory: faster convolutions in bfloat16, and on GPUs."""
    compile: bool = False
    """Compile the UNet's blocks with torch.compile: each batch of another shape waits for its compilation once."""
    deep_every: Count = 1
    """Run the whole UNet every so many steps, and in between its last layer alone."""
    guide_every: Count = 1
    """Run the guidance branches without the instruction every so many steps, and add what they gave in between."""


class ServeSettings(_Settings):
    """Everything `insightedit serve up` can be told beside the model version and the port."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no authentication, so leave it on loopback."""
    exact: bool = True
    """Exact mode: the same request gives the same bits, whoever else is served at the time."""
    startup_seconds: Seconds = 480.0
    """Time for the server to answer its first edit."""
    limits: Limits = Limits()
    gateway: Scaling = Scaling(max_ongoing=64, target_ongoing=16, max_queued=64, cpus=0.1)
    conditioner: Scaling = Scaling()
    editor: Scaling = Scaling(max_ongoing=16)
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _exact_edits_take_no_shortcut(self) -> ServeSettings:
        free = self.engine.model_dump(exclude={"max_batch", "cache_bytes"}, exclude_defaults=True)
        if self.exact and free:
            name = next(iter(free))
            raise ValueError(f"engine.{name} changes an edit's bits, and exact is true; set exact to false or leave it")
        return self
