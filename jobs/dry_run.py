"""`insightedit train --dry-run`: what a training will cost, from config files alone, before anything is started."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from insightedit.model.attention import use_plain_attention
from insightedit.model.configuration import ModelConfig
from insightedit.model.insightedit import InsightEditModel
from insightedit.model.memory import checkpoint_activations, halve_frozen
from insightedit.model.outline import build_outline, outline_batch
from insightedit.model.precision import multiplies_bf16
from insightedit.model.stages import part_of
from insightedit.platform.config import RunConfig, StageConfig
from insightedit.platform.engine import StageLosses, parameter_groups
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.memory_model import Setup, Weights, plan_memory
from insightedit.platform.mixtures import micro_batch_size
from insightedit.platform.tracing import StepTrace, trace_step
from insightedit.platform.trainer import loss_names

UTILISATION = 0.3
"""Share of its peak that a device is taken to reach, where nobody says otherwise."""
GIB = 2**30
_ENCODERS = ("vae", "text_encoder", "image_encoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """What a stage will do."""

    steps: int
    samples: int
    """In all steps."""
    micro_batch: int
    """Samples that a worker takes at once."""
    accumulation: int
    """Micro-batches of a step."""
    trained: int
    """Parameters that train."""
    frozen: int
    """Parameters that do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPart:
    """A part of the model in a stage."""

    parameters: int
    trains: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMemory:
    """GiB of one worker at the fullest moment of a stage's steps; see `insightedit.platform.memory_model.Memory`."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    batch: float
    buffers: float
    host: float
    total: float
    """What is held against the limit: on a worker without a GPU, with `host`."""
    limit: float | None
    """`workers.memory_gib`."""
    fits: bool | None
    """None where no limit is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFlops:
    """Floating point operations, and what time they take."""

    sample: int
    """Of one sample, forward and backward."""
    computed: int
    """With what gradient checkpointing computes again."""
    utilisation: float
    """Model FLOPs utilisation that is taken for granted."""
    samples_per_second: float | None
    """Of all workers; None where `workers.peak_tflops` is not set."""
    hours: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a training will cost."""

    stages: dict[int, PlannedStage]
    trainable: dict[int, dict[str, PlannedPart]]
    memory: dict[int, PlannedMemory]
    flops: dict[int, PlannedFlops]
    resources: dict[str, dict[str, float]]
    config: RunConfig


def dry_run(config: RunConfig, stages: Sequence[int], utilisation: float = UTILISATION) -> DryRun:
    """Say what a training will cost.

    Args:
        config: of the training.
        stages: which of its stages.
        utilisation: model FLOPs utilisation that is taken for granted.

    Raises:
        NotFoundError: a source, or its config files, are not there.
    """
    sources = config.model_sources()
    try:
        planned = {number: _StagePlan(config, sources, number) for number in stages}
    except (ValueError, OSError) as error:
        raise NotFoundError(str(error)) from None
    return DryRun(
        stages={number: plan.stage() for number, plan in planned.items()},
        trainable={number: plan.parts for number, plan in planned.items()},
        memory={number: plan.memory() for number, plan in planned.items()},
        flops={number: plan.flops(utilisation) for number, plan in planned.items()},
        resources=_resources(config),
        config=config,
    )


def check_fits(planned: DryRun) -> None:
    """Refuse a training that does not fit its workers.

    Raises:
        UsageError: a stage needs more than `workers.memory_gib`; it says what would fit.
    """
    for number, memory in planned.memory.items():
        if memory.fits is False:
            raise UsageError(
                f"Stage {number} needs {memory.total:.2f} GiB on each worker and workers.memory_gib is"
                f" {memory.limit:g}; {_way_out(planned.config, number)}."
            )


class _StagePlan:
    """One stage, outlined and traced."""

    def __init__(self, config: RunConfig, sources: ModelConfig, number: int) -> None:
        self._config, self._sources, self._number = config, sources, number
        on_gpu = config.workers.gpus > 0
        self._stage = config.stages[number].settled(bf16=on_gpu or multiplies_bf16(torch.device("cpu")))
        # With a range of workers, the fewest have the most to hold.
        world = config.workers.sizes[0]
        self._size = micro_batch_size(self._stage.global_batch, world, self._stage.micro_batch)
        self._setup = Setup(
            world=world,
            accumulation=self._stage.global_batch // world // self._size,
            zero=self._stage.zero,
            offload=self._stage.offload,
            averages=self._stage.ema_decay is not None,
            on_gpu=on_gpu,
        )
        model = self._outline()
        self.parts = _parts(model)
        self._weights = _weights(model, self._stage)
        self._trace = self._traced(model)

    def stage(self) -> PlannedStage:
        """What the stage does."""
        parts = self.parts.values()
        return PlannedStage(
            steps=self._stage.steps,
            samples=self._stage.steps * self._stage.global_batch,
            micro_batch=self._size,
            accumulation=self._setup.accumulation,
            trained=sum(part.parameters for part in parts if part.trains),
            frozen=sum(part.parameters for part in parts if not part.trains),
        )

    def memory(self) -> PlannedMemory:
        """What it needs of a worker's memory."""
        checkpoints = self._stage.checkpoint_every < self._stage.steps
        memory = plan_memory(self._weights, self._trace, self._setup, checkpoints=checkpoints)
        total = memory.device + (0 if self._setup.on_gpu else memory.host)
        limit = self._config.workers.memory_gib
        return PlannedMemory(
            **{name: size / GIB for name, size in asdict(memory).items()},
            total=total / GIB,
            limit=limit,
            fits=None if limit is None else total <= limit * GIB,
        )

    def flops(self, utilisation: float) -> PlannedFlops:
        """What it computes, and how long that takes."""
        sample = self._trace.flops // self._size
        peak = self._config.workers.peak_tflops
        rate = peak and self._setup.world * peak * 1e12 * utilisation / sample
        return PlannedFlops(
            sample=sample,
            computed=self._trace.computed // self._size,
            utilisation=utilisation,
            samples_per_second=rate,
            hours=self.stage().samples / rate / 3600 if rate else None,
        )

    def _outline(self) -> InsightEditModel:
        """The model's outline, made ready to train as a worker does."""
        stage = self._stage
        model = build_outline(self._sources)
        model.begin_stage(self._number)
        if not self._setup.on_gpu:
            use_plain_attention(model)
        model.train()
        if stage.gradient_checkpointing:
            checkpoint_activations(model)
        if stage.frozen == "bf16":
            halve_frozen(model)
        return model

    def _traced(self, model: InsightEditModel) -> StepTrace:
        names = loss_names(self._number)
        losses = StageLosses(model, self._number, self._stage, names, 1.0)
        return trace_step(losses, outline_batch(model.own_pipeline, self._size), len(names))


def _parts(model: InsightEditModel) -> dict[str, PlannedPart]:
    """The parts by their names in the design; `mllm` is the language model without its LoRA."""
    parts: dict[str, PlannedPart] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name) or name.split(".", 1)[0]
        known = parts.get(part, PlannedPart(parameters=0, trains=parameter.requires_grad))
        parts[part] = replace(known, parameters=known.parameters + parameter.numel())
    for name, encoder in _encoders(model).items():
        parts[name] = PlannedPart(parameters=sum(one.numel() for one in encoder.parameters()), trains=False)
    return parts


def _weights(model: InsightEditModel, stage: StageConfig) -> Weights:
    groups = [list[nn.Parameter](group["params"]) for group in parameter_groups(model, stage, part_of)]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return Weights(
        groups=tuple(sum(parameter.numel() for parameter in group) for group in groups),
        largest=max(parameter.numel() for group in groups for parameter in group),
        frozen=_bytes([*frozen, *model.buffers()]),
        frozen_elements=sum(parameter.numel() for parameter in frozen),
        encoders=sum(_bytes([*one.parameters(), *one.buffers()]) for one in _encoders(model).values()),
    )


def _encoders(model: InsightEditModel) -> dict[str, nn.Module]:
    """The frozen encoders beside the model, which is without those that are parts of it."""
    beside = [name for name in _ENCODERS if getattr(model, name, None) is None]
    return {name: cast(nn.Module, getattr(model.own_pipeline, name)) for name in beside}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resources(config: RunConfig) -> dict[str, dict[str, float]]:
    """What Ray is asked for, by what it is for; `cpus` and `gpus` are those of each."""
    workers, data = config.workers, config.data
    asked = {
        "workers": {"count": workers.sizes[-1], "cpus": workers.cpus, "gpus": workers.gpus},
        "data_tasks": {"count": workers.data_tasks, "cpus": workers.data_cpus, "gpus": 0.0},
    }
    if data.encode == "while_training":
        asked["encoders"] = {"count": data.encoder_workers, "cpus": 1.0, "gpus": data.encoder_gpus}
    total = {unit: sum(one["count"] * one[unit] for one in asked.values()) for unit in ("cpus", "gpus")}
    return {**asked, "total": total}


# -- what would fit ---------------------------------------------------------------------------------------------


def _way_out(config: RunConfig, number: int) -> str:
    """What to set so that a stage fits, found by trying."""
    sources, least = config.model_sources(), float("inf")
    for changes in _ways(config, number):
        stage = config.stages[number].model_copy(update=changes)
        other = config.model_copy(update={"stages": {**config.stages, number: stage}})
        memory = _StagePlan(other, sources, number).memory()
        if memory.fits:
            settings = [f"stages.{number}.{name}={str(value).lower()}" for name, value in changes.items()]
            return f"it fits in {memory.total:.2f} GiB with {' and '.join(settings)}"
        least = min(least, memory.total)
    return (
        f"the least that its settings can bring it to is {least:.2f} GiB, so choose larger workers or a smaller model"
    )


def _ways(config: RunConfig, number: int) -> Iterator[dict[str, Any]]:
    """Changes that need less memory, each with those before it: what costs least time first."""
    stage, changes = config.stages[number], dict[str, Any]()
    if stage.frozen == "fp32" and stage.precision == "bf16":
        changes["frozen"] = "bf16"
        yield dict(changes)
    if not stage.gradient_checkpointing:
        changes["gradient_checkpointing"] = True
        yield dict(changes)
    size = stage.micro_batch
    while size > 1:
        size //= 2
        changes["micro_batch"] = size
        yield dict(changes)
    if config.workers.gpus and stage.offload == "none":
        yield {**changes, "offload": "optimizer"}
    if stage.zero == 2 and config.workers.sizes[0] > 1:
        changes |= {"zero": 3, "validate_every": 0} if stage.validate_every else {"zero": 3}
        yield dict(changes)
    if config.workers.gpus and stage.offload != "all":
        changes |= {"zero": 3, "offload": "all"}
        yield dict(changes)
