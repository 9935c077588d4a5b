"""`insightedit data check`: read a dataset where it lies, and say what is in it. Nothing of it is changed."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.exceptions import RayError

from insightedit.platform.cluster import cause_of, connected
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.contact_sheet import Contact, write_contact_sheet
from insightedit.platform.errors import InsightEditError
from insightedit.platform.ingest import Chunk, chunk_dataset, chunks_of, read_chunk
from insightedit.platform.records import RECORD_TASKS
from insightedit.platform.sharding import QUARANTINE_NAME
from insightedit.platform.shards import Table

SHEET_NAME = "sheet.png"
_CONTACT = pa.struct([("heading", pa.string()), ("text", pa.string()), ("pictures", pa.list_(pa.binary()))])
_SUMMARY = pa.schema(
    [("tasks", pa.string()), ("categories", pa.string()), ("bad", pa.string()), ("contacts", pa.list_(_CONTACT))]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCheck:
    """What a dataset holds."""

    name: str
    records: int
    """Rows that can be trained on."""
    quarantined: int
    """Rows that cannot; with `records` all rows that there are."""
    reasons: Mapping[str, int]
    """Quarantined rows by reason."""
    tasks: Mapping[str, int]
    """Records by task."""
    categories: Mapping[str, int]
    """Records by the dataset's own class, most frequent first; at most 20."""
    quarantine: str | None
    """The file that lists every quarantined row; None where there is none."""
    sheet: str | None
    """The contact sheet; None where there is no record."""


Progress = Callable[[int, int], None]
"""Is told how many rows are read, and about how many there are."""


def check(
    dataset: DatasetConfig, folder: Path, *, tasks: int = 2, contacts: int = 24, progress: Progress | None = None
) -> DatasetCheck:
    """Read and check every row of a dataset.

    Args:
        dataset: reader and options.
        folder: gets the list of quarantined rows and the contact sheet.
        tasks: tasks at a time that read.
        contacts: records on the sheet, spread over the dataset.
        progress: is told how far it is.

    Raises:
        UsageError: an option or an index file is wrong.
        NotFoundError: the dataset is not there.
    """
    chunks = chunks_of(dataset, seed=0)
    if not chunks:
        raise InsightEditError(f"The {dataset.reader} dataset has no rows at all; look at its options and its folder.")
    total = sum(entry.rows for chunk in chunks for entry in chunk.entries)
    each = -(-contacts // len(chunks))
    every = max(len(chunks) * each // contacts, 1)
    make_table = functools.partial(_summary, dataset=dataset, contacts=each, every=every)
    counts = _Counts(folder)
    with connected():
        try:
            for row in chunk_dataset(dataset.reader, chunks, make_table, tasks).iter_rows():
                counts.add(row)
                if progress is not None:
                    progress(counts.rows, total)
        except RayError as error:
            raise InsightEditError(f"Checking {dataset.reader} failed: {cause_of(error)}") from error
    return counts.result(dataset.reader, contacts)


def _summary(chunk: Chunk, *, dataset: DatasetConfig, contacts: int, every: int) -> Table:
    """A row about one chunk."""
    rows = read_chunk(dataset, PictureConfig(), chunk, seed=0)
    records = [record for _, record in rows.good]
    shown = [Contact.of(record) for record in records[:contacts]] if chunk.number % every == 0 else []
    columns = {
        "tasks": json.dumps(Counter(record.task for record in records)),
        "categories": json.dumps(Counter(record.category for record in records)),
        "bad": json.dumps([asdict(row) for _, row in rows.bad]),
        "contacts": [asdict(contact) for contact in shown],
    }
    return pa.table({name: [value] for name, value in columns.items()}, schema=_SUMMARY)


class _Counts:
    """What was read so far; the list of bad rows goes to its file as it grows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tasks: Counter[str] = Counter()
        self._categories: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._contacts: list[Contact] = []
        folder.mkdir(parents=True, exist_ok=True)
        for name in (QUARANTINE_NAME, SHEET_NAME):
            (folder / name).unlink(missing_ok=True)

    @property
    def rows(self) -> int:
        return self._tasks.total() + self._reasons.total()

    def add(self, row: Mapping[str, Any]) -> None:
        self._tasks.update(json.loads(row["tasks"]))
        self._categories.update(json.loads(row["categories"]))
        bad = json.loads(row["bad"])
        self._reasons.update(one["reason"] for one in bad)
        if bad:
            with (self._folder / QUARANTINE_NAME).open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(one)}\n" for one in bad)
        self._contacts += [Contact(**contact) for contact in row["contacts"]]

    def result(self, name: str, contacts: int) -> DatasetCheck:
        sheet = self._folder / SHEET_NAME
        if self._contacts:
            write_contact_sheet(sheet, self._contacts[:contacts])
        named = Counter({category: count for category, count in self._categories.items() if category})
        return DatasetCheck(
            name=name,
            records=self._tasks.total(),
            quarantined=self._reasons.total(),
            reasons=dict(sorted(self._reasons.items())),
            tasks={task: self._tasks[task] for task in RECORD_TASKS if self._tasks[task]},
            categories=dict(named.most_common(20)),
            quarantine=str(self._folder / QUARANTINE_NAME) if self._reasons else None,
            sheet=str(sheet) if self._contacts else None,
        )
