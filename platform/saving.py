"""Saving behind training: what has to be copied is copied at once, all else happens in a thread.

Nothing here calls `torch.distributed`, whose collectives belong to training. Ranks find each other through the
storage, see `insightedit.platform.checkpoints`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from insightedit.platform.checkpoints import CheckpointInfo, CheckpointStore, progress_name
from insightedit.platform.errors import InsightEditError


class CheckpointSaver:
    """Writes one rank's checkpoints, one at a time."""

    def __init__(self, store: CheckpointStore, rank: int, world: int, *, wait: bool = False) -> None:
        """Prepare.

        Args:
            store: where they go.
            rank: of this process.
            world: number of ranks.
            wait: whether a checkpoint is finished when `save` returns.
        """
        self.stalled = 0.0
        """Seconds that training has waited for checkpoints."""
        self._store = store
        self._rank = rank
        self._world = world
        self._wait = wait
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        name: str,
        info: CheckpointInfo,
        snapshot: Callable[[], Callable[[Path], None]],
        *,
        losses: Mapping[str, float],
        progress: Mapping[str, Any],
    ) -> None:
        """Begin a checkpoint, after the one before is finished. Every rank must call this.

        Args:
            name: of the store's `new_name`, the same on every rank.
            info: what it is of.
            snapshot: copies the state now and returns what writes the copy into a folder.
            losses: the last point of each curve, which retention may go by.
            progress: anything else that JSON can hold, given back by `Checkpoint.progress(rank)`.

        Raises:
            InsightEditError: the one before failed.
        """
        self.finish()
        began = time.perf_counter()
        write = snapshot()
        text = json.dumps(progress)

        def write_all(folder: Path) -> None:
            write(folder)
            (folder / progress_name(self._rank)).write_text(text, encoding="utf-8")

        self._thread = threading.Thread(
            target=self._write, args=(name, info, dict(losses), write_all), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.stalled += time.perf_counter() - began
        if self._wait:
            self.finish()

    def check(self) -> None:
        """Say what went wrong behind training; costs nothing.

        Raises:
            InsightEditError: a checkpoint failed.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise InsightEditError(f"A checkpoint could not be written. {error}") from error

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            InsightEditError: it failed.
        """
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.stalled += time.perf_counter() - began
        self.check()

    def abandon(self) -> None:
        """Give up the checkpoint that is being written: training has failed."""
        self._store.stop.set()

    def _write(
        self, name: str, info: CheckpointInfo, losses: Mapping[str, float], write: Callable[[Path], None]
    ) -> None:
        """What the thread does."""
        try:
            self._store.contribute(name, self._rank, write)
            if self._rank == 0:
                self._store.seal(name, info, self._world, losses)
        except BaseException as error:  # noqa: BLE001 - it is raised in training
            self._error = error
