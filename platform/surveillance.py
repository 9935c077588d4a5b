"""What watches over a worker: a watchdog for ranks that hang, and notices of nodes that are about to go."""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

START_SECONDS = 600.0
"""What a start may take beyond a step: weights to load, a stream to begin, kernels to compile."""
_ONE_NOTICE_SECONDS = 60.0
"""Ranks hear of the same notice at different times; what comes within this of a checkpoint made for one is the same."""
_STDERR = 2

terminated = threading.Event()
"""Set once this process has had a SIGTERM."""


@dataclass(slots=True)
class _Requests:
    """How often a checkpoint was asked for, and how many of these times one was made since."""

    asked: int = 0
    met: int = 0


_requests = _Requests()


def ask_for_checkpoint() -> None:
    """Have the group that this process trains in make a checkpoint after the step it is in."""
    _requests.asked += 1


def checkpoint_is_made() -> bool:
    """Whether that has been done."""
    return _requests.met == _requests.asked


class Watchdog:
    """Ends this process when it makes no progress for some time, so that Ray starts the group again.

    A rank that hangs makes all others wait for it, so every rank ends. faulthandler's own thread does it: it needs no
    interpreter lock, which the hanging code may hold, and leaves the stacks of all threads in the worker's log.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def start(self) -> None:
        """Begin to watch; a start may take longer than a step."""
        self._wait(self._seconds + START_SECONDS)

    def progress(self) -> None:
        """Say that this process goes on."""
        self._wait(self._seconds)

    def stop(self) -> None:
        """Watch no longer."""
        faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _wait(seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


class Notices:
    """Whether a checkpoint is wanted now.

    That is when a part of this worker group is about to be taken away, which a node that Ray drains and SIGTERM say, or
    when the group is to be started again with another number of workers.
    """

    def __init__(self) -> None:
        self._heeded = -_ONE_NOTICE_SECONDS
        self._known: object = None

    def pending(self) -> bool:
        """Whether this rank has had a notice that no checkpoint was made for. Costs no message to anyone."""
        if self._news() in ((False, None, 0), self._known):
            return False
        if time.monotonic() - self._heeded < _ONE_NOTICE_SECONDS:
            self._settle()
            return False
        return True

    def heed(self) -> None:
        """Say that a checkpoint was made for what any rank has heard."""
        self._heeded = time.monotonic()
        self._settle()

    def _settle(self) -> None:
        self._known = self._news()
        _requests.met = _requests.asked

    @staticmethod
    def _news() -> tuple[bool, object, int]:
        # ray.train.get_preemption_info() is a barrier through an actor, too slow for every step; this is what it reads.
        info = get_train_context().preemption_context.preemption_info
        return terminated.is_set(), info, _requests.asked


class HeedTermination(WorkerCallback):
    """Makes a worker's first SIGTERM a notice; the second one ends it as before."""

    def after_init_train_context(self) -> None:
        """Ray calls this in each worker."""
        before = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: FrameType | None) -> None:
            del number, frame
            terminated.set()
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, note)
