"""The model's switches for comparisons: no BIM, and a text encoder in place of the language model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from insightedit.model.configuration import BimConfig, ModelConfig
from insightedit.model.encoders import encode_text, text_ids, to_pixels
from insightedit.model.insightedit import InsightEditModel, build_pipeline, draw_noise
from insightedit.model.outline import build_outline, outline_batch
from insightedit.model.pipeline import InsightEditPipeline, load_pipeline
from insightedit.model.stages import STAGES, part_of, parts_trained
from insightedit.platform.config import load_preset
from insightedit.platform.engine import StageLosses
from insightedit.platform.errors import UsageError
from insightedit.platform.tracing import trace_step

INSTRUCTIONS = ["remove it", "remove the red circle"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return tiny_models.tiny_config(tiny_models.build_sources(tmp_path_factory.mktemp("sources")))


def pictures() -> list[Any]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]


def build(config: ModelConfig) -> tuple[InsightEditPipeline, InsightEditModel]:
    torch.manual_seed(0)
    pipeline = build_pipeline(config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, InsightEditModel(pipeline, config.lora, config.diffusion)


def features(pipeline: InsightEditPipeline) -> dict[str, Tensor]:
    """A batch's features of two edits, but for the instructions."""
    pixels = to_pixels(pictures())
    seen, moments = pipeline.encoders.encode_images(pixels), pipeline.encoders.encode_latents(pixels)
    return {
        "clip_patches": seen.patches,
        "source_embeds": seen.embeds,
        "target_embeds": seen.embeds,
        "source_latents": moments[:, :4],
        "target_moments": moments,
        "diffusion_weight": torch.ones(2),
        "seed": torch.tensor([7, 8]),
    }


def text_batch(pipeline: InsightEditPipeline, instructions: list[str]) -> dict[str, Tensor]:
    ids = text_ids(pipeline.tokenizer, tiny_models.TEXT_LENGTH, instructions)
    return {**features(pipeline), "text_ids": ids}


def trained_parts(model: InsightEditModel, stage: int) -> set[str | None]:
    model.begin_stage(stage)
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def edits(pipeline: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipeline(INSTRUCTIONS, pictures(), generator=generators, output_type="pt", exact=True).images


def test_without_bim_the_q_former_alone_conditions(config: ModelConfig, tmp_path: Path) -> None:
    bare = replace(config, bim=BimConfig(enabled=False))
    pipeline, model = build(bare)
    assert not [name for name, _ in model.named_parameters() if name.startswith("bim")]
    assert trained_parts(model, 2) == parts_trained(2, bare) == STAGES[2].trains - {"bim"}
    assert parts_trained(2, config) == STAGES[2].trains
    seen: list[tuple[Tensor, Tensor]] = []
    model.unet.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append((args[0], kwargs["encoder_hidden_states"].text)), with_kwargs=True
    )
    queries: list[Tensor] = []
    keep: Any = queries.append
    model.qformer.register_forward_hook(lambda _m, _a, output: keep(output))
    batch: dict[str, Tensor] = {**features(pipeline), **pipeline.prompts(INSTRUCTIONS, to_pixels(pictures()))}
    drop = draw_noise(batch["seed"], batch["source_latents"].shape, 1000).drop
    assert bool((drop >= 3 * config.diffusion.condition_drop).all()), "these seeds drop nothing"
    losses = model(batch, 2)
    assert losses.keys() == set(STAGES[2].losses)
    sample, text = seen[0]
    assert text.equal(queries[0]), "f_txt is q' itself"
    assert sample.shape[1] == 8, "no v is added"
    conditions = pipeline.condition(INSTRUCTIONS, pictures())
    assert conditions.spatial is None
    model.save_pipeline(tmp_path / "pipeline", image_branch=False)
    assert not (tmp_path / "pipeline" / "bim").exists()
    assert edits(load_pipeline(tmp_path / "pipeline")).equal(edits(model.pipeline(image_branch=False)))


def test_a_text_encoder_conditions_as_instruct_pix2pix_does(config: ModelConfig, tmp_path: Path) -> None:
    """Its loss is that of diffusers' plain UNet with the frozen text encoder's states, and nothing else trains."""
    pipeline, model = build(replace(config, conditioning="text"))
    assert trained_parts(model, 2) == {"unet"}
    batch = text_batch(pipeline, INSTRUCTIONS)
    terms = model(batch, 2)
    assert terms["L_MLLM"].values.tolist() == terms["L_IAA"].values.tolist() == [0.0, 0.0]
    plain: Any = UNet2DConditionModel.from_config(
        {name: value for name, value in model.unet.config.items() if not name.startswith("_")}
    )
    own = {name: value for name, value in model.unet.state_dict().items() if ".processor." not in name}
    plain.load_state_dict(own)
    draws = draw_noise(batch["seed"], batch["source_latents"].shape, 1000)
    mean, log_variance = batch["target_moments"].chunk(2, dim=1)
    latents = (mean + draws.posterior * (0.5 * log_variance).exp()) * pipeline.vae.config["scaling_factor"]
    noisy = model.noise_scheduler.add_noise(latents, draws.noise, draws.timesteps)
    text = encode_text(pipeline.text_encoder, pipeline.tokenizer, INSTRUCTIONS)
    output = plain(torch.cat([noisy, batch["source_latents"]], dim=1), draws.timesteps, text).sample
    velocity = model.noise_scheduler.get_velocity(latents, draws.noise, draws.timesteps)
    expected = (output - velocity).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["L_diff1"].values, expected, rtol=1e-4, atol=1e-5)
    assert not model(text_batch(pipeline, INSTRUCTIONS[::-1]), 2)["L_diff1"].values.equal(terms["L_diff1"].values)
    terms["L_diff1"].values.sum().backward()
    assert {part_of(name) for name, one in model.named_parameters() if one.grad is not None} == {"unet"}
    with pytest.raises(ValueError, match=r"stage 1 trains parts that model\.conditioning: text leaves out"):
        model(batch, 1)
    model.save_pipeline(tmp_path / "pipeline", image_branch=False)
    folders = {path.name for path in (tmp_path / "pipeline").iterdir() if path.is_dir()}
    assert folders == {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}, "InstructPix2Pix's own parts"
    assert edits(load_pipeline(tmp_path / "pipeline")).equal(edits(model.pipeline(image_branch=False)))


def test_a_dry_run_knows_what_each_is_spared(config: ModelConfig) -> None:
    stage, names = load_preset("nano", ["stages.2.precision=fp32"]).stages[2], STAGES[2].losses
    flops: list[int] = []
    for one in (replace(config, conditioning="text"), replace(config, bim=BimConfig(enabled=False)), config):
        model = build_outline(one)
        model.begin_stage(2)
        losses = StageLosses(model, 2, stage, names, 1.0)
        flops.append(trace_step(losses, outline_batch(model.own_pipeline, 2), len(names)).flops)
    assert 0 < flops[0] < flops[1] < flops[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.conditioning=text"], r"stages\.1 trains nothing of this model; take the stage away with stages\.1="),
        (
            ["model.conditioning=text", "stages.1=null", "stages.3=null"],
            r"stages\.2\.learning_rates names 'lora'; the stage trains unet",
        ),
        (["model.bim.enabled=false", "stages.2.learning_rates.bim=0.1"], r"names 'bim'; the stage trains"),
    ],
)
def test_what_the_model_lacks_is_not_trained(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_preset("nano", overrides)


def test_a_config_may_begin_with_a_later_stage() -> None:
    assert [load_preset("nano").stage_before(number) for number in (1, 2, 3)] == [None, 1, 2]
    assert [load_preset("nano", ["stages.1=null"]).stage_before(number) for number in (2, 3)] == [None, 2]
    one = load_preset("nano", ["seed=3"])
    assert (one.shard_seed, load_preset("nano", ["seed=3", "data.seed=1"]).shard_seed) == (3, 1)
