"""Processes told from later ones that have the same number."""

from __future__ import annotations

import os
from pathlib import Path

_STARTED = 19
"""Place of `starttime` in /proc/PID/stat behind the name, see proc(5)."""


def began(pid: int) -> float:
    """When a process of this machine began, in seconds since the machine did: no clock that is set moves it.

    `psutil.Process.create_time` is by the wall clock: it changes when that is set or kept in step.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    # The name is in brackets, and may hold anything.
    return int(stat.rpartition(")")[2].split()[_STARTED]) / os.sysconf("SC_CLK_TCK")
