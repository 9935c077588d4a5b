"""Scaling: what settings allow, what the status says, and a server that sleeps, wakes and grows, behind HAProxy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from test_serve_ray import Served, edit, picture, register_champion, told_until_nobody_listens

from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import VersionEntry, VersionTable
from insightedit.serve.client import Patience
from insightedit.serve.deployment import down, status, up
from insightedit.serve.fleet import DeploymentStatus, fleet_status
from insightedit.serve.ingress import check_haproxy
from insightedit.serve.meters import FOLDER_VARIABLE, Meters
from insightedit.serve.settings import ServeSettings, read_settings


def test_settings_come_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("editor: {max_replicas: 5, min_replicas: 0}\nlimits: {steps: 50}\n")
    settings = read_settings(file, ["editor.max_replicas=3", "haproxy=true"])
    assert (settings.editor.min_replicas, settings.editor.max_replicas, settings.limits.steps) == (0, 3, 50)
    assert settings.sleeps
    assert settings.haproxy
    assert not read_settings(None).sleeps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("editor: {max_replica: 5}", r"serve.yaml: editor\.max_replica is wrong"),
        ("editor: {max_replicas: 2, min_replicas: 3}", "max_replicas 2 is less than min_replicas 3"),
        ("gateway: {min_replicas: 0}", r"gateway\.min_replicas must be 1 or more"),
        ("conditioner: {look_back_seconds: 0}", r"conditioner\.look_back_seconds"),
        ("- editor", "must be a mapping of settings"),
        ("editor: [", "cannot be read as YAML"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_settings(file)


def test_missing_settings_and_values_for_sections(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no config"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="exact is a value, not a section"):
        read_settings(None, ["exact=true", "exact.more=1"])


def test_a_machine_without_haproxy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere/haproxy")
    with pytest.raises(UsageError, match="there is no HAProxy here"):
        check_haproxy()


def test_a_status_is_put_together() -> None:
    config = {"max_ongoing_requests": 4, "autoscaling_config": {"min_replicas": 0, "max_replicas": 3}}
    states = ("RUNNING", "RUNNING", "STARTING", "STOPPING")
    editor = {
        "name": "Editor",
        "deployment_config": config,
        "target_num_replicas": 3,
        "replicas": [{"state": state} for state in states],
    }
    details = {"applications": {"a3": {"status": "RUNNING", "deployments": {"Editor": editor}}}}
    entries = {"3": VersionEntry(application="a3", aliases=("champion",)), "4": VersionEntry(application="a4")}
    shown = fleet_status(details, VersionTable(default="3", versions=entries), {("3", "Editor"): 11})
    (one,) = shown.deployments
    assert (one.version, one.running, one.starting, one.stopping, one.wanted) == ("3", 2, 1, 1, 3)
    assert (one.ongoing, one.queued) == (8, 3)
    assert [(row.version, row.default, row.state) for row in shown.versions] == [
        ("3", True, "RUNNING"), ("4", False, "NOT_STARTED"),
    ]  # fmt: skip


def test_what_a_killed_gateway_had_in_hand_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    dead = max(psutil.pids()) + 100_000
    (tmp_path / f"gauge_livesum_{dead}.db").write_bytes(bytes(64))
    (tmp_path / f"counter_{dead}.db").write_bytes(bytes(64))
    Meters().calls_in_hand()
    assert [path.name for path in tmp_path.glob("*.db")] == [f"counter_{dead}.db"]


def sleepy_settings(*more: str) -> ServeSettings:
    """Conditioner and editor go after a second without work, and grow with every request that waits."""
    scaling = {"min_replicas": 0, "sleep_seconds": 1, "look_back_seconds": 1, "target_ongoing": 1}
    overrides = [f"{part}.{key}={value}" for part in ("conditioner", "editor") for key, value in scaling.items()]
    return read_settings(None, [*overrides, *more])


@pytest.fixture(scope="module")
def sleepy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sleepy")
    workdir = Workdir.open(folder / "work")
    version_folder = register_champion(workdir, folder)
    server = up(workdir, port=0, settings=sleepy_settings())
    yield Served(workdir, server, version_folder)
    down(workdir)


def deployment(served: Served, name: str) -> DeploymentStatus:
    fleet = status(served.workdir).fleet
    assert fleet is not None
    (one,) = [one for one in fleet.deployments if one.name == name]
    return one


def asleep(served: Served) -> bool:
    return all(
        one.running + one.starting + one.stopping + one.wanted == 0
        for one in (deployment(served, "Conditioner"), deployment(served, "Editor"))
    )


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_sleeps_and_the_first_request_waits_for_it(sleepy: Served) -> None:
    def ask() -> bool:
        for path in ("readyz", "healthz", "v1/status", "v1/models"):
            httpx.get(f"{sleepy.status.url}/{path}", timeout=60).raise_for_status()
        return asleep(sleepy)

    until(ask)
    with ThreadPoolExecutor(1) as client:
        first = client.submit(edit, sleepy, picture(), patience=Patience(retries=0))
        until(lambda: all(deployment(sleepy, name).starting for name in ("Conditioner", "Editor")))
        answer = first.result()
    assert edit(sleepy, picture(), patience=Patience(retries=0)) == answer


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_deployment_grows_with_its_own_queue(sleepy: Served) -> None:
    stop = threading.Event()

    def work(seed: int) -> None:
        while not stop.is_set():
            edit(sleepy, picture(), seed, num_inference_steps=100)

    with ThreadPoolExecutor(6) as clients:
        working = [clients.submit(work, seed) for seed in range(6)]
        try:
            until(lambda: deployment(sleepy, "Editor").running == 2)
            until(lambda: deployment(sleepy, "Editor").ongoing > 0)
            assert deployment(sleepy, "Gateway").running == 1
        finally:
            stop.set()
        for one in working:
            one.result()


net_connections: Any = psutil.net_connections  # Its type does not know that an address has a port.


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_haproxy_listens_in_place_of_serves_proxy(tmp_path: Path) -> None:
    workdir = Workdir.open(tmp_path / "work")
    folder = register_champion(workdir, tmp_path)
    server = up(workdir, port=0, settings=read_settings(None, ["haproxy=true"]))
    try:
        port = int(str(server.url).rsplit(":", 1)[1])
        listening = {one.pid for one in net_connections() if one.status == "LISTEN" and one.laddr.port == port}
        assert {psutil.Process(pid).name() for pid in listening if pid} == {"haproxy"}
        served = Served(workdir, server, folder)
        assert edit(served, picture()) == edit(served, picture())
        with ThreadPoolExecutor(1) as pool:
            others_told = pool.submit(told_until_nobody_listens, str(server.url))
            down(workdir)
            told = others_told.result()
        assert {answer.json().get("error", {}).get("code") for answer in told} <= {None, "stopping"}
        assert told[-1].status_code == 503
    finally:
        down(workdir)
