"""What a server allows, and how its parts scale."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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
    budget: Count = 2_000_000_000
    """Pixels x steps x images that one request may ask for."""
    in_flight: Count = 16
    """Edit requests that one gateway replica works on or keeps waiting; beyond them it answers 429."""
    places: Count = 8
    """Images that one gateway replica has edited at a time; whose turn is next when one is free is settled fairly."""
    retry_after: Count = 2
    """Seconds that a refused client is asked to wait."""
    edit_seconds: Seconds = 120.0
    """Time for one request, waiting and retries included. Replicas get longer than this to drain."""
    body_seconds: Seconds = 30.0
    """Time for a request's body to come."""
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


class ServeSettings(_Settings):
    """Everything `insightedit serve up` can be told beside the model version and the port."""

    host: str = "127.0.0.1"
    """Address to listen on. Wherever others reach it, they must show API keys."""
    require_keys: bool | None = None
    """Whether callers must show an API key; by default only where `host` is not a loopback address."""
    hosts: tuple[str, ...] = ()
    """Names beside loopback's by which a server without keys may be asked for, as behind a proxy of your own."""
    exact: bool = True
    """Exact mode: the same request gives the same bits, whoever else is served at the time."""
    startup_seconds: Seconds = 480.0
    """Time for the server to answer its first edit."""
    log_folder: str | None = None
    """Where replicas write their logs; in the work folder's `logs` for a server on this machine, else with Ray's."""
    trace_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of requests that OpenTelemetry traces; above 0 it needs the extra `insightedit[tracing]`."""
    limits: Limits = Limits()
    gateway: Scaling = Scaling(max_ongoing=64, target_ongoing=16, max_queued=64, cpus=0.1)
    conditioner: Scaling = Scaling()
    editor: Scaling = Scaling()
