"""How far a long command is: one live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 20.0
"""Without a terminal, a phase says at most so often how far it is."""


class Display:
    """Phases one after the other, on stderr. A phase ends when another one begins."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]ok[/]"),
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
            console=self._console,
            disable=not self._live,
        )
        self._phase = ""
        self._note = ""
        self._bar: TaskID | None = None
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()
        self._bars.stop()

    def at(self, phase: str, done: int = 0, total: int | None = None, note: str = "") -> None:
        """Say where things are.

        Args:
            phase: its name; another one than before ends that one.
            done: how much of it is done.
            total: of how much; None where that is not known.
            note: in words.
        """
        if phase != self._phase:
            self.end()
            self._begin(phase)
        self._note = note or self._note
        if self._bar is not None:
            self._bars.update(self._bar, completed=done, total=total, note=self._note)
        elif note and time.monotonic() - self._said > _LINE_SECONDS:
            self._line(f"{phase}: {note}")

    def end(self, note: str = "") -> None:
        """End the phase that there is."""
        if not self._phase:
            return
        self._note = note or self._note
        if self._bar is not None:
            self._bars.update(self._bar, completed=1, total=1, note=self._note)
        else:
            remark = f": {self._note}" if self._note else ""
            self._line(f"{self._phase} done in {time.monotonic() - self._began:.0f} s{remark}")
        self._phase, self._note, self._bar = "", "", None

    def say(self, sentence: str) -> None:
        """Tell something apart from the phases."""
        self._line(sentence)

    def _begin(self, phase: str) -> None:
        self._phase, self._note = phase, ""
        self._began = time.monotonic()
        if self._live:
            self._bar = self._bars.add_task(phase, total=None, note="")
        else:
            self._line(f"{phase} ...")

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
