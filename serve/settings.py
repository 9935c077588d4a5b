"""What a server allows, and how its parts scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, IPvAnyNetwork, ValidationError, model_validator

from insightedit.platform.config import JudgeConfig
from insightedit.platform.errors import NotFoundError, UsageError

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Limits(_Settings):
    """What one request may ask for. The page and the error messages name these numbers."""

    body_bytes: Count = 20 * 2**20
    """Size of a whole request, checked before it is parsed."""
    pixels: Count = 16_000_000
    """Pixels of an uploaded image, checked before it is decoded; of a request's images together; of an edit."""
    side: Annotated[int, Field(ge=1, le=16383)] = 8192
    """Longest side of an uploaded image in pixels. WebP holds 16383 at most."""
    aspect: Annotated[float, Field(ge=1)] = 8.0
    """How many times its shorter side an image's longer one may be. Inside the model, thin images grow."""
    prompt_chars: Annotated[int, Field(ge=1, le=32000)] = 4000
    """Length of an instruction, and of a negative prompt, in characters."""
    steps: Count = 200
    """Denoising steps of one edit."""
    images: Count = 16
    """Edits of one request: the images it sends times its `n`."""
    budget: Count = 2_000_000_000
    """Pixels x steps x images that one request may ask for."""
    in_flight: Count = 16
    """Edit requests that one gateway replica works on or keeps waiting; beyond them it answers 429."""
    places: Count = 8
    """Images that one gateway replica has edited at a time; whose turn is next when one is free is settled fairly."""
    jobs: Count = 100
    """Jobs of one caller that wait or are done at a time; beyond them it gets 429."""
    jobs_at_once: Count = 4
    """Jobs that one gateway replica does at a time, half of `in_flight` at most; the others wait in the store."""
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

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """With 0 the last replica goes when nothing has come for `sleep_seconds`; the next request waits for another."""
    max_replicas: Count = 2
    target_ongoing: Annotated[float, Field(gt=0)] = 2.0
    """Requests in hand for each replica, above which Serve adds a replica."""
    look_back_seconds: Annotated[float, Field(ge=1)] = 2.0
    """What the requests in hand are averaged over before they are compared with `target_ongoing`."""
    upscale_seconds: Annotated[float, Field(ge=0)] = 1.0
    """How long too many must be in hand before replicas are added."""
    downscale_seconds: Annotated[float, Field(ge=0)] = 120.0
    """How long too few must be in hand before a replica is taken away."""
    sleep_seconds: Annotated[float, Field(ge=0)] = 300.0
    """How long nothing must come before the last replica goes, where `min_replicas` is 0."""
    max_ongoing: Count = 4
    """Requests that one replica takes before the next ones wait at the caller."""
    max_queued: Count = 16
    """Requests that wait at one caller; beyond them it answers 429."""
    cpus: Annotated[float, Field(ge=0)] = 0.25
    """Logical CPUs that Ray counts for a replica. Its torch runs on one thread whatever this is."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    place: dict[str, str] = {}
    """Labels of the nodes that replicas may run on, as in Ray's label selectors: `{group: serve}`."""

    @model_validator(mode="after")
    def _least_and_most(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}")
        return self


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


ORIGIN = r"(?P<scheme>https?)://(?P<host>\*|(\*\.)?[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>[0-9]{1,5}))?"
"""What `Destinations.origins` are made of."""


class Destinations(_Settings):
    """Where the server opens connections to because a caller names an address: nowhere, unless it is said here."""

    origins: tuple[Annotated[str, Field(pattern=f"^{ORIGIN}$")], ...] = ()
    """Schemes and hosts, with a port where it is not the scheme's own: `https://images.example.com`,
    `https://*.example.com` for what is below that name, `https://*` for every name, `http://10.0.0.7:8080`."""
    networks: tuple[IPvAnyNetwork, ...] = ()
    """Networks that those hosts may be in beside the public internet, as in `10.0.0.0/8`."""
    seconds: Seconds = 10.0
    """Time for a connection, from looking the name up to the end of the answer."""


class StateSettings(_Settings):
    """What gateways keep of requests so that they can be repeated, and where: see `state_store`."""

    url: Annotated[str, Field(pattern=r"^(rediss?|unix)://")] | None = None
    """A Redis that gateways of several machines share, as in `redis://host:6379/0`; a file in the work folder without
    it, which gateways of one machine share."""
    bytes: Count = 2**30
    """What may be kept altogether."""
    key_seconds: Seconds = 86_400.0
    """How long an `Idempotency-Key` is remembered, with the seed and the version of its edit."""
    answer_seconds: Seconds = 3600.0
    """How long the images made for an `Idempotency-Key` are kept, after which a retry has them made again; and those of
    a job."""
    job_seconds: Seconds = 86_400.0
    """How long a job may wait and be done, and how long it is known afterwards."""
    lease_seconds: Annotated[float, Field(ge=0.5)] = 10.0
    """How long a gateway that says nothing any more counts as alive: then another one takes its work over."""

    @model_validator(mode="after")
    def _keys_outlive_answers(self) -> Self:
        if self.key_seconds < self.answer_seconds:
            raise ValueError(f"key_seconds {self.key_seconds:g} is less than answer_seconds {self.answer_seconds:g}")
        return self


def _no_judge_of_shapes(judge: JudgeConfig) -> JudgeConfig:
    if isinstance(judge, str):
        raise ValueError("the judge of shapes needs edits whose truth is known, and users' are not")
    return judge


class RolloutSettings(_Settings):
    """How a newly promoted version takes over from the one that is served: see `rollout`."""

    follow: bool = True
    """Go after the audit log: a server of the champion takes every promotion and rollback over while it runs."""
    poll_seconds: Annotated[float, Field(ge=0.05)] = 1.0
    """How often the audit log is read."""
    share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Of the edits that a new version makes until it has shown that it is not worse."""
    sticky: bool = False
    """Let a caller's user (the request's `user` under its API key) have all edits by the same version meanwhile."""
    load_seconds: Seconds = 600.0
    """Time for a new version to load and to make its first edits."""
    gentle_seconds: Annotated[float, Field(ge=0)] = 120.0
    """How long replicas of a new version, as they start, leave the processors to whoever else wants them."""
    warm_edits: Count = 4
    """Edits that both versions make before the new one has its share."""
    min_requests: Count = 20
    """Edits after which a new version may take all of them."""
    min_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Time on its share, likewise."""
    max_seconds: Seconds = 900.0
    """Time on its share after which it takes all edits though fewer came, if nothing speaks against it."""
    min_failures: Count = 3
    """Failures that rule a version out, if they are more than `max_failed` of its edits. One may be a lost machine."""
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.05
    min_timed: Count = 8
    """Edits of each version whose times are compared by their medians."""
    max_slowdown: Annotated[float, Field(ge=1)] = 1.5
    """How many times the old version's an edit's time may be."""
    slack_seconds: Annotated[float, Field(ge=0)] = 0.1
    """Seconds that it may take beyond that."""
    shadow_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Of the new version's edits that the old one makes too, behind all others, for their quality to be compared."""
    shadow_seconds: Seconds = 3600.0
    """How long such pairs of edits are kept."""
    min_pairs: Annotated[int, Field(ge=2)] = 4
    """Such pairs that say something of quality."""
    quality_margin: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Quality, of 0 to 1, that a new version may be below the old one's, beyond what chance explains."""
    judge: Annotated[JudgeConfig, AfterValidator(_no_judge_of_shapes)] | None = None
    """A language model that compares the quality of edits, as an evaluation's `judge`; pixels alone without it."""
    min_verdicts: Count = 10
    """Edits of each version that users must have accepted or rejected before that counts."""
    reject_margin: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of edits by which users may reject more of a new version's, beyond what chance explains."""
    keep_seconds: Annotated[float, Field(ge=0)] = 3600.0
    """How long the version before stays loaded, for a rollback to take no time."""

    @model_validator(mode="after")
    def _an_end_after_the_beginning(self) -> Self:
        if self.max_seconds < self.min_seconds:
            raise ValueError(f"max_seconds {self.max_seconds:g} is less than min_seconds {self.min_seconds:g}")
        return self


class FeedbackSettings(_Settings):
    """What is kept of users' verdicts on their edits: see `feedback`."""

    consent: bool = False
    """Whether users have agreed that edits which they judge are kept and trained on. Nothing is kept without it."""
    wait_seconds: Seconds = 3600.0
    """How long an edit waits for a verdict."""


class TraceSettings(_Settings):
    """Where traces of edits go."""

    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """Of an OpenTelemetry collector, as in `http://127.0.0.1:4318/v1/traces`; without it there are none."""
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Of the requests that are traced. A caller's own `traceparent` decides for its request."""


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
    haproxy: bool = False
    """Let HAProxy carry requests to the gateways instead of Serve's own proxy."""
    limits: Limits = Limits()
    gateway: Scaling = Scaling(max_ongoing=64, target_ongoing=16, max_queued=64, cpus=0.1)
    conditioner: Scaling = Scaling()
    editor: Scaling = Scaling(max_ongoing=16)
    engine: EngineSettings = EngineSettings()
    state: StateSettings = StateSettings()
    image_urls: Destinations = Destinations()
    """Where images may lie that a JSON body names by their addresses instead of holding them."""
    webhooks: Destinations = Destinations()
    """Where jobs may have their ends told."""
    rollout: RolloutSettings = RolloutSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    traces: TraceSettings = TraceSettings()

    @property
    def grace_seconds(self) -> float:
        """How long a replica that is taken away may finish what it has begun: longer than the longest edit."""
        return self.limits.edit_seconds + 10

    @property
    def stop_seconds(self) -> float:
        """How long the whole server may take to stop: its gateways first, then what is behind them, then Ray."""
        return self.grace_seconds + 90

    @property
    def sleeps(self) -> bool:
        """Whether a version's replicas may all be gone until the next request."""
        return 0 in (self.conditioner.min_replicas, self.editor.min_replicas)

    @model_validator(mode="after")
    def _somebody_answers(self) -> Self:
        if self.gateway.min_replicas == 0:
            raise ValueError("gateway.min_replicas must be 1 or more, since the gateway is what wakes the others")
        return self

    @model_validator(mode="after")
    def _exact_edits_take_no_shortcut(self) -> Self:
        free = self.engine.model_dump(exclude={"max_batch", "cache_bytes"}, exclude_defaults=True)
        if self.exact and free:
            name = next(iter(free))
            raise ValueError(f"engine.{name} changes an edit's bits, and exact is true; set exact to false or leave it")
        return self


def read_settings(path: Path | None, overrides: Sequence[str] = ()) -> ServeSettings:
    """Settings from a YAML file, with `section.key=value` laid over them.

    Args:
        path: of a mapping of what differs from the defaults; None for none.
        overrides: as given to `--set`.

    Raises:
        NotFoundError: there is no such file.
        UsageError: a setting is unknown or wrong, and which.
    """
    content = _read_mapping(path) if path else {}
    for override in overrides:
        name, separator, text = override.partition("=")
        *sections, last = name.split(".")
        if not separator or not last:
            raise UsageError(f"--set {override} is not of the form section.key=value.")
        place = content
        for section in sections:
            below = place.setdefault(section, {})
            if not isinstance(below, dict):
                raise UsageError(f"--set {override}: {section} is a value, not a section.")
            place = cast(dict[str, Any], below)
        place[last] = yaml.safe_load(text)
    defaults = ServeSettings().model_dump()
    for key, value in content.items():
        below = defaults.get(key)
        defaults[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    try:
        return ServeSettings.model_validate(defaults)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{path or '--set'}: {field} is wrong for the server: {message}.") from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"There is no config {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a mapping of settings, such as `editor: {{max_replicas: 4}}`.")
    return cast(dict[str, Any], content)
