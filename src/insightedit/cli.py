"""The command line: parse, call, print.

Results go to stdout and the rest to stderr. What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from insightedit import (
    __version__,
    cli_batch,
    cli_cluster,
    cli_compare,
    cli_construct,
    cli_edit,
    cli_jobs,
    cli_keys,
    cli_models,
    cli_promote,
    cli_report,
)
from insightedit.console import (
    Group,
    Session,
    columns,
    config_option,
    dry_run_option,
    emit,
    emit_manifests,
    json_option,
    open_workdir,
    set_option,
    workdir_option,
)
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.workdir import Workdir

if TYPE_CHECKING:
    from insightedit.jobs.train import TrainingResult
    from insightedit.platform.config import RunConfig
    from insightedit.platform.evaluation import Evaluation
    from insightedit.platform.trainer import Progress
    from insightedit.quickstart import Quickstart

INTERRUPTED = 130
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment in which libraries keep to themselves what is of no use to whoever typed a command, and do not wait for
minutes for a registry that is down."""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="insightedit")
def cli() -> None:
    """Edit images by written instructions; train, keep and serve the model that does it."""


cli.params.append(workdir_option())


# -- everything at once ---------------------------------------------------------------------------------------------


@cli.command()
@click.option("--once", is_flag=True, help="End after one served edit instead of leaving the server up.")
@click.option("--port", type=click.IntRange(0, 65535), help="The server's: 8000 without it, 0 for any free one.")
@config_option
@set_option
@dry_run_option
@json_option
def quickstart(
    once: bool, port: int | None, config: str, overrides: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Go the whole path: data, three stages, evaluation, promotion, a server, an edit."""
    from insightedit.platform.config import load_preset

    run_config = load_preset(config, overrides)
    if dry_run:
        run_config.model_sources()
        emit(run_config, as_json, lambda: _show_plan(run_config, ()))
        return
    from insightedit.quickstart import quickstart as run_quickstart

    done = run_quickstart(open_workdir(), run_config, once=once, port=port)
    emit(done.report, as_json, lambda: _show_quickstart(done))


def _show_quickstart(done: Quickstart) -> Iterable[str]:
    evaluation, served, model = (done.report[name] for name in ("evaluation", "served", "model"))
    yield (
        f"VIEScore {evaluation['viescore']:.3f} on {evaluation['scenes']} held-out scenes"
        f" (source unchanged {evaluation['copy_baseline']['viescore']:.2f}):"
        f" S_i {evaluation['instruction']:.2f}, S_n {evaluation['non_overedit']:.2f}"
    )
    bits = "the same bits" if served["identical_to_local"] else "NOT the same bits"
    yield f"version {model['version']} trained, version {served['model_version']} served: {bits} as made locally"
    yield f"{done.report['seconds']['total']:.0f} s in all; {done.report_html}"
    yield "Next:"
    yield from (f"  {command}" for command in done.next_commands)


# -- this machine ---------------------------------------------------------------------------------------------------


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Look whether this machine has what a run stands on."""
    from insightedit.platform.doctor import examine

    findings = examine(open_workdir())

    def show() -> Iterable[str]:
        for finding in findings:
            yield f"{finding.verdict:<8} {finding.name}: {finding.found}"
            if finding.advice:
                yield f"{'':<9}{finding.advice}"

    emit(findings, as_json, show)
    failed = [finding.name for finding in findings if finding.verdict == "failed"]
    if failed:
        raise InsightEditError(f"Not ready for a run: {', '.join(failed)}; do what is said beside each.")


# -- data -----------------------------------------------------------------------------------------------------------


@cli.group()
def data() -> None:
    """Datasets: what can be read, and shards that training reads."""


@data.command("list")
@json_option
def data_list(as_json: bool) -> None:
    """Show the datasets that can be read, and what each needs."""
    from insightedit.platform.datasets import READERS

    found = [{"name": reader.name, "tasks": reader.tasks, "needs": reader.needs} for reader in READERS.values()]
    rows = [("DATASET", "TASKS", "NEEDS"), *((one.name, ", ".join(one.tasks), one.needs) for one in READERS.values())]
    emit(found, as_json, lambda: columns(rows))


@data.command("check")
@click.argument("name")
@click.argument("root", required=False, type=click.Path(path_type=Path))
@click.option(
    "--set", "settings", multiple=True, metavar="OPTION=VALUE", help="Give the dataset's reader an option; repeatable."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the contact sheet and the list of bad rows.  [default: checks/NAME in the work folder]",
)
@click.option("--tasks", type=click.IntRange(min=1), default=2, show_default=True, help="Tasks that read at a time.")
@json_option
def data_check(
    name: str, root: Path | None, settings: tuple[str, ...], out: Path | None, tasks: int, as_json: bool
) -> None:
    """Read the dataset NAME in the folder ROOT, and say what is in it and what cannot be used."""
    from insightedit.display import Display
    from insightedit.jobs.check import check
    from insightedit.platform.config import DatasetConfig, parse_setting

    options = dict(parse_setting(setting) for setting in settings)
    if root is not None:
        options["root"] = str(root.expanduser().absolute())
    folder = out or open_workdir().root / "checks" / name
    with Display() as display:
        found = check(
            DatasetConfig(reader=name, options=options),
            folder,
            tasks=tasks,
            progress=lambda rows, total: display.at(f"Check {name}", min(rows, total), total),
        )

    def show() -> Iterable[str]:
        by_task = ", ".join(f"{count} {task}" for task, count in found.tasks.items())
        yield f"{found.records} records" + (f": {by_task}" if by_task else "")
        yield f"{found.quarantined} quarantined"
        yield from (f"  {count} {reason}" for reason, count in found.reasons.items())
        yield from (f"{what}: {path}" for what, path in (("list", found.quarantine), ("sheet", found.sheet)) if path)

    emit(found, as_json, show)


@data.command("prepare")
@click.argument("config", default="nano")
@click.option("--rebuild", multiple=True, metavar="NAME", help="Delete this dataset's shards and make them again.")
@set_option
@dry_run_option
@json_option
def data_prepare(
    config: str, rebuild: tuple[str, ...], overrides: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Turn the datasets of a CONFIG into shards."""
    from insightedit.platform.config import load_preset

    run_config = load_preset(config, overrides)
    if dry_run:
        run_config.model_sources()
        emit(run_config.data, as_json, lambda: [f"Would prepare {', '.join(run_config.data.datasets)}."])
        return
    from insightedit.display import Display
    from insightedit.jobs.prepare import prepare

    with Display() as display:
        made = prepare(
            run_config,
            open_workdir(),
            rebuild=rebuild,
            progress=lambda name, done, total: display.at(f"Data {name}", done, total),
        )
    heading = ("DATASET", "ROWS", "QUARANTINED", "SECONDS", "")
    rows = [
        (name, str(one.rows), str(one.quarantined), f"{one.seconds:.1f}", "was there" if one.reused else "made")
        for name, one in made.items()
    ]
    emit(made, as_json, lambda: columns([heading, *rows]))


@data.command("feedback")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; new, or empty.")
@json_option
def data_feedback(out: Path, as_json: bool) -> None:
    """Write the edits that users of the server have accepted as a dataset that `pairs` reads."""
    from insightedit.serve.feedback import export_feedback

    done = export_feedback(open_workdir(), out)
    check = f"`insightedit data check pairs {done.folder}`"
    emit(done, as_json, lambda: [f"{done.pairs} accepted edits; {done.rejected} rejected ones stay out: {check}"])


data.add_command(cli_construct.construct)
data.add_command(cli_report.data_report)


# -- training -------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the steps and scenes, for a quick look.",
)
@dry_run_option
@json_option
def foundation(out: Path, seed: int, share: float, dry_run: bool, as_json: bool) -> None:
    """Train the nano preset's pretrained parts on single images and captions, and say how well each does."""
    from insightedit.jobs.foundation import FoundationRecipe, build_foundation

    recipe = replace(FoundationRecipe(), seed=seed).scaled(share)
    if dry_run:
        emit(recipe, as_json, lambda: [f"Would train on {recipe.scenes} scenes with seed {seed} into {out}."])
        return
    report = build_foundation(out, recipe, lambda line: click.echo(line, err=True))
    quality = report["quality"].items()
    emit(report, as_json, lambda: [f"{part}: {figures}" for part, figures in quality])


@cli.command()
@click.argument("config")
@click.option("--name", help="Of the run. The name of an earlier run goes on with it; without one the run is new.")
@click.option("--stage", "stages", type=click.IntRange(1, 3), multiple=True, help="Only this stage; repeatable.")
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.3,
    show_default=True,
    help="Share of workers.peak_tflops that a dry run takes for granted.",
)
@set_option
@dry_run_option
@json_option
def train(
    config: str,
    name: str | None,
    stages: tuple[int, ...],
    utilisation: float,
    overrides: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a CONFIG: a preset, or a file that extends one. What comes out is registered as the challenger."""
    from insightedit.platform.config import load_preset

    run_config = load_preset(config, overrides)
    if dry_run:
        _train_dry(run_config, stages, utilisation, as_json)
        return
    from insightedit.display import Display
    from insightedit.jobs.train import Watchers, train

    with Display() as display:

        def on_progress(at: Progress) -> None:
            losses = ", ".join(f"{loss} {value:.4f}" for loss, value in at.losses.items())
            pace = f"{at.samples_per_second:.3g} samples/s, goodput {at.goodput:.0%}"
            display.at(f"Stage {at.stage}", at.step, at.steps, f"{losses}; {pace}")

        watchers = Watchers(
            prepare=lambda what, done, total: display.at(f"Data {what}", done, total), train=on_progress
        )
        result = train(run_config, open_workdir(), name=name, stages=stages or None, watchers=watchers)
    version = _registered(result, run_config)
    report = {"run": result.name, "run_id": result.run_id, "folder": result.folder, "model_version": version}
    report |= {"stages": result.stages, "seconds": result.seconds}
    emit(report, as_json, lambda: _show_training(result, version))


def _train_dry(config: RunConfig, stages: Sequence[int], utilisation: float, as_json: bool) -> None:
    """Say what a training will cost, and fail where it cannot fit."""
    from insightedit.jobs.dry_run import check_fits, dry_run
    from insightedit.jobs.train import stage_numbers
    from insightedit.plans import show_dry_run

    planned = dry_run(config, stage_numbers(config, stages or None), utilisation)
    emit(planned, as_json, lambda: show_dry_run(planned))
    check_fits(planned)


def _registered(result: TrainingResult, config: RunConfig) -> str | None:
    """Register the model of a training that has gone through its last stage, once.

    Returns:
        The version's number; None where the last stage is still to come.
    """
    if max(result.stages) < max(config.stages):
        return None
    from insightedit.platform.model_cards import keep_card
    from insightedit.platform.registry import Registry
    from insightedit.platform.tracking import git_commit

    registry, lineage = Registry(open_workdir()), result.lineage(config)
    for version in registry.versions():
        if lineage.items() <= version.tags.items():
            return version.version
    tags = {**lineage, "preset": config.name, "git_commit": git_commit()}
    made = registry.register(result.folder, result.run_id, tags)
    keep_card(registry, made)
    return made.version


def _show_plan(config: RunConfig, stages: Sequence[int]) -> Iterable[str]:
    """A config as YAML, after comments on what would be done with it."""
    from insightedit.platform.config import dump_config

    workers = config.workers
    yield f"# would train stages {', '.join(map(str, stages or config.stages))} with {workers.shown} workers of"
    yield f"# {workers.cpus:g} CPUs and {workers.gpus:g} GPUs each"
    yield dump_config(config).rstrip()


def _show_training(result: TrainingResult, version: str | None) -> Iterable[str]:
    for number, stage in result.stages.items():
        losses = ", ".join(
            f"{loss} {first:.4g} -> {stage.result.last[loss]:.4g}" for loss, first in stage.result.first.items()
        )
        yield f"stage {number}: {stage.result.steps} steps, {losses}"
    yield f"run {result.name}, pipeline {result.folder}"
    if version is not None:
        yield f"version {version}: `insightedit evaluate {version}`, then `insightedit promote {version}`"


# -- on a cluster ---------------------------------------------------------------------------------------------------

for command in cli_cluster.COMMANDS:
    cli.add_command(command)


# -- model versions -------------------------------------------------------------------------------------------------


cli.add_command(cli_models.models)


# -- judging and deciding -------------------------------------------------------------------------------------------


@cli.command()
@click.argument("model", default="champion", metavar="[VERSION|FOLDER]")
@config_option
@set_option
@dry_run_option
@json_option
def evaluate(model: str, config: str, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Judge a model version, the champion unless given, or a pipeline folder, on scenes that no training has seen."""
    from insightedit.platform.config import load_preset
    from insightedit.platform.registry import Registry

    run_config = load_preset(config, overrides)
    folder = Path(model).expanduser().absolute()
    judged = folder if (folder / "model_index.json").is_file() else Registry(open_workdir()).resolve(model)
    named = str(judged) if isinstance(judged, Path) else f"version {judged.version}"
    if dry_run:
        from insightedit.platform.evaluation import least_scenes

        plan = {"model": named, "evaluation": run_config.evaluation}
        asked = run_config.evaluation
        scenes = asked.scenes or least_scenes(asked) or "all"
        emit(plan, as_json, lambda: [f"Would judge {named} on {scenes} scenes of {asked.benchmark.reader}."])
        return
    from insightedit.display import Display
    from insightedit.jobs.evaluate import evaluate as run_evaluation

    with Display() as display:
        result = run_evaluation(
            judged,
            run_config,
            open_workdir(),
            progress=lambda done, total: display.at("Evaluation", done, total, named),
            judging=lambda done, total: display.at("Judging", done, total, named),
        )
    report = result.evaluation.to_json() | {"model": named, "run": result.run_id, "report": result.report}
    emit(report, as_json, lambda: _show_evaluation(named, result.evaluation, result.report))


def _show_evaluation(named: str, evaluation: Evaluation, report: Path) -> Iterable[str]:
    groups = {"all": evaluation.overall, **evaluation.wordings()}
    groups |= {f"task {name}": figures for name, figures in evaluation.by_task.items()}
    groups |= {"source unchanged": evaluation.copy_baseline, "instructions shuffled": evaluation.shuffled}
    failed = f", {evaluation.overall.failed} edits not judged" if evaluation.overall.failed else ""
    failed += f", {evaluation.overall.unmade} edits not made" if evaluation.overall.unmade else ""
    yield f"{named} on {evaluation.scenes} scenes, judged by {evaluation.judge}{failed}"
    rows = [
        (name, str(one.edits), f"{one.viescore:.3f}", f"{one.instruction:.2f}", f"{one.non_overedit:.2f}")
        for name, one in groups.items()
    ]
    yield from columns([("", "EDITS", "VIESCORE", "S_I", "S_N"), *rows])
    yield ""
    means = [(name, str(one.edits), f"{one.mean:.4f}") for name, one in evaluation.measured.items()]
    yield from columns([("METRIC", "EDITS", "MEAN"), *means])
    yield from (f"{name} is missing. {reason}" for name, reason in evaluation.unmeasured.items())
    yield f"report: {report}"


cli.add_command(cli_promote.promote)
cli.add_command(cli_promote.rollback)


# -- serving --------------------------------------------------------------------------------------------------------


@cli.group()
def serve() -> None:
    """The server that edits images online."""


serve.add_command(cli_keys.keys)


def _show_server(status: Any) -> Iterable[str]:
    if status.url is None:
        yield "No server is up."
        return
    verb = {"planned": "would serve", "down": "served"}.get(status.state, "serves")
    yield f"{status.state}: {status.url} {verb} version {status.model_version} ({', '.join(status.aliases) or '-'})"
    if status.state == "up":
        yield f"{'answers' if status.ready else 'does not answer'}; process {status.pid}, log {status.log}"
    for one in status.fleet.deployments if status.fleet else ():
        replicas = f"{one.running} running, {one.starting} starting, {one.wanted} wanted"
        bounds = f"{one.min_replicas} to {one.max_replicas}"
        version = f" of version {one.version}" if one.version else ""
        yield f"  {one.name}{version}: {replicas} ({bounds}); {one.ongoing} in hand, {one.queued} waiting"
    if status.fleet and status.fleet.rollout:
        yield _show_rollout(status.fleet.rollout)


def _show_rollout(rollout: Any) -> str:
    state = rollout.state.replace("_", " ")
    seen = f"{rollout.answers} edits made, {rollout.failures} failed"
    if rollout.quality is not None:
        quality = f"quality {rollout.quality:.2f} and {rollout.old_quality:.2f}"
        seen += f", {quality} by version {rollout.old} on the same {rollout.pairs}"
    return f"  version {rollout.version}: {state}{f', {rollout.reason}' if rollout.reason else ''} ({seen})"


@serve.command("up")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--model", default="champion", show_default=True, metavar="VERSION", help="A number or an alias.")
@set_option
@click.option("--kube", is_flag=True, help="Start nothing; write a KubeRay RayService for `kubectl apply`.")
@click.option("--config", metavar="CONFIG", help="YAML of settings; with --kube, whose `kube` section is used.")
@click.option("--name", help="With --kube: of the RayService.  [default: insightedit]")
@click.option("--out", type=click.Path(path_type=Path), help="With --kube: file to write; stdout without it.")
@dry_run_option
@json_option
def serve_up(
    port: int,
    model: str,
    overrides: tuple[str, ...],
    kube: bool,
    config: str | None,
    dry_run: bool,
    as_json: bool,
    **kube_options: Any,
) -> None:
    """Start a server that goes on after this command, ready when it returns."""
    if kube:
        if port != 8000:
            raise UsageError("--port is for a server on this machine; a RayService's answers at port 8000.")
        emit_manifests([_ray_service(model, overrides, config, **kube_options)], kube_options["out"], as_json, dry_run)
        return
    if idle := [name for name, value in kube_options.items() if value is not None]:
        raise UsageError(f"--{idle[0]} is for a RayService; add --kube or leave it out.")
    from insightedit.serve import deployment

    settings = _serve_settings(overrides, config)
    if not dry_run:
        click.echo("Starting the server ...", err=True)
    status = deployment.up(open_workdir(), model, port, settings, dry_run=dry_run)
    emit(status, as_json, lambda: _show_server(status))


def _ray_service(
    model: str, overrides: Sequence[str], config: str | None, *, name: str | None, **_: Any
) -> dict[str, Any]:
    """A model version as a RayService; `--set kube...` changes the config, any other the server's settings."""
    from insightedit.platform.config import load_preset
    from insightedit.serve.kube import resolved, serving_manifest

    of_kube = [override for override in overrides if override.startswith("kube.")]
    settings = _serve_settings([override for override in overrides if override not in of_kube])
    version, aliases = resolved(open_workdir(), model)
    kube = load_preset(config or "nano", of_kube).kube
    return serving_manifest(kube, name or "insightedit", version, aliases, settings)


def _serve_settings(overrides: Sequence[str], config: str | None = None) -> Any:
    """The server's settings: those of a YAML file, with `section.key=value` laid over them."""
    from insightedit.serve.settings import read_settings

    return read_settings(Path(config) if config else None, overrides)


@serve.command("status")
@json_option
def serve_status(as_json: bool) -> None:
    """Say whether a server is up, where, and with which version."""
    from insightedit.serve import deployment

    status = deployment.status(open_workdir())
    emit(status, as_json, lambda: _show_server(status))


@serve.command("down")
@dry_run_option
@json_option
def serve_down(dry_run: bool, as_json: bool) -> None:
    """Stop the server, after the edits it has in hand."""
    from insightedit.serve import deployment

    status = deployment.status(open_workdir()) if dry_run else deployment.down(open_workdir())
    emit(status, as_json, lambda: _show_server(status))


cli.add_command(cli_compare.compare)
cli.add_command(cli_edit.edit)
cli.add_command(cli_jobs.edit_job)
cli.add_command(cli_batch.batch_edit)


# -- running it all -------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str] | None = None) -> int:  # noqa: PLR0911  (one for each way to end)
    """Run a command.

    Args:
        arguments: what stands after `insightedit`; the process's own without it.

    Returns:
        The exit code: 0, 1 failed, 2 wrong use, 3 a gate refused, 4 not found, 5 cluster not reached, 130 interrupted.
    """
    session = Session()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Loaded wherever a model is saved, it says on stdout, where results are printed, that there is no GPU.
    logging.getLogger("DeepSpeed").disabled = True
    try:
        result = cli.main(arguments, prog_name="insightedit", standalone_mode=False, obj=session)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("Interrupted.", INTERRUPTED)
    except InsightEditError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        return 1  # Whoever read the results has heard enough.
    except Exception as error:  # noqa: BLE001  (people get a sentence, whoever mends it the traceback)
        return _fail(_unexpected(error, session), 1)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    click.echo(f"Error: {message}", err=True)
    return code


def _unexpected(error: Exception, session: Session) -> str:
    """What to say of an error that is none of ours."""
    # MLflow has one class for everything; only its client says this.
    if type(error).__name__ == "MlflowException" and re.search(r"API request to \S+ failed with", str(error)):
        where = Workdir.open(session.folder).tracking_uri
        return f"The registry at {where} does not answer: see whether it is up, and run the command again."
    return f"{_one_line(error)} This is a fault of insightedit; details are in {_write_down(session)}."


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}." if text else f"{type(error).__name__}."


def _write_down(session: Session) -> Path:
    """Write the traceback being handled to the work folder's logs, or where that fails to a temporary folder."""
    try:
        folder = Workdir.open(session.folder).logs
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, InsightEditError):
        folder = Path(tempfile.mkdtemp(prefix="insightedit-"))
    file = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}.log"
    file.write_text(f"{' '.join(sys.argv)}\n{traceback.format_exc()}")
    return file


def main() -> None:
    """The `insightedit` command."""
    sys.exit(run())
