"""`insightedit data prepare`: every dataset of a config as shards, encoded ahead, ready to be streamed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from insightedit.model.configuration import SourcesConfig
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig
from insightedit.platform.errors import UsageError
from insightedit.platform.ingest import chunks_of
from insightedit.platform.sharding import Sharding, clear_shards, prepared_manifest, write_shards
from insightedit.platform.storage import Store
from insightedit.platform.workdir import Workdir


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDataset:
    """What preparing one dataset gave."""

    name: str
    store: str
    """Where the shards are."""
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
    config: RunConfig, workdir: Workdir, *, rebuild: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, PreparedDataset]:
    """Prepare every dataset of a config that is not there yet.

    Args:
        config: what to prepare.
        workdir: its `data` folder gets a folder for each dataset, unless `data.store` names another place.
        rebuild: datasets whose shards are deleted and made again.
        progress: is told how far it is.

    Raises:
        UsageError: shards of the same name were made with other settings.
        NotFoundError: a dataset, or a source of the model, is missing.
        InsightEditError: too many rows are bad.
    """
    sources = config.model_sources().sources
    shardings = {name: _sharding(config, sources, name) for name in config.data.datasets}
    stores = {name: Store.at(config.data.store or workdir.data).child(name) for name in shardings}
    if unknown := set(rebuild) - set(shardings):
        raise UsageError(f"--rebuild names {sorted(unknown)[0]!r}; the datasets are {', '.join(shardings)}.")
    # Nothing is deleted or made before all that is there was looked at.
    ready = {name: prepared_manifest(shardings[name], stores[name]) for name in shardings if name not in rebuild}
    for name in rebuild:
        chunks_of(shardings[name].dataset, config.shard_seed)
    result: dict[str, PreparedDataset] = {}
    with connected():
        for name, sharding in shardings.items():
            began = time.perf_counter()
            manifest = ready.get(name)
            if name in rebuild:
                clear_shards(stores[name])
            if manifest is None:
                told = None if progress is None else functools.partial(progress, name)
                manifest = write_shards(sharding, stores[name], told)
            result[name] = PreparedDataset(
                name=name,
                store=stores[name].uri,
                rows=manifest.rows,
                quarantined=manifest.quarantined,
                fingerprint=manifest.fingerprint,
                encoders=manifest.encoders,
                reused=ready.get(name) is not None,
                seconds=time.perf_counter() - began,
            )
    return result


def _sharding(config: RunConfig, sources: SourcesConfig, name: str) -> Sharding:
    data = config.data
    return Sharding(
        name=name,
        dataset=data.datasets[name],
        seed=config.shard_seed,
        rows_per_shard=data.rows_per_shard,
        quarantine_limit=data.quarantine_limit,
        pictures=data.pictures,
        resolution=config.model.resolution,
        tasks=data.read_tasks,
        encoder=_RecordEncoder if data.encode == "ahead" else None,
        encoder_arguments=(sources, config.model.resolution),
        encoder_workers=data.encoder_workers,
        encoder_gpus=data.encoder_gpus,
        place=data.place,
    )


class _RecordEncoder:
    """The encoder, imported only in the processes that run it: it brings torch, transformers and diffusers."""

    def __init__(self, *arguments: Any) -> None:
        from insightedit.platform.encoding import RecordEncoder  # noqa: PLC0415

        self._encoder = RecordEncoder(*arguments)
        self.fingerprint = self._encoder.fingerprint

    def __call__(self, table: Any) -> Any:
        return self._encoder(table)
