"""What the gateways of a server have in common through their store."""

from __future__ import annotations

import time
from dataclasses import dataclass

from insightedit.serve.idempotency import IdempotencyKeys
from insightedit.serve.job_book import JobBook
from insightedit.serve.settings import Destinations, Limits, StateSettings
from insightedit.serve.state_store import Clock, SqliteStore, StateStore
from insightedit.serve.webhooks import Webhooks


@dataclass(frozen=True, slots=True)
class Shared:
    """Keys, jobs, and whom their ends are told to."""

    store: StateStore
    keys: IdempotencyKeys
    book: JobBook
    webhooks: Webhooks

    @classmethod
    def of(
        cls,
        store: StateStore,
        settings: StateSettings,
        limits: Limits,
        webhooks: Destinations | None = None,
        clock: Clock = time.time,
    ) -> Shared:
        """What is in a store.

        Args:
            store: of all gateways.
            settings: how long and how much of it is kept.
            limits: how many jobs there may be.
            webhooks: where their ends may be told; nowhere without it.
            clock: tells the time.
        """
        book = JobBook(store, settings, limits, clock)
        return cls(
            store, IdempotencyKeys(store, settings, clock), book, Webhooks(store, book, webhooks or Destinations())
        )

    @classmethod
    def in_this_process(cls, limits: Limits) -> Shared:
        """For one gateway, which takes it with it when it ends."""
        settings = StateSettings()
        return cls.of(SqliteStore(":memory:", settings.bytes), settings, limits)
