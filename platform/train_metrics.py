"""A training's figures for Prometheus, through Ray: every node of a cluster exports what the processes on it set.

`deploy/grafana/training.json` shows them. MLflow keeps a run's curves for good; this is for whoever watches a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

FIGURES: Mapping[str, str] = {
    "gradient_norm": "Norm of the gradients before they are clipped, mean of the steps since the last point.",
    "learning_rate": "Learning rate of the last step.",
    "skipped_steps": "Bad steps since the last point, which were left out.",
    "samples_per_second": "Samples that all workers together trained on in a second.",
    "data_wait_seconds": "Seconds since the last point in which training waited for data.",
    "data_wait_share": "Share of the time since the last point in which training waited for data.",
    "checkpoint_stall_seconds": "Seconds since the last point in which training waited for checkpoints.",
    "checkpoint_stall_share": "Share of the time since the last point in which training waited for checkpoints.",
    "goodput": "Useful time of the run so far over all time since it began, restarts included.",
    "model_flops_utilisation": "The model's FLOPs over what the workers could do; with workers.peak_tflops alone.",
}
"""Every figure that a point of the curves may have, and what it says."""

_PREFIX = "insightedit_train"
_LOSS, _STEP, _STEPS = f"{_PREFIX}_loss", f"{_PREFIX}_step", f"{_PREFIX}_steps"
_STAGE_TAGS = ("run", "stage")


class TrainMetrics:
    """The gauges of one stage of a run, for its rank 0."""

    def __init__(self, run: str, stage: int) -> None:
        self._tags = {"run": run, "stage": str(stage)}
        self._figures = {name: Gauge(f"{_PREFIX}_{name}", text, _STAGE_TAGS) for name, text in FIGURES.items()}
        self._loss = Gauge(_LOSS, "A loss of the stage, by its name in the seed.", (*_STAGE_TAGS, "loss"))
        self._step = Gauge(_STEP, "Steps of the stage that are done.", _STAGE_TAGS)
        self._steps = Gauge(_STEPS, "Steps that the stage will have.", _STAGE_TAGS)

    def show(self, step: int, steps: int, losses: Mapping[str, float], figures: Mapping[str, float]) -> None:
        """Show a point of the curves.

        Args:
            step: steps that are done.
            steps: of the whole stage.
            losses: by their names in the seed.
            figures: by their names in `FIGURES`; one that a point does not have is left as it was.
        """
        self._step.set(step, self._tags)
        self._steps.set(steps, self._tags)
        for name, value in losses.items():
            self._loss.set(value, {**self._tags, "loss": name})
        for name, gauge in self._figures.items():
            gauge.set(figures.get(name), self._tags)


def exported_names() -> set[str]:
    """The names under which Prometheus finds the gauges; Ray puts its own before those that are set."""
    return {f"ray_{name}" for name in (_LOSS, _STEP, _STEPS, *(f"{_PREFIX}_{figure}" for figure in FIGURES))}
