"""One owner for each run, whoever dies, and in whatever order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from insightedit.platform import leases
from insightedit.platform.errors import UsageError
from insightedit.platform.leases import Lease, claimed, is_owned, owner_of

CLAIM = """
import sys, time
from pathlib import Path
from insightedit.platform.errors import UsageError
from insightedit.platform.leases import claimed
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
try:
    with claimed(Path(sys.argv[1]), "config") as lease:
        print("mine", lease.number, flush=True)
        time.sleep(float(sys.argv[4]))
except UsageError as error:
    print(error, flush=True)
"""
"""A process that says it is ready, waits for a file, and claims a run for some seconds."""
FENCED = """
import sys, time
from pathlib import Path
from insightedit.platform import leases
leases.BEAT_SECONDS = 0.05
leases.FENCE_SECONDS = float(sys.argv[2])
leases.watch(leases.Lease(Path(sys.argv[1]), 1))
print("watching", flush=True)
time.sleep(60)
"""
"""A worker of the first lease."""


def process(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def claim(run: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that owns the run already."""
    go = run.parent / "go"
    go.touch()
    owner = process(CLAIM, run, run.parent / "ready", go, seconds)
    assert owner.stdout
    assert owner.stdout.readline().startswith("mine")
    return owner


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process takes itself for one on another machine: it cannot look who lives on that of before."""
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")


def test_of_many_that_claim_at_once_one_owns_the_run(tmp_path: Path) -> None:
    run, go = tmp_path / "run", tmp_path / "go"
    rivals = [process(CLAIM, run, tmp_path / f"ready-{number}", go, 5.0) for number in range(6)]
    while len(list(tmp_path.glob("ready-*"))) < len(rivals):
        time.sleep(0.01)
    go.touch()
    said = [rival.communicate()[0] for rival in rivals]
    assert sum(one.startswith("mine 1") for one in said) == 1
    assert sum("is being trained by process" in one for one in said) == len(rivals) - 1


def test_a_run_that_was_given_back_is_free(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with claimed(tmp_path, f"config-{number}") as lease:
            assert lease.number == number
            assert is_owned(tmp_path)
        assert not is_owned(tmp_path)
        owner = owner_of(tmp_path)
        assert owner
        assert (owner.config, owner.released) == (f"config-{number}", True)


def test_who_is_slow_gets_no_number_that_was_given_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claimed(tmp_path, "first"):
        pass
    wait = leases._wait_until_free  # pyright: ignore[reportPrivateUsage]

    def overtaken(lease: Lease, run: str) -> None:
        wait(lease, run)
        monkeypatch.setattr(leases, "_wait_until_free", wait)
        for name in ("second", "third"):
            with claimed(tmp_path, name):
                pass

    monkeypatch.setattr(leases, "_wait_until_free", overtaken)
    with claimed(tmp_path, "slow") as lease:
        assert lease.number == 4
        assert lease.is_held()
        assert [path.name for path in lease.folder.glob("*.json")] == ["000004.json"]


def test_a_run_whose_process_was_killed_is_free_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    owner = claim(run, 60)
    assert is_owned(run)
    owner.kill()
    owner.wait()
    with claimed(run, "config") as lease:
        assert lease.number == 2


def test_an_owner_outlives_a_clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    owner = claim(run, 60)
    # The time of day at which the machine began moves with the clock, by a second whenever that is kept in step.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1e9)
    assert is_owned(run)
    with pytest.raises(UsageError, match="is being trained by process"), claimed(run, "config"):
        pass
    owner.kill()
    owner.wait()


def test_an_owner_on_another_machine_is_known_by_its_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    owner = claim(run, 60)
    elsewhere(monkeypatch)
    with pytest.raises(UsageError, match="is being trained by process"), claimed(run, "config"):
        pass
    owner.kill()
    owner.wait()


def test_an_owner_that_fell_silent_on_another_machine_loses_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    owner = claim(run, 60)
    os.kill(owner.pid, signal.SIGSTOP)
    elsewhere(monkeypatch)
    assert is_owned(run)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    with claimed(run, "config") as lease:
        assert lease.number == 2
        os.kill(owner.pid, signal.SIGCONT)
        with pytest.raises(UsageError, match="was taken over"):
            Lease(lease.folder, 1).check("run")
        time.sleep(2 * leases.BEAT_SECONDS / 3)
        # Who wakes up does not disturb.
        assert lease.is_held()
    owner.kill()
    owner.wait()


def test_a_lease_that_its_owner_died_over_writing_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "leases"
    folder.mkdir()
    (folder / "000004.json").write_text('{"host": "h')
    assert is_owned(tmp_path)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.0)
    with claimed(tmp_path, "config") as lease:
        assert lease.number == 5


@pytest.mark.parametrize("event", ["taken over", "silence"])
def test_a_worker_ends_with_its_owner(tmp_path: Path, event: str) -> None:
    with claimed(tmp_path, "config") as lease:
        # The owner beats every three seconds: with the longer patience only a takeover ends the worker.
        worker = process(FENCED, lease.folder, 3600 if event == "taken over" else 0.5)
        assert worker.stdout
        assert worker.stdout.readline()
        if event == "taken over":
            (lease.folder / "000002.json").write_text(json.dumps({}))
        assert worker.wait(30) == 70


def test_a_worker_lives_while_its_owner_does(tmp_path: Path) -> None:
    with claimed(tmp_path, "config") as lease:
        worker = process(FENCED, lease.folder, 2 * leases.BEAT_SECONDS)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(3 * leases.BEAT_SECONDS)
        worker.kill()
        worker.wait()
