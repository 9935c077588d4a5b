"""Work that leaves the processors to whoever else wants them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def gently(until: float, work: Callable[[], Result]) -> Result:
    """Do some work, behind everybody else's until some time.

    It runs on a thread of its own, of Linux's class of idle work: that is a thread's, not the process', and a thread
    may enter it without any right and not leave it again. Threads that the work starts stay in it too.

    Args:
        until: seconds since the epoch from when on the work is done like any other.
        work: what to do.
    """
    if sys.platform != "linux" or time.time() >= until:
        return work()
    future: Future[Result] = Future()

    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  (the caller's thread raises it)
            future.set_exception(error)

    threading.Thread(target=run, name="gentle", daemon=True).start()
    return future.result()
