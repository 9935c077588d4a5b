"""Versions with an evaluation that nobody had to run: tables of cases, kept where `evaluate` keeps them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from insightedit.platform.registry import Registry
from insightedit.platform.results import RESULTS_FILE, CaseResult, write_results
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

TASKS = ("remove", "add", "replace", "recolour", "move")


def case_table(scores: Sequence[Sequence[float]], tasks: Sequence[str] = TASKS) -> list[CaseResult]:
    """A table with two cases a scene.

    Args:
        scores: the VIEScore of each scene's simple and advanced instruction; a negative one is of an edit that the
            judge could not judge.
        tasks: of the scenes in turn.
    """
    return [
        CaseResult(
            case=f"test-{scene:03d}-{wording}",
            scene=f"test-{scene:03d}",
            seed=scene,
            task=tasks[scene % len(tasks)],
            wording=wording,
            instruction="remove it",
            viescore=value if value >= 0 else None,
            failure="" if value >= 0 else "judge timeout: nothing came",
        )
        for scene, pair in enumerate(scores)
        for wording, value in zip(("simple", "advanced"), pair, strict=True)
    ]


def even_table(viescore: float, scenes: int = 40) -> list[CaseResult]:
    """The same score everywhere."""
    return case_table([(viescore, viescore)] * scenes)


def keep_evaluation(registry: Registry, workdir: Workdir, results: Sequence[CaseResult], cases: str) -> dict[str, str]:
    """Keep a table as `evaluate` does, and return the tags that a version with it has."""
    run_id = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id
    with tempfile.TemporaryDirectory() as folder:
        write_results(Path(folder) / RESULTS_FILE, results)
        registry.client.log_artifacts(run_id, folder)
    known = [one.viescore for one in results if one.viescore is not None]
    return {
        "viescore": f"{sum(known) / len(known):.6f}",
        "evaluation.cases": cases,
        "evaluation.scenes": str(len({one.scene for one in results})),
        "evaluation.run": run_id,
    }


def empty_pipeline(folder: Path) -> Path:
    """A folder with the form of a pipeline and no parts."""
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    return folder
