"""What a training will cost, as text for people: tables in comments, above the config as YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from insightedit.console import columns
from insightedit.jobs.dry_run import DryRun
from insightedit.platform.config import dump_config

_MEMORY = ("weights", "gradients", "optimizer", "activations", "batch", "buffers", "host", "total")


def show_dry_run(planned: DryRun) -> Iterable[str]:
    """All that a dry run found out."""
    utilisation = next(iter(planned.flops.values())).utilisation
    yield from _table("What is trained", _part_rows(planned))
    yield from _table(f"Work; samples a second at {utilisation:.0%} of workers.peak_tflops", _work_rows(planned))
    yield from _table("GiB of a worker's memory at the fullest moment of a step", _memory_rows(planned))
    yield from _table("What Ray is asked for", _resource_rows(planned.resources))
    yield dump_config(planned.config).rstrip()


def _part_rows(planned: DryRun) -> Iterable[tuple[str, ...]]:
    yield "PART", "PARAMETERS", "TRAINS IN STAGES"
    for name, part in next(iter(planned.trainable.values())).items():
        stages = [str(number) for number, parts in planned.trainable.items() if parts[name].trains]
        yield name, f"{part.parameters:,}", ", ".join(stages) or "-"


def _work_rows(planned: DryRun) -> Iterable[tuple[str, ...]]:
    yield "STAGE", "STEPS", "SAMPLES", "MICRO-BATCH", "TRAINED", "FROZEN", "GFLOP/SAMPLE", "SAMPLES/S", "HOURS"
    for number, stage in planned.stages.items():
        flops = planned.flops[number]
        sizes = (stage.steps, stage.samples, stage.micro_batch, stage.trained, stage.frozen)
        rates = (flops.sample / 1e9, flops.samples_per_second, flops.hours)
        yield str(number), *(f"{size:,}" for size in sizes), *(_or_dash(rate) for rate in rates)


def _memory_rows(planned: DryRun) -> Iterable[tuple[str, ...]]:
    yield "STAGE", *(name.upper() for name in _MEMORY), "LIMIT"
    for number, memory in planned.memory.items():
        yield str(number), *(f"{getattr(memory, name):.3f}" for name in _MEMORY), _or_dash(memory.limit)


def _resource_rows(resources: Mapping[str, Mapping[str, float]]) -> Iterable[tuple[str, ...]]:
    units = ("count", "cpus", "gpus")
    yield "FOR", *(unit.upper() for unit in units)
    for name, one in resources.items():
        yield name, *(f"{one[unit]:g}" if unit in one else "" for unit in units)


def _table(title: str, rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"# {title}"
    yield from (f"#   {line}" for line in columns(list(rows)))


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
