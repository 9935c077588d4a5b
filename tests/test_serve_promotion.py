"""Promotions and rollbacks under load, the long form: nobody is failed, no answer is of two versions.

The short form is in `test_serve_ray.py`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from figures import report_part
from rollouts import BAD_WEIGHTS, NOISE, Change, Load, ended, no_start, of_index, register, wrong_file
from test_serve_ray import PROMPT, Served, picture, png, register_champion

from insightedit.platform.registry import Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve.deployment import down, up
from insightedit.serve.settings import read_settings

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(4 * 3600)]

SHARE = 0.1
LOAD = 0.3
"""Share of the capacity that the load takes."""
FIELDS = {"prompt": f"{PROMPT} and make it blue", "num_inference_steps": "20"}
BROKEN: dict[str, Change] = {
    "bad_weights": BAD_WEIGHTS,
    "wrong_file": wrong_file,
    "no_start": no_start,
    "noise": NOISE,
    "fails_at_some": of_index(prompt_length=45),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("promotion")
    workdir = Workdir.open(folder / "work")
    version_folder = register_champion(workdir, folder)
    settings = {"share": SHARE, "poll_seconds": 0.5, "min_requests": 10, "min_seconds": 5, "max_seconds": 60}
    server = up(workdir, port=0, settings=read_settings(None, [f"rollout.{key}={settings[key]}" for key in settings]))
    yield Served(workdir, server, version_folder)
    down(workdir)


@pytest.fixture(scope="module")
def rate(served: Served) -> float:
    """Edits a second that are 30% of what the server makes when a few clients wait for their answers."""
    load = Load(str(served.status.url), png(picture()), FIELDS, rate=1)
    with load.client() as client, ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda number: load.edit(client, number), range(8)))
        begun = time.monotonic()
        list(clients.map(lambda number: load.edit(client, number), range(48)))
        return LOAD * 48 / (time.monotonic() - begun)


def worst_added(load: Load, calm: float) -> int:
    """Milliseconds that the slowest answer took beyond the slowest of the calm before."""
    slow = [answer.seconds for answer in load.answers if answer.sent > calm]
    return round(1000 * max(0.0, max(slow) - max(answer.seconds for answer in load.answers if answer.sent <= calm)))


def p99(load: Load) -> int:
    """Milliseconds."""
    return round(1000 * statistics.quantiles([answer.seconds for answer in load.answers], n=100)[-1])


def test_promotions_and_rollbacks_fail_nobody(served: Served, rate: float, tmp_path: Path) -> None:
    url, registry = str(served.status.url), Registry(served.workdir)
    count = int(os.environ.get("INSIGHTEDIT_CHAOS_PROMOTIONS", "20"))
    load = Load(url, png(picture()), FIELDS, rate)
    astray = 0
    with load.running():
        time.sleep(30)
        calm = time.monotonic()
        for number in range(count):
            version = register(served.workdir, served.folder, tmp_path, of_index(guidance_scale=3.0 + number)).version
            registry.promote(version)
            found = ended(url, version)
            assert found.state == "full", found
            time.sleep(3)
            registry.rollback(reason="the test's")
            assert ended(url, "1").state == "full"
            time.sleep(1)
            back = time.monotonic()
            time.sleep(3)
            astray += len(load.by(version, since=back))
    counts = {
        "promotions": count,
        "rollbacks": count,
        "requests": len(load.answers),
        "failed": load.failed,
        "mixed": load.mixed(),
        "astray": astray,
        "worst_added_ms": worst_added(load, calm),
        "p99_ms": p99(load),
    }
    report_part("chaos", "promotion", counts)
    assert (counts["failed"], counts["mixed"], counts["astray"]) == (0, 0, 0)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_version_has_its_share_at_most(served: Served, rate: float, tmp_path: Path, kind: str) -> None:
    broken(served, rate, tmp_path, kind, BROKEN[kind], FIELDS)


def test_a_slow_version_has_its_share_at_most(served: Served, rate: float, tmp_path: Path) -> None:
    """Its edits have six times the steps where nobody says how many they want."""
    fields = {key: value for key, value in FIELDS.items() if key != "num_inference_steps"}
    broken(served, rate, tmp_path, "slow", of_index(num_inference_steps=60), fields)


def broken(served: Served, rate: float, folder: Path, kind: str, change: Change, fields: dict[str, str]) -> None:
    """Promote a broken version under load, and count who noticed."""
    url, registry = str(served.status.url), Registry(served.workdir)
    load = Load(url, png(picture()), fields, rate)
    served_before = registry.resolve("champion").version
    with load.running():
        time.sleep(5)
        begun = time.monotonic()
        version = register(served.workdir, served.folder, folder, change).version
        registry.promote(version)
        found = ended(url, version)
        took = time.monotonic() - begun
        time.sleep(3)
    during = [answer for answer in load.answers if begun < answer.sent < begun + took]
    last = registry.audit.entries()[-1]
    counts = {
        "requests": len(load.answers),
        "failed": load.failed,
        "mixed": load.mixed(),
        "by_it": len(load.by(version)),
        "of": len(during),
        "seconds": round(took),
    }
    report_part("chaos", f"promotion_{kind}", counts)
    assert (found.state, last.action, last.to_version) == ("rolled_back", "rollback", served_before)
    assert (counts["failed"], counts["mixed"]) == (0, 0)
    # Of a share of 10%, chance gives more than this once in a thousand times.
    assert counts["by_it"] <= SHARE * len(during) + 3.1 * (SHARE * (1 - SHARE) * len(during)) ** 0.5 + 1
