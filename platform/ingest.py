"""From datasets to prepared shards, on Ray Data: read records, set bad ones aside, encode, write.

Nothing here loads a model; encoding does (`encoding.py`), in processes of its own.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.exceptions import RayError

from insightedit.platform.cluster import cause_of
from insightedit.platform.config import DatasetConfig
from insightedit.platform.datasets import reader_named
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.records import Record, decode_image, to_table
from insightedit.platform.shards import Shard, ShardManifest, Table, write_shard

QUARANTINE_NAME = "quarantine.jsonl"
_NUMBER = "shard"
_BAD = "bad"
_TASK_CPUS = 0.5
_SUMMARY = pa.schema(
    [
        pa.field(_NUMBER, pa.int64()),
        pa.field("file", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("encoders", pa.string()),
        pa.field(_BAD, pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingestion:
    """How one dataset becomes shards."""

    name: str
    dataset: DatasetConfig
    rows_per_shard: int
    quarantine_limit: float
    resolution: int
    encoder: type[Any] | None
    """A class whose objects turn a table of records into one with features, and whose `fingerprint` names them."""
    encoder_arguments: tuple[Any, ...] = ()
    encoder_workers: int = 1
    encoder_gpus: float = 0.0

    @property
    def rows(self) -> int:
        """Records of the dataset."""
        return reader_named(self.dataset.reader).count(self.dataset.options)

    @property
    def source(self) -> str:
        """Fingerprint of the dataset and its options."""
        return reader_named(self.dataset.reader).fingerprint(self.dataset.options)


def ingest(ingestion: Ingestion, folder: Path, on_progress: Callable[[int], None] | None = None) -> ShardManifest:
    """Prepare a dataset's shards. The folder appears whole or not at all.

    Args:
        ingestion: what is prepared.
        folder: where; it must not exist.
        on_progress: told the number of rows that are written since the last call.

    Raises:
        InsightEditError: too many rows are bad.
    """
    temporary = folder.with_name(f"tmp-{folder.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        summaries: list[dict[str, Any]] = []
        for summary in _pipeline(ingestion, temporary).iter_rows():
            summaries.append(summary)
            if on_progress is not None:
                on_progress(int(summary["rows"]))
        manifest = _manifest(ingestion, sorted(summaries, key=lambda row: row[_NUMBER]), temporary)
        manifest.write(temporary)
        temporary.rename(folder)
    except RayError as error:
        raise InsightEditError(f"Preparing {ingestion.name} failed: {cause_of(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _pipeline(ingestion: Ingestion, folder: Path) -> Dataset:
    """A row about each shard, as they are written."""
    shards = -(-ingestion.rows // ingestion.rows_per_shard)
    dataset = ray.data.range(shards, override_num_blocks=shards)
    context = dataset.context
    # A shard is a block, whatever its size.
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    tables: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    reading = TaskPoolStrategy(size=max(ingestion.encoder_workers, 1))
    dataset = dataset.map_batches(
        cast(Any, _read), fn_kwargs={"ingestion": ingestion}, batch_size=1, compute=reading, num_cpus=_TASK_CPUS
    )
    if ingestion.encoder is not None:
        dataset = dataset.map_batches(
            _Encode,
            fn_constructor_args=(ingestion.encoder, ingestion.encoder_arguments),
            compute=ActorPoolStrategy(size=ingestion.encoder_workers),
            num_cpus=_TASK_CPUS,
            num_gpus=ingestion.encoder_gpus,
            **tables,
        )
    return dataset.map_batches(
        cast(Any, _write), fn_kwargs={"folder": folder}, compute=TaskPoolStrategy(size=1), num_cpus=_TASK_CPUS, **tables
    )


def _read(batch: dict[str, NDArray[np.int64]], ingestion: Ingestion) -> Table:
    """The good records of one shard; number and bad records travel in the schema's metadata."""
    number = int(batch["id"][0])
    start = number * ingestion.rows_per_shard
    reader = reader_named(ingestion.dataset.reader)
    good: list[Record] = []
    bad: list[dict[str, str]] = []
    for record in reader.records(ingestion.dataset.options, start, start + ingestion.rows_per_shard):
        try:
            check_record(record)
            good.append(record)
        except UsageError as error:
            bad.append({"key": record.key, "reason": str(error)})
    table = to_table(good)
    return _labelled(table, number, bad)


def check_record(record: Record) -> None:
    """Check that a record can be trained on.

    Raises:
        UsageError: a picture is missing or broken, or an edit has no target or instruction.
    """
    if record.source is None:
        raise UsageError("The source picture is missing.")
    decode_image(record.source)
    if record.target is not None:
        decode_image(record.target)
    if record.task == "edit" and record.target is None:
        raise UsageError("The target picture is missing.")
    if not record.instruction.strip():
        raise UsageError("The instruction is empty.")


class _Encode:
    """Runs an encoder, made once in each process, over whole shards."""

    def __init__(self, encoder: type[Any], arguments: tuple[Any, ...]) -> None:
        self._encoder = encoder(*arguments)

    def __call__(self, table: Table) -> Table:
        number, bad, _ = _labels(table)
        encoded = self._encoder(table) if len(table) else table
        return _labelled(encoded, number, bad, self._encoder.fingerprint)


def _write(table: Table, folder: Path) -> Table:
    number, bad, encoders = _labels(table)
    name = f"shard-{number:05d}.parquet"
    shard = write_shard(table.replace_schema_metadata(None), folder / name) if len(table) else Shard("", 0, 0, "")
    row = {_NUMBER: number, "file": shard.file, "rows": shard.rows, "size": shard.size, "sha256": shard.sha256}
    return pa.Table.from_pylist([{**row, "encoders": encoders, _BAD: json.dumps(bad)}], schema=_SUMMARY)


def _labelled(table: Table, number: int, bad: list[dict[str, str]], encoders: str = "") -> Table:
    labels = {_NUMBER: str(number), _BAD: json.dumps(bad), "encoders": encoders}
    return table.replace_schema_metadata(labels)


def _labels(table: Table) -> tuple[int, list[dict[str, str]], str]:
    metadata = cast(dict[bytes, bytes], table.schema.metadata)
    return int(metadata[_NUMBER.encode()]), json.loads(metadata[_BAD.encode()]), metadata[b"encoders"].decode()


def _manifest(ingestion: Ingestion, summaries: list[dict[str, Any]], folder: Path) -> ShardManifest:
    """Put the shards together, and write down what was set aside."""
    bad = [entry for summary in summaries for entry in json.loads(summary[_BAD])]
    good = sum(int(summary["rows"]) for summary in summaries)
    if bad:
        lines = "".join(f"{json.dumps(entry)}\n" for entry in bad)
        (folder / QUARANTINE_NAME).write_text(lines, encoding="utf-8")
    if not good or len(bad) > ingestion.quarantine_limit * (good + len(bad)):
        first = bad[0] if bad else {"key": "-", "reason": "it has no rows."}
        raise InsightEditError(
            f"{len(bad)} of {good + len(bad)} rows of {ingestion.name} are bad, more than data.quarantine_limit"
            f" {ingestion.quarantine_limit:g} allows; the first is {first['key']}: {first['reason']}"
        )
    shards = tuple(
        Shard(row["file"], int(row["rows"]), int(row["size"]), row["sha256"]) for row in summaries if row["rows"]
    )
    encoders = {row["encoders"] for row in summaries}
    if len(encoders) != 1:
        raise InsightEditError("The encoders' weights differ between machines; give every machine the same sources.")
    return ShardManifest(
        dataset=ingestion.name,
        source=ingestion.source,
        encoders=encoders.pop(),
        resolution=ingestion.resolution,
        shards=shards,
        quarantined=len(bad),
    )
