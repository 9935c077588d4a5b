"""A model of a few linear layers with the losses' names of the real one, and a prepared dataset for it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray.cloudpickle
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from insightedit.model.configuration import ModelConfig, SourcesConfig
from insightedit.model.losses import LossTerm, squared_error
from insightedit.model.stages import STAGES, Part
from insightedit.platform import surveillance
from insightedit.platform.config import DataConfig, DatasetConfig, RunConfig, StageConfig, WorkersConfig
from insightedit.platform.errors import InsightEditError
from insightedit.platform.shards import (
    MANIFEST_NAME,
    Shard,
    ShardManifest,
    Table,
    add_features,
    features_of,
    write_shard,
)
from insightedit.platform.storage import Store
from insightedit.platform.streams import Arrays, Collate, Encode, StageStream

# Workers do not know the tests' folder.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

WIDTH = 8
CALLS: dict[int, int] = {}
"""Calls of `loss_weights` in this process, by stage."""


class ToyModel(nn.Module):
    """Three linear layers; stage n trains layer n, and stage 2 the head too. `frozen` never trains."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in STAGES)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def begin_stage(self, number: int) -> None:
        self.requires_grad_(False)
        self.layers[number - 1].requires_grad_(True)
        if number == 2:
            self.head.requires_grad_(True)

    def forward(self, batch: Mapping[str, Tensor], stage: int) -> dict[str, LossTerm]:
        x = batch["x"] + noise(batch["seed"])
        for layer in self.layers:
            x = x + self.dropout(layer(x).tanh())
        outputs = {"first": self.head(x), "second": self.frozen(x)}
        weights = term_weights(batch, stage)
        return {
            name: LossTerm(squared_error(outputs["second" if "diff" in name else "first"], batch["y"]), weights[name])
            for name in STAGES[stage].losses
        }


def noise(seeds: Tensor) -> Tensor:
    rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return 0.1 * torch.stack(rows)


def term_weights(batch: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
    every = torch.ones_like(batch["diffusion_weight"])
    return {name: batch["diffusion_weight"] if "diff" in name else every for name in STAGES[stage].losses}


@dataclass(frozen=True)
class ToyTask:
    """See `insightedit.platform.tasks.TrainingTask`."""

    dropout: float = 0.0
    die_at: tuple[int, int, str] | None = None
    """Stage, step and file: rank 1 kills itself in that step, unless the file says that it did before."""
    hang_at: tuple[int, int, str] | None = None
    """The same, but rank 1 hangs."""
    notice_at: tuple[int, int, str] | None = None
    """The same, but rank 1 is told that it will be ended."""
    pause: float = 0.0
    """Seconds that each micro-batch takes longer, until the file `pause_until` is there."""
    pause_until: str = ""
    record: str | None = None
    """A folder in which each process notes the seeds of the samples it trains on, a micro-batch a line."""
    key: str = "toy"

    def build_model(self, *, halved: bool = False) -> nn.Module:
        return ToyModel(self.dropout)

    def make_collate(self) -> Collate:
        def collate(table: Table) -> Arrays:
            return features_of(table)

        return collate

    def make_encoder(self) -> Encode:
        return ToyEncoder()

    def part_of(self, parameter: str) -> Part | None:
        return "bim" if parameter.startswith("head.") else "unet"

    def loss_weights(self, batch: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        CALLS[stage] = CALLS.get(stage, 0) + 1
        if _is_time(self.die_at, stage):
            os.kill(os.getpid(), signal.SIGKILL)
        if _is_time(self.hang_at, stage):
            time.sleep(3600)
        if _is_time(self.notice_at, stage):
            os.kill(os.getpid(), signal.SIGTERM)
            # The main thread, which Python's handlers run on, wakes up when Ray asks it for news.
            surveillance.terminated.wait(60)
        if self.pause and not Path(self.pause_until).exists():
            time.sleep(self.pause)
        if self.record is not None:
            self._note(self.record, stage, batch["seed"].tolist())
        return term_weights(batch, stage)

    @staticmethod
    def _note(folder: str, stage: int, seeds: list[int]) -> None:
        Path(folder).mkdir(exist_ok=True)
        # Names of processes in the order of their starts: what one of them began, the next one goes on with.
        started = int(psutil.Process().create_time() * 1000)
        name = f"{stage}-{started}-{dist.get_rank()}-{os.getpid()}-{os.environ['MASTER_PORT']}"
        with (Path(folder) / name).open("a") as stream:
            stream.write(json.dumps(seeds) + "\n")

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        return {"query_variance": 1.0}

    def pictures(self, model: nn.Module, stage: int) -> dict[str, Image.Image]:
        return {"toy": Image.new("RGB", (8, 8))}


def _is_time(fault: tuple[int, int, str] | None, stage: int) -> bool:
    """Whether a fault is due; once."""
    number, step, mark = fault or (0, 0, "")
    if (stage, CALLS[stage]) != (number, step) or dist.get_rank() != 1 or Path(mark).exists():
        return False
    Path(mark).touch()
    return True


def processes(folder: Path, stream: StageStream, rank: int) -> list[list[int]]:
    """The positions that each process of a rank trained on, in the order of their starts (see `ToyTask.record`)."""
    return [_positions(file, stream) for file in sorted(folder.glob(f"{stream.stage}-*-{rank}-*"))]


def _positions(file: Path, stream: StageStream) -> list[int]:
    """The positions whose samples' seeds a process noted."""
    positions = np.arange(stream.steps * stream.global_batch)
    place = {seed: number for number, seed in enumerate(stream.mixture()[0].rows(positions).seed.tolist())}
    return [place[seed] for line in file.read_text().splitlines() for seed in json.loads(line)]


def groups(folder: Path, stream: StageStream) -> list[list[list[int]]]:
    """The positions that each rank of each group of workers trained on, in the order of the groups' starts."""
    known: dict[str, list[list[int]]] = {}
    for file in sorted(folder.glob(f"{stream.stage}-*")):
        known.setdefault(file.name.rpartition("-")[2], []).append(_positions(file, stream))
    return list(known.values())


def consumed(folder: Path, stream: StageStream, rank: int) -> list[int]:
    """The positions that made the weights: what a process did behind its last checkpoint is done again."""
    order: list[int] = []
    for some in processes(folder, stream, rank):
        order = [position for position in order if position < some[0]] + some
    return order


def toy_arrays(rows: int, seed: int, weight: float | None = None) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 2, rows) if weight is None else np.full(rows, weight)
    return {
        "x": rng.standard_normal((rows, WIDTH)).astype(np.float32),
        "y": rng.standard_normal((rows, WIDTH)).astype(np.float16),
        "diffusion_weight": weights.astype(np.float32),
    }


def write_manifest(folder: Path, shards: tuple[Shard, ...]) -> None:
    """The last file of a prepared dataset."""
    plan = {"source": hashlib.sha256(str(shards).encode()).hexdigest()}
    manifest = ShardManifest(dataset=folder.name, plan=plan, encoders="", shards=shards, quarantined=0)
    Store.at(folder).write(MANIFEST_NAME, manifest.to_json().encode())


def prepare_toy(folder: Path, shards: tuple[int, ...] = (24, 24, 16), weight: float | None = None) -> Path:
    """A prepared dataset of toy rows."""
    folder.mkdir(parents=True)
    written = []
    for number, rows in enumerate(shards):
        table = pa.table({"key": [f"{folder.name}-{number}-{row}" for row in range(rows)]})
        table = add_features(table, toy_arrays(rows, number + 100 * len(folder.name), weight))
        written.append(write_shard(table, Store.at(folder), f"shard-{number:05d}"))
    write_manifest(folder, tuple(written))
    return folder


class FailingEncoder:
    """An encoder that meets something wrong."""

    fingerprint = ""

    def __call__(self, table: Table) -> Table:
        raise InsightEditError("the encoder says what is wrong")


def toy_config(stages: dict[int, dict[str, Any]], datasets: tuple[str, ...] = ("a",), **workers: Any) -> RunConfig:
    """A run of toy stages; each gives what differs."""
    plain = {"global_batch": 8, "micro_batch": 4, "learning_rate": 1e-2, "warmup": 0.0, "log_every": 2}
    return RunConfig(
        name="toy",
        seed=3,
        model=ModelConfig(sources=SourcesConfig(diffusion="none", image_encoder="none", mllm="none")),
        data=DataConfig(datasets={name: DatasetConfig(reader="toy") for name in datasets}, shuffle_shards=2),
        stages={
            number: StageConfig.model_validate(
                {
                    "datasets": dict.fromkeys(datasets, 1.0),
                    "losses": dict.fromkeys(STAGES[number].losses, 1.0),
                    **plain,
                    **settings,
                }
            )
            for number, settings in stages.items()
        },
        workers=WorkersConfig(steps_per_block=2, **workers),
    )


class ToyEncoder:
    """An encoder that computes a feature from each row's key."""

    fingerprint = "toy"

    def __call__(self, table: Table) -> Table:
        lengths = [float(sum(key.encode())) for key in table.column("key").to_pylist()]
        return add_features(table, {"key_sum": np.array(lengths, np.float32)})
