"""A storm over a server: whatever is killed, every edit is answered once, with the undisturbed run's bytes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import openai
import psutil
import pytest
from figures import report_part
from test_serve_ray import PROMPT, Served, picture, png, register_champion

from insightedit.platform.errors import InsightEditError
from insightedit.platform.workdir import Workdir
from insightedit.serve.client import Patience, edit_over_http
from insightedit.serve.deployment import down, up
from insightedit.serve.job_client import JobClient, images_of
from insightedit.serve.settings import read_settings

KINDS = ("Editor", "Conditioner", "Gateway")
SEEDS = range(8)
STEPS = 20
LOAD = 0.3
"""Share of the capacity that the storm's load takes."""
RESTART_CPU_SECONDS = 8.0
"""What starting a replica takes; kills are spaced so that restarts take a quarter of the machine."""
RECOVERY_SECONDS = 30.0
KEYED_SECONDS = 120.0
"""What OpenAI's client waits for one of its tries."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replicas of everything, as many as it takes for one to be left."""
    folder = tmp_path_factory.mktemp("chaos")
    workdir = Workdir.open(folder / "work")
    version_folder = register_champion(workdir, folder)
    fixed = [
        f"{part}.{key}=2" for part in ("gateway", "conditioner", "editor") for key in ("min_replicas", "max_replicas")
    ]
    server = up(workdir, port=0, settings=read_settings(None, fixed))
    yield Served(workdir, server, version_folder)
    down(workdir)


def processes(served: Served, kind: str) -> list[psutil.Process]:
    """The living processes of a kind. Ray shows what they are as their title, and what they do behind a dot."""
    title = re.compile(rf":{kind}(\.\w+)?$")
    found: list[psutil.Process] = []
    for process in psutil.Process(served.status.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any(title.search(word) for word in process.cmdline()[:1]):
                found.append(process)
    return found


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def edit(served: Served, seed: int) -> bytes:
    url = str(served.status.url)
    return edit_over_http(
        url, png(picture()), PROMPT, seed=seed, num_inference_steps=STEPS, patience=Patience(unreachable_retries=10)
    ).image


def keyed_edit(served: Served, key: str, seconds: float) -> list[str]:
    """What OpenAI's client gets under a key, without a seed: once with its retries, and once more."""
    client = openai.OpenAI(base_url=f"{served.status.url}/v1", api_key="any", max_retries=10, timeout=seconds)
    images: list[str] = []
    for _ in range(2):
        answer = client.images.edit(
            image=("a.png", png(picture()), "image/png"),
            prompt=PROMPT,
            extra_headers={"Idempotency-Key": key},
            extra_body={"num_inference_steps": STEPS},
        )
        images += [str(one.b64_json) for one in answer.data or ()]
    return images


def capacity(served: Served) -> float:
    """Edits a second with a few clients at a time, each waiting for its answers."""
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda seed: edit(served, seed), SEEDS))
        begun = time.monotonic()
        count = len(list(clients.map(lambda seed: edit(served, seed), [*SEEDS] * 3)))
        return count / (time.monotonic() - begun)


@dataclass
class Load:
    """Requests that come at their times, whatever became of those before.

    Every other one is OpenAI's client's, under a key and without a seed, and is sent twice; the others are ours.
    """

    served: Served
    rate: float
    """Requests a second."""
    answers: dict[int, list[bytes]] = field(default_factory=lambda: {seed: [] for seed in SEEDS})
    keyed: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    errors: list[Exception] = field(default_factory=list[Exception])
    sent: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        with ThreadPoolExecutor(64) as clients:
            thread = threading.Thread(target=self._send, args=(clients,))
            thread.start()
            try:
                yield
            finally:
                self.stop.set()
                thread.join()

    def _send(self, clients: ThreadPoolExecutor) -> None:
        while not self.stop.wait(1 / self.rate):
            work = self._edit_under_key if self.sent % 2 else self._edit
            clients.submit(work, self.sent)
            self.sent += 1

    def _edit(self, number: int) -> None:
        seed = SEEDS[number // 2 % len(SEEDS)]
        try:
            self.answers[seed].append(edit(self.served, seed))
        except InsightEditError as error:
            self.errors.append(error)

    def _edit_under_key(self, number: int) -> None:
        key = f"{self.name}/{number}"
        try:
            self.keyed[key] = keyed_edit(self.served, key, KEYED_SECONDS)
        except openai.OpenAIError as error:
            self.errors.append(error)

    def counts(self, expected: dict[int, bytes]) -> dict[str, int]:
        """What went wrong, once everything has been answered."""
        answered = sum(len(images) for images in self.answers.values()) + len(self.keyed)
        return {
            "requests": self.sent,
            "lost": self.sent - answered,
            "doubled": sum(len(set(images)) > 1 for images in self.keyed.values()),
            "mismatched": sum(image != expected[seed] for seed, images in self.answers.items() for image in images),
        }


def strike(served: Served, kind: str, chance: random.Random) -> None:
    """Kill one process of a kind, once there is one."""
    end = time.monotonic() + 60
    while not (living := processes(served, kind)):
        assert time.monotonic() < end, f"no {kind} comes back"
        time.sleep(0.1)
    with contextlib.suppress(psutil.NoSuchProcess):
        chance.choice(living).kill()


def storm(served: Served, kinds: list[str], pause: float) -> dict[str, int]:
    """Kill one after the other under load, and compare with the time before."""
    chance = random.Random(7)
    expected = {seed: edit(served, seed) for seed in SEEDS}
    load = Load(served, LOAD * capacity(served))
    jobs = JobClient(str(served.status.url), Patience(unreachable_retries=10))
    sent: list[tuple[int, str]] = []
    with load.running():
        for kind in kinds:
            time.sleep(pause * chance.uniform(0.5, 1.5))
            for seed in (0, 1):
                job = jobs.submit(png(picture()), PROMPT, seed=seed, num_inference_steps=STEPS)
                sent.append((seed, job.id))
            strike(served, kind, chance)
        ended = [(seed, jobs.wait(job_id, 300)) for seed, job_id in sent]
    wrong = sum(job.result is None or images_of(job) != (expected[seed],) for seed, job in ended)
    return {"kills": len(kinds), "wrong_jobs": wrong, **load.counts(expected)}


@pytest.mark.timeout(1200)
def test_a_short_storm_loses_and_doubles_nothing(served: Served) -> None:
    counts = storm(served, [*KINDS], pause=3)
    assert counts.pop("requests") > 0
    assert counts == {"kills": 3, "wrong_jobs": 0, "lost": 0, "doubled": 0, "mismatched": 0}
    until(lambda: all(len(processes(served, kind)) == 2 for kind in KINDS), 300, "not all come back")


def overload(served: Served, rate: float, seconds: float) -> set[int]:
    """The statuses of requests at a rate, none of them tried again."""
    url, image = f"{served.status.url}/v1/images/edits", png(picture())

    def post(index: int) -> int:
        time.sleep(index / rate)
        fields = {"prompt": PROMPT, "seed": str(index), "num_inference_steps": str(STEPS)}
        return httpx.post(url, data=fields, files={"image": ("a", image)}, timeout=300).status_code

    count = int(rate * seconds)
    with ThreadPoolExecutor(count) as clients:
        return set(clients.map(post, range(count)))


@pytest.mark.chaos
@pytest.mark.timeout(6 * 3600)
def test_a_long_storm_loses_and_doubles_nothing(served: Served) -> None:
    kills = int(os.environ.get("INSIGHTEDIT_CHAOS_KILLS", "100"))
    pause = RESTART_CPU_SECONDS / ((os.cpu_count() or 1) / 4)
    counts = storm(served, [KINDS[number % len(KINDS)] for number in range(kills)], pause)
    # A proxy takes half a minute to come back.
    proxies = storm(served, ["ProxyActor"] * 5, pause=60)
    report_part("chaos", "serving", counts)
    report_part("chaos", "serving_proxy", proxies)
    for done in (counts, proxies):
        assert (done["lost"], done["doubled"], done["mismatched"], done["wrong_jobs"]) == (0, 0, 0, 0)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_five_times_the_capacity_is_refused_and_passes(served: Served) -> None:
    rate = capacity(served)
    begun = time.monotonic()
    edit_over_http(str(served.status.url), png(picture()), PROMPT, seed=0, patience=Patience(retries=0))
    calm = time.monotonic() - begun
    statuses = overload(served, 5 * rate, 20)

    def recovered() -> bool:
        begun = time.monotonic()
        edit(served, 0)
        return time.monotonic() - begun < max(3 * calm, 1.0)

    until(recovered, RECOVERY_SECONDS, "it does not recover")
    assert statuses == {200, 429}


@dataclass(frozen=True)
class Sample:
    """What the server's processes hold at one moment."""

    memory: int
    """Bytes that are theirs alone."""
    descriptors: int
    processes: int


def sample(served: Served) -> Sample:
    root = psutil.Process(served.status.pid)
    memory = descriptors = count = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            memory += process.memory_full_info().uss
            descriptors += process.num_fds()
            count += 1
    return Sample(memory, descriptors, count)


def soak(served: Served, seconds: float, every: float) -> list[Sample]:
    """Samples under half load."""
    load = Load(served, 0.5 * capacity(served))
    samples: list[Sample] = []
    with load.running():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(every)
            samples.append(sample(served))
    assert not load.errors
    return samples


def growth(values: list[int]) -> float:
    """From the second fifth of the time to the last: the first is for caches to fill."""
    fifth = max(len(values) // 5, 1)
    return statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth] or values[:1])


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_an_hour_of_load_leaves_nothing_behind(served: Served) -> None:
    seconds = 60 * float(os.environ.get("INSIGHTEDIT_SOAK_MINUTES", "60"))
    samples = soak(served, seconds, every=min(10.0, seconds / 30))
    memory = growth([one.memory for one in samples])
    counts = {
        "samples": len(samples),
        "memory_mib": samples[-1].memory >> 20,
        "memory_growth_mib": int(memory / 2**20),
        "descriptors_growth": int(growth([one.descriptors for one in samples])),
        "processes_growth": int(growth([one.processes for one in samples])),
    }
    report_part("soak", "serving", counts)
    assert memory < 0.05 * samples[0].memory
    assert counts["descriptors_growth"] <= 8
    assert counts["processes_growth"] <= 0
