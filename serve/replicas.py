"""The two halves of an edit as Serve replicas, each with only the weights it needs.

The work is done on threads of its own, so that a replica's event loop answers health checks and takes edits meanwhile.
The engines are imported where a replica starts: whoever deploys these classes needs neither torch nor its memory.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import queue
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from insightedit.serve.backend import Conditions, Edited, EditJob, Partial, Refusal, VersionInfo
from insightedit.serve.gentle import gently
from insightedit.serve.settings import EngineSettings
from insightedit.serve.uploads import Pixels

Result = TypeVar("Result")


def _import_engines() -> None:
    """Most of the time that a replica of a small model takes to start."""
    importlib.import_module("insightedit.serve.engine")


class Lane:
    """One thread that does one thing after the other, and tells when it is stuck."""

    def __init__(self, patience: float, initializer: Callable[[], None]) -> None:
        self._patience = patience
        self._begun: float | None = None
        self._thread = ThreadPoolExecutor(1, "edit", initializer=initializer)

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Do some work when its turn comes."""
        return self._thread.submit(self._timed, work)

    def _timed(self, work: Callable[[], Result]) -> Result:
        self._begun = time.monotonic()
        try:
            return work()
        finally:
            self._begun = None

    def check(self) -> None:
        """Raise if the present work has taken longer than anybody waits for it."""
        begun = self._begun
        if begun is not None and time.monotonic() - begun > self._patience:
            raise RuntimeError(f"an edit has been running for more than {self._patience:g} seconds")


@dataclass(frozen=True, order=True, slots=True)
class _Waiting:
    """An edit that waits for its conditions. The smallest goes first."""

    reversed_priority: int
    order: int
    """Of arrival."""
    job: EditJob = field(compare=False)
    future: Future[Conditions | Refusal] = field(compare=False)


class Conditioner:
    """The first half: language model, Q-Former, BIM and adapter, one pass an edit, or for those that wait together."""

    def __init__(
        self, folder: str, exact: bool, patience: float, settings: EngineSettings, gentle_until: float
    ) -> None:
        """Load from a verified local folder.

        Args:
            folder: the pipeline's.
            exact: whether to run in exact mode.
            patience: seconds after which an edit counts as stuck.
            settings: of the engine.
            gentle_until: until when, in seconds since the epoch, it loads behind everybody else's work.
        """
        gently(gentle_until, _import_engines)
        from insightedit.serve.engine import ConditionEngine, use_threads  # noqa: PLC0415  (see above)

        self._engine = ConditionEngine(folder, exact, settings, gentle_until)
        # In exact mode a pass is one edit's, and each is answered when its own has ended.
        self._at_once = 1 if exact else settings.max_batch
        self._waiting: queue.PriorityQueue[_Waiting] = queue.PriorityQueue()
        self._count = itertools.count()
        self._lane = Lane(patience, lambda: use_threads(settings.threads))

    async def condition(self, job: EditJob) -> Conditions | Refusal:
        """What the editor needs to know beside the image, or why the model cannot do it."""
        entry = _Waiting(-job.priority, next(self._count), job, Future())
        self._waiting.put(entry)
        # One turn for each edit that has come, whosever it is then: so nobody is left.
        self._lane.submit(self._do_some)
        return await asyncio.wrap_future(entry.future)

    def _do_some(self) -> None:
        """Condition those that wait foremost."""
        taken: list[_Waiting] = []
        while len(taken) < self._at_once and not self._waiting.empty():
            entry = self._waiting.get()
            if entry.future.set_running_or_notify_cancel():
                taken.append(entry)
        try:
            answers = self._engine.condition([entry.job for entry in taken])
        except Exception as error:  # noqa: BLE001  (whatever it is, it is theirs)
            for entry in taken:
                entry.future.set_exception(error)
            return
        for entry, answer in zip(taken, answers, strict=True):
            entry.future.set_result(answer)

    async def ready(self) -> bool:
        """Answer; the weights are loaded."""
        return True

    def check_health(self) -> None:
        """Serve's health check."""
        self._lane.check()


class Editor:
    """The second half: the UNet's steps between the VAE's encoder and decoder. Its application's entrance."""

    def __init__(
        self,
        folder: str,
        exact: bool,
        patience: float,
        settings: EngineSettings,
        gentle_until: float,
        conditioner: Any,
    ) -> None:
        """Load from a verified local folder.

        Args:
            folder: the pipeline's.
            exact: whether to run in exact mode.
            patience: seconds after which an edit counts as stuck.
            settings: of the engine.
            gentle_until: until when, in seconds since the epoch, it loads behind everybody else's work.
            conditioner: Serve's handle of the other half of the same version.
        """
        gently(gentle_until, _import_engines)
        from insightedit.serve.engine import EditEngine  # noqa: PLC0415  (see above)

        self._engine = EditEngine(folder, exact, settings, patience, gentle_until)
        self._conditioner = conditioner

    async def edit(self, job: EditJob, conditions: Conditions) -> Edited:
        """Do an edit; the same job and conditions give the same image. Cancelled, it leaves before its next step."""
        return await asyncio.wrap_future(self._engine.submit(job, conditions))

    async def edit_in_parts(self, job: EditJob, conditions: Conditions) -> AsyncGenerator[Partial | Edited]:
        """Do an edit, and show images of it in progress before the finished one."""
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[Partial | None] = asyncio.Queue()

        def take(index: int, pixels: Pixels) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, Partial(index, pixels))

        future = self._engine.submit(job, conditions, take)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(parts.put_nowait, None))
        try:
            while (part := await parts.get()) is not None:
                yield part
            yield future.result()
        finally:
            future.cancel()

    async def ready(self) -> bool:
        """Answer; the weights are loaded."""
        return True

    async def describe(self) -> VersionInfo:
        """What this version is, once the conditioner has answered as well."""
        await self._conditioner.ready.remote()
        return self._engine.describe()

    def check_health(self) -> None:
        """Serve's health check."""
        self._engine.check()
