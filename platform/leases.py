"""One owner for each run: a lease in its folder, so that two jobs never train the same run.

A lease is a numbered file. Whoever creates the next number owns the run; creating is atomic, so of two only one does.
The owner touches its file every few seconds. A lease is free when its owner gave it back, when the owner's process on
this machine is gone, or when it was not touched for `LEASE_SECONDS`. Its workers look at the file too: they end
themselves once it was not touched for `FENCE_SECONDS`, which is sooner, or belongs to somebody else. So who takes a
run over from a machine that is out of reach finds nobody at work.

No clock is compared with another: ages are differences of times that the folder's own file system wrote, or of one
process's own monotonic clock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from insightedit.platform.errors import UsageError
from insightedit.platform.processes import began

JOB_VARIABLE = "INSIGHTEDIT_JOB"
"""Environment variable with the name of the cluster's job that a process belongs to."""
BEAT_SECONDS = 3.0
FENCE_SECONDS = 30.0
LEASE_SECONDS = 45.0
_FOLDER = "leases"
_POLL_SECONDS = 0.25
_LOST = 70
"""Exit code of a worker whose run has another owner or none."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who trains a run."""

    host: str
    machine: str
    """A running kernel and the space of process ids in it: within one, `pid` says which process."""
    pid: int
    process_began: float
    """In seconds since the machine began."""
    job: str
    """The job of the cluster; empty for a process that somebody started by hand."""
    config: str
    """Fingerprint of the config."""
    since: str
    released: bool = False

    @classmethod
    def this_process(cls, config: str) -> Owner:
        """This process as an owner."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_began=began(os.getpid()),
            job=os.environ.get(JOB_VARIABLE, ""),
            config=config,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @property
    def is_gone(self) -> bool:
        """Whether it gave the run back, or was a process of this machine that is no more."""
        if self.released:
            return True
        if self.machine != _machine():
            return False
        try:
            return began(self.pid) != self.process_began
        except ProcessLookupError:
            return True

    def __str__(self) -> str:
        """Who it is, for people."""
        return f"job {self.job} on {self.host}" if self.job else f"process {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to train a run; workers get a copy."""

    folder: Path
    number: int

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / f"{self.number:06d}.json"

    def is_held(self) -> bool:
        """Whether nobody has taken the run over."""
        return _newest(self.folder) == self.number and self.path.is_file()

    def check(self, run: str) -> None:
        """Check that the run is still this job's.

        Raises:
            UsageError: another one has it.
        """
        if not self.is_held():
            raise UsageError(f"Run {run} was taken over by another job, which goes on with it; this one ends.")


@contextmanager
def claimed(run: Path, config: str) -> Generator[Lease]:
    """Own a run for a while.

    Args:
        run: its folder.
        config: fingerprint of its config.

    Raises:
        UsageError: somebody else trains it.
    """
    owner = Owner.this_process(config)
    lease = _claim(run, owner)
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(lease, stop), name="lease", daemon=True)
    beats.start()
    try:
        yield lease
    finally:
        stop.set()
        beats.join()
        with contextlib.suppress(OSError):
            if lease.is_held():
                _write(lease.path, replace(owner, released=True))


def owner_of(run: Path) -> Owner | None:
    """Who trains a run, or did last; None where nobody ever did, or the newest lease is being written."""
    number = _newest(run / _FOLDER)
    return _read(Lease(run / _FOLDER, number)) if number else None


def is_owned(run: Path) -> bool:
    """Whether somebody trains a run, as far as can be told without waiting."""
    number = _newest(run / _FOLDER)
    return number > 0 and not _is_free(Lease(run / _FOLDER, number))


def watch(lease: Lease) -> None:
    """End this process, a worker, when the run has another owner or its owner is out of reach."""
    threading.Thread(target=_fence, args=(lease,), name="fence", daemon=True).start()


def _claim(run: Path, owner: Owner) -> Lease:
    """Create the next lease once the newest one is free."""
    folder = run / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        newest = Lease(folder, _newest(folder))
        if newest.number:
            _wait_until_free(newest, run.name)
        mine = Lease(folder, newest.number + 1)
        try:
            with mine.path.open("x", encoding="utf-8") as stream:
                json.dump(asdict(owner), stream)
        except FileExistsError:
            continue  # Another one was quicker; it is alive.
        if not mine.is_held():
            # Others came, went and took its number away since it was looked for.
            mine.path.unlink(missing_ok=True)
            continue
        for number in _numbers(folder):
            if number < mine.number:
                Lease(folder, number).path.unlink(missing_ok=True)
        return mine


def _wait_until_free(lease: Lease, run: str) -> None:
    """Wait as long as it takes to know whether a lease's owner is alive: a beat, or until the lease has run out.

    Raises:
        UsageError: it is alive.
    """
    before = _touched(lease)
    while not _is_free(lease):
        if _touched(lease) != before:
            who = _read(lease) or "another process"
            raise UsageError(
                f"Run {run} is being trained by {who}; wait for it, cancel it, or give the new run another name."
            )
        time.sleep(_POLL_SECONDS)


def _is_free(lease: Lease) -> bool:
    """Whether a lease may be taken."""
    owner, touched = _read(lease), _touched(lease)
    if touched is None or (owner is not None and owner.is_gone):
        return True
    return (_now(lease.folder) - touched) / 1e9 > LEASE_SECONDS


def _beat(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        try:
            os.utime(lease.path)
        except FileNotFoundError:
            return  # Taken over; the workers see it themselves.
        except OSError as error:
            log.warning("The lease %s cannot be renewed: %s", lease.path, error)


def _fence(lease: Lease) -> None:
    last, missed = None, 0
    while True:
        time.sleep(BEAT_SECONDS)
        try:
            held, touched = lease.is_held(), _touched(lease)
        except OSError as error:
            log.warning("The lease %s cannot be looked at: %s", lease.path, error)
            continue
        # Looks are counted, not seconds: a file system that stood still for a while says nothing about the owner.
        missed = missed + 1 if touched == last else 0
        last = touched
        if not held or missed * BEAT_SECONDS > FENCE_SECONDS:
            log.error("The run of %s has another owner, or its owner is out of reach: this worker ends.", lease.path)
            os._exit(_LOST)


def _newest(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()]


def _read(lease: Lease) -> Owner | None:
    """The owner; None while it is being written."""
    try:
        return Owner(**json.loads(lease.path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write(path: Path, owner: Owner) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    temporary.replace(path)


def _touched(lease: Lease) -> int | None:
    """Nanoseconds at which a lease was touched, by the file system's clock; None where it is no more."""
    try:
        # Opening asks a network file system anew; what it knows of a file may be old.
        with lease.path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _now(folder: Path) -> int:
    """The file system's time in nanoseconds."""
    probe = folder / f"now-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
