"""The commands for runs on a cluster: submit, status, logs, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from insightedit.console import (
    Command,
    columns,
    dry_run_option,
    emit,
    emit_manifests,
    json_option,
    open_workdir,
    set_option,
    work_folder,
)
from insightedit.platform.errors import UsageError

if TYPE_CHECKING:
    from insightedit.platform.overview import RunOverview
    from insightedit.platform.submission import Job, Jobs, Submission

_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"

address_option = click.option(
    "--address",
    envvar=_ADDRESS_VARIABLE,
    metavar="URL",
    help=f"The cluster's dashboard, such as http://HOST:8265; {_ADDRESS_VARIABLE} without it.",
)


def _jobs(address: str | None) -> Jobs:
    from insightedit.platform.submission import Jobs

    if not address:
        raise UsageError(f"Name the cluster with --address http://HOST:8265, or set {_ADDRESS_VARIABLE}.")
    return Jobs(address)


@click.command(cls=Command)
@click.argument("config")
@address_option
@click.option("--name", help="Of the run. The name of an earlier run goes on with it; without one the run is new.")
@set_option
@click.option("--supervise", is_flag=True, help="Stay, and submit the run again when its job or the cluster dies.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=10, show_default=True, help="Of --supervise.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="MINUTES",
    help="How long --supervise waits for a cluster that does not answer or has lost nodes.",
)
@click.option("--kube", is_flag=True, help="Ask no cluster; write a KubeRay RayJob for `kubectl apply`.")
@click.option("--out", type=click.Path(path_type=Path), help="With --kube: file to write; stdout without it.")
@dry_run_option
@json_option
def submit(
    config: str,
    address: str | None,
    name: str | None,
    overrides: tuple[str, ...],
    supervise: bool,
    max_restarts: int,
    wait: float,
    kube: bool,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a CONFIG as a job of a Ray cluster, as `train` does on this machine.

    The work folder must be one that all nodes share.
    """
    if kube and supervise:
        raise UsageError("--supervise is for a job of a Ray cluster; KubeRay sees a run through, kube.retries times.")
    if kube:
        emit_manifests(_ray_job(config, name, overrides), out, as_json, dry_run)
        return
    if out is not None:
        raise UsageError("--out is for a RayJob; add --kube or leave it out.")
    from insightedit.platform.config import load_preset
    from insightedit.platform.submission import Patience, Submission, submit
    from insightedit.platform.submission import supervise as supervise_run
    from insightedit.platform.workdir import run_name

    run_config = load_preset(config, overrides)
    submission = Submission(run=run_name(name, run_config.name), config=run_config, workdir=work_folder())
    jobs = _jobs(address)
    job = submit(jobs, submission, dry_run=dry_run)
    report: dict[str, Any] = {"run": submission.run, "job": job, "address": jobs.place, "workdir": submission.workdir}
    if job is None:
        report |= {"entrypoint": submission.entrypoint, "config": run_config}
        emit(report, as_json, lambda: _show_plan(submission, jobs.place))
        return
    if not supervise:
        emit(report, as_json, lambda: _show_submitted(submission, job, jobs.place))
        return
    click.echo(f"Job {job} is submitted. Ctrl-C ends the supervision, not the run.", err=True)
    patience = Patience(max_restarts=max_restarts, seconds=60 * wait)
    end, restarts = supervise_run(jobs.place, submission, job, patience, lambda line: click.echo(line, err=True))
    report |= {"job": end.job, "status": end.status, "restarts": restarts}
    emit(report, as_json, lambda: [f"run {end.run} has finished as job {end.job}, after {restarts} restarts"])


def _ray_job(config: str, name: str | None, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """A run as objects of Kubernetes."""
    from insightedit.platform.config import load_preset
    from insightedit.platform.kube import training_manifests
    from insightedit.platform.workdir import run_name

    run_config = load_preset(config, overrides)
    return training_manifests(run_config, run_name(name, run_config.name))


def _show_plan(submission: Submission, place: str) -> Iterable[str]:
    from insightedit.platform.config import dump_config

    yield f"# would submit run {submission.run} to {place}, with the work folder {submission.workdir}, as"
    yield f"#   {submission.entrypoint}"
    yield dump_config(submission.config).rstrip()


def _show_submitted(submission: Submission, job: str, place: str) -> Iterable[str]:
    yield f"run {submission.run} is submitted as job {job}, with the work folder {submission.workdir}"
    for command in ("status", "logs --follow", "cancel"):
        verb, *flags = command.split()
        yield " ".join(["  insightedit", verb, submission.run, *flags, "--address", place])


@click.command(cls=Command)
@click.argument("run", required=False)
@address_option
@json_option
def status(run: str | None, address: str | None, as_json: bool) -> None:
    """Show the runs of a cluster and of the work folder, or one RUN."""
    from insightedit.platform.overview import overview, version_of

    jobs = _jobs(address).all() if address else []
    workdir = open_workdir()
    found = overview(jobs, workdir, run)
    if run is None:
        emit(found, as_json, lambda: _table(found))
        return
    version = version_of(run, workdir)
    emit(asdict(found[0]) | {"model_version": version}, as_json, lambda: _details(found[0], version))


def _table(found: Sequence[RunOverview]) -> Iterable[str]:
    if not found:
        click.echo("No run yet: `insightedit train` or `insightedit submit` starts one.", err=True)
        return
    heading = ("RUN", "STATE", "AT", "JOB", "STARTED")
    yield from columns(
        [heading, *((one.run, one.state, one.at, one.job.job if one.job else "-", _time(one.started)) for one in found)]
    )


def _details(one: RunOverview, version: str | None) -> Iterable[str]:
    yield f"run      {one.run}"
    yield f"state    {one.state}"
    yield f"at       {one.at}"
    if one.job:
        yield f"job      {one.job.job}, {one.job.status}, try {one.job.tried}"
    yield f"started  {_time(one.started)}"
    yield f"folder   {one.folder or '-'}"
    yield from (f"stage {number}  {state}" for number, state in one.stages.items())
    if version:
        yield f"version  {version}"


def _time(time: datetime | None) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}" if time else "-"


@click.command(cls=Command)
@click.argument("run")
@address_option
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends.")
@json_option
def logs(run: str, address: str | None, follow: bool, as_json: bool) -> None:
    """Show what the newest job of a RUN has printed."""
    if follow and as_json:
        raise UsageError("--follow prints lines as they come, and --json one result; leave one of them out.")
    jobs = _jobs(address)
    job = jobs.newest(run)
    if follow:
        asyncio.run(_follow(jobs, job))
        return
    text = jobs.text(job)
    emit({"run": run, "job": job.job, "log": text}, as_json, lambda: [text.rstrip()])


async def _follow(jobs: Jobs, job: Job) -> None:
    async for text in jobs.follow(job):
        emit(text, as_json=False, show=lambda text=text: [text.rstrip("\n")])


@click.command(cls=Command)
@click.argument("run")
@address_option
@dry_run_option
@json_option
def cancel(run: str, address: str | None, dry_run: bool, as_json: bool) -> None:
    """End the job of a RUN. Submitting it again under its name goes on from the newest checkpoint."""
    jobs = _jobs(address)
    job = jobs.newest(run)
    ended = not job.is_over if dry_run else jobs.cancel(job)
    said = f"{'would end' if dry_run else 'ends'}" if ended else f"has ended already: {job.status}"
    emit({"run": run, "job": job.job, "cancelled": ended}, as_json, lambda: [f"job {job.job} {said}"])


COMMANDS: Sequence[click.Command] = (submit, status, logs, cancel)
