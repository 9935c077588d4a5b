"""`insightedit foundation`: train the nano preset's pretrained parts and say how well each does.

The result has the layout that people have for the paper's sizes: a Stable Diffusion folder, a CLIP vision tower and
a LLaVA. It follows from the seed: the same recipe gives the same files on one machine, as every process runs one
thread. No part ever sees an edit.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import platform as machine
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection, LlavaProcessor

from insightedit.jobs import foundation_parts as parts
from insightedit.jobs.foundation_parts import Fit, Pictures, Progress
from insightedit.jobs.foundation_quality import clip_quality, mllm_quality, unet_quality, vae_quality
from insightedit.platform.errors import UsageError

REPORT = "foundation.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundationRecipe:
    """How the foundation is trained."""

    seed: int = 0
    scenes: int = 48_000
    vae: Fit = field(default_factory=lambda: Fit(steps=2600, batch=64, learning_rate=6e-3))
    clip: Fit = field(default_factory=lambda: Fit(steps=1200, batch=128, learning_rate=2e-3, weight_decay=0.05))
    unet: Fit = field(default_factory=lambda: Fit(steps=2800, batch=48, learning_rate=3e-3))
    mllm: Fit = field(default_factory=lambda: Fit(steps=9000, batch=16, learning_rate=3e-3, weight_decay=0.01))
    mllm_tuning: Fit = field(default_factory=lambda: Fit(steps=2400, batch=16, learning_rate=2e-3, weight_decay=0.01))
    mllm_hard: Fit = field(default_factory=lambda: Fit(steps=3200, batch=16, learning_rate=2e-3, weight_decay=0.01))
    mllm_hard_rounds: int = 4
    validation_scenes: int = 256

    def scaled(self, share: float) -> FoundationRecipe:
        """The same recipe with `share` of the steps and scenes, for a quick look."""

        def shorter(how: Fit) -> Fit:
            return replace(how, steps=max(round(how.steps * share), 1), warmup=max(round(how.warmup * share), 1))

        return replace(
            self,
            scenes=max(round(self.scenes * share), 256),
            validation_scenes=max(round(self.validation_scenes * share), 32),
            **{
                name: shorter(getattr(self, name))
                for name in ("vae", "clip", "unet", "mllm", "mllm_tuning", "mllm_hard")
            },
        )


def build_foundation(out: Path, recipe: FoundationRecipe, progress: Progress) -> dict[str, Any]:
    """Train every part and write them below a folder.

    Args:
        out: a folder that does not exist yet or is empty.
        recipe: what to do; the files follow from it.
        progress: is told what happens.

    Returns:
        The report, as `foundation.json` in the folder has it: recipe, quality of each part on validation scenes,
        seconds, versions, and the sha256 of every file.

    Raises:
        UsageError: the folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty; name a new folder or empty it first.")
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    started = time.monotonic()
    # Two processes of one thread each use both cores and still give the same bits.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as images, context.Pool(1) as language:
        jobs = (
            images.apply_async(_build_images, (temporary, recipe)),
            language.apply_async(_build_mllm, (temporary, recipe)),
        )
        progress("training VAE, CLIP and UNet in one process, the language model in another")
        quality = {name: value for job in jobs for name, value in job.get().items()}
    _forget_folders(temporary)
    report = {
        "recipe": asdict(recipe),
        "quality": quality,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "machine": machine.processor() or machine.machine(),
        "files": {
            str(path.relative_to(temporary)): _sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()
        },
    }
    (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    return report


def _begin(seed: int) -> None:
    torch.set_num_threads(1)
    # On a CPU in bf16 PyTorch's fused attention takes two to three times as long as plain products.
    torch.backends.cuda.enable_flash_sdp(enabled=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(seed)
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _build_images(out: Path, recipe: FoundationRecipe) -> dict[str, Any]:
    """VAE, CLIP and UNet, one after the other; each is written as soon as it is trained."""
    _begin(recipe.seed)
    pictures = Pictures.draw(recipe.scenes, recipe.seed)
    held_out = Pictures.draw(recipe.validation_scenes, recipe.seed, "validation")
    vae = parts.train_vae(pictures, recipe.vae, _say)
    vae = _stored(vae, out / "diffusion" / "vae")
    quality: dict[str, Any] = {"vae": vae_quality(vae, held_out)}
    _say(f"vae: {quality['vae']}")
    tokenizer = parts.build_tokenizer(parts.TEXT_LENGTH, ends=True)
    clip = parts.train_clip(pictures, tokenizer, recipe.clip, _say)
    quality["clip"] = clip_quality(clip, tokenizer, held_out)
    _say(f"clip: {quality['clip']}")
    text_encoder, image_encoder = _towers(clip)
    image_encoder = _stored(image_encoder, out / "image_encoder")
    parts.image_processor().save_pretrained(out / "image_encoder")
    text_encoder = _stored(text_encoder, out / "diffusion" / "text_encoder")
    unet = parts.train_unet(pictures, vae, text_encoder, tokenizer, recipe.unet, _say)
    unet = unet.half()
    parts.quieten(unet)
    members: dict[str, Any] = {
        "vae": vae.half(),
        "text_encoder": text_encoder.half(),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": parts.noise_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    StableDiffusionPipeline(**members).save_pretrained(out / "diffusion")
    pipeline = StableDiffusionPipeline.from_pretrained(out / "diffusion", dtype=torch.float32)
    quality["unet"] = unet_quality(pipeline, clip, tokenizer, held_out)
    _say(f"unet: {quality['unet']}")
    return quality


def _build_mllm(out: Path, recipe: FoundationRecipe) -> dict[str, Any]:
    """The language model with its processor."""
    _begin(recipe.seed + 1)
    pictures = Pictures.draw(recipe.scenes, recipe.seed + 1)
    tokenizer = parts.build_tokenizer(512, ends=False)
    mllm: Any = parts.train_mllm(pictures, tokenizer, recipe.mllm, _say)
    tunings = [(recipe.mllm_tuning, False), *[(recipe.mllm_hard, True)] * recipe.mllm_hard_rounds]
    for seed, (how, hard) in enumerate(tunings, recipe.seed + 2):
        # Rounded to what half precision can say: tuning goes on just as well from a stored model.
        mllm = mllm.half().float()
        parts.tune_mllm(mllm, pictures, tokenizer, how, _say, hard=hard, seed=seed)
    mllm = _stored(mllm, out / "mllm")
    processor = LlavaProcessor(
        image_processor=parts.image_processor(),
        tokenizer=tokenizer,
        patch_size=parts.CHAT_VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=parts.CHAT_TEMPLATE,
    )
    processor.save_pretrained(out / "mllm")
    held_out = Pictures.draw(recipe.validation_scenes, recipe.seed, "validation")
    quality = mllm_quality(mllm, tokenizer, held_out, random.Random(recipe.seed))
    _say(f"mllm: {quality}")
    return {"mllm": quality}


def _towers(clip: CLIPModel) -> tuple[CLIPTextModel, CLIPVisionModelWithProjection]:
    """CLIP's two towers as the models that Stable Diffusion and InsightEdit load."""
    config: Any = clip.config
    text = CLIPTextModel(config.text_config)
    vision = CLIPVisionModelWithProjection(config.vision_config)
    for tower, prefix in ((text, "text_model."), (vision, "")):
        own = clip.state_dict()
        names = list(tower.state_dict())
        strip = prefix and not names[0].startswith(prefix)
        tower.load_state_dict({name: own[prefix + name] if strip else own[name] for name in names})
    return text.eval(), vision.eval()


def _stored(module: Any, folder: Path) -> Any:
    """Write a part in half precision and open it again in single, so that all that follows sees what is shipped."""
    module.half().save_pretrained(folder)
    return type(module).from_pretrained(folder, dtype=torch.float32).eval()


def _forget_folders(folder: Path) -> None:
    """Take out of configs where a part was opened from, which would differ with every `--out`."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
