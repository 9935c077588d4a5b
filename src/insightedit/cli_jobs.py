"""The commands about edits as jobs of a server: `insightedit edit-job submit | show | list | fetch | cancel`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from insightedit.cli_edit import asked, edit_options, format_of, read_image, write_all
from insightedit.console import Group, emit, json_option, open_workdir
from insightedit.platform.errors import UsageError

if TYPE_CHECKING:
    from insightedit.serve.answers import Job, JobList, JobStatus
    from insightedit.serve.job_client import JobClient


@click.group(cls=Group)
def edit_job() -> None:
    """Edits that a server does later, under ids of your own."""


server_option = click.option("--server", metavar="URL", help="Whose jobs; the work folder's server without it.")


def _client(server: str | None) -> JobClient:
    from insightedit.serve.client import served_url
    from insightedit.serve.job_client import JobClient

    return JobClient(server or served_url(open_workdir()))


@edit_job.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("instruction")
@click.option(
    "--id", "job_id", metavar="ID", help="Of the job; the same again is the same job. Without it one is drawn."
)
@click.option("--model", metavar="VERSION", help="A number or an alias; the server's own without it.")
@click.option("--format", "output_format", type=click.Choice(["png", "jpeg", "webp"]), help="png without it.")
@click.option("--webhook", metavar="URL", help="Address that is told how it ended, if the server may.")
@click.option("--webhook-images", is_flag=True, help="Tell it the images as well.")
@edit_options
@server_option
@json_option
def submit(
    image: Path, instruction: str, job_id: str | None, server: str | None, as_json: bool, **settings: Any
) -> None:
    """Send IMAGE to be edited by an INSTRUCTION."""
    job = _client(server).submit(read_image(image), instruction, job_id=job_id, **asked(settings))
    _report(job, as_json)


@edit_job.command()
@click.argument("job_id", metavar="ID")
@server_option
@json_option
def show(job_id: str, server: str | None, as_json: bool) -> None:
    """Say how a job is."""
    _report(_client(server).poll(job_id), as_json)


@edit_job.command("list")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many at most.")
@click.option("--after", metavar="ID", help="Only those older than this job.")
@click.option(
    "--status", type=click.Choice(["queued", "in_progress", "completed", "failed", "cancelled"]), help="Only those."
)
@server_option
@json_option
def list_(limit: int, after: str | None, status: JobStatus | None, server: str | None, as_json: bool) -> None:
    """List your jobs, the newest first."""
    found = _client(server).list_jobs(limit, after, status)
    emit(found.model_dump(exclude={"data": {"__all__": {"result"}}}), as_json, lambda: _lines(found))


@edit_job.command()
@click.argument("job_id", metavar="ID")
@server_option
@json_option
def cancel(job_id: str, server: str | None, as_json: bool) -> None:
    """Cancel a job that has not ended."""
    _report(_client(server).cancel(job_id), as_json)


@edit_job.command()
@server_option
@json_option
def webhook_secret(server: str | None, as_json: bool) -> None:
    """Print the key that your webhooks are signed with."""
    key = _client(server).webhook_secret()
    emit({"key": key}, as_json, lambda: [key])


@edit_job.command()
@click.argument("job_id", metavar="ID")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write; several are numbered.")
@click.option("--wait", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="For its end.")
@server_option
@json_option
def fetch(job_id: str, out: Path, wait: float, server: str | None, as_json: bool) -> None:
    """Write the images of a completed job."""
    from insightedit.serve.job_client import images_of

    wanted = format_of(out)
    job = _client(server).wait(job_id, wait)
    images = images_of(job)
    if job.result is not None and job.result.output_format != wanted:
        raise UsageError(f"--out {out}: the job's images are {job.result.output_format}; name the file accordingly.")
    files = write_all(out, images)
    emit([str(file) for file in files], as_json, lambda: map(str, files))


def _report(job: Job, as_json: bool) -> None:
    emit(job.model_dump(exclude={"result"}), as_json, lambda: _said(job))


def _said(job: Job) -> Iterable[str]:
    yield f"{job.id}: {job.status.replace('_', ' ')}" + (f": {job.error.message}" if job.error else "")


def _lines(jobs: JobList) -> Iterable[str]:
    for job in jobs.data:
        yield from _said(job)
    if jobs.has_more:
        yield f"There are more: --after {jobs.last_id}"
    elif not jobs.data:
        yield "There are none."
