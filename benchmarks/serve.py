"""Our engine beside diffusers' `StableDiffusionInstructPix2PixPipeline`, in one process on the same weights.

Both do the same edits in turn, several times over: whole edits, from prompt and image to image, with the caches off.
diffusers does one after the other, on one thread or on all, whichever is faster. The engine's exact mode does them on
one thread; its fast mode batches them and takes the shortcuts that are named here, at a cost in likeness that is
measured as well.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from figures import report, row
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from insightedit.model.pipeline import load_pipeline
from insightedit.model.unet import InsightEditUNet
from insightedit.model.weights import SINGLE_FILE_CONFIG
from insightedit.platform.config import PRESETS
from insightedit.platform.datasets.shapes_edits import sample_edit
from insightedit.platform.datasets.shapes_world import render
from insightedit.serve.backend import Conditions, Edited, EditJob
from insightedit.serve.engine import ConditionEngine, EditEngine, use_threads
from insightedit.serve.settings import EngineSettings

FOUNDATION = PRESETS / "nano-foundation" / "diffusion"
GUIDANCE: dict[str, Any] = {"guidance_scale": 7.5, "image_guidance_scale": 1.5}

Pictures = list[NDArray[np.uint8]]
Way = Callable[[], Pictures]
"""Does every edit once, in order."""


def main() -> None:
    """Do the edits in each way in turn, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=FOUNDATION, help="A pipeline's folder; nano's foundation without."
    )
    parser.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's size, random weights, bfloat16.")
    parser.add_argument("--edits", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deep-every", type=int, default=3, help="Of the fast mode, like the next.")
    parser.add_argument("--guide-every", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, help="Side of the edited images in pixels; 32, or 256 with --sd15.")
    options = parser.parse_args()
    size = options.size or (256 if options.sd15 else 32)
    jobs = [make_job(seed, size, options.steps) for seed in range(options.edits)]
    with tempfile.TemporaryDirectory() as folder:
        if options.sd15:
            save_full_size(Path(folder))
        else:
            save_instruct_pix2pix(options.model, Path(folder))
        precision = "bfloat16" if options.sd15 else "float32"
        fast = {"deep_every": options.deep_every, "guide_every": options.guide_every, "max_batch": options.batch}
        ways = make_ways(folder, jobs, precision, fast)
        rates, pictures = measured(ways, options.rounds, len(jobs))
    best = max(np.median(rates[name]) for name in rates if name.startswith("diffusers"))
    likeness = [psnr(one, other) for one, other in zip(pictures["fast"], pictures["exact"], strict=True)]
    ratios = {f"{name}_vs_diffusers": float(np.median(rates[name]) / best) for name in ("exact", "fast")}
    ratios["fast_psnr_db"] = float(np.percentile(likeness, 5))
    rows = [row(name, "edits/s", values) for name, values in rates.items()]
    report("serve_sd15" if options.sd15 else "serve", [*rows, row("fast_psnr", "dB", likeness)], ratios)


def make_job(seed: int, size: int, steps: int) -> EditJob:
    """An edit of the shapes world."""
    edit = sample_edit(seed, "validation")
    image = Image.fromarray(render(edit.source)).resize((size, size), Image.Resampling.BICUBIC)
    return EditJob(prompt=edit.simple, pixels=np.asarray(image), seed=seed, num_inference_steps=steps, **GUIDANCE)


# -- the weights ------------------------------------------------------------------------------------------------------


def save_instruct_pix2pix(source: Path, folder: Path) -> None:
    """A pipeline's UNet without what is InsightEdit's own, its VAE and its text encoder, as InstructPix2Pix."""
    parts = load_pipeline(source).components
    inner: Any = parts["unet"]
    wide = InsightEditUNet.from_unet(inner, in_channels=8) if inner.config["in_channels"] == 4 else inner
    unet: Any = UNet2DConditionModel.from_config({k: v for k, v in wide.config.items() if not k.startswith("_")})
    unet.load_state_dict({name: x for name, x in wide.state_dict().items() if ".processor." not in name})
    save(folder, {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")} | {"unet": unet})


def save_full_size(folder: Path) -> None:
    """InstructPix2Pix of Stable Diffusion 1.5's size with random weights, which take as long as any."""
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    unet_config: Any = UNet2DConditionModel.load_config(SINGLE_FILE_CONFIG, subfolder="unet")
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config({**unet_config, "in_channels": 8}),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(SINGLE_FILE_CONFIG, subfolder="vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(SINGLE_FILE_CONFIG / "text_encoder")),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(FOUNDATION / "tokenizer", model_max_length=77),
        "scheduler": EulerAncestralDiscreteScheduler.from_pretrained(SINGLE_FILE_CONFIG, subfolder="scheduler"),
    }
    torch.set_default_dtype(torch.float32)
    save(folder, parts)


def save(folder: Path, parts: dict[str, Any]) -> None:
    """A folder of InstructPix2Pix."""
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionInstructPix2PixPipeline(**parts, **absent).save_pretrained(folder)


# -- the ways to do the edits -----------------------------------------------------------------------------------------


def make_ways(folder: str, jobs: Sequence[EditJob], precision: str, fast: dict[str, Any]) -> dict[str, Way]:
    """Every way, loaded and ready."""
    cores = os.cpu_count() or 1
    caches = {"cache_bytes": 0, "precision": precision}
    exact = EngineSettings.model_validate(caches)
    quick = EngineSettings.model_validate({**caches, "threads": cores, "channels_last": True, **fast})
    ways = {f"diffusers_{threads}_threads": diffusers_way(folder, jobs, precision, threads) for threads in {1, cores}}
    return {**ways, "exact": engine_way(folder, jobs, exact, exact=True), "fast": engine_way(folder, jobs, quick)}


def diffusers_way(folder: str, jobs: Sequence[EditJob], precision: str, threads: int) -> Way:
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


def engine_way(folder: str, jobs: Sequence[EditJob], settings: EngineSettings, *, exact: bool = False) -> Way:
    """Our engine, with all the edits before it at once."""
    conditioner = ConditionEngine(folder, exact, settings)
    engine = EditEngine(folder, exact, settings)

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


def measured(ways: Mapping[str, Way], rounds: int, edits: int) -> tuple[dict[str, list[float]], dict[str, Pictures]]:
    """Edits a second of every way in every round, and the pictures of the last one. A first round is not timed."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    pictures: dict[str, Pictures] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            pictures[name] = way()
            if number:
                rates[name].append(edits / (time.perf_counter() - begun))
        print({name: round(values[-1], 3) for name, values in rates.items() if values}, flush=True)
    return rates, pictures


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal to noise of two pictures in dB, 100 at most."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 255**2 * 1e-10)))


if __name__ == "__main__":
    main()
