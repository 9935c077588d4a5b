"""`insightedit data construct`: pictures become pairs with instructions, a report, and shards to train on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from insightedit.jobs.prepare import PreparedDataset, prepare
from insightedit.platform.cluster import connected
from insightedit.platform.config import DataConfig, DatasetConfig, RunConfig, preset_names
from insightedit.platform.construction import pipeline
from insightedit.platform.construction.counts import Counts
from insightedit.platform.construction.output import PATTERN
from insightedit.platform.construction.report import REPORT, note_run, write_report
from insightedit.platform.workdir import Workdir

ANSWERS: Final = "answers"
"""The folder of a work folder with what language models answered."""
DATASET: Final = "constructed"
"""What configs call the result."""
SHARDS: Final = "shards"
"""Folder of the shards in the output."""
TRAIN: Final = "train.yaml"
"""A config that trains on the result."""

Progress = Callable[[str, int, int, str], None]
"""Is told a phase, how much of it is done of how much, and a remark."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constructed:
    """What a construction gave."""

    folder: Path
    """AdvancedEdit's own layout, with a report and shards."""
    report: Path
    counts: Counts
    shards: PreparedDataset | None
    """None where no pair was kept."""


def construct(
    config: RunConfig, out: Path, workdir: Workdir, *, base: str = "nano", progress: Progress | None = None
) -> Constructed:
    """Construct a dataset, or go on where an earlier call stopped.

    Args:
        config: its `construction` says from what and how, its `data` how shards are made.
        out: the folder of the dataset.
        workdir: keeps what language models answered.
        base: the config's name or file, which the one to train with extends.
        progress: is told how far it is.

    Raises:
        UsageError: the folder holds something else, or a step cannot begin.
        NotFoundError: the pictures, a model or annotations are not there.
        InsightEditError: a step failed.
    """
    tell = progress or (lambda *_: None)
    work = pipeline.Construction(config.construction, out, workdir.root / ANSWERS)
    with connected():
        _run(work, tell)
        tell("Report", 0, 1, "")
        work.store.child(pipeline.WORK).delete()
        counts = write_report(out, config.construction)
        shards = None
        if counts.kept:
            shards = prepare(shard_config(config, out), workdir)[DATASET]
            _write_train_config(config, out, base)
    return Constructed(folder=out, report=out / REPORT / "report.html", counts=counts, shards=shards)


def shard_config(config: RunConfig, out: Path) -> RunConfig:
    """The config whose one dataset is what was constructed."""
    dataset = DatasetConfig(reader="advancededit", options={"root": str(out), "pattern": PATTERN})
    data = config.data.model_dump() | {"datasets": {DATASET: dataset}, "store": str(out / SHARDS), "validation": None}
    return config.model_copy(update={"data": DataConfig.model_validate(data)})


def _run(work: pipeline.Construction, tell: Progress) -> None:
    """Construct, with the time written down after every block: a run may be killed."""
    began, before = time.perf_counter(), -1
    for at in pipeline.construct(work):
        if before >= 0:
            note_run(work.out, time.perf_counter() - began, at.blocks - before)
            began = time.perf_counter()
        before = at.blocks
        tell("Construct", at.blocks, at.total, f"{at.pairs} pairs of {at.photos} pictures")


def _write_train_config(config: RunConfig, out: Path, base: str) -> None:
    """A config whose stages 2 and 3 train on what was constructed; its shards are at hand."""
    options = {"root": str(out), "pattern": PATTERN}
    # What is extended is laid under: its datasets have to be taken away.
    stages = {
        number: {"datasets": {**dict.fromkeys(stage.datasets), DATASET: 1}}
        for number, stage in config.stages.items()
        if number > 1
    }
    content = {
        "extends": base if base in preset_names() else str(Path(base).absolute()),
        "name": out.name,
        "data": {"store": str(out / SHARDS), "datasets": {DATASET: {"reader": "advancededit", "options": options}}},
        "stages": stages,
    }
    (out / TRAIN).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
