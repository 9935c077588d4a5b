"""What `serve up` starts and what it leaves for the other commands to find: `serve.json` in the work folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict

from insightedit.platform.processes import began
from insightedit.platform.workdir import Workdir
from insightedit.serve.settings import ServeSettings


class ServePlan(BaseModel):
    """All that the server process needs to know. The version is resolved and its folder verified by then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workdir: Path
    version: str
    aliases: tuple[str, ...]
    folder: Path
    port: int
    settings: ServeSettings
    follows: bool = False
    """Whether it goes after the audit log."""

    @property
    def url(self) -> str:
        """Where the server will answer."""
        return f"http://{self.settings.host}:{self.port}"


class ServeState(BaseModel):
    """A server process and what it serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Literal["starting", "up"]
    url: str
    model_version: str
    aliases: tuple[str, ...]
    pid: int
    stop_seconds: float = 180.0
    """How long it may take to stop."""
    began: float
    """When the process did, in seconds since the machine did: tells it from a later one with the same number."""
    log: Path

    def process(self) -> psutil.Process | None:
        """The server's process, if it is alive."""
        try:
            process = psutil.Process(self.pid)
            alive = process.status() != psutil.STATUS_ZOMBIE and began(self.pid) == self.began
        except (psutil.NoSuchProcess, ProcessLookupError):
            return None
        return process if alive else None


def read_state(workdir: Workdir) -> ServeState | None:
    """The server that is alive, if there is one."""
    try:
        state = ServeState.model_validate_json(workdir.serve_state.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return state if state.process() else None


def write_state(workdir: Workdir, state: ServeState) -> None:
    """Say what is served, in one step."""
    temporary = workdir.serve_state.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(state.model_dump_json(indent=2) + "\n")
    temporary.replace(workdir.serve_state)


def clear_state(workdir: Workdir) -> None:
    """Nothing is served any more."""
    workdir.serve_state.unlink(missing_ok=True)
