"""The second half of `serve.py`: our server beside LitServe and BentoML around diffusers' pipeline, over HTTP.

Every server gets the same edits, whose numbers of steps differ from one to the next, in turn and several times over:
closed loads, in which so many clients each send the next edit when they have the answer, and open ones, in which edits
come at random times whatever has been answered. Servers that are not asked are up, and idle.
"""

from __future__ import annotations

import base64
import io
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from figures import Row, row
from PIL import Image
from serve_engine import FAST
from serve_weights import GUIDANCE, make_job

from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir
from insightedit.serve.deployment import down, up
from insightedit.serve.settings import ServeSettings, read_settings

PEERS = ("litserve", "bentoml")
SHARES = (0.5, 0.8)
"""Open loads, as shares of the better peer's highest rate."""
START_SECONDS = 300
TIMEOUT = 600

Bodies = Sequence[Mapping[str, Any]]
Send = Callable[[httpx.Client, int], httpx.Response]
"""Ask one server for the edit of a number."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one server made of one load."""

    rate: float
    """Edits a second."""
    p95: float
    """95th percentile of the seconds of an edit."""
    responses: Sequence[httpx.Response]


@dataclass(slots=True)
class Curve:
    """One server's closed loads: the rounds of each number of clients."""

    loads: dict[int, list[Load]] = field(default_factory=dict[int, list[Load]])

    def rate(self, clients: int) -> float:
        """Median over the rounds."""
        return statistics.median(load.rate for load in self.loads[clients])

    def p95(self, clients: int) -> float:
        """Median over the rounds."""
        return statistics.median(load.p95 for load in self.loads[clients])

    def best(self) -> int:
        """The number of clients with the highest rate."""
        return max(self.loads, key=self.rate)

    def rate_within(self, p95: float) -> float:
        """The highest rate at which edits take no longer; 0 where none is so quick."""
        return max((self.rate(clients) for clients in self.loads if self.p95(clients) <= p95), default=0.0)


def load_figures(
    python: Path, weights: Path, precision: str, size: int, edits: int, steps: int, rounds: int, clients: Sequence[int]
) -> tuple[list[Row], dict[str, float]]:
    """Rows and ratios of the same loads on every server.

    Args:
        python: of the peers' environment.
        weights: folder of InstructPix2Pix.
        precision: `float32` or `bfloat16`.
        size: side of the images in pixels.
        edits: of one load.
        steps: of the middle one of three edits.
        rounds: how often each load is put on each server.
        clients: of the closed loads.
    """
    ours_, theirs = make_requests(edits, size, steps)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        asked = {
            **{name: servers.enter_context(peer(python, name, weights, precision, theirs)) for name in PEERS},
            **{
                name: servers.enter_context(ours(settings, weights, Path(folder) / name, ours_))
                for name, settings in our_settings(precision).items()
            },
        }
        closed = closed_loads(asked, clients, edits, rounds)
        fastest_peer = max(closed[name].rate(closed[name].best()) for name in PEERS)
        opened = {share: open_loads(asked, share * fastest_peer, edits, rounds) for share in SHARES}
    return rows(closed, opened), ratios(closed)


def ratios(closed: Mapping[str, Curve]) -> dict[str, float]:
    """Requests a second beside each peer's best, at its 95th percentile or less; and what the gateway adds."""
    found: dict[str, float] = {}
    for name in PEERS:
        best = closed[name].best()
        p95, rate = closed[name].p95(best), closed[name].rate(best)
        found[f"server_vs_{name}"] = closed["fast"].rate_within(p95) / rate
        if "exact" in closed:
            found[f"exact_server_vs_{name}"] = closed["exact"].rate_within(p95) / rate
    alone = closed["fast"].loads[min(closed["fast"].loads)]
    found["gateway_ms"] = statistics.median(
        1000 * (response.elapsed.total_seconds() - float(response.headers["x-insightedit-compute-seconds"]))
        for load in alone
        for response in load.responses
    )
    return found


def rows(closed: Mapping[str, Curve], opened: Mapping[float, Mapping[str, Sequence[Load]]]) -> list[Row]:
    """What was measured, server by server."""
    found: list[Row] = []
    for name, curve in closed.items():
        for clients, loads in curve.loads.items():
            found.append(row(f"{name}_{clients}_clients", "edits/s", [load.rate for load in loads]))
            found.append(row(f"{name}_{clients}_clients_p95", "s", [load.p95 for load in loads]))
    for share, servers in opened.items():
        for name, loads in servers.items():
            found.append(row(f"{name}_open_{share:.0%}_p95", "s", [load.p95 for load in loads]))
    return found


# -- the requests -----------------------------------------------------------------------------------------------------


def make_requests(edits: int, size: int, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The bodies of the same edits for our API and for the peers."""
    mixed = (steps // 2, steps, steps + steps // 2)
    jobs = [make_job(number, size, mixed[number % len(mixed)]) for number in range(edits)]
    ours_, theirs = [], []
    for job in jobs:
        file = io.BytesIO()
        Image.fromarray(job.pixels).save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        asked = {"prompt": job.prompt, "seed": job.seed, "num_inference_steps": job.num_inference_steps, **GUIDANCE}
        ours_.append({**asked, "images": [{"image_url": f"data:image/png;base64,{image}"}]})
        theirs.append({"request": {**asked, "image": image}})
    return ours_, theirs


def sender(url: str, bodies: Bodies) -> Send:
    """Asks a server at an address."""

    def send(client: httpx.Client, number: int) -> httpx.Response:
        return client.post(url, json=bodies[number % len(bodies)]).raise_for_status()

    return send


# -- the servers ------------------------------------------------------------------------------------------------------


@contextmanager
def ours(settings: ServeSettings, weights: Path, folder: Path, bodies: Bodies) -> Generator[Send]:
    """Our server, until the end."""
    workdir = Workdir.open(folder)
    version = registered(workdir, weights)
    try:
        yield sender(f"{up(workdir, version.version, 0, settings).url}/v1/images/edits", bodies)
    finally:
        down(workdir)


def registered(workdir: Workdir, weights: Path) -> ModelVersion:
    """A version of the weights."""
    registry = Registry(workdir)
    run = registry.client.create_run(ensure_experiment(registry.client, workdir))
    return registry.register(weights, run.info.run_id)


def our_settings(precision: str) -> dict[str, ServeSettings]:
    """Exact mode, which is in float32 alone, and the fast one; caches off, and as many editors as peers' processes."""
    replicas = [f"{part}.{bound}_replicas={count}" for part, count in COUNTS.items() for bound in ("min", "max")]
    room = [f"{part}.max_{what}=64" for part in ("conditioner", "editor") for what in ("ongoing", "queued")]
    limits = ["limits.in_flight=256", "limits.places=64", f"limits.edit_seconds={TIMEOUT}", "engine.cache_bytes=0"]
    common = [*replicas, *room, *limits]
    fast = ["exact=false", f"engine.precision={precision}", *(f"engine.{key}={value}" for key, value in FAST.items())]
    settings = {"fast": read_settings(None, [*common, *fast])}
    return settings if precision != "float32" else {"exact": read_settings(None, common), **settings}


COUNTS = {"gateway": 1, "conditioner": 1, "editor": 2}


@contextmanager
def peer(python: Path, name: str, weights: Path, precision: str, bodies: Bodies) -> Generator[Send]:
    """A peer's server, until the end."""
    port = free_port()
    script = Path(__file__).with_name("serve_peers.py")
    process = subprocess.Popen(
        [
            python.absolute(),
            script,
            name,
            weights,
            precision,
            str(port),
        ],  # not resolved: a link says which environment it is
        env={**os.environ, "OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "True"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    send = sender(f"http://127.0.0.1:{port}/edit", bodies)
    try:
        wait_for(name, send, process)
        yield send
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(name: str, send: Send, process: subprocess.Popen[bytes]) -> None:
    """Return when a server has answered an edit."""
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(timeout=START_SECONDS) as client:
        while True:
            try:
                send(client, 0)
                return
            except httpx.HTTPStatusError as error:
                if error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise SystemExit(f"{name} refuses an edit: {error.response.text[:500]}") from error
            except httpx.TransportError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} does not answer: {error}") from error
            time.sleep(1)


# -- the loads --------------------------------------------------------------------------------------------------------


def closed_loads(asked: Mapping[str, Send], clients: Sequence[int], edits: int, rounds: int) -> dict[str, Curve]:
    """Every number of clients on every server in turn. A first round of the most clients is not timed."""
    curves = {name: Curve() for name in asked}
    for send in asked.values():
        closed_load(send, max(clients), edits)
    for _ in range(rounds):
        for count in clients:
            for name, send in asked.items():
                load = closed_load(send, count, edits)
                curves[name].loads.setdefault(count, []).append(load)
                print(f"{name}, {count} clients: {load.rate:.3g} edits/s, p95 {load.p95:.3g} s", flush=True)
    return curves


def closed_load(send: Send, clients: int, edits: int) -> Load:
    """So many clients, each with the next edit when it has the answer; each sends two at least."""
    return loaded(send, clients, max(edits, 2 * clients))


def open_loads(asked: Mapping[str, Send], rate: float, edits: int, rounds: int) -> dict[str, list[Load]]:
    """Edits at the same random times on every server in turn."""
    found: dict[str, list[Load]] = {name: [] for name in asked}
    for number in range(rounds):
        times = np.cumsum([random.Random(f"{number} {edit}").expovariate(rate) for edit in range(edits)])
        for name, send in asked.items():
            found[name].append(loaded(send, edits, edits, [float(moment) for moment in times]))
    return found


def loaded(send: Send, clients: int, edits: int, moments: Sequence[float] | None = None) -> Load:
    """Edits sent by so many clients; where moments are given (in seconds), each at its own, and timed from it."""
    local = threading.local()
    begun = time.perf_counter()
    took: list[float] = []

    def one(number: int) -> httpx.Response:
        if not hasattr(local, "client"):
            local.client = httpx.Client(timeout=TIMEOUT)
        sent = time.perf_counter() if moments is None else begun + moments[number]
        time.sleep(max(0.0, sent - time.perf_counter()))
        response = send(local.client, number)
        took.append(time.perf_counter() - sent)
        return response

    with ThreadPoolExecutor(clients) as pool:
        responses = list(pool.map(one, range(edits)))
    seconds = time.perf_counter() - begun
    return Load(rate=edits / seconds, p95=float(np.percentile(took, 95)), responses=responses)
