"""Putting a model version online, asking how it is, and taking it off: `insightedit serve up | status | down`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Literal

import httpx
import psutil
from pydantic import BaseModel, ConfigDict

from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.registry import CHAMPION, Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve.client import key_headers
from insightedit.serve.door import check_access
from insightedit.serve.fleet import FleetStatus
from insightedit.serve.follower import FROM_TAG, STATE_TAG, UNDER_WAY
from insightedit.serve.ingress import check_haproxy, haproxy_variables
from insightedit.serve.settings import ServeSettings
from insightedit.serve.state import ServePlan, ServeState, clear_state, read_state
from insightedit.serve.traces import check_traces

DEFAULT_PORT = 8000
_LOG_LINES = 12


class ServeStatus(BaseModel):
    """A server as `--json` shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    state: Literal["down", "planned", "starting", "up"]
    ready: bool = False
    """Whether every replica answers."""
    url: str | None = None
    model_version: str | None = None
    aliases: tuple[str, ...] = ()
    pid: int | None = None
    log: Path | None = None
    fleet: FleetStatus | None = None
    """Replicas and queues, where the server answers; one that asks for API keys is shown that of the environment."""


def up(
    workdir: Workdir,
    reference: str = "champion",
    port: int = DEFAULT_PORT,
    settings: ServeSettings | None = None,
    *,
    dry_run: bool = False,
) -> ServeStatus:
    """Start a server that goes on after this process, and return when it has answered an edit.

    Args:
        workdir: where the registry is, and where `serve.json` and the log go.
        reference: the model version, resolved here and nowhere else.
        port: where to listen; 0 for a free one.
        settings: limits and scaling.
        dry_run: check everything, start nothing.

    Raises:
        NotFoundError: there is no such version, for example no champion yet.
        UsageError: a server is up already, the port is taken, or others would reach it and there is no API key.
        InsightEditError: the server does not come up; the message ends with its last log lines.
    """
    settings = settings or ServeSettings()
    running = read_state(workdir)
    if running is not None:
        raise UsageError(
            f"A server of version {running.model_version} is up at {running.url}; "
            "stop it with `insightedit serve down` first."
        )
    check_access(workdir, settings)
    if settings.haproxy:
        check_haproxy()
    check_traces(settings.traces)
    registry = Registry(workdir)
    version = registry.resolve(reference)
    # Who asks for a version by its number gets that one.
    follows = settings.rollout.follow and not reference.isdecimal() and CHAMPION in version.aliases
    if follows and version.tags.get(STATE_TAG) == UNDER_WAY:
        # A server went down while the champion had its share of the edits: it goes on from there.
        version = replace(registry.find(version.tags[FROM_TAG]) or version, aliases=(CHAMPION,))
    plan = ServePlan(
        workdir=workdir.root,
        version=version.version,
        aliases=version.aliases,
        folder=registry.fetch(version),
        port=_claimed_port(settings.host, port),
        follows=follows,
        settings=settings.model_copy(update={"log_folder": settings.log_folder or str(workdir.logs / "serve")}),
    )
    if dry_run:
        return ServeStatus(state="planned", url=plan.url, model_version=plan.version, aliases=plan.aliases)
    return _start(workdir, plan)


def status(workdir: Workdir) -> ServeStatus:
    """How the work folder's server is."""
    state = read_state(workdir)
    if state is None:
        return ServeStatus(state="down")
    ready = state.state == "up" and _answers(f"{state.url}/healthz", 15)
    return _status(state, ready=ready).model_copy(update={"fleet": _fleet(state.url) if ready else None})


def _fleet(url: str) -> FleetStatus | None:
    try:
        answer = httpx.get(f"{url}/v1/status", headers=key_headers(), timeout=15)
        return FleetStatus.model_validate_json(answer.raise_for_status().content)
    except httpx.HTTPError:
        return None


def down(workdir: Workdir) -> ServeStatus:
    """Stop the server. Edits in hand are finished first.

    Returns:
        What was stopped, or a status with no URL where there was no server.
    """
    state = read_state(workdir)
    process = state.process() if state else None
    if state is None or process is None:
        clear_state(workdir)
        return ServeStatus(state="down")
    _stop(process, state.stop_seconds)
    clear_state(workdir)
    return _status(state, ready=False).model_copy(update={"state": "down", "pid": None})


def _stop(process: psutil.Process, seconds: float) -> None:
    children = process.children(recursive=True)
    process.terminate()
    try:
        process.wait(timeout=seconds)
    except psutil.TimeoutExpired:
        process.kill()
    # Ray's processes follow their head; whichever did not is ended here.
    _, left = psutil.wait_procs(children, timeout=10)
    for child in left:
        child.kill()


def _status(state: ServeState, *, ready: bool) -> ServeStatus:
    return ServeStatus(
        state=state.state,
        ready=ready,
        url=state.url,
        model_version=state.model_version,
        aliases=state.aliases,
        pid=state.pid,
        log=state.log,
    )


def _claimed_port(host: str, port: int) -> int:
    """The port, if nobody listens there; a free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"Port {port} of {host} cannot be used ({error.strerror}); choose another one.") from None
        return int(probe.getsockname()[1])


def _start(workdir: Workdir, plan: ServePlan) -> ServeStatus:
    workdir.logs.mkdir(parents=True, exist_ok=True)
    plan_file = workdir.logs / f"serve-{time.strftime('%Y%m%d-%H%M%S')}-v{plan.version}.json"
    plan_file.write_text(plan.model_dump_json(indent=2) + "\n")
    log = plan_file.with_suffix(".log")
    command = [sys.executable, "-m", "insightedit.serve.server", str(plan_file)]
    with log.open("wb") as output:
        server = subprocess.Popen(  # noqa: S603  (our own module and a file we have just written)
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **(haproxy_variables() if plan.settings.haproxy else {})},
        )
    deadline = time.monotonic() + plan.settings.startup_seconds
    try:
        while server.poll() is None and time.monotonic() < deadline:
            state = read_state(workdir)
            if state is not None and state.state == "up" and _answers(f"{plan.url}/readyz", 60):
                return _status(state, ready=True)
            time.sleep(0.2)
    except BaseException:
        _stop(psutil.Process(server.pid), plan.settings.stop_seconds)
        raise
    if server.poll() is None:
        _stop(psutil.Process(server.pid), plan.settings.stop_seconds)
        reason = f"did not answer within {plan.settings.startup_seconds:g} seconds"
    else:
        reason = f"ended with status {server.returncode}"
    clear_state(workdir)
    raise InsightEditError(f"The server {reason}; the end of its log {log}:\n{_tail(log)}")


def _answers(url: str, timeout: float) -> bool:
    try:
        return httpx.get(url, timeout=timeout).status_code == HTTPStatus.OK
    except httpx.HTTPError:
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:])
