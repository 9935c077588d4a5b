"""What an evaluation found out about each case, as one table: what gates decide on and reports are made of."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from insightedit.platform.errors import InsightEditError

RESULTS_FILE: Final = "results.parquet"
"""The artifact of an evaluation's run (a version's tag `evaluation.run`) that `write_results` wrote."""
SCORES: Final = ("instruction_adherence", "non_overediting", "naturalness", "no_artifacts")
"""The four scores of a judge, integers from 0 to 5."""
_METRIC: Final = "metric."
_OF_EVERY_JUDGE: Final = ("viescore", "instruction_adherence", "non_overediting")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """One row: one case, edited once. Nothing that is unknown is 0: it is None, which is null in the file.

    Two evaluations compare row by row where `case` and `seed` are the same; every version is given the same ones.
    Cases with the same `scene` share their source picture and noise, so they are no independent observations: whoever
    tests or resamples takes whole scenes.
    """

    case: str
    """Unique in the evaluation."""
    scene: str
    """The source picture's; the simple and the advanced instruction of one edit have the same."""
    seed: int
    """The noise's."""
    task: str
    """The kind of edit: `remove`, `add`, `replace`, or whatever the benchmark calls it."""
    wording: str
    """`simple` or `advanced`; empty where the benchmark does not say."""
    instruction: str
    instruction_adherence: int | None = None
    """S_i, 0 to 5; likewise the other three. A judge need not give all four."""
    non_overediting: int | None = None
    naturalness: int | None = None
    no_artifacts: int | None = None
    viescore: float | None = None
    """Equation 1, 0 to 1; None where the case failed."""
    explanations: Mapping[str, str] = field(default_factory=dict[str, str])
    """The judge's words by the name of the score that they explain."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """PSNR and the like by name; what could not be measured has no entry."""
    failure: str = ""
    """Why there is no score: one sentence, that begins with `edit` or `judge`. Empty for a case that was scored."""

    @property
    def unmade(self) -> bool:
        """Whether there is no edit to judge."""
        return self.failure.startswith("edit")


def counted(result: CaseResult, score: str) -> float | None:
    """A score of a case as it counts in means and comparisons.

    Whoever gives up on what is hard is no better than one that does it badly: where no edit was made, what every judge
    gives counts as 0. None where there is no telling.
    """
    if score in _OF_EVERY_JUDGE and result.unmade:
        return 0.0
    return getattr(result, score)


def write_results(path: Path, results: Iterable[CaseResult]) -> None:
    """Write the table as Parquet: a column for each field, and `metric.NAME` for each metric of any case."""
    rows = list(results)
    names = sorted({name for row in rows for name in row.metrics})
    columns: dict[str, Any] = {
        name: pa.array([_cell(getattr(row, name)) for row in rows], kind) for name, kind in _COLUMNS.items()
    }
    for name in names:
        columns[_METRIC + name] = pa.array([row.metrics.get(name) for row in rows], pa.float64())
    pq.write_table(pa.table(columns), path)


def read_results(path: Path) -> list[CaseResult]:
    """Read what `write_results` wrote.

    Raises:
        InsightEditError: the file is damaged, or no such table.
    """
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return [_result(row) for row in rows]
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise InsightEditError(f"{path} is no table of an evaluation ({error}): evaluate the version again.") from None


def load_results(client: MlflowClient, run_id: str) -> list[CaseResult] | None:
    """Read the table that an evaluation left with its run; None where it left none, or the run is gone.

    Raises:
        InsightEditError: the file is damaged.
        MlflowException: the registry does not answer, which is no proof that the table is not there.
    """
    try:
        kept: Sequence[Any] = client.list_artifacts(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if all(one.path != RESULTS_FILE for one in kept):
        return None
    with tempfile.TemporaryDirectory() as folder:
        # A folder of this machine is read where it is; an object store's file is fetched.
        return read_results(Path(client.download_artifacts(run_id, RESULTS_FILE, folder)))


def _cell(value: object) -> object:
    return list(value.items()) if isinstance(value, Mapping) else value


def _result(row: Mapping[str, Any]) -> CaseResult:
    own = {one.name: row[one.name] for one in fields(CaseResult) if one.name not in ("metrics", "explanations")}
    measured = {name.removeprefix(_METRIC): value for name, value in row.items() if name.startswith(_METRIC)}
    metrics = {name: float(value) for name, value in measured.items() if value is not None}
    return CaseResult(**own, metrics=metrics, explanations=dict(row["explanations"]))


_COLUMNS: Final[dict[str, Any]] = {
    "case": pa.string(),
    "scene": pa.string(),
    "seed": pa.int64(),
    "task": pa.string(),
    "wording": pa.string(),
    "instruction": pa.string(),
    **dict.fromkeys(SCORES, pa.int8()),
    "viescore": pa.float64(),
    "explanations": pa.map_(pa.string(), pa.string()),
    "failure": pa.string(),
}
