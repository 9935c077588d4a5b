"""MLflow as a team has it: a tracking server on loopback, with a store behind it, and a connection that breaks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "host"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TrackingServer:
    """`mlflow server` as a process, which can be killed and started again on what it has stored."""

    def __init__(self, folder: Path, backend: str, artifacts: str, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        self._environment = {**os.environ, **environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", backend, "--artifacts-destination", artifacts,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the tracking server does not come up:\n{self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        """End it and its workers at once, whatever they do."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Breaking:
    """A proxy before a server that stops answering at a chosen request, as if the server had died there."""

    def __init__(self, target: str) -> None:
        self.requests = 0
        self._fatal: int | None = None
        self._delivered = False
        self._lock = threading.Lock()
        outer, client = self, httpx.Client(base_url=target, timeout=60)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                reached, answered = outer._next()
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
                send = partial(client.request, self.command, self.path, headers=headers, content=body)
                answer = send() if reached else None
                if answer is None or not answered:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer  # noqa: N815  (the library's names)

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    super().handle()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Breaking:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def dying_at(self, request: int, *, delivered: bool) -> Generator[None]:
        """Answer this many requests and then none; the fatal one may still reach the server."""
        with self._lock:
            self.requests, self._fatal, self._delivered = 0, request, delivered
        try:
            yield
        finally:
            with self._lock:
                self._fatal = None

    def _next(self) -> tuple[bool, bool]:
        """Whether a request reaches the server, and whether its answer comes back."""
        with self._lock:
            self.requests += 1
            if self._fatal is None or self.requests < self._fatal:
                return True, True
            return self.requests == self._fatal and self._delivered, False


class PostgreSQL:
    """A PostgreSQL of this machine, if it has one, with an empty database."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"postgresql+psycopg://mlflow@127.0.0.1:{self.port}/postgres"
        # It refuses to run as root, and the tests' own folders are closed to others.
        self._user: dict[str, Any] = {"user": "nobody"} if os.getuid() == 0 else {}
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._process: Any = None
        if self._user:
            shutil.chown(self._folder, "nobody")

    @staticmethod
    def is_here() -> bool:
        """Whether `initdb` and `postgres` are on the path."""
        return shutil.which("initdb") is not None and shutil.which("postgres") is not None

    def __enter__(self) -> PostgreSQL:
        data = str(self._folder / "data")
        made = ["initdb", "--pgdata", data, "--username", "mlflow", "--auth", "trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=self._folder, **self._user)
        settings = [f"port={self.port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={self._folder}"]
        command = ["postgres", "-D", data, *(word for setting in settings for word in ("-c", setting))]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._user)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            time.sleep(0.1)
        raise AssertionError((self._folder / "log").read_text())

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
        shutil.rmtree(self._folder, ignore_errors=True)
