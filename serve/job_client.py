"""Edits as jobs over HTTP: sent under an id, looked at, cancelled, fetched."""

from __future__ import annotations

import base64
import time
import uuid
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import quote

from insightedit.platform.errors import InsightEditError
from insightedit.serve.answers import Job, JobList, JobStatus, WebhookSecret
from insightedit.serve.client import EditOptions, Patience, ask, files_of, form_of, parsed
from insightedit.serve.schema import JOBS_PATH


class JobClient:
    """The jobs of a server.

    A server that asks for an API key gets that of the environment's `INSIGHTEDIT_API_KEY`. Every request may be sent
    again, and is while the server is overloaded or not to be reached.

    All methods raise what `client.edit_over_http` raises; `NotFoundError` also for a job that is not there.
    """

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """Name a server.

        Args:
            url: as in `http://127.0.0.1:8000`.
            patience: how long to wait for an answer, and how often to try.
        """
        self._url = url
        self._patience = patience or Patience()

    def submit(
        self,
        image: Path | bytes,
        prompt: str,
        *,
        job_id: str | None = None,
        mask: Path | bytes | None = None,
        webhook: str | None = None,
        webhook_images: bool = False,
        **options: Unpack[EditOptions],
    ) -> Job:
        """Have an image edited later. The same again under the same id is the same job.

        Args:
            image: a PNG, JPEG or WebP file, or its bytes.
            prompt: the instruction.
            job_id: letters, digits, `.`, `_`, `:`, `~` and `-`, 128 at most; one is drawn without it.
            mask: a PNG of the image's size, or its bytes.
            webhook: address that is told how it ended.
            webhook_images: whether it is told the images as well.
            **options: see `EditOptions`.

        Raises:
            UsageError: also if the id is another request's.
        """
        fields = form_of(prompt, options)
        if webhook is not None:
            fields |= {"webhook": webhook, "webhook_images": str(webhook_images).lower()}
        return self._ask("PUT", job_id or uuid.uuid4().hex, data=fields, files=files_of(image, mask))

    def poll(self, job_id: str) -> Job:
        """How a job is, with its images once it is completed."""
        return self._ask("GET", job_id)

    def list_jobs(self, limit: int = 20, after: str | None = None, status: JobStatus | None = None) -> JobList:
        """One's own jobs, the newest first, without their images.

        Args:
            limit: how many at most, up to 100.
            after: id of a job that all of them are older than, as `last_id` of the list before.
            status: of all of them; any without it.

        Raises:
            UsageError: also if there is no job `after`.
        """
        params = {"limit": limit, "after": after, "status": status}
        given = {name: value for name, value in params.items() if value is not None}
        return parsed(self._url, ask(self._url, "GET", JOBS_PATH, self._patience, params=given), JobList)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that has not ended."""
        return self._ask("POST", job_id, "/cancel")

    def wait(self, job_id: str, seconds: float = 600.0, every: float = 1.0) -> Job:
        """A job once it has ended, or as it is after some seconds.

        Args:
            job_id: its id.
            seconds: how long to wait.
            every: how many seconds to wait before asking again.
        """
        end = time.monotonic() + seconds
        while (job := self.poll(job_id)).status in ("queued", "in_progress") and time.monotonic() < end:
            time.sleep(min(every, max(end - time.monotonic(), 0.0)))
        return job

    def webhook_secret(self) -> str:
        """The key that one's webhooks are signed with, as libraries of Standard Webhooks take it."""
        return parsed(self._url, ask(self._url, "GET", "/v1/webhooks/secret", self._patience), WebhookSecret).key

    def _ask(self, method: str, job_id: str, more: str = "", **body: Any) -> Job:
        path = f"{JOBS_PATH}/{quote(job_id, safe='')}{more}"
        return parsed(self._url, ask(self._url, method, path, self._patience, **body), Job)


def images_of(job: Job) -> tuple[bytes, ...]:
    """The encoded files of a completed job.

    Raises:
        InsightEditError: it has none, and why.
    """
    if job.result is not None:
        return tuple(base64.b64decode(one.b64_json) for one in job.result.data)
    if job.error is not None:
        raise InsightEditError(f"The job {job.id} failed: {job.error.message}")
    if job.status == "completed":
        raise InsightEditError(f"The images of job {job.id} are not kept any more; send it again under another id.")
    raise InsightEditError(f"The job {job.id} has no images: it is {job.status.replace('_', ' ')}.")
