"""The Ray cluster that a command works on: one that runs already, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
import ray
import ray.exceptions

from insightedit.platform.errors import ClusterError

Started = TypeVar("Started")

ADDRESS_VARIABLE = "RAY_ADDRESS"
_OWN_ERROR = re.compile(r"^insightedit\.\S+Error: (.+)$", re.MULTILINE)
# Of Ray's text, which is a page long and ends with advice for those who run Ray.
_SHORT_OF_MEMORY = re.compile(r"low on memory. Memory on the node \(IP: ([^,)]+).*?\) was (\S+) used / (\S+) limit")
_TOO_BUSY = "timed out during startup"  # Of what Ray says of a node that has not come up.
_TRIES = 4
MIN_LOGICAL_CPUS = 8
"""What a local Ray counts at least: two workers and their data stream on a machine of two CPUs would leave none to run
the data tasks on, and training would wait forever."""


@contextmanager
def connected(address: str | None = None, *, cpus: int | None = None) -> Generator[None]:
    """Use a Ray cluster for a while.

    A Ray that this process is connected to already is used and left as it is. One that is started here ends here.

    Args:
        address: of a running cluster; without it `RAY_ADDRESS`, then a local Ray of this process.
        cpus: logical CPUs of a local Ray.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    connect(address, cpus=cpus)
    try:
        yield
    finally:
        ray.shutdown()


def cause_of(error: BaseException) -> str:
    """What went wrong in the task or actor that an error of Ray is about, in one line."""
    # Ray carries tracebacks as text; an error of ours stands there with its whole name.
    if own := _OWN_ERROR.findall(str(error)):
        return own[-1]
    # Ray Data raises some errors from one that says nothing.
    while (inner := getattr(error, "cause", None) or error.__cause__) and str(inner):
        error = inner
    if short := _SHORT_OF_MEMORY.search(str(error)):
        return (
            f"machine {short[1]} ran out of memory ({short[2]} of {short[3]} were in use), and Ray ended a process of"
            " the run; leave it more memory, or let it take less (`insightedit train CONFIG --dry-run` says how much)."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def connect(address: str | None = None, *, cpus: int | None = None) -> None:
    """Connect this process to Ray; arguments and errors as in `connected`."""
    address = address or os.environ.get(ADDRESS_VARIABLE)
    quiet: Any = {"logging_level": "ERROR", "log_to_driver": False}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            logical = cpus or max(os.cpu_count() or 1, MIN_LOGICAL_CPUS)
            start_local(logical, **quiet)
    except (ConnectionError, TimeoutError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        where = f"at {address}" if address else "on this machine"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClusterError(f"Ray {where} cannot be reached ({reason}); check the address or start one.") from error


def start_local(cpus: int, **arguments: Any) -> None:
    """Start a Ray of this process, which may have more logical CPUs than the machine.

    Args:
        cpus: logical ones.
        arguments: others of `ray.init`.

    Raises:
        ClusterError: the machine is too busy.
    """
    # Ray would warn of every pair of processes beyond the machine's own CPUs, of which there are meant to be many, and
    # start one for each logical CPU before there is work for it.
    config = {"worker_maximum_startup_concurrency": cpus, "prestart_worker_first_driver": False}
    started(
        lambda: ray.init(address="local", num_cpus=cpus, include_dashboard=False, _system_config=config, **arguments)
    )


def started(start: Callable[[], Started]) -> Started:
    """What starts a Ray node in this process, tried again where the machine was too busy.

    A node ends itself when an agent of it has not come up within 15 seconds, whatever it is told
    (ray-project/ray#65983).

    Raises:
        ClusterError: it has not started in the last try either.
    """
    for _ in range(_TRIES):
        others = set(psutil.Process().children())
        try:
            return start()
        except Exception as error:
            # Ray has no class of its own for it, and leaves the node's other processes behind.
            if _TOO_BUSY not in str(error):
                raise
            for process in set(psutil.Process().children()) - others:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    raise ClusterError(f"Ray did not start here in {_TRIES} tries: the machine is too busy; try again when it is less.")
