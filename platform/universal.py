"""The state of one number of ranks, for another: DeepSpeed's universal checkpoints.

Each of ZeRO's files holds one rank's part of the flattened parameters and optimiser, and loads at that number of ranks
alone. A universal checkpoint has a file for each parameter and each of its moments, whole, of which any number of ranks
take their parts. Nothing is rounded on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from insightedit.platform.errors import InsightEditError

STATE = "state"
"""The folder, in a checkpoint's, that DeepSpeed's files are in."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of Adam."""
_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def make_universal(checkpoint: Path, folder: Path, world: int) -> None:
    """Convert a checkpoint that was verified.

    Args:
        checkpoint: its folder, in which nothing is changed.
        folder: an empty one, which has the same layout afterwards. It takes twice the size of weights and optimiser on
            the way, and once in the end.
        world: number of ranks that wrote it.

    Raises:
        InsightEditError: some rank's part is not there.
    """
    shards = sorted(int(found[1]) for path in (checkpoint / STATE).iterdir() if (found := _SHARD.fullmatch(path.name)))
    if shards != list(range(world)):
        raise InsightEditError(
            f"{checkpoint} has the optimiser's parts of ranks {shards}, not of all {world}; delete it."
        )
    settings = argparse.Namespace(
        input_folder=str(checkpoint / STATE),
        output_folder=str(folder / STATE),
        # More would be forked off a process with threads and devices of its own.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # What only models that split layers between ranks record.
        inject_missing_state=True,
    )
    # It has no other voice than printing.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cast(Any, ds_to_universal).main(settings)


def load_universal(engine: Any, folder: Path, trained: Mapping[str, nn.Parameter]) -> None:
    """Restore weights and optimiser of a fresh engine from what `make_universal` made.

    Args:
        engine: DeepSpeed's.
        folder: see `make_universal`.
        trained: the engine's parameters that train, by name.
    """
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        _load_zero3(engine.optimizer, folder / STATE)
    else:
        _load_zero2(engine.optimizer, folder / STATE / "zero", trained)
    _load_buffers(engine.module, folder / STATE)


def _load_zero3(optimizer: Any, folder: Path) -> None:
    """With DeepSpeed's own loader, and what it does wrong put right.

    It gives all groups of parameters the first one's settings, and all parameters one and the same counter of steps,
    which each of them would then move.
    """
    groups = optimizer.optimizer.param_groups
    own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict(None, checkpoint_folder=str(folder))
    optimizer.checkpoint_event_epilogue()
    for group, settings in zip(groups, own, strict=True):
        group.update(settings)
    for state in optimizer.optimizer.state.values():
        state["step"] = _counter(state["step"], state["exp_avg"])


def _load_zero2(optimizer: Any, folder: Path, trained: Mapping[str, nn.Parameter]) -> None:
    """DeepSpeed's own loader fails on a rank that has no part of some group, as where there are few biases."""
    inner = optimizer.optimizer
    step = torch.load(folder / next(iter(trained)) / "step.pt", weights_only=True)
    for group in inner.param_groups:
        (flat,) = group["params"]
        inner.state[flat] = {key: torch.zeros_like(flat) for key in _MOMENTS} | {"step": _counter(step, flat)}
    # Tell the parameters where their parts of it are.
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in trained.items():
        safe_set_full_fp32_param(parameter, _whole(folder / name / "fp32.pt"))
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, _whole(folder / name / f"{key}.pt"), key)
    optimizer.update_lp_params()


def _whole(file: Path) -> Tensor:
    """A whole parameter or moment of it."""
    return torch.load(file, map_location="cpu", weights_only=True)["param"]


def _counter(step: Any, beside: Tensor) -> Any:
    """A counter of steps that nobody shares, on a tensor's device."""
    return step.to(beside.device, copy=True) if isinstance(step, Tensor) else step


def _load_buffers(module: nn.Module, folder: Path) -> None:
    """Restore what is state and no parameter, such as running means: universal checkpoints have none of it."""
    file = min(folder.glob("*model_states.pt"))
    kept = torch.load(file, map_location="cpu", weights_only=False)["module"]
    buffers = dict(module.named_buffers())
    module.load_state_dict({name: value for name, value in kept.items() if name in buffers}, strict=False)
