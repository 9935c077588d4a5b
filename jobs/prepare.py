"""`insightedit data prepare`: every dataset of a config as shards, encoded ahead, ready to be streamed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from insightedit.model.configuration import SourcesConfig
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.ingest import Ingestion, ingest
from insightedit.platform.shards import PreparedData, ShardManifest
from insightedit.platform.workdir import Workdir


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDataset:
    """What preparing one dataset gave."""

    name: str
    folder: Path
    rows: int
    quarantined: int
    fingerprint: str
    """Of the shards."""
    encoders: str
    """Fingerprint of the encoders that made their features."""
    reused: bool
    """Whether the shards were there already, made with the same settings."""
    seconds: float


Progress = Callable[[str, int, int], None]
"""Is told a dataset's name, its rows that are ready and all its rows."""


def prepare(
    config: RunConfig, workdir: Workdir, *, rebuild: bool = False, progress: Progress | None = None
) -> dict[str, PreparedDataset]:
    """Prepare every dataset of a config that is not there yet.

    Args:
        config: what to prepare.
        workdir: its `data` folder gets a folder for each dataset.
        rebuild: make shards of other settings again instead of refusing them.
        progress: is told how far it is.

    Raises:
        UsageError: shards of the same name were made with other settings.
        NotFoundError: a source of the model is missing.
        InsightEditError: too many rows are bad.
    """
    sources = config.model_sources().sources
    result: dict[str, PreparedDataset] = {}
    with connected():
        for name in config.data.datasets:
            began = time.perf_counter()
            folder = workdir.data / name
            ingestion = _ingestion(config, sources, name)
            manifest = None if rebuild else _existing(ingestion, folder)
            reused = manifest is not None
            if manifest is None:
                manifest = _make(ingestion, folder, progress)
            result[name] = PreparedDataset(
                name=name,
                folder=folder,
                rows=manifest.rows,
                quarantined=manifest.quarantined,
                fingerprint=manifest.fingerprint,
                encoders=manifest.encoders,
                reused=reused,
                seconds=time.perf_counter() - began,
            )
    return result


def _ingestion(config: RunConfig, sources: SourcesConfig, name: str) -> Ingestion:
    data = config.data
    return Ingestion(
        name=name,
        dataset=data.datasets[name],
        rows_per_shard=data.rows_per_shard,
        quarantine_limit=data.quarantine_limit,
        resolution=config.model.resolution,
        encoder=_RecordEncoder,
        encoder_arguments=(sources, config.model.resolution),
        encoder_workers=data.encoder_workers,
        encoder_gpus=data.encoder_gpus,
    )


class _RecordEncoder:
    """The encoder, imported only in the processes that run it: it brings torch, transformers and diffusers."""

    def __init__(self, *arguments: Any) -> None:
        from insightedit.platform.encoding import RecordEncoder  # noqa: PLC0415

        self._encoder = RecordEncoder(*arguments)
        self.fingerprint = self._encoder.fingerprint

    def __call__(self, table: Any) -> Any:
        return self._encoder(table)


def _existing(ingestion: Ingestion, folder: Path) -> ShardManifest | None:
    """The manifest of shards that are there already; None where there are none.

    Raises:
        UsageError: they were made with other settings.
    """
    try:
        manifest = PreparedData.open(folder).manifest
    except NotFoundError:
        return None
    if (manifest.source, manifest.resolution) != (ingestion.source, ingestion.resolution):
        raise UsageError(
            f"{folder} was prepared with other settings; prepare it again with --rebuild, or use another --workdir."
        )
    return manifest


def _make(ingestion: Ingestion, folder: Path, progress: Progress | None) -> ShardManifest:
    """Make the shards, replacing what is there once they are whole."""
    old = folder.with_name(f"old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    ready = 0
    total = ingestion.rows

    def on_progress(rows: int) -> None:
        nonlocal ready
        ready += rows
        if progress is not None:
            progress(ingestion.name, ready, total)

    try:
        manifest = ingest(ingestion, folder, on_progress)
    except InsightEditError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return manifest
