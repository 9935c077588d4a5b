"""A local Ray is started again where the machine was too busy for its first try."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from insightedit.platform.cluster import started
from insightedit.platform.errors import ClusterError

# In every Python of the node; the first agent takes longer than Ray gives it.
LATE_AGENT = """
import os, sys, time
if any("dashboard/agent.py" in word for word in sys.orig_argv):
    try:
        os.close(os.open(os.environ["LATE_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        time.sleep(30)
"""
RAY = """
import psutil, ray
from insightedit.platform.cluster import connected
with connected():
    assert ray.get(ray.remote(num_cpus=0.1)(lambda: 1).remote()) == 1
assert not psutil.Process().children()
"""
LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def test_a_node_that_comes_up_late_is_started_again_and_leaves_nothing() -> None:
    left: list[psutil.Popen] = []

    def start() -> str:
        if len(left) < 2:
            left.append(psutil.Popen(["sleep", "600"]))
            raise Exception(LATE)
        return "up"

    with subprocess.Popen(["sleep", "600"]) as other:
        assert started(start) == "up"
        assert other.poll() is None
        other.kill()
    assert len(left) == 2
    assert all(process.wait(10) for process in left)


def test_a_machine_that_stays_busy_is_told() -> None:
    def start() -> str:
        raise Exception(LATE)

    with pytest.raises(ClusterError, match="4 tries: the machine is too busy"):
        started(start)


def test_another_error_is_not_tried_again() -> None:
    tries: list[int] = []

    def start() -> str:
        tries.append(1)
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError, match="refused"):
        started(start)
    assert len(tries) == 1


@pytest.mark.slow
def test_a_ray_with_a_late_agent_comes_up_in_another_try(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE_AGENT)
    once = tmp_path / "once"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", RAY], env={**os.environ, "PYTHONPATH": path, "LATE_ONCE": str(once)}, check=True
    )
    assert once.exists()
