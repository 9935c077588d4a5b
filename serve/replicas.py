"""The two halves of an edit as Serve replicas, each with only the weights it needs.

A replica works on one edit at a time, on a thread of its own, so that its event loop answers health checks meanwhile.
The engines are imported where a replica starts: whoever deploys these classes needs neither torch nor its memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from insightedit.serve.backend import Conditions, Edited, EditJob, Refusal, VersionInfo

Result = TypeVar("Result")


class Lane:
    """One thread that does one thing after the other, and tells when it is stuck."""

    def __init__(self, patience: float, initializer: Callable[[], None]) -> None:
        self._patience = patience
        self._begun: float | None = None
        self._thread = ThreadPoolExecutor(1, "edit", initializer=initializer)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do some work when its turn comes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, work)

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


class Conditioner:
    """The first half: language model, Q-Former, BIM and adapter, one pass an edit."""

    def __init__(self, folder: str, exact: bool, patience: float) -> None:
        """Load from a verified local folder.

        Args:
            folder: the pipeline's.
            exact: whether to run in exact mode.
            patience: seconds after which an edit counts as stuck.
        """
        from insightedit.serve.engine import ConditionEngine, use_one_thread  # noqa: PLC0415  (see above)

        self._engine = ConditionEngine(folder, exact)
        self._lane = Lane(patience, use_one_thread)

    async def condition(self, job: EditJob) -> Conditions | Refusal:
        """What the editor needs to know beside the image, or why the model cannot do it."""
        return await self._lane.run(lambda: self._engine.condition(job))

    async def ready(self) -> bool:
        """Answer; the weights are loaded."""
        return True

    def check_health(self) -> None:
        """Serve's health check."""
        self._lane.check()


class Editor:
    """The second half: the UNet's steps between the VAE's encoder and decoder. Its application's entrance."""

    def __init__(self, folder: str, exact: bool, patience: float, conditioner: Any) -> None:
        """Load from a verified local folder.

        Args:
            folder: the pipeline's.
            exact: whether to run in exact mode.
            patience: seconds after which an edit counts as stuck.
            conditioner: Serve's handle of the other half of the same version.
        """
        from insightedit.serve.engine import EditEngine, use_one_thread  # noqa: PLC0415  (see above)

        self._engine = EditEngine(folder, exact)
        self._lane = Lane(patience, use_one_thread)
        self._conditioner = conditioner

    async def edit(self, job: EditJob, conditions: Conditions) -> Edited:
        """Do an edit; the same job and conditions give the same image."""
        return await self._lane.run(lambda: self._engine.edit(job, conditions))

    async def describe(self) -> VersionInfo:
        """What this version is, once the conditioner has answered as well."""
        await self._conditioner.ready.remote()
        return self._engine.describe()

    def check_health(self) -> None:
        """Serve's health check."""
        self._lane.check()
