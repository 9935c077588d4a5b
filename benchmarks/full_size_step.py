"""One training step of each stage of a full-size model on a GPU: samples a second, and utilisation beside the roofline.

The sources are those of the config: hub ids, or folders named with `--set model.sources.mllm=FOLDER` and so on. For
speed and memory their weights may as well be random.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from figures import Row, report, row
from PIL import Image
from torch import Tensor, nn

from insightedit.model.attention import use_plain_attention
from insightedit.model.encoders import to_pixels
from insightedit.model.insightedit import InsightEditModel, build_pipeline
from insightedit.model.pipeline import InsightEditPipeline
from insightedit.model.stages import STAGES, part_of
from insightedit.platform.config import RunConfig, StageConfig, load_preset
from insightedit.platform.efficiency import FlopMeter
from insightedit.platform.engine import StageLosses, parameter_shape, set_learning_rates, start_engine

WARM = 2
"""Steps that are not timed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Time a few steps of each stage, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="sd15-llava7b")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s of the device's memory; an H100's 3.35.")
    parser.add_argument(
        "--peak-tflops", type=float, help="Of the device; workers.peak_tflops of the config without it."
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "There is no GPU on this machine; run this where there is one, or a small config with --device cpu."
        )
    config = load_preset(options.config, options.overrides)
    peak = options.peak_tflops or config.workers.peak_tflops
    if peak is None:
        raise SystemExit("The device's peak is not known; give it with --peak-tflops.")
    device = torch.device(options.device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'meeting'}", rank=0, world_size=1)
        for number in config.stages:
            rows += stage_rows(config, number, device, options.steps, peak * 1e12, options.bandwidth * 1e12)
        dist.destroy_process_group()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"Device: {name}")
    report("full_size_step", rows, {})


def stage_rows(
    config: RunConfig, number: int, device: torch.device, steps: int, peak: float, bandwidth: float
) -> list[Row]:
    """What is measured of one stage.

    Args:
        config: whose stage it is.
        number: of the stage.
        device: that trains.
        steps: that are timed.
        peak: floating point operations a second of the device.
        bandwidth: bytes a second of its memory.
    """
    stage = config.stages[number]
    torch.manual_seed(config.seed)
    model_config = config.model_sources()
    pipeline = build_pipeline(model_config)
    batch = {name: x.to(device) for name, x in make_batch(pipeline, stage.micro_batch).items()}
    model: Any = InsightEditModel(pipeline, model_config.lora, model_config.diffusion)
    model.begin_stage(number)
    if device.type == "cpu":
        use_plain_attention(model)
    model.train()
    meter = FlopMeter()
    seconds = timed_steps(model, number, stage, batch, steps, meter, device)
    rates = [stage.micro_batch / one for one in seconds]
    floor = max(meter.per_sample * stage.micro_batch / peak, moved_bytes(model, stage) / bandwidth)
    share = meter.per_sample / peak
    rows = [
        row(f"stage_{number}_samples_per_second", "samples/s", rates),
        row(f"stage_{number}_model_flops", "TFLOP/sample", [meter.per_sample / 1e12]),
        row(f"stage_{number}_utilisation", "", [share * rate for rate in rates]),
        row(f"stage_{number}_utilisation_at_the_roofline", "", [share * stage.micro_batch / floor]),
    ]
    if device.type == "cuda":
        rows.append(row(f"stage_{number}_memory", "GiB", [torch.cuda.max_memory_allocated() / 2**30]))
    return rows


def timed_steps(
    model: nn.Module,
    number: int,
    stage: StageConfig,
    batch: dict[str, Tensor],
    steps: int,
    meter: FlopMeter,
    device: torch.device,
) -> list[float]:
    """Seconds of each step of one micro-batch."""
    names = STAGES[number].losses
    losses = StageLosses(model, number, stage, names, 1.0)
    engine = start_engine(losses, stage, part_of, micro_batch=stage.micro_batch, accumulation=1, device=device)
    totals = torch.full((len(names),), float(stage.micro_batch), device=device)
    marks: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM + steps):
        set_learning_rates(engine, stage, step)
        with meter.first(stage.micro_batch):
            loss, _ = engine(batch, totals)
            engine.backward(loss)
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    engine.destroy()
    return [after - before for before, after in zip(marks[WARM - 1 :], marks[WARM:], strict=False)]


def moved_bytes(model: nn.Module, stage: StageConfig) -> float:
    """Bytes that a step moves at least: weights in each pass, gradients, what the optimiser reads and writes."""
    passes = 3 if stage.gradient_checkpointing else 2
    sizes = [(math.prod(parameter_shape(x)) * x.element_size(), x.requires_grad) for x in model.parameters()]
    weights = sum(size for size, _ in sizes)
    trained = sum(size for size, trains in sizes if trains)
    # Gradients are written and read; weights and both moments are read and written.
    return passes * weights + (2 + 2 * 3) * trained


def make_batch(pipeline: InsightEditPipeline, count: int) -> dict[str, Tensor]:
    """A micro-batch of noise for pictures, with all that a batch has."""
    rng = np.random.default_rng(0)
    side = pipeline.config["resolution"]
    noise = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2 * count)]
    source, target = (to_pixels([Image.fromarray(one) for one in some]) for some in (noise[:count], noise[count:]))
    encoders = pipeline.encoders
    features = encoders.encode_images(source)
    with torch.no_grad():
        return {
            **pipeline.prompts(["Remove the animal that could climb the tree."] * count, source),
            "clip_patches": features.patches,
            "source_embeds": features.embeds,
            "target_embeds": encoders.encode_images(target).embeds,
            "text_states": encoders.encode_text(["A cat under a tree."] * count),
            "source_latents": encoders.encode_latents(source)[:, :4],
            "target_moments": encoders.encode_latents(target),
            "diffusion_weight": torch.ones(count),
            "seed": torch.arange(count),
        }


if __name__ == "__main__":
    main()
