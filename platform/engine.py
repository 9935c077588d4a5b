"""DeepSpeed's engine for one stage: ZeRO, accumulation and clipping, around a loss over the whole global batch."""

from __future__ import annotations

import copy
import logging
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import deepspeed
import deepspeed.ops
import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor, nn

from insightedit.model.compilation import compile_blocks, missing_compiler
from insightedit.model.losses import LossTerm
from insightedit.model.memory import checkpoint_activations, halve_frozen
from insightedit.model.stages import Part
from insightedit.platform.config import StageConfig
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.universal import STATE, load_universal

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its shared-memory collectives want a compiler on every machine and train no faster; gloo is as good.
cast(dict[str, bool], deepspeed.ops.__compatible_ops__)["deepspeed_shm_comm"] = False


class StageLosses(nn.Module):
    """A model with its stage's weighted losses: what DeepSpeed wraps."""

    def __init__(self, model: nn.Module, stage: int, config: StageConfig, names: Sequence[str], scale: float) -> None:
        """Wrap a model.

        Args:
            model: has `forward(batch, stage)`, which returns a `LossTerm` for each loss.
            stage: its number.
            config: precision and the losses' weights.
            names: the losses, in the order of all vectors here.
            scale: undoes the mean that DeepSpeed takes over ranks and micro-batches.
        """
        super().__init__()
        self.model = model
        self.stage = stage
        self._names = tuple(names)
        self._scale = scale
        self._bf16 = config.precision == "bf16"
        self._loss_weights = [config.losses[name] for name in names]

    def forward(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the global batch's loss.

        With l_i and w_i the values and weights of one loss over all samples i of the global batch, the loss is the sum
        over losses of weight * sum_i(w_i l_i) / sum_i(w_i).

        Args:
            batch: one micro-batch.
            totals: (T,) sum of the samples' weights over the global batch, for each loss.

        Returns:
            The loss to differentiate, and sums (2, T) of w_i l_i and of w_i over the micro-batch.
        """
        with torch.autocast(totals.device.type, torch.bfloat16, enabled=self._bf16):
            terms = cast(Mapping[str, LossTerm], self.model(batch, self.stage))
        sums = torch.stack([(terms[name].values.float() * terms[name].weights).sum() for name in self._names])
        counts = torch.stack([terms[name].weights.float().sum() for name in self._names])
        # A loss that no sample of the global batch has is 0, not 0 / 0.
        means = sums / torch.where(totals > 0, totals, torch.ones_like(totals))
        loss = (means * totals.new_tensor(self._loss_weights)).sum() * self._scale
        return loss, torch.stack([sums.detach(), counts])


def start_engine(
    losses: StageLosses,
    config: StageConfig,
    part_of: Callable[[str], Part | None],
    *,
    micro_batch: int,
    accumulation: int,
    device: torch.device,
) -> Any:
    """Give a stage's model to DeepSpeed, as lean as the config says; `torch.distributed` is up already.

    Args:
        losses: around the model, on the CPU.
        config: of the stage.
        part_of: names the part that one of the model's parameters belongs to, by the parameter's name.
        micro_batch: samples that a rank takes at once.
        accumulation: micro-batches of an optimiser step.
        device: where the model goes.

    Raises:
        UsageError: the model is to be compiled, and there is no compiler.
    """
    _make_lean(losses, config)
    losses.to(device)
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": _zero_settings(config, device),
        # Torch's own optimiser works on a CPU as it is; DeepSpeed's wants a compiler on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        parameter_groups(losses.model, config, part_of), lr=config.learning_rate, betas=config.betas, fused=fused
    )
    initialize = cast(Any, deepspeed).initialize
    return initialize(model=losses, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def _make_lean(losses: StageLosses, config: StageConfig) -> None:
    """Prepare the model while it is on the CPU: only what is halved already fits a GPU."""
    if config.gradient_checkpointing:
        checkpoint_activations(losses)
    if config.frozen == "bf16":
        halve_frozen(losses)
    if config.compile:
        if missing := missing_compiler():
            raise UsageError(
                f"stages.{losses.stage}.compile needs a C++ compiler on every worker, and there is no {missing} on this"
                " one; install it or set that to false."
            )
        compile_blocks(losses)


def _zero_settings(config: StageConfig, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    settings: dict[str, Any] = {"stage": config.zero, "overlap_comm": on_gpu}
    if config.zero == 2 and not on_gpu:
        # Copying every gradient into one buffer first costs a third of a small model's step on a CPU.
        settings["contiguous_gradients"] = False
    if config.offload != "none":
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if config.offload == "all":
        settings["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return settings


def parameter_groups(
    model: nn.Module, config: StageConfig, part_of: Callable[[str], Part | None]
) -> list[dict[str, Any]]:
    """Groups of parameters with a learning rate, a warm-up and a weight decay of their own.

    `scale` is a group's learning rate as a share of the stage's. Weight decay is for matrices; biases, norms and single
    vectors have none.
    """
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        part = part_of(name)
        own = config.learning_rates.get(part) if part else None
        scale = (own or config.learning_rate) / config.learning_rate
        warmup = config.warmups.get(part, config.warmup) if part else config.warmup
        decay = config.weight_decay if len(parameter_shape(parameter)) >= 2 else 0.0
        groups.setdefault((scale, warmup, decay), []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "warmup": warmup, "weight_decay": decay}
        for (scale, warmup, decay), parameters in groups.items()
    ]


def learning_rate(config: StageConfig, step: int, warmup: float | None = None) -> float:
    """The learning rate of a step (from 0): a linear rise, then the schedule down to its end.

    Args:
        config: of the stage.
        step: from 0.
        warmup: share of the steps in which it rises; the config's own if None.
    """
    rise = math.ceil((config.warmup if warmup is None else warmup) * config.steps)
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    progress = (step - rise) / max(config.steps - rise, 1)
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * shape)


def set_learning_rates(engine: Any, config: StageConfig, step: int) -> None:
    """Set every group's learning rate for a step (from 0)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(config, step, group["warmup"])


def watch_norm(engine: Any, admits: Callable[[float], bool]) -> None:
    """Let a function decide from the norm of a whole batch's gradients whether the optimiser's step is done.

    DeepSpeed itself leaves out a step whose norm is not finite: it clears the gradients and changes nothing else. So a
    step that is not to be done gets an infinite norm. All ranks compute the same norm.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_get_norm_groups"):
        groups_of = cast(Callable[[], list[Any]], optimizer._get_norm_groups)

        def watched_groups() -> list[Any]:
            groups = groups_of()
            return groups if admits(float(combine_grad_norm_groups(groups))) else [torch.tensor(math.inf)]

        optimizer._get_norm_groups = watched_groups
        return
    norm_of = cast(Callable[[], Any], optimizer.scaled_global_norm)

    def watched_norm() -> Tensor:
        norm = torch.as_tensor(norm_of())
        return norm if admits(float(norm)) else torch.full_like(norm, math.inf)

    optimizer.scaled_global_norm = watched_norm


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def parameter_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's whole shape; ZeRO-3 leaves an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered_weights(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Whole values of the parameters that train, on the CPU of rank 0; empty elsewhere. Every rank must call this."""
    weights: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


class _Snapshot(TorchCheckpointEngine):
    """Takes what DeepSpeed wants to write, so that it can be written while training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Any] = {}
        """By the path that each was meant for."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: folders are made when the states are written."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a copy in this machine's memory, untouched by the steps that follow."""
        memo: dict[int, Any] = {}
        _copy_tensors(state_dict, memo)
        self.states[path] = copy.deepcopy(state_dict, memo)


def _copy_tensors(item: object, memo: dict[int, Any]) -> None:
    """Add to `copy.deepcopy`'s memo a copy on the CPU of every tensor in nested containers."""
    if isinstance(item, Tensor):
        memo[id(item)] = item.detach().to("cpu", copy=True)
    elif isinstance(item, Mapping):
        for value in cast(Mapping[Any, Any], item).values():
            _copy_tensors(value, memo)
    elif isinstance(item, (list, tuple)):
        for value in cast(Sequence[Any], item):
            _copy_tensors(value, memo)


def snapshot_state(engine: Any, rank: int, more: Mapping[str, Any] = MappingProxyType({})) -> Callable[[Path], None]:
    """Copy this rank's part of weights, optimiser and random states into memory. Every rank must call this.

    Args:
        engine: whose state it is.
        rank: of this process.
        more: copies of what else there is to keep, by the names of their files.

    Returns:
        Writes the copy into an empty folder, at any time and from any thread.
    """
    snapshot, own = _Snapshot(), engine.checkpoint_engine
    engine.checkpoint_engine = snapshot
    try:
        # The folder is only named: what DeepSpeed itself leaves there is scripts.
        with tempfile.TemporaryDirectory() as scratch:
            engine.save_checkpoint(scratch, tag=STATE, save_latest=False, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine = own
    states = {str(Path(path).relative_to(scratch)): state for path, state in snapshot.states.items()}
    states[_random_name(rank)] = _random_state(engine.device)
    states |= more

    def write(folder: Path) -> None:
        for name, state in states.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / name)

    return write


def load_state(engine: Any, folder: Path, rank: int) -> None:
    """Restore what `snapshot_state` took, from a folder that was verified.

    Raises:
        InsightEditError: it lacks a parameter that trains, or has one that the model does not.
    """
    loaded, _ = engine.load_checkpoint(str(folder), tag=STATE, custom_load_fn=_load_module)
    if loaded is None:
        raise InsightEditError(f"DeepSpeed found no checkpoint in {folder}; delete it.")
    _restore_random_state(torch.load(folder / _random_name(rank), weights_only=True), engine.device)


def load_resized_state(engine: Any, folder: Path, universal: Path, rank: int, seed: int) -> None:
    """Restore what another number of ranks left, as far as it can be.

    Weights and optimiser are the same. A rank that there was draws on from where it was; others begin with a seed.

    Args:
        engine: DeepSpeed's, not trained yet.
        folder: what `snapshot_state` wrote, verified.
        universal: what was made of it by `insightedit.platform.universal.make_universal`.
        rank: of this process.
        seed: for a rank that there was not, its own.
    """
    load_universal(engine, universal, trained_parameters(engine.module))
    own = folder / _random_name(rank)
    if own.is_file():
        _restore_random_state(torch.load(own, weights_only=True), engine.device)
    else:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - others' global state


def _load_module(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Load a module's state that leaves frozen parameters out, and check what DeepSpeed would not."""
    trained = trained_parameters(dst)
    if missing := trained.keys() - src.keys():
        raise InsightEditError(f"The checkpoint lacks the parameter {sorted(missing)[0]}; delete it.")
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):
        # With ZeRO-3 the weights are in the optimiser's partitions.
        return
    if unknown := dst.load_state_dict(src, strict=False).unexpected_keys:
        raise InsightEditError(f"The checkpoint has a parameter {unknown[0]} that the model has not; delete it.")


def _random_name(rank: int) -> str:
    return f"random-{rank}.pt"


def _random_state(device: torch.device) -> dict[str, Any]:
    _, key, position, has_gauss, gauss = cast(Any, np.random.get_state(legacy=True))  # noqa: NPY002 - others' global state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (torch.from_numpy(key.astype(np.int64)), position, has_gauss, gauss),
    }


def _restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    key, *rest = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - others' global state
