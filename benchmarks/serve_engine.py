"""The first half of `serve.py`: our engine beside diffusers' pipeline, in one process.

Both do the same edits in turn, several times over: whole edits, from prompt and image to image, with the caches off.
diffusers does one after the other, on one thread or on all, whichever is faster. The engine's exact mode does them on
one thread; its fast mode batches them and takes the shortcuts that are named in `FAST`, at a cost in likeness that is
measured as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from figures import Row, row
from numpy.typing import NDArray
from PIL import Image
from serve_weights import make_job

from insightedit.serve.backend import Conditions, Edited, EditJob
from insightedit.serve.engine import ConditionEngine, EditEngine, use_threads
from insightedit.serve.settings import EngineSettings

FAST: dict[str, Any] = {"deep_every": 3, "guide_every": 3, "channels_last": True}
"""Settings of the fast mode beside its batches."""

Pictures = list[NDArray[np.uint8]]
Way = Callable[[], Pictures]
"""Does every edit once, in order."""


def engine_figures(
    weights: Path, likeness: Path, precision: str, size: int, edits: int, steps: int, rounds: int
) -> tuple[list[Row], dict[str, float]]:
    """Rows and ratios of the same edits done in every way.

    Args:
        weights: folder of InstructPix2Pix, which diffusers opens as well.
        likeness: folder of the pipeline on which fast edits are compared with exact ones.
        precision: `float32` or `bfloat16`.
        size: side of the images in pixels.
        edits: how many.
        steps: of each.
        rounds: how often they are done.
    """
    jobs = [make_job(seed, size, steps) for seed in range(edits)]
    rates = measured(make_ways(weights, jobs, precision), rounds, len(jobs))
    best = max(np.median(rates[name]) for name in rates if name.startswith("diffusers"))
    ratios = {f"{name}_vs_diffusers": float(np.median(rates[name]) / best) for name in ("exact", "fast")}
    ours = our_ways(likeness, jobs, precision)
    like = [psnr(one, other) for one, other in zip(ours["fast"](), ours["exact"](), strict=True)]
    ratios["fast_psnr_db"] = float(np.percentile(like, 5))
    return [*(row(name, "edits/s", values) for name, values in rates.items()), row("fast_psnr", "dB", like)], ratios


# -- the ways to do the edits -----------------------------------------------------------------------------------------


def make_ways(folder: Path, jobs: Sequence[EditJob], precision: str) -> dict[str, Way]:
    """Every way, loaded and ready."""
    threads = sorted({1, os.cpu_count() or 1})
    theirs = {f"diffusers_{count}_threads": diffusers_way(folder, jobs, precision, count) for count in threads}
    return {**theirs, **our_ways(folder, jobs, precision)}


def our_ways(folder: Path, jobs: Sequence[EditJob], precision: str) -> dict[str, Way]:
    """The exact and the fast mode."""
    exact = {"cache_bytes": 0, "precision": precision}
    fast = {**exact, **FAST, "threads": os.cpu_count() or 1}
    settings = {"exact": EngineSettings.model_validate(exact), "fast": EngineSettings.model_validate(fast)}
    return {name: engine_way(folder, jobs, chosen, exact=name == "exact") for name, chosen in settings.items()}


def diffusers_way(folder: Path, jobs: Sequence[EditJob], precision: str, threads: int) -> Way:
    """diffusers' pipeline, one edit after the other."""
    load: Any = StableDiffusionInstructPix2PixPipeline.from_pretrained
    pipeline = load(folder, torch_dtype=getattr(torch, precision), safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def way() -> Pictures:
        use_threads(threads)
        return [np.asarray(pipeline(**call(job)).images[0]) for job in jobs]

    return way


def call(job: EditJob) -> dict[str, Any]:
    """A job as diffusers' pipeline is called."""
    return {
        "prompt": job.prompt,
        "image": Image.fromarray(job.pixels),
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "image_guidance_scale": job.image_guidance_scale,
        "generator": torch.Generator().manual_seed(job.seed),
    }


def engine_way(folder: Path, jobs: Sequence[EditJob], settings: EngineSettings, *, exact: bool) -> Way:
    """Our engine, with all the edits before it at once."""
    conditioner = ConditionEngine(str(folder), exact, settings)
    engine = EditEngine(str(folder), exact, settings)

    def way() -> Pictures:
        use_threads(settings.threads)
        futures: list[Future[Edited]] = []
        for job in jobs:
            (conditions,) = conditioner.condition([job])
            assert isinstance(conditions, Conditions)
            futures.append(engine.submit(job, conditions))
        return [future.result().pixels for future in futures]

    return way


# -- measuring --------------------------------------------------------------------------------------------------------


def measured(ways: Mapping[str, Way], rounds: int, edits: int) -> dict[str, list[float]]:
    """Edits a second of every way in every round. A first round is not timed."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if number:
                rates[name].append(edits / (time.perf_counter() - begun))
        print({name: round(values[-1], 3) for name, values in rates.items() if values}, flush=True)
    return rates


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal to noise of two pictures in dB, 100 at most."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 255**2 * 1e-10)))
