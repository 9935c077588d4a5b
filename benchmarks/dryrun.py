"""What `train --dry-run` says of memory, beside what DeepSpeed's engine and loop really take on this machine.

For each stage the workers are started as processes of their own, without Ray, and do three steps of made-up samples as
long as samples can be. What a rank holds is the live tensors between steps and, above them, what torch's allocator
hands out in the last step. Interpreter, libraries and the allocator's gaps are no part of it.

    make bench-dryrun ARGS="--presets nano"
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from insightedit.jobs.dry_run import GIB, dry_run
from insightedit.model.attention import use_plain_attention
from insightedit.model.outline import outline_batch
from insightedit.model.precision import multiplies_bf16
from insightedit.model.weights import SINGLE_FILE_CONFIG
from insightedit.platform.config import PRESETS, RunConfig, load_preset
from insightedit.platform.editing import EditingTask
from insightedit.platform.engine import StageLosses, start_engine
from insightedit.platform.loop import Layout, StageLoop
from insightedit.platform.mixtures import micro_batch_size, step_positions
from insightedit.platform.trainer import loss_names

STEPS = 3


def main() -> None:
    """Compare, or be one rank of what is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--presets", nargs="+", default=["nano", "unet"])
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(measure(load_preset(arguments.presets[0]), arguments.stages[0], arguments.rank)))
        return
    rows: list[figures.Row] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for preset in arguments.presets:
            path = unet_preset(Path(scratch)) if preset == "unet" else short_preset(preset, Path(scratch))
            for number in arguments.stages:
                planned = dry_run(load_preset(path), [number]).memory[number].total * GIB
                real = measured(path, number)
                name = f"{preset}_stage_{number}"
                rows += [figures.row(f"{name}_planned", "MB", [planned / 1e6])]
                rows += [figures.row(f"{name}_measured", "MB", [real / 1e6])]
                ratios[name] = planned / real
    figures.report("dryrun", rows, ratios)


def short_preset(preset: str, folder: Path) -> Path:
    """A preset without checkpoints, which are copies that a measurement of three steps does not make."""
    stages = {number: {"steps": STEPS, "checkpoint_every": STEPS} for number in load_preset(preset).stages}
    path = folder / f"{preset}.yaml"
    path.write_text(yaml.safe_dump({"extends": preset, "stages": stages}), encoding="utf-8")
    return path


def unet_preset(folder: Path) -> Path:
    """Stable Diffusion 1.5 in full size with random weights, with nano's small language model, for one worker."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: PLC0415 - not needed by nano
    from transformers import CLIPTextConfig, CLIPTextModel  # noqa: PLC0415

    target = folder / "diffusion"
    shutil.copytree(PRESETS / "nano-foundation" / "diffusion", target)
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        shutil.rmtree(target / name)
        built: Any = kind.from_config(kind.load_config(SINGLE_FILE_CONFIG, subfolder=name))
        built.half().save_pretrained(target / name)
    shutil.rmtree(target / "text_encoder")
    text: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(SINGLE_FILE_CONFIG, subfolder="text_encoder"))
    text.half().save_pretrained(target / "text_encoder")
    stage = {"steps": STEPS, "checkpoint_every": STEPS, "frozen": "bf16", "global_batch": 2, "micro_batch": 2}
    content = {
        "extends": "nano",
        "model": {"sources": {"diffusion": str(target)}, "resolution": 128},
        "stages": dict.fromkeys((1, 2, 3), stage),
        "workers": {"count": 1},
    }
    path = folder / "unet.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def measured(path: Path, number: int) -> int:
    """Bytes that rank 0 takes at most."""
    world = load_preset(path).workers.sizes[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--presets", str(path), "--stages", str(number), "--rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    printed = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"Stage {number} of {path.name} could not be measured.")
    return int(json.loads(printed[0].splitlines()[-1]))


def measure(config: RunConfig, number: int, rank: int) -> int:
    """One rank's training, and the bytes that it takes at most."""
    torch.set_num_threads(config.workers.threads)
    dist.init_process_group("gloo")
    loop = start_loop(config, number, rank)
    for step in range(STEPS - 1):
        loop.step(step)
    gc.collect()
    steady = alive()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop.step(STEPS - 1)
    dist.destroy_process_group()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return steady + max(0, int(np.cumsum(sizes).max()))


def start_loop(config: RunConfig, number: int, rank: int) -> StageLoop:
    """A stage's loop as `StageWorker` builds it, over made-up samples."""
    stage = config.stages[number].settled(bf16=multiplies_bf16(torch.device("cpu")))
    world, names = config.workers.sizes[0], loss_names(number)
    size = micro_batch_size(stage.global_batch, world, stage.micro_batch)
    accumulation = stage.global_batch // world // size
    layout = Layout(rank=rank, world=world, micro_batch=size, accumulation=accumulation, device=torch.device("cpu"))
    task = EditingTask(key="", model=config.model_sources(), encoders="", validation=None)
    model: Any = task.build_model(halved=stage.frozen == "bf16")
    model.begin_stage(number)
    use_plain_attention(model)
    model.train()
    batch = {name: made_up(x) for name, x in outline_batch(model.own_pipeline, size).items()}
    engine = start_engine(
        StageLosses(model, number, stage, names, float(world * accumulation)),
        stage,
        task.part_of,
        micro_batch=size,
        accumulation=accumulation,
        device=layout.device,
    )

    def arrays() -> Iterator[Mapping[str, Any]]:
        for step in range(STEPS):
            positions = step_positions(step, global_batch=stage.global_batch, world=world, rank=rank)
            for some in positions.reshape(accumulation, size):
                yield {**batch, "position": some}

    return StageLoop(engine, stage, names, layout, arrays(), lambda batch: task.loss_weights(batch, number))


def made_up(tensor: Tensor) -> Any:
    """An array of a tensor's shape: what has no data gets noise, in half precision as shards have it."""
    return (
        np.random.default_rng(0).random(tensor.shape, np.float32).astype(np.float16)
        if tensor.is_meta
        else tensor.numpy()
    )


def alive() -> int:
    """Bytes of all tensors that the process holds."""
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        if isinstance(item, Tensor) and item.device.type == "cpu":
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
