"""A Ray cluster of several nodes on this machine, each a process of its own, with a token."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

START_SECONDS = 400.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class RayCluster:
    """A head without work, and nodes of groups."""

    groups: dict[str, int]
    """CPUs of the node of each group; the group is its label."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    # Sockets lie in it, whose paths must be short.
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ie-")))
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process of this cluster, or a client of it, needs; not where this package's source is."""
        unset = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH"}
        own = {name: value for name, value in os.environ.items() if name not in unset}
        # The nodes install the wheel with the pip beside this Python.
        path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
        return own | {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self) -> None:
        head = f"--head --port={self.port} --dashboard-port={self.dashboard_port} --num-cpus=0"
        self._start_node(f"{head} --ray-client-server-port={free_port()}")
        for group, cpus in self.groups.items():
            self._start_node(f"--address=127.0.0.1:{self.port} --num-cpus={cpus} --labels=group={group}")

    def lose_head(self) -> None:
        """As when the head's machine loses its power; the others end themselves after a minute, and here at once."""
        for node in self.nodes:
            _kill(node)
        self.nodes.clear()

    def stop(self) -> None:
        self.lose_head()
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.get(f"{self.address}{path}", headers=headers, timeout=10).raise_for_status().json()

    def _start_node(self, arguments: str) -> None:
        """Start a node and wait until it is up; one that the machine was too busy for ends, and is started again."""
        folder = self.folder / f"n{len(self.nodes)}"
        log = self.folder / f"{folder.name}.log"
        # A folder each, as machines have.
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        # Jobs are started by the head's agent, which has a fixed port unless told otherwise: another Ray's may have it.
        command += [f"--temp-dir={folder}", f"--dashboard-agent-listen-port={free_port()}", *arguments.split()]
        began = time.monotonic()
        self.nodes.append(self._run(command, log))
        while self._alive() != len(self.nodes):
            assert time.monotonic() - began < START_SECONDS, log.read_text()[-2000:]
            if self.nodes[-1].poll() is not None:
                _kill_of(folder)
                self.nodes[-1] = self._run(command, log)
            time.sleep(0.2)

    def _run(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, start_new_session=True)

    def _alive(self) -> int:
        with contextlib.suppress(httpx.HTTPError):
            nodes = self.get("/api/v0/nodes")["data"]["result"]["result"]
            return sum(node["state"] == "ALIVE" for node in nodes)
        return 0


def _kill_of(folder: Path) -> None:
    """What a node that has ended left behind."""
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(folder) in word for word in process.info["cmdline"] or []):
                process.kill()


def _kill(node: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


@contextmanager
def ray_cluster(**groups: int) -> Generator[RayCluster]:
    cluster = RayCluster(groups)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
