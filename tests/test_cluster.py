"""A local Ray is started again where the machine was too busy for its first try."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from insightedit.platform.cluster import started
from insightedit.platform.errors import ClusterError

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
