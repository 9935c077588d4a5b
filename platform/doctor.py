"""Whether this machine has what a run stands on: `insightedit doctor`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from insightedit.platform.workdir import Workdir

GIB = 2**30
MIN_CORES = 2
MIN_MEMORY = 6 * GIB
"""What the nano preset's Ray, two workers and server take together, with room."""
MIN_DISK = 5 * GIB
"""Free space below which a run would not get far, and below which Ray begins to complain."""

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    """The way out, empty where nothing is wrong."""


def examine(workdir: Workdir) -> list[Finding]:
    """Look at everything; a `failed` finding means that runs will fail or would be unsafe."""
    return [
        _python(),
        *_packages(),
        _cores(),
        _memory(),
        _disk(workdir.root),
        _writable(workdir.root),
        _ray_token(),
    ]


def _python() -> Finding:
    wanted = metadata("insightedit")["Requires-Python"]
    found = ".".join(map(str, sys.version_info[:3]))
    if SpecifierSet(wanted).contains(found):
        return Finding(name="python", verdict="ok", found=found)
    return Finding(name="python", verdict="failed", found=found, advice=f"Use Python {wanted}.")


def _packages() -> Iterator[Finding]:
    """Every package that the code needs, against the range it was written for."""
    for line in requires("insightedit") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found != "missing" and requirement.specifier.contains(found, prereleases=True):
            yield Finding(name=requirement.name, verdict="ok", found=found)
        else:
            advice = f"Install {requirement.name}{requirement.specifier}; constraints.txt has versions that work."
            yield Finding(name=requirement.name, verdict="failed", found=found, advice=advice)


def _cores() -> Finding:
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if found >= MIN_CORES:
        return Finding(name="cores", verdict="ok", found=str(found))
    return Finding(
        name="cores", verdict="warning", found=str(found), advice=f"Training is slow on fewer than {MIN_CORES} cores."
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available >= MIN_MEMORY:
        return Finding(name="memory", verdict="ok", found=found)
    advice = f"The nano preset wants {MIN_MEMORY / GIB:.0f} GiB; end other programs."
    return Finding(name="memory", verdict="warning", found=found, advice=advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free >= MIN_DISK:
        return Finding(name="disk", verdict="ok", found=found)
    advice = f"Make {MIN_DISK / GIB:.0f} GiB free, or name another folder with --workdir."
    return Finding(name="disk", verdict="failed", found=found, advice=advice)


def _writable(folder: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        advice = "Name a folder that you may write to with --workdir."
        return Finding(name="workdir", verdict="failed", found=found, advice=advice)
    return Finding(name="workdir", verdict="ok", found=f"{folder} can be written")


def _ray_token() -> Finding:
    """A cluster without a token runs code for whoever reaches its ports."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        found = "no cluster named in RAY_ADDRESS; a Ray on this machine makes a token of its own"
        return Finding(name="ray token", verdict="ok", found=found)
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        advice = f"Set RAY_AUTH_MODE=token here and where {address} is started: without it anyone may run code there."
        return Finding(name="ray token", verdict="failed", found="RAY_AUTH_MODE is not token", advice=advice)
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding(name="ray token", verdict="ok", found="token in RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if file.is_file() and file.stat().st_size:
        return Finding(name="ray token", verdict="ok", found=f"token in {file}")
    advice = f"Copy the token of {address} to {file}, or make one with `ray get-auth-token --generate`."
    return Finding(name="ray token", verdict="failed", found=f"no token in {file}", advice=advice)
