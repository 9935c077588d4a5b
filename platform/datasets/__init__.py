"""Readers of datasets: each turns one dataset's original form into records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Final, Protocol

from insightedit.platform.datasets.shapes import ShapesReader
from insightedit.platform.errors import UsageError
from insightedit.platform.records import Record

__all__ = ["READERS", "Reader", "reader_named"]


class Reader(Protocol):
    """Turns one dataset into records. Options come from a config; wrong ones raise `UsageError`."""

    name: ClassVar[str]
    """What configs call it."""
    needs: ClassVar[str]
    """What must be there before it can read, for people."""

    def count(self, options: Mapping[str, object]) -> int:
        """Return the number of records."""
        ...

    def records(self, options: Mapping[str, object], start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Read records number `start` up to `stop` (the end), in an order that never changes."""
        ...

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        ...


READERS: Final[dict[str, Reader]] = {ShapesReader.name: ShapesReader()}
"""Every reader by its name."""


def reader_named(name: str) -> Reader:
    """Return a reader.

    Raises:
        UsageError: There is none of this name.
    """
    if name not in READERS:
        raise UsageError(f"There is no reader {name!r}; readers are {', '.join(sorted(READERS))}.")
    return READERS[name]
