"""`insightedit data prepare`: every dataset of a config as shards, encoded ahead, ready to be streamed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from insightedit.model.configuration import SourcesConfig
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig
from insightedit.platform.sharding import Sharding, prepared_manifest, write_shards
from insightedit.platform.storage import Store
from insightedit.platform.workdir import Workdir


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDataset:
    """What preparing one dataset gave."""

    name: str
    store: Store
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
"""Is told a dataset's name, its rows that are ready and about how many there are."""


def prepare(
    config: RunConfig, workdir: Workdir, *, rebuild: bool = False, progress: Progress | None = None
) -> dict[str, PreparedDataset]:
    """Prepare every dataset of a config that is not there yet.

    Args:
        config: what to prepare.
        workdir: its `data` folder gets a folder for each dataset, unless `data.store` names another place.
        rebuild: delete what is there and begin anew, instead of refusing shards of other settings.
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
            store = Store.at(config.data.store or workdir.data).child(name)
            sharding = _sharding(config, sources, name)
            if rebuild:
                store.delete()
            manifest = prepared_manifest(sharding, store)
            reused = manifest is not None
            if manifest is None:
                told = None if progress is None else functools.partial(progress, name)
                manifest = write_shards(sharding, store, told)
            result[name] = PreparedDataset(
                name=name,
                store=store,
                rows=manifest.rows,
                quarantined=manifest.quarantined,
                fingerprint=manifest.fingerprint,
                encoders=manifest.encoders,
                reused=reused,
                seconds=time.perf_counter() - began,
            )
    return result


def _sharding(config: RunConfig, sources: SourcesConfig, name: str) -> Sharding:
    data = config.data
    return Sharding(
        name=name,
        dataset=data.datasets[name],
        seed=config.seed,
        rows_per_shard=data.rows_per_shard,
        quarantine_limit=data.quarantine_limit,
        pictures=data.pictures,
        resolution=config.model.resolution,
        tasks=data.read_tasks,
        encoder=_RecordEncoder if data.encode == "ahead" else None,
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
