"""How long a server takes to follow its load: a cold start, a step in load, and the first edit after a sleep.

None of it is a ratio: what it is made of is shown instead, moment by moment.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from figures import report, row
from serve_load import make_requests, registered, sender
from serve_weights import FOUNDATION, save_instruct_pix2pix

from insightedit.platform.registry import ModelVersion
from insightedit.platform.workdir import Workdir
from insightedit.serve.deployment import down, up
from insightedit.serve.fleet import DeploymentStatus, FleetStatus
from insightedit.serve.settings import ServeSettings, read_settings
from insightedit.serve.state import ServeState, read_state

POLL = 0.05
PATIENCE = 300.0
ASLEEP = 15.0
"""Seconds without an edit after which replicas go, in the part that measures waking: longer than one takes to come, or
the half that came first would be gone again while the other wakes."""

Seconds = dict[str, float]
"""How long something took, by name."""


def main() -> None:
    """Measure each part several times, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOUNDATION, help="A folder instead of nano's foundation.")
    parser.add_argument("--size", type=int, default=32, help="Side of the edited images in pixels.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8, help="Who begin to send at once.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: list[Seconds] = []
    with tempfile.TemporaryDirectory() as folder:
        save_instruct_pix2pix(options.model, Path(folder) / "weights")
        workdir = Workdir.open(Path(folder) / "work")
        version = registered(workdir, Path(folder) / "weights")
        bodies, _ = make_requests(options.clients, options.size, options.steps)
        for _ in range(options.rounds):
            found.append(step_in_load(workdir, version, bodies, options.clients) | waking(workdir, version, bodies))
            print({name: round(seconds, 2) for name, seconds in found[-1].items()}, flush=True)
    report("scaling", [row(name, "s", [one[name] for one in found]) for name in found[0]], {})


def step_in_load(workdir: Workdir, version: ModelVersion, bodies: Sequence[dict[str, object]], clients: int) -> Seconds:
    """A cold start, then from the first edit of many clients to a second editor that takes edits."""
    settings = read_settings(None, ["editor.max_replicas=2", "engine.cache_bytes=0"])
    with served(workdir, version, settings) as (url, took), loaded(url, bodies, clients):
        begun = time.perf_counter()
        until(lambda: editor(url).wanted > 1)
        wanted = time.perf_counter()
        until(lambda: editor(url).running > 1)
        running = time.perf_counter()
    return {**took, "step_until_wanted": wanted - begun, "step_starting": running - wanted, "step": running - begun}


def waking(workdir: Workdir, version: ModelVersion, bodies: Sequence[dict[str, object]]) -> Seconds:
    """The first edit of a server whose replicas sleep, and the next one."""
    sleepy = [f"{part}.{name}" for part in ("conditioner", "editor") for name in SLEEP]
    found: Seconds = {}
    with served(workdir, version, read_settings(None, [*sleepy, "engine.cache_bytes=0"])) as (url, _):
        until(lambda: editor(url).running + editor(url).stopping == 0)
        send = sender(f"{url}/v1/images/edits", bodies)
        with httpx.Client(timeout=PATIENCE) as client:
            for name in ("asleep_edit", "awake_edit"):
                begun = time.perf_counter()
                send(client, 0)
                found[name] = time.perf_counter() - begun
    return found


SLEEP = ("min_replicas=0", f"sleep_seconds={ASLEEP}", "downscale_seconds=1")


@contextmanager
def served(workdir: Workdir, version: ModelVersion, settings: ServeSettings) -> Generator[tuple[str, Seconds]]:
    """A server, and how long its start took: to its process, to its replicas, to its first edit."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(up, workdir, version.version, 0, settings)
        until(lambda: state(workdir, server) is not None)
        process = time.perf_counter()
        until(lambda: getattr(state(workdir, server), "state", "") == "up")
        replicas = time.perf_counter()
        url = server.result().url
    answered = time.perf_counter()
    assert url
    try:
        yield (
            url,
            {
                "cold_process": process - begun,
                "cold_replicas": replicas - process,
                "cold_first_edit": answered - replicas,
                "cold_start": answered - begun,
            },
        )
    finally:
        down(workdir)


def state(workdir: Workdir, server: Future[object]) -> ServeState | None:
    """What the server says of itself; the reason why it did not start is raised."""
    if server.done():
        server.result()
    return read_state(workdir)


@contextmanager
def loaded(url: str, bodies: Sequence[dict[str, object]], clients: int) -> Generator[None]:
    """Clients that send one edit after the other until the end."""
    stopped = threading.Event()
    send = sender(f"{url}/v1/images/edits", bodies)

    def one(number: int) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not stopped.is_set():
                send(client, number)

    with ThreadPoolExecutor(clients) as pool:
        sending = [pool.submit(one, number) for number in range(clients)]
        try:
            yield
        finally:
            stopped.set()
    for one_sending in sending:
        one_sending.result()


def editor(url: str) -> DeploymentStatus:
    """The editors of the server."""
    fleet = FleetStatus.model_validate_json(httpx.get(f"{url}/v1/status", timeout=PATIENCE).raise_for_status().content)
    return next(one for one in fleet.deployments if one.name == "Editor")


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, or give up."""
    deadline = time.perf_counter() + PATIENCE
    while not condition():
        if time.perf_counter() > deadline:
            raise SystemExit(f"Nothing came of it in {PATIENCE:g} seconds.")
        time.sleep(POLL)


if __name__ == "__main__":
    main()
