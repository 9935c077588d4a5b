"""A model behind an OpenAI-compatible endpoint: hosted, or vLLM, SGLang, llama.cpp and the like.

Endpoints are overloaded, restart, drop connections and answer with pages of HTML. Whatever may pass is tried again,
with growing pauses or when the endpoint says; whatever does not is one conversation's failure and never the run's.
Only where nothing has been answered yet and the endpoint refuses the key or knows no such model, all asking stops.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import hashlib
import io
import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, cast

import httpx
from pydantic import BaseModel, ValidationError

from insightedit.platform.chat import Answer, Conversation, NoReply, OnAnswer, Reason, Reply, Turn, Usage, shown
from insightedit.platform.chat.config import EndpointConfig
from insightedit.platform.errors import UsageError

LONGEST_PAUSE: Final = 120.0
"""Seconds that are waited at most, even where the endpoint asks for more."""
_RETRIED: Final = frozenset({408, 409, 425, 429})
_NOT_LET_IN: Final = frozenset({401, 403, 404})


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds between tries where the endpoint does not say: twice as long after each.

    Attributes:
        first: after the first try.
        longest: never longer.
    """

    first: float = 0.5
    longest: float = 16.0

    def pause(self, attempt: int) -> float:
        """Seconds after a try, counted from 0; less by up to a quarter, so that not all come back at once."""
        return min(self.first * 2**attempt, self.longest) * random.uniform(0.75, 1)


@dataclass(frozen=True, slots=True)
class _Setback:
    """A try without an answer."""

    failure: NoReply
    again: bool = True
    """Whether another try may help."""
    pause: float | None = None
    """Seconds that the endpoint asks for."""


class ChatEndpoint:
    """A model behind an endpoint; see `insightedit.platform.chat.ChatModel`."""

    def __init__(self, config: EndpointConfig, backoff: Backoff = Backoff()) -> None:
        """Make ready; nothing is sent.

        Args:
            config: where it is and how it is asked.
            backoff: between tries.

        Raises:
            UsageError: the variable with the API key is not set.
        """
        self.usage = Usage()
        self._config = config
        self._backoff = backoff
        self._headers = _headers(config)
        self._fields: dict[str, Any] = {"model": config.model, "temperature": config.temperature}
        self._fields |= {"max_tokens": config.max_tokens, **config.options}
        self._fields = {name: value for name, value in self._fields.items() if value is not None}
        self._answered = False
        self._resume = 0.0  # before this time of the monotonic clock nobody asks: the endpoint said so

    @property
    def identity(self) -> str:
        """The model's name and the settings of its answers; not the URL, which changes without the model."""
        settings = json.dumps([self._fields, self._config.picture_side], sort_keys=True)
        return f"{self._config.model} {hashlib.sha256(settings.encode()).hexdigest()[:16]}"

    def ask(self, conversations: Sequence[Conversation], on_answer: OnAnswer) -> None:
        """Have conversations answered, several at a time.

        Raises:
            UsageError: the endpoint refuses the key, or has no such model.
        """
        try:
            asyncio.run(self._ask_all(conversations, on_answer))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _ask_all(self, conversations: Sequence[Conversation], on_answer: OnAnswer) -> None:
        waiting = iter(enumerate(conversations))
        parallel = min(self._config.parallel, len(conversations))
        # The whole request has a limit of time, see `_send`; a connection alone must not take all of it.
        timeout = httpx.Timeout(self._config.timeout, connect=min(self._config.timeout, 15.0))
        limits = httpx.Limits(max_connections=parallel)
        async with (
            httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits) as client,
            asyncio.TaskGroup() as workers,
        ):
            for _ in range(parallel):
                workers.create_task(self._work(client, waiting, on_answer))

    async def _work(
        self, client: httpx.AsyncClient, waiting: Iterator[tuple[int, Conversation]], on_answer: OnAnswer
    ) -> None:
        """Take conversations until there are no more: pictures are encoded only when their turn comes."""
        for number, conversation in waiting:
            body = await asyncio.to_thread(self._body, conversation)
            on_answer(number, await self._answer(client, body))

    def _body(self, conversation: Conversation) -> bytes:
        messages = [_message(turn, self._config.picture_side) for turn in conversation]
        return json.dumps({**self._fields, "messages": messages}).encode()

    async def _answer(self, client: httpx.AsyncClient, body: bytes) -> Answer:
        attempt = 0
        while True:
            outcome = await self._send(client, body)
            if isinstance(outcome, Reply):
                self._answered = True
                return outcome
            if not outcome.again or attempt == self._config.retries:
                return outcome.failure
            await asyncio.sleep(self._backoff.pause(attempt) if outcome.pause is None else outcome.pause)
            attempt += 1
            self.usage.retries += 1

    async def _send(self, client: httpx.AsyncClient, body: bytes) -> Reply | _Setback:
        """One try."""
        while (rest := self._resume - time.monotonic()) > 0:
            await asyncio.sleep(rest)
        self.usage.requests += 1
        try:
            async with asyncio.timeout(self._config.timeout):
                response = await client.post(f"{self._config.endpoint}/chat/completions", content=body)
        except (TimeoutError, httpx.TimeoutException):
            return _Setback(NoReply("timeout", f"No answer came within {self._config.timeout:g} seconds."))
        except httpx.HTTPError as error:
            return _Setback(NoReply("unreachable", f"The connection broke: {_line(str(error) or repr(error))}."))
        if response.status_code == HTTPStatus.OK:
            return self._read(response.content)
        return self._refused(response)

    def _refused(self, response: httpx.Response) -> _Setback:
        status, said = response.status_code, f"HTTP {response.status_code}: {_error_message(response)}"
        if status in _NOT_LET_IN and not self._answered:
            raise UsageError(self._way_in(status, said))
        if status not in _RETRIED and status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return _Setback(NoReply("rejected", said), again=False)
        pause = retry_after(response.headers)
        if status == HTTPStatus.TOO_MANY_REQUESTS and pause is not None:
            self._resume = max(self._resume, time.monotonic() + pause)
        reason: Reason = "overloaded" if status == HTTPStatus.TOO_MANY_REQUESTS else "server_error"
        return _Setback(NoReply(reason, said), pause=pause)

    def _way_in(self, status: int, said: str) -> str:
        config = self._config
        if status == HTTPStatus.NOT_FOUND:
            return f"{config.endpoint} has no model {config.model} to chat with; set endpoint and model ({said})."
        if config.api_key_env is None:
            return f"{config.endpoint} wants an API key; name the variable that has it in api_key_env ({said})."
        return f"{config.endpoint} refuses the API key; put another one into {config.api_key_env} ({said})."

    def _read(self, content: bytes) -> Reply | _Setback:
        """What a completion says."""
        try:
            completion = _Completion.model_validate_json(content)
        except ValidationError:
            return _Setback(NoReply("server_error", f"The answer is no chat completion: {_excerpt(content)}"))
        self.usage.prompt_tokens += _count(completion.usage, "prompt_tokens")
        self.usage.completion_tokens += _count(completion.usage, "completion_tokens")
        if not completion.choices:
            return _Setback(NoReply("empty", f"The answer has no choices: {_excerpt(content)}"))
        choice = completion.choices[0]
        if choice.message.refusal:
            return _Setback(NoReply("refused", f"The model declined: {_line(choice.message.refusal)}"), again=False)
        text = _text(choice.message.content)
        if text.strip():
            return Reply(text)
        if choice.finish_reason == "content_filter":
            return _Setback(NoReply("refused", "The endpoint's filter kept the answer back."), again=False)
        cut = " before max_tokens came to an end; raise it" if choice.finish_reason == "length" else ""
        return _Setback(NoReply("empty", f"The model said nothing{cut}."))


class _Message(BaseModel):
    content: str | list[Any] | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """The part of a chat completion that is used; a null is as good as nothing."""

    choices: list[_Choice] | None = None
    usage: Any = None


def _headers(config: EndpointConfig) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            raise UsageError(f"The environment variable {config.api_key_env} is not set; put the API key into it.")
        if not (key.isascii() and key.isprintable()):  # httpx would show it in its error
            raise UsageError(f"The environment variable {config.api_key_env} holds no API key; put the key into it.")
        headers["authorization"] = f"Bearer {key}"
    return headers


def _message(turn: Turn, longest: int) -> dict[str, Any]:
    """A turn in the API's form; one without pictures as plain text, which every endpoint takes."""
    if not turn.pictures:
        return {"role": turn.role, "content": turn.text}
    parts: list[dict[str, Any]] = []
    for picture in turn.pictures:
        buffer = io.BytesIO()
        shown(picture, longest).save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]}


def _text(content: str | list[Any] | None) -> str:
    """A message's text, whether it comes whole or in parts."""
    if not isinstance(content, list):
        return content or ""
    parts = [cast(Mapping[str, Any], part) for part in content if isinstance(part, Mapping)]
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that an answer asks to wait, `LONGEST_PAUSE` at most; None if it does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return _bounded(float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        return _bounded(email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return None


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), LONGEST_PAUSE) if math.isfinite(seconds) else LONGEST_PAUSE


def _count(usage: Any, name: str) -> int:
    value = cast(Mapping[str, Any], usage).get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) else 0


def _error_message(response: httpx.Response) -> str:
    """What an error answer says, in whichever of the usual forms."""
    try:
        error = response.json()
        for name in ("error", "message"):
            error = error[name] if isinstance(error, dict) and name in error else error
        return _line(error if isinstance(error, str) else json.dumps(error))
    except ValueError:
        return _excerpt(response.content)


def _excerpt(content: bytes) -> str:
    return _line(content.decode(errors="replace")) or "nothing"


def _line(text: str) -> str:
    """Text as part of a sentence: one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."
