"""The state of one number of ranks, for another: DeepSpeed's universal checkpoints.

Each of ZeRO's files holds one rank's part of the flattened parameters and optimiser, and loads at that number of ranks
alone. A universal checkpoint has a file for each parameter and each of its moments, whole, of which any number of ranks
take their parts. Both ways are DeepSpeed's own; nothing is rounded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from insightedit.platform.errors import InsightEditError

STATE = "state"
"""The folder, in a checkpoint's, that DeepSpeed's files are in."""
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


def load_universal(engine: Any, folder: Path) -> None:
    """Restore weights and optimiser from what `make_universal` made; the engine was started for that."""
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in engine.optimizer.param_groups
    ]
    engine.load_checkpoint(str(folder), tag=STATE)
    optimizer = engine.optimizer.optimizer
    # With ZeRO-3 DeepSpeed gives all groups the first one's settings, and all parameters one and the same step counter.
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(step := state.get("step"), Tensor):
            state["step"] = step.to(state["exp_avg"].device, copy=True)
    _load_buffers(engine.module, folder)


def _load_buffers(module: torch.nn.Module, folder: Path) -> None:
    """Restore what is state and no parameter, such as running means: DeepSpeed does not."""
    file = min((folder / STATE).glob("*model_states.pt"))
    kept = torch.load(file, map_location="cpu", weights_only=False)["module"]
    buffers = dict(module.named_buffers())
    module.load_state_dict({name: value for name, value in kept.items() if name in buffers}, strict=False)
