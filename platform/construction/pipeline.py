"""The steps as one Ray Data job: a pool of processes for each, blocks of pictures that flow through them.

A folder is resumable at any moment. `PLAN.json` comes first and says what it is made from. Each step puts down what it
made of a block, whole, before the next one gets it; when a block is through, its pairs are written, then the file that
says so, and what the steps put down is deleted. A second run skips the blocks that are done, and in the others the
steps that are.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.exceptions import RayError

from insightedit.platform.blocks import ordered_blocks
from insightedit.platform.chat.config import EndpointConfig
from insightedit.platform.cluster import cause_of
from insightedit.platform.construction.config import ConstructionConfig, StepName
from insightedit.platform.construction.output import blocks_done, count_pairs, write_block
from insightedit.platform.construction.photos import Photo, Spent, from_rows, to_rows
from insightedit.platform.construction.sources import Block, blocks_of, fingerprint_of, read_block
from insightedit.platform.construction.steps import Step, make_step, step_names
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.ingest import TASK_CPUS
from insightedit.platform.shards import Table
from insightedit.platform.storage import Store

PLAN: Final = "PLAN.json"
WORK: Final = "work"
"""Folder of what steps made of blocks that are not through."""
VERSION: Final = 1
"""Raised whenever the same pictures and settings give other pairs."""
_QUIET: Final = {"pools", "read_tasks", "sample"}
"""Settings that the pairs do not depend on."""
_QUIET_ASKING: Final = {"endpoint", "api_key_env", "parallel", "timeout", "retries", "batch"}
"""The same of a language model."""


@dataclass(frozen=True, slots=True)
class Construction:
    """What is constructed, and where.

    Attributes:
        config: from what and how.
        out: the folder of the dataset; seen from every machine that takes part.
        answers: folder of what language models answered before.
    """

    config: ConstructionConfig
    out: Path
    answers: Path

    @property
    def store(self) -> Store:
        """The folder of the dataset."""
        return Store.at(self.out)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a construction is: blocks and pictures that are through, blocks there are, and pairs that were made."""

    blocks: int
    total: int
    photos: int
    pairs: int


def construct(work: Construction) -> Iterator[Progress]:
    """Construct a dataset, or go on where an earlier run stopped; yields after each block.

    Raises:
        UsageError: the folder holds something else, or pairs of other settings; or a step cannot begin.
        NotFoundError: the pictures are not there.
        InsightEditError: a step failed.
    """
    blocks = blocks_of(work.config)
    _begin(work, len(blocks))
    done = blocks_done(work.store)
    missing = [block for block in blocks if block.number not in done]
    photos = pairs = 0
    yield Progress(len(done), len(blocks), photos, pairs)
    if not missing:
        return
    try:
        for count, row in enumerate(_pipeline(work, missing).iter_rows(), 1):
            photos, pairs = photos + row["photos"], pairs + row["pairs"]
            yield Progress(len(done) + count, len(blocks), photos, pairs)
    except RayError as error:
        raise InsightEditError(f"Construction failed: {cause_of(error)}") from error
    # Tasks of a run that was stopped may have outlived it, and left torn files since this one began.
    work.store.remove_torn()


def plan_of(config: ConstructionConfig, blocks: int) -> dict[str, Any]:
    """All that the pairs depend on, but for the weights of models."""
    settings = config.model_dump(mode="json", exclude=_QUIET)
    images: dict[str, Any] = settings.pop("images")
    return {
        "version": VERSION,
        "images": {name: images[name] for name in ("reader", "shorter_side")},
        "source": fingerprint_of(config.images),
        "blocks": blocks,
        **{name: _lasting(getattr(config, name), value) for name, value in settings.items()},
    }


def _lasting(field: object, value: Any) -> Any:
    """A setting without what its answers do not depend on."""
    if isinstance(field, EndpointConfig) or (isinstance(value, Mapping) and "local" in value):
        return {name: one for name, one in cast(Mapping[str, Any], value).items() if name not in _QUIET_ASKING}
    return value


def _begin(work: Construction, blocks: int) -> None:
    """Write the plan, or check the one that is there."""
    plan = plan_of(work.config, blocks)
    if work.store.sizes():
        try:
            before: dict[str, Any] = json.loads(work.store.read(PLAN))
        except (NotFoundError, ValueError):
            raise UsageError(f"{work.out} holds something else; name another folder with --out.") from None
        if before != plan:
            differing = next(key for key in {**before, **plan} if before.get(key) != plan.get(key))
            raise UsageError(
                f"{work.out} was constructed with other settings (construction.{differing} differs); name another"
                " folder with --out, or delete this one."
            )
    work.store.remove_torn()
    work.store.write(PLAN, json.dumps(plan, indent=1).encode())


def _pipeline(work: Construction, blocks: Sequence[Block]) -> Dataset:
    """A row about each block, as it is put down."""
    config = work.config
    makers = [functools.partial(_read, work, block) for block in blocks]
    dataset = ordered_blocks("construct", makers, tasks=config.read_tasks, cpus=TASK_CPUS)
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    for name in step_names(config):
        pool = config.pool(name)
        dataset = dataset.map_batches(
            Worker,
            fn_constructor_args=(name, work),
            compute=ActorPoolStrategy(size=pool.workers),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            **whole,
        )
    writing = TaskPoolStrategy(size=config.read_tasks)
    return dataset.map_batches(
        cast(Any, _commit), fn_kwargs={"work": work}, compute=writing, num_cpus=TASK_CPUS, **whole
    )


def _read(work: Construction, block: Block) -> Table:
    """The pictures of a block as rows."""
    photos = read_block(work.config.images, block)
    if not photos:
        raise InsightEditError(f"Block {block.number} has no pictures; look at construction.images.")
    return to_rows(block.number, photos)


class Worker:
    """A process of one step."""

    def __init__(self, name: StepName, work: Construction) -> None:
        self._name: StepName = name
        self._work = work
        self._store = work.store.child(WORK).child(name)
        _limit_threads(work.config.pool(name).threads)

    @functools.cached_property
    def _step(self) -> Step:
        """The step with its model; made when there is something to do, and where Ray does not log what goes wrong."""
        return make_step(self._name, self._work.config, self._work.answers)

    def __call__(self, table: Table) -> Table:
        """Do the step for a block, unless that was done before."""
        block, photos = from_rows(table)
        try:
            return _load(self._store.read(_work_file(block)))
        except NotFoundError:
            pass
        self._run([photo for photo in photos if not photo.out])
        made = to_rows(block, photos)
        self._store.write(_work_file(block), _dump(made))
        return made

    def _run(self, photos: Sequence[Photo]) -> None:
        """Run the step, and share what it took among the photos."""
        before, began = self._step.spent(), time.perf_counter()
        if photos:
            self._step.run(photos)
        taken = self._step.spent().plus(before, -1)
        seconds = time.perf_counter() - began
        for number, photo in enumerate(photos):
            own = taken if number == 0 else Spent()
            photo.spent[self._name] = own.model_copy(update={"seconds": seconds / len(photos)})


def _limit_threads(threads: int) -> None:
    """Give the libraries of this process so many threads; those that are not loaded read it when they are."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
        os.environ[name] = str(threads)


def _commit(table: Table, work: Construction) -> Table:
    """Put a block down; what the steps left of it is not needed any more."""
    block, photos = from_rows(table)
    sampled = max(work.config.sample - block * work.config.images_per_block, 0)
    write_block(work.store, block, photos, sampled)
    names = [f"{WORK}/{name}/{_work_file(block)}" for name in step_names(work.config)]
    work.store.remove(*names)
    pairs = count_pairs(photos).total()
    return pa.table({"block": [block], "photos": [len(photos)], "pairs": [pairs]})


def _work_file(block: int) -> str:
    return f"{block:06d}.arrow"


def _dump(table: Table) -> memoryview:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def _load(data: bytes) -> Table:
    return pa.ipc.open_stream(pa.BufferReader(data)).read_all()
