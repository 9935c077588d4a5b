"""Which multimodal language model is asked, and how: behind an endpoint, or local; or the shapes world's own truth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag

from insightedit.platform.settings import SETTINGS, Count


def _check_url(value: str) -> str:
    """Refuse what is no base URL, or holds a secret that would be stored with every run."""
    if not re.fullmatch(r"https?://[^\s@?#]+", value):
        raise ValueError("it must be a URL such as http://127.0.0.1:8000/v1, with no user, key or question in it")
    return value.rstrip("/")


class _Settings(BaseModel):
    model_config = SETTINGS


class EndpointConfig(_Settings):
    """A multimodal language model behind an OpenAI-compatible endpoint."""

    endpoint: Annotated[str, AfterValidator(_check_url)]
    """The URL that its clients call the base URL, such as `http://127.0.0.1:8000/v1`; no user or key is in it."""
    model: Annotated[str, Field(min_length=1)]
    """What the endpoint calls it."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """The environment variable with the API key. The key itself is never stored."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """The endpoint's own if None."""
    max_tokens: Count | None = 1024
    """Most tokens of an answer; the endpoint's own limit if None."""
    options: dict[str, Any] = {}
    """More fields of the request's body, such as `response_format` or `seed`."""
    picture_side: Count = 1024
    """Pixels to which the longer side of larger pictures is reduced before they are shown."""
    parallel: Count = 8
    """Requests at a time."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds for one request."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Tries after the first, where the endpoint is not to be reached, overloaded or broken."""


class LocalModelConfig(_Settings):
    """A multimodal language model that transformers loads as an `AutoModelForImageTextToText`; it answers greedily."""

    local: Annotated[str, Field(min_length=1)]
    """Folder or hub id."""
    max_tokens: Count = 512
    """Most tokens of an answer."""
    picture_side: Count = 1024
    """Pixels to which the longer side of larger pictures is reduced before they are shown."""
    batch: Count = 1
    """Questions at a time."""


def _judge_kind(value: object) -> str | None:
    """Which judge a config names, by the field that only that one has."""
    if value == "shapes":
        return "[shapes]"
    if isinstance(value, EndpointConfig) or (isinstance(value, Mapping) and "endpoint" in value):
        return "[endpoint]"
    if isinstance(value, LocalModelConfig) or (isinstance(value, Mapping) and "local" in value):
        return "[local]"
    return None


JudgeConfig = Annotated[
    Annotated[Literal["shapes"], Tag("[shapes]")]
    | Annotated[EndpointConfig, Tag("[endpoint]")]
    | Annotated[LocalModelConfig, Tag("[local]")],
    Discriminator(
        _judge_kind,
        custom_error_type="no_judge",
        custom_error_message="it must be shapes, or have the field endpoint (a URL, with model) or local (a folder)",
    ),
]
