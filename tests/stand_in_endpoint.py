"""A stand-in for an OpenAI-compatible endpoint, on loopback, that misbehaves as real ones do.

    with StandIn(in_turn(Status(429, {"retry-after": "0"}), Drop(), Say("hello"))) as endpoint:
        ...  # ask endpoint.url; endpoint.asked holds what came in

What it does is decided by a function of what it is asked; `in_turn` makes one of a list.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    body: dict[str, Any]
    headers: dict[str, str]
    """By their names in small letters."""

    @property
    def texts(self) -> list[str]:
        """The text of every turn."""
        return [_text(message["content"]) for message in self.body["messages"]]

    @property
    def pictures(self) -> list[NDArray[np.uint8]]:
        """All pictures of the conversation."""
        parts = [part for message in self.body["messages"] for part in message["content"] if isinstance(part, dict)]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        files = [base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True) for url in urls]
        return [np.asarray(Image.open(io.BytesIO(data))) for data in files]

    @property
    def question(self) -> str:
        """The same for every try of one conversation, and for the complaint about its answer."""
        return hashlib.sha256(json.dumps(self.body["messages"][0]).encode()).hexdigest()


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@dataclass(frozen=True, slots=True)
class Say:
    """A completion."""

    text: str | None
    parts: bool = False
    """Whether the text comes as a list of parts."""
    refusal: str | None = None
    finish_reason: str = "stop"
    usage: Any = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})

    def body(self) -> bytes:
        content: Any = [{"type": "text", "text": self.text}] if self.parts else self.text
        message = {"role": "assistant", "content": content, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": self.usage}).encode()


@dataclass(frozen=True, slots=True)
class Status:
    """An answer with another status than 200, or a body of one's own."""

    code: int
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b'{"error": {"message": "not now", "type": "server_error", "param": null, "code": null}}'


@dataclass(frozen=True, slots=True)
class Drop:
    """The connection breaks, after a part of an answer if asked for."""

    after: bytes = b""


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing comes for some seconds, and then something does."""

    seconds: float
    then: Say | Status = Say("too late")


Reaction = Say | Status | Drop | Stall
React = Callable[[Asked], Reaction]


def in_turn(*reactions: Reaction) -> React:
    """To each conversation the reactions one after the other; the last one from then on."""
    tries = Counter[str]()
    lock = threading.Lock()

    def react(asked: Asked) -> Reaction:
        with lock:
            number = tries[asked.question]
            tries[asked.question] += 1
        return reactions[min(number, len(reactions) - 1)]

    return react


class StandIn:
    """The endpoint, up as long as its block runs."""

    def __init__(self, react: React) -> None:
        self.react = react
        self.asked: list[Asked] = []
        self.at_once = 0
        """Requests at a time, at most."""
        self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> StandIn:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, asked: Asked) -> Reaction:
        with self._lock:
            self.asked.append(asked)
        return self.react(asked)

    def count(self, change: int) -> None:
        with self._lock:
            self._now += change
            self.at_once = max(self.at_once, self._now)


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            stand_in.count(1)
            try:
                self._react()
            finally:
                stand_in.count(-1)

        def _react(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.path.endswith("/chat/completions"):
                self._send(Status(404))
                return
            headers = {name.lower(): value for name, value in self.headers.items()}
            reaction = stand_in.take(Asked(body, headers))
            if isinstance(reaction, Stall):
                time.sleep(reaction.seconds)
                reaction = reaction.then
            if isinstance(reaction, Drop):
                self.wfile.write(reaction.after)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self._send(Status(200, body=reaction.body()) if isinstance(reaction, Say) else reaction)

        def _send(self, status: Status) -> None:
            try:
                self.send_response(status.code)
                for name, value in {"content-type": "application/json", **status.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(status.body)))
                self.end_headers()
                self.wfile.write(status.body)
            except OSError:  # who asked did not wait
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by its base class
            """Say nothing."""

    return Handler
