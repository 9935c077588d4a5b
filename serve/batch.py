"""`insightedit batch-edit`: many images and instructions through Ray Data, with the server's own engine.

An output folder is resumable at any moment. Its plan comes first and says what the edits' bytes depend on; each edit
appears whole, and then a note on it; the table of results comes last and replaces the notes. A second run does what no
note and no table says is done, and writes what the first would have written: an edit's seed follows from its key.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.exceptions import RayError

from insightedit.platform.capacity import Need, wait_for_room
from insightedit.platform.cluster import MIN_LOGICAL_CPUS, cause_of, connected
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.ingest import TASK_CPUS
from insightedit.platform.records import BadRowError
from insightedit.platform.registry import Registry
from insightedit.platform.shards import Table
from insightedit.platform.storage import Store
from insightedit.platform.workdir import Workdir
from insightedit.serve.batch_rows import BadEdit, BatchInput, WantedEdit, pictures
from insightedit.serve.batch_worker import NOTES, BatchEditor, BatchSettings, DoneEdit, wanted_from

RESULTS_NAME = "results.jsonl"
QUARANTINE_NAME = "quarantine.jsonl"
_PLAN = ".batch/plan.json"
_ROWS_READ = 256
"""Rows whose pictures one task reads, one after the other."""
_ROWS_EDITED = 8
"""Edits that a worker gets at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchWorkers:
    """The processes that edit, and what Ray sets aside for each."""

    count: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def need(self) -> list[Need]:
        """All that has to fit into the cluster at the same time."""
        editing = Need(what="--workers", count=self.count, cpus=self.cpus, gpus=self.gpus, place={})
        return [editing, Need(what="reading", count=1, cpus=TASK_CPUS, gpus=0, place={})]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """What a job is about to do."""

    input: BatchInput
    out: Store
    version: str
    folder: str
    """The version's verified pipeline folder."""
    settings: BatchSettings
    done: Mapping[str, DoneEdit]
    """What earlier runs have done of it, by request."""

    @property
    def todo(self) -> list[WantedEdit]:
        """What is left."""
        return [wanted for wanted in self.input.wanted if wanted.request not in self.done]

    @property
    def rows(self) -> int:
        """Of the input, good and bad."""
        return len(self.input.wanted) + len(self.input.bad)

    def summary(self) -> dict[str, Any]:
        """As a dry run shows it."""
        return {
            "out": str(self.out),
            "model_version": self.version,
            "rows": self.rows,
            "done": len(self.done),
            "to_edit": len(self.todo),
            "bad": [bad.row() for bad in self.input.bad],
            "settings": asdict(self.settings),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchResult:
    """What a job has done."""

    out: str
    results: str
    """The table of all edits."""
    model_version: str
    edited: int
    """In this run."""
    kept: int
    """Done before."""
    quarantined: int
    reasons: dict[str, int]
    quarantine: str | None
    """The list of bad rows."""
    seconds: float


Progress = Callable[[int, int, float | None], None]
"""Is told how many rows of how many are through, and the edits a second since the first one, once there are two."""


def plan_batch(
    workdir: Workdir, asked: BatchInput, out: Store, model: str = "champion", settings: BatchSettings | None = None
) -> BatchPlan:
    """Look at what is asked for and what is there; nothing is written.

    Args:
        workdir: whose registry has the model.
        asked: the edits.
        out: where they go.
        model: a version or an alias, resolved here and nowhere else.
        settings: what the edits' bytes depend on.

    Raises:
        NotFoundError: there is no such version.
        UsageError: `out` has edits that were made with other settings, or something else.
        InsightEditError: the version is damaged.
    """
    registry = Registry(workdir)
    version = registry.resolve(model)
    settings = settings or BatchSettings()
    sizes = out.sizes()
    _check_plan(out, sizes, _plan_content(version.version, settings))
    wanted = {row.request for row in asked.wanted}
    done = [edit for edit in _done_before(out, sizes) if edit.request in wanted]
    return BatchPlan(
        input=asked,
        out=out,
        version=version.version,
        folder=str(registry.fetch(version)),
        settings=settings,
        done={edit.request: edit for edit in done},
    )


def run_batch(
    plan: BatchPlan, workers: BatchWorkers, quarantine_limit: float = 0.01, progress: Progress | None = None
) -> BatchResult:
    """Do what is left of a plan.

    Args:
        plan: from `plan_batch`.
        workers: who edits.
        quarantine_limit: share of bad rows above which the job stops.
        progress: is told how far it is.

    Raises:
        NoRoomError: the cluster is too small for the workers.
        InsightEditError: too many rows are bad, or the work failed.
    """
    began = time.perf_counter()
    run = _Run(plan, quarantine_limit, progress)
    try:
        run.start()
        if plan.todo:
            with connected(cpus=max(MIN_LOGICAL_CPUS, math.ceil(workers.count * workers.cpus) + 1)):
                wait_for_room([workers.need()])
                run.follow(_outcomes(plan, workers))
    except RayError as error:
        raise InsightEditError(f"Editing failed: {cause_of(error)}") from error
    finally:
        run.list_bad()
    return run.finish(time.perf_counter() - began)


class _Run:
    """One run of a plan, as the process that started it sees it."""

    def __init__(self, plan: BatchPlan, limit: float, progress: Progress | None) -> None:
        self._plan = plan
        self._limit = limit
        self._progress = progress
        self._bad = list(plan.input.bad)
        self._edited: list[DoneEdit] = []

    def start(self) -> None:
        """Say what the folder is for, before anything is in it."""
        plan = self._plan
        plan.out.remove_torn()
        plan.out.write(_PLAN, json.dumps(_plan_content(plan.version, plan.settings), indent=1).encode())
        self._check_limit()

    def follow(self, outcomes: Iterator[DoneEdit | BadEdit]) -> None:
        """Take in what becomes of each row.

        Raises:
            InsightEditError: too many are bad.
        """
        first: float | None = None
        self._tell(None)
        for outcome in outcomes:
            if isinstance(outcome, BadEdit):
                self._bad.append(outcome)
                self._check_limit()
            else:
                self._edited.append(outcome)
            # Until then, workers were starting.
            first = first or time.monotonic()
            passed = time.monotonic() - first
            self._tell((len(self._edited) - 1) / passed if passed > 0 else None)

    def _tell(self, rate: float | None) -> None:
        if self._progress is not None:
            through = len(self._plan.done) + len(self._edited) + len(self._bad)
            self._progress(through, self._plan.rows, rate)

    def _check_limit(self) -> None:
        if len(self._bad) > self._limit * self._plan.rows:
            first = self._bad[0]
            raise InsightEditError(
                f"{len(self._bad)} of {self._plan.rows} rows are bad, more than --quarantine-limit {self._limit:g}"
                f" allows; {QUARANTINE_NAME} in {self._plan.out} lists them, and the first is {first.key}:"
                f" {first.detail}"
            )

    def list_bad(self) -> None:
        """Write the list of bad rows, in place of an earlier run's."""
        if self._bad:
            lines = "".join(f"{json.dumps(bad.row())}\n" for bad in self._bad)
            self._plan.out.write(QUARANTINE_NAME, lines.encode())
        else:
            self._plan.out.remove(QUARANTINE_NAME)

    def finish(self, seconds: float) -> BatchResult:
        """Put the table of results in the notes' place."""
        out = self._plan.out
        by_request = {**self._plan.done, **{edit.request: edit for edit in self._edited}}
        rows = [by_request[wanted.request] for wanted in self._plan.input.wanted if wanted.request in by_request]
        out.write(RESULTS_NAME, "".join(f"{json.dumps(row.row())}\n" for row in rows).encode())
        out.child(NOTES).delete()
        return BatchResult(
            out=str(out),
            results=f"{out}/{RESULTS_NAME}",
            model_version=self._plan.version,
            edited=len(self._edited),
            kept=len(self._plan.done),
            quarantined=len(self._bad),
            reasons=dict(Counter(bad.reason for bad in self._bad)),
            quarantine=f"{out}/{QUARANTINE_NAME}" if self._bad else None,
            seconds=round(seconds, 3),
        )


# -- what is there already --------------------------------------------------------------------------------------------


def _plan_content(version: str, settings: BatchSettings) -> dict[str, Any]:
    return {"model_version": version, **asdict(settings)}


def _check_plan(out: Store, sizes: Mapping[str, int], content: Mapping[str, Any]) -> None:
    """Refuse a folder whose edits would not go together with those to come.

    Raises:
        UsageError: they were made with other settings, or the folder holds something else.
    """
    if not sizes:
        return
    if _PLAN not in sizes:
        raise UsageError(f"--out {out} holds something else than edits of batch-edit; name another folder.")
    before: dict[str, Any] = json.loads(out.read(_PLAN))
    if differing := [name for name, value in content.items() if before.get(name) != value]:
        name = differing[0]
        raise UsageError(
            f"--out {out} has edits made with another {name} ({before.get(name)}, now {content[name]}); name another"
            " folder, or give the same settings."
        )


def _done_before(out: Store, sizes: Mapping[str, int]) -> list[DoneEdit]:
    """The edits that are there, by the table of results and by later notes."""
    lines = out.read(RESULTS_NAME).splitlines() if RESULTS_NAME in sizes else []
    notes = [name for name in sizes if name.startswith(f"{NOTES}/")]
    with ThreadPoolExecutor(16) as readers:
        lines += list(readers.map(out.read, notes))
    edits = [DoneEdit(**json.loads(line)) for line in lines]
    last = {edit.file: edit for edit in edits}
    return [edit for edit in last.values() if sizes.get(edit.file) == edit.size]


# -- the work ---------------------------------------------------------------------------------------------------------


def _outcomes(plan: BatchPlan, workers: BatchWorkers) -> Iterator[DoneEdit | BadEdit]:
    """What becomes of each row that is left, as it is known."""
    for row in _pipeline(plan, workers).iter_rows():
        fields = json.loads(row["outcome"])
        yield BadEdit(**fields) if "reason" in fields else DoneEdit(**fields)


def _pipeline(plan: BatchPlan, workers: BatchWorkers) -> Dataset:
    """Read pictures ahead of the edits, and edit."""
    todo = plan.todo
    chunks = [todo[start : start + _ROWS_READ] for start in range(0, len(todo), _ROWS_READ)]
    items = [{"rows": json.dumps([asdict(wanted) for wanted in chunk])} for chunk in chunks]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    context = dataset.context
    # Each picture is a block of its own: a worker takes the next few whatever task has read them.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    dataset = dataset.map_batches(
        cast(Any, _read),
        fn_kwargs={"store": plan.input.store},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
        compute=TaskPoolStrategy(size=min(workers.count, len(items))),
    )
    return dataset.map_batches(
        BatchEditor,
        fn_constructor_args=(plan.folder, plan.version, plan.settings, plan.out),
        batch_size=_ROWS_EDITED,
        batch_format="pyarrow",
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        compute=ActorPoolStrategy(size=workers.count),
    )


def _read(chunk: Table, store: Store) -> Iterator[Table]:
    """The pictures of a chunk's rows, or why there is none."""
    wanted = [wanted_from(fields) for fields in json.loads(chunk.column("rows")[0].as_py())]
    for edit, picture in zip(wanted, pictures(store, wanted), strict=True):
        bad = isinstance(picture, BadRowError)
        reason, detail = (picture.reason, str(picture)) if bad else ("", "")
        yield pa.table(
            {
                "wanted": [json.dumps(asdict(edit))],
                "picture": pa.array([None if bad else picture], pa.large_binary()),
                "reason": [reason],
                "detail": [detail],
            }
        )
