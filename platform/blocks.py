"""Ray Data datasets whose blocks are made one by one, stay whole, and keep their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data
from ray.data import Dataset, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from insightedit.platform.shards import Table

MakeBlock = Callable[[], Table]


class _Blocks(Datasource):
    """A read task for each block."""

    def __init__(self, name: str, makers: Sequence[MakeBlock], rows: int | None) -> None:
        super().__init__()
        self._name = name
        self._makers = makers
        self._rows = rows

    def get_name(self) -> str:
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=self._rows, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Only(make), metadata) for make in self._makers]


class _Only:
    """A read task's function: it gives one block."""

    def __init__(self, make: MakeBlock) -> None:
        self._make = make

    def __call__(self) -> Iterator[Any]:
        yield self._make()


def ordered_blocks(
    name: str, makers: Sequence[MakeBlock], *, tasks: int, cpus: float, rows: int | None = None
) -> Dataset:
    """A dataset of one block from each function, in their order, each whole, whatever its size.

    Args:
        name: of the dataset's operator, for people.
        makers: picklable functions; each runs in a task.
        tasks: tasks at a time.
        cpus: CPUs that Ray sets aside for each task.
        rows: of a block, where it is known.
    """
    dataset = ray.data.read_datasource(
        _Blocks(name, makers, rows),
        override_num_blocks=len(makers),
        concurrency=max(min(tasks, len(makers)), 1),
        num_cpus=cpus,
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return dataset
