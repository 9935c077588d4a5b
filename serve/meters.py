"""What a server counts, in Prometheus' form.

Where `PROMETHEUS_MULTIPROC_DIR` is set, every process of a machine keeps its figures in that folder and any of them
answers with the sum, so that it does not matter which gateway replica is asked and which ones have died.
"""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_BUCKETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 13, 21, 34, 60, 120)


class Meters:
    """The figures of the gateway."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "insightedit_edit_requests",
            "Answers to edit requests by HTTP status and model version.",
            ["code", "model_version"],
            registry=self._registry,
        )
        self.rejected = Counter(
            "insightedit_edit_rejected",
            "Edit requests answered with an error, by its code.",
            ["reason"],
            registry=self._registry,
        )
        self.duration = self._histogram("duration", "Time from the request's arrival to its answer.")
        self.queue = self._histogram("queue", "Time an edit waited for a conditioner and an editor.")
        self.step = self._histogram("step", "Time of one denoising step, encoding and decoding shared out over them.")
        self.in_flight = Gauge(
            "insightedit_edit_in_flight",
            "Edit requests being worked on or waiting.",
            multiprocess_mode="livesum",
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"insightedit_edit_{name}_seconds", text, buckets=_BUCKETS, registry=self._registry)

    def render(self) -> bytes:
        """Every figure as text."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
