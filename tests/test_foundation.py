"""The nano foundation: built in small, opened as people open the paper's parts, and the shipped one's promises."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModelWithProjection

from insightedit.jobs.foundation import REPORT, FoundationRecipe, build_foundation
from insightedit.jobs.foundation_parts import QUIET, Muon, quieten
from insightedit.model.configuration import ModelConfig, QFormerConfig, SourcesConfig
from insightedit.model.insightedit import build_pipeline
from insightedit.platform.config import PRESETS
from insightedit.platform.errors import UsageError

SHIPPED = PRESETS / "nano-foundation"


def recipe() -> FoundationRecipe:
    return FoundationRecipe().scaled(0.002)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("foundation") / "out"
    return folder, build_foundation(folder, recipe(), lambda _line: None)


def test_every_part_opens_with_its_librarys_loader(built: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = built
    diffusion: Any = StableDiffusionPipeline.from_pretrained(folder / "diffusion", dtype=torch.float32)
    diffusion.set_progress_bar_config(disable=True)
    drawn = diffusion("large red circle top left", height=32, width=32, num_inference_steps=2)
    assert drawn.images[0].size == (32, 32)
    assert CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").config.projection_dim == 128
    mllm: Any = AutoModelForImageTextToText.from_pretrained(folder / "mllm", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "mllm")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the picture"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (32, 32)), text=prompt, return_tensors="pt")
    output = mllm.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs.input_ids.shape[1]


def test_insightedit_is_built_on_it(built: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = built
    sources = {name: str(folder / name) for name in ("diffusion", "image_encoder", "mllm")}
    config = ModelConfig(
        sources=SourcesConfig(**sources), resolution=32, prompt_length=160, qformer=QFormerConfig(num_heads=4)
    )
    pipeline: Any = build_pipeline(config)
    pipeline.set_progress_bar_config(disable=True)
    edited = pipeline("remove the red circle", Image.new("RGB", (32, 32)), num_inference_steps=2)
    assert edited.images[0].size == (32, 32)


def test_the_report_names_every_file_and_every_part(built: tuple[Path, dict[str, Any]]) -> None:
    folder, report = built
    assert set(report["quality"]) == {"vae", "clip", "unet", "mllm"}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {REPORT}
    assert found == set(report["files"])
    assert json.loads((folder / REPORT).read_text())["files"] == report["files"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="is not empty"):
        build_foundation(tmp_path, recipe(), lambda _line: None)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.slow
def test_the_same_recipe_makes_the_same_files(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = build_foundation(tmp_path / "again", recipe(), lambda _line: None)
    assert again["files"] == built[1]["files"]


def test_a_quiet_unet_computes_the_same() -> None:
    unet: Any = UNet2DConditionModel.from_pretrained(SHIPPED / "diffusion" / "unet", dtype=torch.float32)
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 24, 128)
    with torch.no_grad():
        quiet, weight = unet(*inputs).sample, unet.conv_in.weight.clone()
        quieten(unet, 1 / QUIET)
        loud = unet(*inputs).sample
    assert unet.conv_in.weight.equal(weight / QUIET)
    torch.testing.assert_close(quiet, loud, rtol=0, atol=0.002)


def test_the_shipped_foundation_is_whole_and_small() -> None:
    report = json.loads((SHIPPED / REPORT).read_text())
    for name, expected in report["files"].items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == expected, name
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 15_000_000
    quality = report["quality"]
    assert quality["vae"]["worst_shape_error"] <= 0.02
    assert quality["clip"]["best_of_16"] >= 0.9
    assert quality["unet"]["best_of_16"] >= 0.9
    assert min(quality["mllm"].values()) >= 0.9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float32, 0.05)])
def test_muon_steps_as_pytorchs_own(dtype: torch.dtype, tolerance: float) -> None:
    """To the bit in bfloat16; in float32 within what bfloat16 rounds away."""
    torch.manual_seed(0)
    begun = [torch.randn(24, 40), torch.randn(40, 24), torch.randn(32, 32)]
    ours, theirs = ([matrix.clone().requires_grad_() for matrix in begun] for _ in range(2))
    muon = Muon(ours, 0.1, dtype)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        muon.step(0.02)
        reference.step()
    for mine, other, first in zip(ours, theirs, begun, strict=True):
        moved = (other - first).norm()
        assert moved > 0.01 * first.norm()
        assert (mine - other).norm() <= tolerance * moved
