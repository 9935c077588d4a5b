"""Readers of datasets: each turns one dataset's original form into records."""

from __future__ import annotations

from typing import Final

from insightedit.platform.datasets.advancededit import AdvancedEditReader
from insightedit.platform.datasets.cc12m import CC12MReader
from insightedit.platform.datasets.coco import CocoReader
from insightedit.platform.datasets.cocostuff import CocoStuffReader
from insightedit.platform.datasets.instructpix2pix import InstructPix2PixReader
from insightedit.platform.datasets.magicbrush import MagicBrushReader
from insightedit.platform.datasets.pairs import PairsReader
from insightedit.platform.datasets.reading import Entry, Reader, records_of
from insightedit.platform.datasets.reasonseg import ReasonSegReader
from insightedit.platform.datasets.refcoco import GrefcocoReader, RefcocogReader, RefcocoPlusReader, RefcocoReader
from insightedit.platform.datasets.shapes import ShapesReader
from insightedit.platform.errors import UsageError

__all__ = ["READERS", "Entry", "Reader", "reader_named", "records_of"]

_READERS: Final[tuple[Reader, ...]] = (
    ShapesReader(),
    PairsReader(),
    CC12MReader(),
    InstructPix2PixReader(),
    MagicBrushReader(),
    AdvancedEditReader(),
    CocoReader(),
    RefcocoReader(),
    RefcocoPlusReader(),
    RefcocogReader(),
    GrefcocoReader(),
    CocoStuffReader(),
    ReasonSegReader(),
)
READERS: Final[dict[str, Reader]] = {reader.name: reader for reader in _READERS}
"""Every reader by its name."""


def reader_named(name: str) -> Reader:
    """Return a reader.

    Raises:
        UsageError: There is none of this name.
    """
    if name not in READERS:
        raise UsageError(f"There is no reader {name!r}; readers are {', '.join(sorted(READERS))}.")
    return READERS[name]
