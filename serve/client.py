"""An edit over HTTP, as `insightedit edit` does it."""

from __future__ import annotations

import base64
import os
import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx

from insightedit.platform.errors import ClusterError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.answers import ImagesResponse
from insightedit.serve.state import read_state

KEY_VARIABLE = "INSIGHTEDIT_API_KEY"
"""Environment variable with the API key of the server; a key on the command line is seen by every process."""
_RETRIED = frozenset({429, 502, 503})


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedEdit:
    """An answer of the server."""

    image: bytes
    """The encoded file."""
    model_version: str
    seed: int
    size: str
    request_id: str
    seconds: float
    """From sending to having the answer, retries included."""
    status: int


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
    model: str | None = None,
    seed: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    output_format: str = "png",
    patience: Patience = Patience(),
) -> ServedEdit:
    """Have an image edited by a server, trying again while it is overloaded or not to be reached.

    A server that asks for an API key gets that of the environment's `INSIGHTEDIT_API_KEY`.

    Args:
        url: the server's, as in `http://127.0.0.1:8000`.
        image: a PNG, JPEG or WebP file, or its bytes.
        prompt: the instruction.
        model: a version or alias that is served; the server's own without it. Of the others, see `pipeline`.
        seed: the noise's.
        num_inference_steps: denoising steps.
        guidance_scale: weight of the instruction.
        image_guidance_scale: weight of the source.
        negative_prompt: what to keep away from.
        output_format: png, jpeg or webp.
        patience: how long to wait, and how often to try.

    Raises:
        NotFoundError: the image file or the model does not exist.
        UsageError: the server refuses the request, and says why.
        ClusterError: the server cannot be reached.
        InsightEditError: the server failed.
    """
    fields = {
        "prompt": prompt,
        "model": model,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "image_guidance_scale": image_guidance_scale,
        "negative_prompt": negative_prompt,
        "output_format": output_format,
    }
    form = {name: str(value) for name, value in fields.items() if value is not None}
    begun = time.perf_counter()
    key = os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    address = f"{url.rstrip('/')}/v1/images/edits"
    response = _post(address, form, _contents(image), headers, patience)
    if response.status_code != HTTPStatus.OK:
        raise _error(response)
    answer = ImagesResponse.model_validate_json(response.content)
    return ServedEdit(
        image=base64.b64decode(answer.data[0].b64_json),
        model_version=answer.model_version,
        seed=answer.seed,
        size=answer.size,
        request_id=response.headers.get("x-request-id", ""),
        seconds=time.perf_counter() - begun,
        status=response.status_code,
    )


def _contents(image: Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"There is no image {image}.") from None
    except OSError as error:
        raise UsageError(f"{image} cannot be read: {error.strerror}.") from None


def _post(url: str, form: dict[str, str], image: bytes, headers: dict[str, str], patience: Patience) -> httpx.Response:
    # The name says nothing; the server looks at the bytes.
    files = {"image": ("image", image, "application/octet-stream")}
    with httpx.Client(timeout=httpx.Timeout(patience.timeout, connect=5.0)) as client:
        for attempt in range(patience.retries + 1):
            last = attempt == patience.retries
            pause = min(0.5 * 2**attempt, 8.0)
            try:
                response = client.post(url, data=form, files=files, headers=headers)
                if last or not _may_pass(response):
                    return response
                pause = float(response.headers.get("retry-after", pause))
            except httpx.ConnectError as error:
                if attempt >= min(patience.retries, patience.unreachable_retries):
                    raise ClusterError(f"No server answers at {url}: {error}.") from None
            except httpx.HTTPError as error:
                if last:
                    raise ClusterError(f"The connection to {url} broke: {error}.") from None
            time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def _may_pass(response: httpx.Response) -> bool:
    """Whether trying again may help. A 500 that is not in our words is the proxy's, whose gateway died under it."""
    ours = response.headers.get("content-type", "").startswith("application/json")
    return response.status_code in _RETRIED or (response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR and not ours)


def _error(response: httpx.Response) -> InsightEditError:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    if response.status_code == HTTPStatus.NOT_FOUND:
        return NotFoundError(message)
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        return UsageError(f"The server refused: {message} Put it into {KEY_VARIABLE}.")
    kind = UsageError if response.status_code < HTTPStatus.TOO_MANY_REQUESTS else InsightEditError
    return kind(f"The server answered {response.status_code}: {message}")
