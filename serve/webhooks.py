"""Webhooks: the end of a job told to an address that its caller named, as Standard Webhooks have it.

Every message has three headers: `webhook-id`, the same each time it is sent; `webhook-timestamp`, seconds since the
epoch; and `webhook-signature`, `v1,` and the HMAC-SHA256 in base64 of id, timestamp and body with dots between them.
Its key is the caller's own, so that nobody can speak in the server's name to somebody else.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import random
import secrets
import time
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from http import HTTPStatus

from insightedit.serve.answers import Job
from insightedit.serve.crew import Crew
from insightedit.serve.job_book import JobBook, JobRecord
from insightedit.serve.logs import LOGGER
from insightedit.serve.outbound import FailedConnectionError, RefusedAddressError, check_address, deliver
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Destinations
from insightedit.serve.state_store import Entry, StateStore

logger = logging.getLogger(LOGGER)

PREFIX = "whsec_"
AT_ONCE = 4
"""Messages that a gateway sends at a time."""
PAUSES = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0)
"""Seconds after which a message that was not taken is sent again, and then no more."""
_MASTER = "secret/webhooks"
_FOR_GOOD = 1e10
"""Seconds since the epoch: the store lets go of it with everything else only."""


class Webhooks:
    """Tells the ends of jobs."""

    def __init__(self, store: StateStore, book: JobBook, allowed: Destinations) -> None:
        """Begin with nothing to tell.

        Args:
            store: has the secret that all callers' keys come from.
            book: the jobs.
            allowed: where to.
        """
        self._store = store
        self._book = book
        self._allowed = allowed
        self._crew = Crew(AT_ONCE, book.untold, self._take, self._tell)

    def at_work(self) -> AbstractAsyncContextManager[None]:
        """A block in which ends of jobs are told."""
        return self._crew.at_work()

    def check(self, address: str) -> None:
        """Look whether an address may be told anything.

        Raises:
            ApiError: 400, it may not.
        """
        try:
            check_address(address, self._allowed)
        except RefusedAddressError as error:
            raise ApiError(400, "webhook_not_allowed", f"webhook: {error}", "webhook") from None

    async def key_of(self, scope: str) -> bytes:
        """The key of a caller's messages.

        Raises:
            StoreUnreachableError, StoreFullError: it is not to be had.
        """
        while (master := await self._store.get(_MASTER)) is None:
            await self._store.change({_MASTER: None}, {_MASTER: Entry(secrets.token_bytes(32), _FOR_GOOD)})
        return hmac.digest(master, b"webhook/" + scope.encode(), "sha256")

    async def _take(self, path: str) -> JobRecord | None:
        return await self._book.take_untold(path, self._allowed.seconds + self._book.lease_seconds)

    async def _tell(self, job: JobRecord) -> None:
        """Tell the end of a job once, and write down whether it was heard."""
        body = message(await self._book.answer(job, with_images=job.webhook_images))
        headers = signed(await self.key_of(job.scope), message_id(job.path, job.created), body, time.time())
        try:
            status = await deliver(job.webhook, self._allowed, headers, body)
        except (RefusedAddressError, FailedConnectionError) as error:
            logger.warning("the webhook of a job cannot be sent: %s", error)
            status = 0
        if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            await self._book.told(job, "delivered")
        elif status == HTTPStatus.GONE or job.tries >= len(PAUSES):
            await self._book.told(job, "failed")
        else:
            # Those that were refused together do not come back together.
            await self._book.tell_later(job, PAUSES[job.tries] * random.uniform(1.0, 1.25))


def shown(key: bytes) -> str:
    """A key as libraries of Standard Webhooks take it."""
    return PREFIX + base64.b64encode(key).decode("ascii")


def message_id(path: str, created: float) -> str:
    """What a receiver knows a message by that comes twice."""
    return "msg_" + hashlib.sha256(f"{path}/{created}".encode()).hexdigest()[:32]


def message(job: Job) -> bytes:
    """What is said of a job."""
    ended = datetime.fromtimestamp(job.ended_at or job.created_at, UTC).isoformat()
    data = job.model_dump(mode="json", exclude={"webhook_status"})
    return json.dumps({"type": f"{job.object}.{job.status}", "timestamp": ended, "data": data}).encode()


def signed(key: bytes, name: str, body: bytes, now: float) -> dict[str, str]:
    """The headers of a message that is sent now, in seconds since the epoch."""
    stamp = str(int(now))
    digest = hmac.digest(key, f"{name}.{stamp}.".encode() + body, "sha256")
    return {
        "content-type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": stamp,
        "webhook-signature": "v1," + base64.b64encode(digest).decode("ascii"),
    }
