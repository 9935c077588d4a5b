"""What is kept of an evaluation: an MLflow run with its figures, its tables and pictures, and the page for people."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from insightedit.platform.errors import InsightEditError
from insightedit.platform.evaluation import Evaluation, JudgedEdit, case_results, write_cases
from insightedit.platform.evaluation_report import Baseline, EvaluationPage, shown_cases, write_evaluation_report
from insightedit.platform.records import decode_image
from insightedit.platform.registry import CHAMPION, ModelVersion, Registry
from insightedit.platform.reports import sheet_rows, write_sheet
from insightedit.platform.results import RESULTS_FILE, read_results, write_results
from insightedit.platform.tracking import ensure_experiment, environment_tags, git_commit
from insightedit.platform.workdir import Workdir

SHEET_ROWS: Final = 20
CASES_FILE: Final = "cases.parquet"
REPORT_FILE: Final = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptEvaluation:
    """Where an evaluation is."""

    run_id: str
    report: Path
    """The page, also an artifact of the run."""


def keep_evaluation(
    registry: Registry,
    workdir: Workdir,
    model: Path | ModelVersion,
    evaluation: Evaluation,
    judged: Sequence[JudgedEdit],
    parent_run: str | None = None,
) -> KeptEvaluation:
    """Keep an evaluation as a run of MLflow with metrics and files, and as a page in the work folder.

    Args:
        registry: whose MLflow it is, and whose champion is compared with.
        workdir: where the page goes.
        model: what was evaluated.
        evaluation: its figures.
        judged: every case.
        parent_run: the run that made the model.
    """
    name = f"version {model.version}" if isinstance(model, ModelVersion) else model.name
    client = registry.client
    tags = environment_tags() | {"evaluation.cases": evaluation.cases}
    if parent_run is not None:
        tags["mlflow.parentRunId"] = parent_run
    run = client.create_run(ensure_experiment(client, workdir), tags=tags, run_name=f"evaluate/{name}")
    run_id = run.info.run_id
    metrics = [Metric(key, value, run.info.start_time, 0) for key, value in evaluation.metrics().items()]
    client.log_batch(run_id, metrics=metrics)
    report = workdir.reports / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{run_id[:8]}.html"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "evaluation.json").write_text(json.dumps(evaluation.to_json(), indent=2) + "\n", encoding="utf-8")
        write_cases(folder / CASES_FILE, judged)
        write_results(folder / RESULTS_FILE, case_results(judged))
        write_sheet(folder / "sheet.png", sheet_rows(judged, SHEET_ROWS))
        _write_page(folder / REPORT_FILE, registry, model, name, evaluation, judged, run_id)
        client.log_artifacts(run_id, str(folder))
        report.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / REPORT_FILE, report)
    client.set_terminated(run_id)
    return KeptEvaluation(run_id=run_id, report=report)


def _write_page(
    path: Path,
    registry: Registry,
    model: Path | ModelVersion,
    name: str,
    evaluation: Evaluation,
    judged: Sequence[JudgedEdit],
    run_id: str,
) -> None:
    baseline = _champion(registry, model, evaluation, judged)
    page = EvaluationPage(
        name=name,
        evaluation=evaluation,
        judged=judged,
        champion=baseline if isinstance(baseline, Baseline) else None,
        without_champion=baseline if isinstance(baseline, str) else "",
        facts={
            "model": model.uri if isinstance(model, ModelVersion) else str(model),
            "MLflow run": run_id,
            "judge": evaluation.judge,
            "cases": evaluation.cases,
            "commit": git_commit() or "not a checkout",
        },
    )
    write_evaluation_report(path, page)


def _champion(
    registry: Registry, model: Path | ModelVersion, evaluation: Evaluation, judged: Sequence[JudgedEdit]
) -> Baseline | str:
    """The champion's evaluation of the same cases, or why there is none."""
    champion = registry.find(CHAMPION)
    if champion is None:
        return "There is no champion to compare with."
    if isinstance(model, ModelVersion) and champion.version == model.version:
        return "This is the champion itself."
    name, run = f"version {champion.version}", champion.tags.get("evaluation.run")
    if run is None or champion.tags.get("evaluation.cases") != evaluation.cases:
        return (
            f"The champion, {name}, was not judged on these cases: run `insightedit evaluate {champion.version}` with"
            " the same settings and then this evaluation again to see what changed."
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = read_results(Path(registry.client.download_artifacts(run, RESULTS_FILE, folder)))
            by_case = {result.case: result for result in results}
            cases = Path(registry.client.download_artifacts(run, CASES_FILE, folder))
            return Baseline(name=name, results=by_case, edits=_edits(cases, shown_cases(judged, by_case)))
    except (MlflowException, OSError, InsightEditError):
        return f"What was kept of the champion's evaluation, run {run}, is gone: evaluate {name} again."


def _edits(path: Path, cases: Collection[str]) -> dict[str, NDArray[np.uint8]]:
    """The edits of some cases, out of the file of all."""
    table = pq.read_table(path, columns=["key", "edit"], filters=[("key", "in", list(cases))])
    return {row["key"]: decode_image(row["edit"]) for row in table.to_pylist()}
