"""What a server counts, in Prometheus' form.

Where `PROMETHEUS_MULTIPROC_DIR` is set, every process of a machine keeps its figures in that folder and any of them
answers with the sum, so that it does not matter which gateway replica is asked and which ones have died.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

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
        self.replayed = Counter(
            "insightedit_edit_replayed",
            "Edit requests answered with what was kept under their Idempotency-Key.",
            registry=self._registry,
        )
        self.jobs = Counter(
            "insightedit_edit_jobs", "Jobs that have ended, by how.", ["status"], registry=self._registry
        )
        for status in ("completed", "failed", "cancelled"):
            self.jobs.labels(status)  # There from the beginning, so that a first one is seen as a change.
        self.stood_in = Counter(
            "insightedit_edit_stood_in",
            "Edits that a version on trial failed at, and the default one made; by the one that failed.",
            ["model_version"],
            registry=self._registry,
        )
        self.feedback = Counter(
            "insightedit_edit_feedback",
            "What users said of their edits, by verdict (accept, reject) and model version.",
            ["verdict", "model_version"],
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
        self.in_hand = Gauge(
            "insightedit_edit_in_hand",
            "Calls to conditioners and editors that have not been answered.",
            ["model_version", "deployment"],
            multiprocess_mode="livesum",
            registry=self._registry,
        )

        self.quality = Gauge(
            "insightedit_rollout_quality",
            "Quality, 0 to 1, of the same edits by a new version and by the old one while it is on trial.",
            ["model_version"],
            multiprocess_mode="mostrecent",
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"insightedit_edit_{name}_seconds", text, buckets=_BUCKETS, registry=self._registry)

    def render(self) -> bytes:
        """Every figure as text."""
        return generate_latest(self._all_processes())

    def calls_in_hand(self) -> dict[tuple[str, str], int]:
        """Unanswered calls by model version and deployment; the gateway's own requests under no version."""
        calls: dict[tuple[str, str], int] = {}
        for metric in self._all_processes().collect():
            for sample in metric.samples:
                if sample.name == "insightedit_edit_in_hand":
                    calls[sample.labels["model_version"], sample.labels["deployment"]] = int(sample.value)
                elif sample.name == "insightedit_edit_in_flight":
                    calls["", "Gateway"] = int(sample.value)
        return calls

    def _all_processes(self) -> CollectorRegistry:
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None:
            return self._registry
        _forget_the_dead(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return registry


def _forget_the_dead(folder: Path) -> None:
    """What a killed process had in hand is nobody's any more; what it counted stays."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not psutil.pid_exists(pid):
            mark_process_dead(pid, str(folder))
