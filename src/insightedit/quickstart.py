"""`insightedit quickstart`: the path from end to end, from images to an edit by the promoted model.

Each step is the call that the command of its own makes; nothing here is done in another way than there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from mlflow import MlflowClient

from insightedit.display import Display
from insightedit.jobs.evaluate import EditorPool, EvaluationResult, evaluate, evaluate_quickly
from insightedit.jobs.latency import measure_latency
from insightedit.jobs.prepare import prepare
from insightedit.jobs.promote import promote
from insightedit.jobs.train import TrainingResult, Watchers, export_untrained, train
from insightedit.platform.cluster import connected
from insightedit.platform.config import RunConfig
from insightedit.platform.errors import GateRefusedError, InsightEditError, UsageError
from insightedit.platform.evaluation import EditCase, Figures, least_scenes
from insightedit.platform.evaluation_runs import SHEET_ROWS
from insightedit.platform.model_cards import keep_card
from insightedit.platform.records import encode_png
from insightedit.platform.registry import CHAMPION, ModelVersion, Registry
from insightedit.platform.reports import Curve, Report, sheet_rows, write_report, write_sheet
from insightedit.platform.tracking import git_commit
from insightedit.platform.trainer import Progress
from insightedit.platform.workdir import Workdir
from insightedit.serve import deployment
from insightedit.serve.client import edit_over_http

STAGE_SCENES = 30
"""Scenes for the score before training and after each stage; the whole evaluation has all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedEdit:
    """One edit over HTTP, and the same edit by the same version in a process of its own."""

    status: int
    model_version: str
    seed: int
    seconds: float
    sha256: str
    sha256_local: str
    identical_to_local: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Quickstart:
    """What a quickstart leaves."""

    report: Mapping[str, Any]
    """The content of `report.json`."""
    report_json: Path
    report_html: Path
    url: str | None
    """Where the server answers that it left up."""
    next_commands: Sequence[str]
    """What to type next."""


def quickstart(workdir: Workdir, config: RunConfig, *, once: bool = False, port: int | None = None) -> Quickstart:
    """Go the whole path: prepare, train three stages, evaluate, register, promote, serve, edit, compare, report.

    Args:
        workdir: where everything goes.
        config: what to train and how to judge it.
        once: end after one served edit instead of leaving the server up.
        port: where to listen; 8000 without it, or any free one with `once`.

    Raises:
        UsageError: the port is taken, or the work folder holds data prepared with other settings.
        GateRefusedError: the first model is no better than copying its source.
        InsightEditError: a step failed.
    """
    began = time.perf_counter()
    _quiet_libraries()
    port = (0 if once else deployment.DEFAULT_PORT) if port is None else port
    old_server = deployment.status(workdir)
    if old_server.url is None:
        _check_port(port)
    with Display() as display:
        with connected():
            _prepare(config, workdir, display)
            prepared = time.perf_counter()
            training = _train(config, workdir, display)
            trained = time.perf_counter()
            with EditorPool(config) as editor:
                display.at("Evaluation")
                judged = _evaluate(config, workdir, training, editor, display)
                version = _register(config, workdir, training, judged.result)
            _promote(config, workdir, version, display)
        evaluated = time.perf_counter()
        if old_server.url is not None:
            display.say(f"The server of version {old_server.model_version} at {old_server.url} gives way to a new one.")
            deployment.down(workdir)
        keep = not once or old_server.url is not None
        case = judged.result.judged[1].case
        served, url = _serve(workdir, training.name, case, port, display, keep=keep)
    ended = time.perf_counter()
    seconds = {
        "data": prepared - began,
        "train": trained - prepared,
        "evaluate": evaluated - trained,
        "serve": ended - evaluated,
        "total": ended - began,
    }
    version = Registry(workdir).resolve(version.version)
    report = {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "stages": _stages(training, judged),
        "evaluation": judged.result.evaluation.to_json(),
        "model": {"name": version.name, "version": version.version, "aliases": list(version.aliases)},
        "served": asdict(served),
    }
    next_commands = _next_commands(workdir, url, version)
    page = _write_reports(workdir, config, training, judged, report, next_commands)
    return Quickstart(
        report=report,
        report_json=page.with_suffix(".json"),
        report_html=page,
        url=url,
        next_commands=next_commands,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """The whole evaluation, and the short ones before it."""

    result: EvaluationResult
    before: Figures
    after: Mapping[int, Figures]


def _prepare(config: RunConfig, workdir: Workdir, display: Display) -> None:
    def on_prepare(name: str, done: int, total: int) -> None:
        display.at("Data", done, total, f"{name}: {done} of {total} records")

    display.at("Data")
    datasets = prepare(config, workdir, progress=on_prepare)
    display.end(", ".join(f"{name}: {dataset.rows} records" for name, dataset in datasets.items()))
    reused = [name for name, dataset in datasets.items() if dataset.reused]
    if reused:
        display.say(f"Data prepared before with the same settings is used again: {', '.join(reused)}.")


def _train(config: RunConfig, workdir: Workdir, display: Display) -> TrainingResult:
    def on_train(at: Progress) -> None:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in at.losses.items())
        display.at(f"Stage {at.stage}", at.step, at.steps, f"step {at.step} of {at.steps}, {losses}")

    display.at("Workers", note=f"{config.workers.sizes[-1]} of them")
    return train(config, workdir, watchers=Watchers(train=on_train))


def _evaluate(
    config: RunConfig, workdir: Workdir, training: TrainingResult, editor: EditorPool, display: Display
) -> _Judged:
    """The score before training and after each stage on a few scenes, then the whole evaluation."""

    def telling(what: str) -> Callable[[int, int], None]:
        return lambda done, total: display.at("Evaluation", done, total, f"{what}, {done} of {total} edits")

    def score(folder: Path, what: str) -> Figures:
        return evaluate_quickly(folder, config, workdir, STAGE_SCENES, editor, telling(what))

    untrained = workdir.runs / training.name / "untrained"
    before = score(export_untrained(config, untrained), "before training")
    shutil.rmtree(untrained)
    last = max(training.stages)
    after = {number: score(stage.folder, f"after stage {number}") for number, stage in training.stages.items()}
    result = evaluate(
        training.stages[last].folder,
        config,
        workdir,
        editor=editor,
        parent_run=training.run_id,
        before_training=before,
        progress=telling("all scenes"),
    )
    return _Judged(result=result, before=before, after=after)


def _register(config: RunConfig, workdir: Workdir, training: TrainingResult, result: EvaluationResult) -> ModelVersion:
    tags = {
        **training.lineage(config),
        **result.evaluation.tags(),
        "evaluation.run": result.run_id,
        "preset": config.name,
        "git_commit": git_commit(),
    }
    registry = Registry(workdir)
    version = registry.register(training.folder, training.run_id, tags)
    keep_card(registry, version)
    return version


def _promote(config: RunConfig, workdir: Workdir, version: ModelVersion, display: Display) -> None:
    """Promote the version if it is better; a champion that is as good stays, and is served.

    Raises:
        GateRefusedError: it is refused and there is no champion.
    """
    display.at("Promotion", note=f"version {version.version}")
    try:
        promote(
            workdir,
            version.version,
            config.promotion,
            lambda one: evaluate(one, config, workdir),
            lambda folders: measure_latency(folders, config),
            scenes=least_scenes(config.evaluation),
        )
    except GateRefusedError as refusal:
        if Registry(workdir).find(CHAMPION) is None:
            raise
        display.say(f"{refusal} The champion stays and is served.")


def _serve(
    workdir: Workdir, run_name: str, case: EditCase, port: int, display: Display, *, keep: bool
) -> tuple[ServedEdit, str | None]:
    """Start the server, have one edit made, and have the same edit made here.

    Returns:
        The edit, and the server's address if it stays up.
    """
    display.at("Server", note="starting")
    server = deployment.up(workdir, CHAMPION, port)
    try:
        if server.url is None:
            raise InsightEditError(f"The server is {server.state}; see its log {server.log}.")
        display.end(f"version {server.model_version} at {server.url}")
        display.at("Edit", note=case.instruction)
        served = _compare(workdir, workdir.runs / run_name, server.url, case)
    except BaseException:
        deployment.down(workdir)
        raise
    if keep:
        return served, server.url
    deployment.down(workdir)
    return served, None


def _compare(workdir: Workdir, folder: Path, url: str, case: EditCase) -> ServedEdit:
    source, local = folder / "edit-source.png", folder / "edit-local.png"
    source.write_bytes(encode_png(case.source))
    answer = edit_over_http(url, source, case.instruction, seed=case.seed)
    (folder / "edit-served.png").write_bytes(answer.image)
    _edit_apart(workdir, source, case.instruction, local, answer.model_version, answer.seed)
    sha256, sha256_local = (hashlib.sha256(data).hexdigest() for data in (answer.image, local.read_bytes()))
    return ServedEdit(
        status=answer.status,
        model_version=answer.model_version,
        seed=answer.seed,
        seconds=round(answer.seconds, 3),
        sha256=sha256,
        sha256_local=sha256_local,
        identical_to_local=sha256 == sha256_local,
    )


def _edit_apart(workdir: Workdir, source: Path, instruction: str, out: Path, version: str, seed: int) -> None:
    """`insightedit edit` in a process of its own, which opens the registered version itself."""
    program = [sys.executable, "-c", "from insightedit.cli import main; main()"]
    options = ["--workdir", str(workdir.root), "--model", version, "--seed", str(seed), "--out", str(out)]
    command = [*program, "edit", *options, "--", str(source), instruction]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command line
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise InsightEditError(f"The same edit without the server failed: {lines[-1]}")


def _stages(training: TrainingResult, judged: _Judged) -> dict[str, Any]:
    """Of each stage, the first and last value of its losses, and the score after it."""
    return {
        str(number): {
            **{name: {"first": first, "last": stage.result.last[name]} for name, first in stage.result.first.items()},
            "viescore_after": judged.after[number].viescore,
        }
        for number, stage in training.stages.items()
    }


def _write_reports(
    workdir: Workdir,
    config: RunConfig,
    training: TrainingResult,
    judged: _Judged,
    report: Mapping[str, Any],
    next_commands: Sequence[str],
) -> Path:
    """Write report and sheet to the run's folder, copy them to the work folder, and return the page there."""
    folder = workdir.runs / training.name
    evaluation, served, seconds = judged.result.evaluation, report["served"], report["seconds"]
    rows = sheet_rows(judged.result.judged, SHEET_ROWS)
    identical = "the same bits without the server" if served["identical_to_local"] else "NOT the bits made locally"
    page = Report(
        title=f"{config.name}: from images to a served edit",
        summary=[
            (f"{evaluation.overall.viescore:.3f}", "VIEScore", f"{evaluation.scenes} held-out scenes"),
            (f"{evaluation.overall.instruction:.2f}", "instruction, S_i", "of 5"),
            (f"{evaluation.overall.non_overedit:.2f}", "non-overedit, S_n", "of 5"),
            (f"{seconds['total'] / 60:.1f} min", "in all", f"{seconds['train'] / 60:.1f} min of it training"),
            (f"{served['seconds']:.1f} s", "the served edit", identical),
        ],
        curves=_curves(workdir, training, judged),
        evaluation=evaluation,
        sheet=rows,
        facts={
            "run": training.name,
            "model version": f"{report['model']['version']} ({', '.join(report['model']['aliases']) or 'no alias'})",
            "served version": served["model_version"],
            "commit": git_commit() or "not a checkout",
            "config": config.fingerprint(3),
            **{f"dataset {name}": dataset.fingerprint for name, dataset in training.datasets.items()},
            **{f"next {number}": command for number, command in enumerate(next_commands, 1)},
        },
    )
    write_report(folder / "report.html", page)
    write_sheet(folder / "sheet.png", rows)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in ("report.html", "sheet.png", "report.json"):
        shutil.copyfile(folder / name, workdir.root / name)
    return workdir.root / "report.html"


def _curves(workdir: Workdir, training: TrainingResult, judged: _Judged) -> dict[str, list[Curve]]:
    """The curves of every stage's losses, as MLflow keeps them."""
    client = MlflowClient(workdir.tracking_uri)
    result: dict[str, list[Curve]] = {}
    for number, stage in training.stages.items():
        heading = f"Stage {number}: VIEScore {judged.after[number].viescore:.3f} after {stage.result.steps} steps"
        result[heading] = [_curve(client, stage.run_id, name) for name in stage.result.first]
    return result


def _curve(client: MlflowClient, run_id: str, name: str) -> Curve:
    points = sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))
    return Curve(name=name, steps=[step for step, _ in points], values=[value for _, value in points])


def _next_commands(workdir: Workdir, url: str | None, version: ModelVersion) -> list[str]:
    own = f" --workdir {workdir.root}"
    commands = [f"insightedit models list{own}", f"insightedit models show {version.version}{own}"]
    if url is None:
        return [f"insightedit serve up{own}", *commands]
    edit = f'insightedit edit IMAGE "INSTRUCTION" --server {url} --out edit.png'
    return [f"open {url}", edit, *commands, f"insightedit serve down{own}"]


def _check_port(port: int) -> None:
    """Find a taken port now and not after the training."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if port and probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UsageError(f"Port {port} is taken; choose another one with --port, or 0 for any free one.")


def _quiet_libraries() -> None:
    """There is one progress display, and it is ours."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
