"""The server process: a local Ray with Serve in it, from start to SIGTERM.

Run by `insightedit serve up` as `python -m insightedit.serve.server PLAN`, with a log file for its output.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import ray as untyped_ray
from ray import serve as untyped_serve
from ray.serve.exceptions import RayServeException

from insightedit.platform.cluster import start_local
from insightedit.platform.processes import began
from insightedit.platform.registry import Registry
from insightedit.platform.workdir import ENVIRONMENT_VARIABLE, Workdir
from insightedit.serve.applications import (
    GATEWAY,
    GATEWAY_APPLICATION,
    ServeFleet,
    gateway_application,
    single_version_table,
    version_application,
    version_application_name,
)
from insightedit.serve.follower import Follower, Place
from insightedit.serve.ingress import remove_haproxy_files
from insightedit.serve.meters import FOLDER_VARIABLE, Meters
from insightedit.serve.quality import JudgedQuality, PixelQuality, Quality
from insightedit.serve.routing import ReplicaBackend
from insightedit.serve.settings import ServeSettings
from insightedit.serve.state import ServePlan, ServeState, clear_state, write_state
from insightedit.serve.state_store import open_store
from insightedit.serve.trials import Channel

ray: Any = untyped_ray
serve: Any = untyped_serve

DRAIN_SECONDS = 10.0
"""What it may take to have the gateways know that they stop, beside what they have in hand."""
LAST_BYTES_SECONDS = 1.0
"""Time for the last answers to get through the proxies."""
LOGICAL_CPUS = 8
"""Ray's count. What its actors take of it is a share, not a limit, so it may exceed the machine's."""


@contextmanager
def local_cluster(workdir: Workdir, folder: Path) -> Generator[None]:
    """A Ray of our own on this machine, gone at the end.

    Args:
        workdir: where the processes find what the work folder holds, such as API keys.
        folder: where they keep their figures.
    """
    variables = {
        ENVIRONMENT_VARIABLE: str(workdir.root),
        FOLDER_VARIABLE: str(folder),
        "HF_HUB_OFFLINE": "1",  # Weights come from the version's folder alone.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    cpus = max(LOGICAL_CPUS, os.cpu_count() or 1)
    environment = {"env_vars": variables}
    start_local(cpus, runtime_env=environment)
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(plan: ServePlan, channel: str | None = None) -> None:
    """Start Serve with the plan's version and the gateway; return when both run."""
    settings = plan.settings
    # The gateway gives an edit up first, and says so properly.
    options = {"host": settings.host, "port": plan.port, "request_timeout_s": settings.limits.edit_seconds + 15}
    serve.start(proxy_location="HeadOnly", http_options=options)
    table = single_version_table(plan.version, plan.aliases, settings.sleeps)
    serve.run_many(
        [
            serve.RunTarget(
                version_application(plan.folder, settings),
                name=version_application_name(plan.version),
                route_prefix=None,
            ),
            serve.RunTarget(gateway_application(table, settings, channel), name=GATEWAY_APPLICATION, route_prefix="/"),
        ]
    )


@contextmanager
def draining(settings: ServeSettings) -> Generator[None]:
    """At the end of the block, have the gateways take no more edits, and wait until they have nothing in hand.

    Serve's own shutdown, which follows, begins with the proxies and cuts what goes through them. The gateways stay till
    then, since without them the proxies would answer in words of their own.
    """
    try:
        yield
    finally:
        end = time.monotonic() + settings.grace_seconds + DRAIN_SECONDS
        gateways = serve.get_deployment_handle(GATEWAY, GATEWAY_APPLICATION)
        while in_hand(gateways) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(LAST_BYTES_SECONDS)


def in_hand(gateways: Any) -> int:
    """Have every gateway drain, also those that have come meanwhile; how many requests they have in hand."""
    try:
        answers = gateways.broadcast("drain").results(timeout_s=DRAIN_SECONDS, return_exceptions=True)
    except RayServeException:
        return 0  # There is none.
    except TimeoutError:
        return 1
    # Who does not say may have some, until Serve knows that it is dead.
    return sum(1 if isinstance(answer, Exception) else answer for answer in answers)


@contextmanager
def following(plan: ServePlan, workdir: Workdir, channel: str | None, state: ServeState) -> Generator[None]:
    """Go after the audit log on a thread of its own while the block runs, unless there is no channel."""
    if channel is None:
        yield
        return
    settings = plan.settings
    table = single_version_table(plan.version, plan.aliases, settings.sleeps)
    store = open_store(settings.state.url, workdir.root / "state.db", settings.state.bytes)

    def on_full(version: str, aliases: tuple[str, ...]) -> None:
        write_state(workdir, state.model_copy(update={"model_version": version, "aliases": aliases}))

    place = Place(
        registry=Registry(workdir),
        fleet=ServeFleet(settings),
        backend=ReplicaBackend(table, settings.limits, Meters()),
        store=store,
        channel=Channel(channel),
        quality=_quality(settings, workdir),
        # A request may wait that long in its gateway before it is handed on.
        drain_seconds=settings.limits.edit_seconds + 15,
        on_full=on_full,
    )
    follower = Follower(place, settings.rollout, settings.sleeps)
    loop = asyncio.new_event_loop()
    task = loop.create_task(follower.run())

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run, name="follower")
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def _quality(settings: ServeSettings, workdir: Workdir) -> Quality:
    if settings.rollout.judge is None:
        return PixelQuality()
    from insightedit.platform.judges.choosing import build_judge  # noqa: PLC0415  (a local model needs torch)

    return JudgedQuality(build_judge(settings.rollout.judge, workdir))


def main(plan_file: str) -> None:
    """Serve until told to stop."""
    plan = ServePlan.model_validate_json(Path(plan_file).read_text())
    workdir = Workdir.open(plan.workdir)
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            return  # Already on the way.
        stopped.set()
        raise SystemExit(0)

    state = ServeState(
        state="starting",
        url=plan.url,
        model_version=plan.version,
        aliases=plan.aliases,
        pid=os.getpid(),
        stop_seconds=plan.settings.stop_seconds,
        began=began(os.getpid()),
        log=Path(plan_file).with_suffix(".log"),
    )
    write_state(workdir, state)
    try:
        with tempfile.TemporaryDirectory(prefix="insightedit-serve-") as folder, local_cluster(workdir, Path(folder)):
            # Not before: Ray puts handlers of its own in place.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            channel = uuid.uuid4().hex if plan.follows else None
            deploy(plan, channel)
            state = state.model_copy(update={"state": "up"})
            write_state(workdir, state)
            with draining(plan.settings), following(plan, workdir, channel, state):
                stopped.wait()
    finally:
        clear_state(workdir)
        remove_haproxy_files()


if __name__ == "__main__":
    main(sys.argv[1])
