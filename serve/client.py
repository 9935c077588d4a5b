"""An edit over HTTP, as `insightedit edit --server` does it."""

from __future__ import annotations

import base64
import os
import random
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import httpx
from pydantic import BaseModel, ValidationError

from insightedit.platform.errors import ClusterError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.answers import ImagesResponse
from insightedit.serve.schema import EDIT_PATH, OutputFormat, SchedulerName
from insightedit.serve.state import read_state

KEY_VARIABLE = "INSIGHTEDIT_API_KEY"
"""Environment variable with the API key of the server; a key on the command line is seen by every process."""
Answer = TypeVar("Answer", bound=BaseModel)
_RETRIED = frozenset({408, 429, 502, 503})
_LONGEST_PAUSE = 120.0
"""Seconds that a server may make us wait before the next try."""


class EditOptions(TypedDict, total=False):
    """What may be said of an edit beside image and instruction; what is missing or None is left to the server."""

    model: str | None
    """A version or an alias."""
    seed: int | None
    n: int | None
    """Edits, with seeds that follow each other."""
    size: str | None
    """As in `640x480`."""
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    image_branch_scale: float | None
    negative_prompt: str | None
    scheduler: SchedulerName | None
    output_format: OutputFormat | None
    output_compression: int | None
    """Quality of a JPEG or WebP file, from 0 to 100."""


def form_of(prompt: str, options: EditOptions) -> dict[str, str]:
    """The text fields of the request."""
    given = {name: str(value) for name, value in options.items() if value is not None}
    return {"prompt": prompt, **given}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedEdit:
    """An answer of the server."""

    images: tuple[bytes, ...]
    """The encoded files."""
    seeds: tuple[int, ...]
    """Of each."""
    model_version: str
    size: str
    request_id: str
    seconds: float
    """From sending to having the answer, retries included."""
    status: int

    @property
    def image(self) -> bytes:
        """The first file."""
        return self.images[0]

    @property
    def seed(self) -> int:
        """Of the first file."""
        return self.seeds[0]


def served_url(workdir: Workdir) -> str:
    """Where the work folder's server answers.

    Raises:
        ClusterError: none is up.
    """
    state = read_state(workdir)
    if state is None:
        raise ClusterError(f"No server is up for {workdir.root}; start one with `insightedit serve up`.")
    return state.url


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client waits for an answer, and how often it asks."""

    timeout: float = 600.0
    """Seconds for one try."""
    retries: int = 10
    """Tries after the first."""
    unreachable_retries: int = 2
    """How many of them where nobody listens. More than a few help only where a proxy that died is on its way back, in
    half a minute."""


def edit_over_http(
    url: str,
    image: Path | bytes,
    prompt: str,
    *,
    mask: Path | bytes | None = None,
    patience: Patience = Patience(),
    **options: Unpack[EditOptions],
) -> ServedEdit:
    """Have an image edited by a server, trying again while it is overloaded or not to be reached.

    All tries bear one `Idempotency-Key`, so that a server that had made the edit when the connection broke answers with
    that one. A server that asks for an API key gets that of the environment's `INSIGHTEDIT_API_KEY`.

    Args:
        url: the server's, as in `http://127.0.0.1:8000`.
        image: a PNG, JPEG or WebP file, or its bytes.
        prompt: the instruction.
        mask: a PNG of the image's size, or its bytes; the image changes where its alpha is 0.
        patience: how long to wait, and how often to try.
        **options: see `EditOptions`.

    Raises:
        NotFoundError: an image file or the model does not exist.
        UsageError: the address is none, or the server refuses the request and says why.
        ClusterError: the server cannot be reached.
        InsightEditError: the server failed, or is none of ours.
    """
    begun = time.perf_counter()
    response = ask(
        url,
        "POST",
        EDIT_PATH,
        patience,
        headers={"idempotency-key": uuid.uuid4().hex},
        data=form_of(prompt, options),
        files=files_of(image, mask),
    )
    answer = parsed(url, response, ImagesResponse)
    return ServedEdit(
        images=tuple(base64.b64decode(one.b64_json) for one in answer.data),
        seeds=tuple(one.seed for one in answer.data),
        model_version=answer.model_version,
        size=answer.size,
        request_id=response.headers.get("x-request-id", ""),
        seconds=time.perf_counter() - begun,
        status=response.status_code,
    )


def files_of(image: Path | bytes, mask: Path | bytes | None) -> dict[str, tuple[str, bytes, str]]:
    """The files of the request.

    Raises:
        NotFoundError: one does not exist.
        UsageError: one cannot be read.
    """
    # The names say nothing; the server looks at the bytes.
    given = {"image": image} if mask is None else {"image": image, "mask": mask}
    return {name: (name, _contents(file), "application/octet-stream") for name, file in given.items()}


def ask(
    url: str, method: str, path: str, patience: Patience, headers: Mapping[str, str] | None = None, **body: Any
) -> httpx.Response:
    """A server's answer to a request that may be sent again.

    Args:
        url: the server's.
        method: of the request.
        path: below the URL.
        patience: how long to wait, and how often to try.
        headers: beside that of the API key, which the environment has.
        **body: as httpx takes it.

    Raises:
        NotFoundError, UsageError, ClusterError, InsightEditError: as `edit_over_http` does.
    """
    address = f"{_checked_url(url)}{path}"
    own = {**(headers or {}), **key_headers()}
    with httpx.Client(timeout=httpx.Timeout(patience.timeout, connect=5.0), headers=own) as client:
        response = _send(client, client.build_request(method, address, **body), patience)
    if not response.is_success:
        raise _error(response)
    return response


def key_headers() -> dict[str, str]:
    """The headers that show a server the API key of the environment, if that has one."""
    key = os.environ.get(KEY_VARIABLE)
    return {"authorization": f"Bearer {key}"} if key else {}


def parsed(url: str, response: httpx.Response, kind: type[Answer]) -> Answer:
    """What an answer says.

    Raises:
        InsightEditError: the server is none of ours.
    """
    try:
        return kind.model_validate_json(response.content)
    except ValidationError:
        raise InsightEditError(f"What answers at {url} is no InsightEdit server; check the address.") from None


def _contents(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"There is no image {image}.") from None
    except OSError as error:
        raise UsageError(f"{image} cannot be read: {error.strerror}.") from None


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"{url} is no address of a server; write it as in http://127.0.0.1:8000.")
    return url.rstrip("/")


def _send(client: httpx.Client, request: httpx.Request, patience: Patience) -> httpx.Response:
    for attempt in range(patience.retries + 1):
        last = attempt == patience.retries
        # Clients that were refused together do not come back together.
        pause = min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.0)
        try:
            response = client.send(request)
            if last or not _may_pass(response):
                return response
            pause = _asked_pause(response.headers, pause)
        except httpx.ConnectError as error:
            if attempt >= min(patience.retries, patience.unreachable_retries):
                raise ClusterError(f"No server answers at {request.url}: {error}.") from None
        except httpx.HTTPError as error:
            if last:
                reason = str(error) or type(error).__name__
                raise ClusterError(f"The connection to {request.url} broke: {reason}.") from None
        time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def _may_pass(response: httpx.Response) -> bool:
    """Whether trying again may help.

    A server's fault that is not told in our words is of what stands before it, whose gateway died under it. A conflict
    passes where the server says when.
    """
    ours = response.headers.get("content-type", "").startswith("application/json")
    if response.status_code == HTTPStatus.CONFLICT:
        return "retry-after" in response.headers
    return response.status_code in _RETRIED or (response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR and not ours)


def _asked_pause(headers: Mapping[str, str], otherwise: float) -> float:
    """Seconds that the server asks to wait, by a number or a date; our own where it does not."""
    asked = headers.get("retry-after", "")
    seconds = otherwise
    with suppress(ValueError):
        seconds = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
    with suppress(ValueError):
        seconds = float(asked)
    return min(max(seconds, 0.0), _LONGEST_PAUSE)


def _error(response: httpx.Response) -> InsightEditError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = " ".join(response.text[:200].split()) or response.reason_phrase
    if response.status_code == HTTPStatus.NOT_FOUND:
        return NotFoundError(message)
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        return UsageError(f"The server refused: {message} Put it into {KEY_VARIABLE}.")
    kind = UsageError if response.status_code < HTTPStatus.TOO_MANY_REQUESTS else InsightEditError
    return kind(f"The server answered {response.status_code}: {message}")
