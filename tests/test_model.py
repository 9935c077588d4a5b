"""The model against the paper: what trains, what each part does at its start, and the bits of an edit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil

from insightedit.model.attention import use_plain_attention
from insightedit.model.configuration import ModelConfig
from insightedit.model.denoiser import Denoiser
from insightedit.model.encoders import squared, to_pixels
from insightedit.model.guidance import EditConditions, Guidance
from insightedit.model.insightedit import InsightEditModel, build_pipeline, draw_noise
from insightedit.model.losses import mm_token_loss, squared_error
from insightedit.model.mllm import hidden_states
from insightedit.model.pipeline import (
    InsightEditPipeline,
    exact_mode,
    load_conditioner,
    load_editor,
    load_pipeline,
)
from insightedit.model.prompts import PromptEncoder
from insightedit.model.schedulers import SCHEDULERS, make_scheduler
from insightedit.model.stages import STAGES, part_of
from insightedit.model.unet import AttentionContext, DecoupledCrossAttention, InsightEditUNet
from insightedit.platform.config import load_preset
from insightedit.serve.schema import SchedulerName


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return tiny_models.tiny_config(tiny_models.build_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture
def pipeline(config: ModelConfig) -> InsightEditPipeline:
    torch.manual_seed(0)
    result = build_pipeline(config)
    result.set_progress_bar_config(disable=True)
    return result


@pytest.fixture
def model(pipeline: InsightEditPipeline, config: ModelConfig) -> InsightEditModel:
    return InsightEditModel(pipeline, config.lora, config.diffusion)


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_batch(pipeline: InsightEditPipeline, weights: tuple[float, ...] = (1.0, 1.0)) -> dict[str, Tensor]:
    count = len(weights)
    source, target = (to_pixels([picture(10 * k + i) for i in range(count)]) for k in (1, 2))
    encoders = pipeline.encoders
    features = encoders.encode_images(source)
    return {
        **pipeline.prompts(["remove the red circle"] * count, source),
        "clip_patches": features.patches,
        "source_embeds": features.embeds,
        "target_embeds": encoders.encode_images(target).embeds,
        "text_states": encoders.encode_text(["a red circle"] * count),
        "source_latents": encoders.encode_latents(source)[:, :4],
        "target_moments": encoders.encode_latents(target),
        "diffusion_weight": torch.tensor(weights),
        "seed": torch.arange(count),
    }


def edit(pipeline: Any, seed: int = 0, **arguments: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline("remove it", picture(), generator=generator, output_type="pt", exact=True, **arguments).images


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stage_changes_exactly_the_parts_of_the_table(
    model: InsightEditModel, pipeline: InsightEditPipeline, number: int
) -> None:
    table = {
        1: {"mm_tokens", "qformer", "mapper"},
        2: {"mm_tokens", "lora", "qformer", "mapper", "bim", "unet"},
        3: {"mapper", "adapter", "image_branch"},
    }
    batch = make_batch(pipeline)
    model.begin_stage(number)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):  # BIM and LoRA begin at zero: what is behind their zeros moves only after the first step
        optimizer.zero_grad()
        torch.stack([term.values.mean() for term in model(batch, number).values()]).sum().backward()
        optimizer.step()
    changed = {part_of(name) for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == table[number] == STAGES[number].trains


def test_each_stage_gives_the_terms_of_its_equation(model: InsightEditModel, pipeline: InsightEditPipeline) -> None:
    batch = make_batch(pipeline)
    for number, stage in STAGES.items():
        model.begin_stage(number)
        assert tuple(model(batch, number)) == stage.losses


def test_what_stage_3_leaves_alone_drops_nothing_out(config: ModelConfig) -> None:
    dropping = replace(
        config, qformer=replace(config.qformer, dropout=0.5), lora=replace(config.lora, rank=2, dropout=0.5)
    )
    pipeline = build_pipeline(dropping)
    batch = make_batch(pipeline)
    model = InsightEditModel(pipeline, dropping.lora, dropping.diffusion)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for stage, repeats in ((2, False), (3, True)):
        model.begin_stage(stage)
        model.train()
        first, second = (model(batch, stage)["L_IAA"].values for _ in range(2))
        assert first.equal(second) is repeats
    assert model.unet.training, "or its activations would not be checkpointed"


def test_an_untrained_bim_leaves_the_unet_as_it_was(pipeline: InsightEditPipeline) -> None:
    unet: InsightEditUNet = pipeline.unet
    queries, patches = torch.randn(2, tiny_models.TEXT_LENGTH, 16), torch.randn(2, 16, 16)
    text, spatial = pipeline.bim(queries, patches)
    assert text.equal(queries)
    assert spatial.shape == (2, 16, 4, 4)
    sample, step = torch.randn(2, 8, 4, 4), torch.tensor([3, 500])
    with_bim = unet.denoise(sample, step, AttentionContext(text), spatial)
    without = unet.denoise(sample, step, AttentionContext(queries), None)
    assert with_bim.equal(without)


def test_new_input_channels_and_the_image_branch_at_weight_0_leave_the_original_unet(config: ModelConfig) -> None:
    original = UNet2DConditionModel.from_pretrained(config.sources.diffusion, subfolder="unet")
    unet = InsightEditUNet.from_unet(original, in_channels=8)
    sample, step = torch.randn(2, 4, 4, 4), torch.tensor([3, 500])
    text, image = torch.randn(2, 5, 16), torch.randn(2, 2, 16)
    expected = original(sample, step, encoder_hidden_states=text).sample
    wide = torch.cat([sample, torch.randn(2, 4, 4, 4)], dim=1)
    plain = unet.denoise(wide, step, AttentionContext(text), None)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    switched_off = unet.denoise(wide, step, AttentionContext(text, image, torch.zeros(2)), None)
    assert switched_off.equal(plain)
    assert not unet.denoise(wide, step, AttentionContext(text, image), None).allclose(plain)


def test_an_untrained_adapter_leaves_the_unet_as_it_was(pipeline: InsightEditPipeline) -> None:
    unet: InsightEditUNet = pipeline.unet
    unet.start_image_branch()
    text, sample, step = torch.randn(2, tiny_models.TEXT_LENGTH, 16), torch.randn(2, 8, 4, 4), torch.tensor([3, 500])
    image = pipeline.adapter(torch.randn(2, pipeline.mm_tokens.config["num_tokens"], 32))
    with_image = unet.denoise(sample, step, AttentionContext(text, image), None)
    assert with_image.equal(unet.denoise(sample, step, AttentionContext(text), None))


def test_the_image_branch_equals_ip_adapters_processor() -> None:
    torch.manual_seed(0)
    attention: Any = Attention(query_dim=32, cross_attention_dim=16, heads=4, dim_head=8)
    hidden, text, image = torch.randn(2, 9, 32), torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    attention.set_processor(AttnProcessor2_0())
    plain = attention(hidden, encoder_hidden_states=text)
    ours = DecoupledCrossAttention("layer", attention)
    for weight in (0.0, 0.3, 1.0):
        oracle: Any = IPAdapterAttnProcessor2_0(32, cross_attention_dim=16, num_tokens=(3,), scale=weight)
        oracle.to_k_ip[0].weight = ours.to_k_img.weight
        oracle.to_v_ip[0].weight = ours.to_v_img.weight
        attention.set_processor(oracle)
        expected = attention(hidden, encoder_hidden_states=(text, [image]))
        attention.set_processor(ours)
        context = AttentionContext(text, image, torch.full((2,), weight))
        output = attention(hidden, encoder_hidden_states=context)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        if weight == 0.0:
            assert output.equal(plain)


def test_projected_keys_and_values_give_the_same_bits(pipeline: InsightEditPipeline) -> None:
    unet: InsightEditUNet = pipeline.unet
    context = AttentionContext(torch.randn(2, 5, 16), torch.randn(2, 2, 16), torch.tensor([0.5, 1.0]))
    sample = torch.randn(2, 8, 4, 4)
    once = unet.project(context)
    assert len(once.projected) == len(unet.cross_attentions())
    step = torch.tensor(7)
    assert unet.denoise(sample, step, once, None).equal(unet.denoise(sample, step, context, None))


def test_stage_3_begins_with_the_texts_keys_and_values(model: InsightEditModel) -> None:
    with torch.no_grad():
        for attention in model.unet.cross_attentions().values():
            attention.to_k.weight.add_(1.0)
    model.begin_stage(2)
    assert not any(_branch_equals_text(model))
    model.begin_stage(3)
    assert all(_branch_equals_text(model))


def _branch_equals_text(model: InsightEditModel) -> list[bool]:
    layers = model.unet.cross_attentions().values()
    return [layer.processor.to_k_img.weight.equal(layer.to_k.weight) for layer in layers]


def test_positions_of_patches_are_exact_under_autocast(pipeline: InsightEditPipeline) -> None:
    bim = pipeline.bim
    assert bim is not None
    centres = (torch.arange(16, dtype=torch.float64) + 0.5) / 16 * 2 - 1
    places = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)
    angles = 2 * torch.pi * places @ bim.frequencies.double()
    expected = torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None].float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(bim.grid_positions(16), expected, rtol=0, atol=1e-4)


def test_v_is_added_after_the_first_convolution(pipeline: InsightEditPipeline) -> None:
    unet: InsightEditUNet = pipeline.unet
    sample, added = torch.randn(1, 8, 4, 4), torch.randn(1, 16, 4, 4)
    expected = unet.conv_in(sample) + added
    assert unet.conv_in(torch.cat([sample, added], dim=1)).equal(expected)


def test_mm_token_loss_equals_a_float64_computation() -> None:
    logits = torch.randn(3, 4, 11)
    expected = np.zeros(3)
    for row, matrix in enumerate(logits.double().numpy()):
        for i, scores in enumerate(matrix):
            expected[row] -= np.log(np.exp(scores[7 + i]) / np.exp(scores).sum()) / 4
    np.testing.assert_allclose(mm_token_loss(logits, 7).numpy(), expected, rtol=1e-6)


def test_squared_error_equals_a_float64_computation() -> None:
    first, second = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = [np.mean((a - b) ** 2) for a, b in zip(first.double().numpy(), second.double().numpy(), strict=True)]
    np.testing.assert_allclose(squared_error(first, second).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_diffusion_loss_follows_its_equation(tmp_path: Path, prediction_type: str) -> None:
    config = tiny_models.tiny_config(tiny_models.build_sources(tmp_path, prediction_type))
    pipeline = build_pipeline(config)
    model = InsightEditModel(pipeline, config.lora, config.diffusion)
    batch = make_batch(pipeline, (1.0,) * 8)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(
        _module: object, args: tuple[Tensor, Tensor], kwargs: dict[str, AttentionContext], output: tuple[Tensor]
    ):
        seen.append((args[0], kwargs["encoder_hidden_states"].text, output[0]))

    model.unet.register_forward_hook(record, with_kwargs=True)
    values = model(batch, 2)["L_diff1"].values
    sample, text, output = (x.detach().double() for x in seen[0])
    draws = draw_noise(batch["seed"], batch["source_latents"].shape, 1000)
    scale = pipeline.vae.config["scaling_factor"]
    mean, log_variance = batch["target_moments"].double().chunk(2, dim=1)
    latents = (mean + draws.posterior * (log_variance / 2).exp()) * scale
    alpha = model.noise_scheduler.alphas_cumprod.double()[draws.timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * draws.noise
    torch.testing.assert_close(sample[:, :4], noisy, rtol=1e-4, atol=1e-4)
    epsilon = prediction_type == "epsilon"
    target = draws.noise.double() if epsilon else alpha.sqrt() * draws.noise - (1 - alpha).sqrt() * latents
    expected = (output - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
    assert text.shape[0] == 8


def test_conditions_are_dropped_as_instruct_pix2pix_drops_them(
    model: InsightEditModel, pipeline: InsightEditPipeline
) -> None:
    seeds, share = torch.arange(400), model.diffusion.condition_drop
    assert share == 0.05
    drop = draw_noise(seeds, torch.Size((400, 4, 4, 4)), 1000).drop
    wanted = {
        "text": int(seeds[(drop < share)][0]),
        "both": int(seeds[(drop >= share) & (drop < 2 * share)][0]),
        "source": int(seeds[(drop >= 2 * share) & (drop < 3 * share)][0]),
        "nothing": int(seeds[drop >= 3 * share][0]),
    }
    batch = make_batch(pipeline, (1.0,) * 4) | {"seed": torch.tensor(list(wanted.values()))}
    seen: list[tuple[Tensor, AttentionContext]] = []
    model.unet.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    torch.nn.init.ones_(model.adapter.projection.norm.weight)  # zero until stage 3, when no image would differ
    model(batch, 3)
    sample, context = seen[0]
    null_image = model.adapter.project(torch.zeros(1, 16))[0]
    assert context.image is not None
    source_gone = [not bool(row[4:8].any()) for row in sample]
    text_gone = [row.equal(model.null_text[0]) for row in context.text]
    image_gone = [row.allclose(null_image) for row in context.image]
    assert source_gone == [False, True, True, False]
    assert text_gone == image_gone == [True, True, False, False]


@pytest.mark.parametrize(("high_noise", "mean"), [(1.0, 0.5), (4.0, 0.8), (19.0, 0.95)])
def test_timesteps_are_drawn_where_the_config_says(high_noise: float, mean: float) -> None:
    drawn = draw_noise(torch.arange(4000), torch.Size((4000, 1, 1, 1)), 1000, high_noise).timesteps
    assert (int(drawn.min()) >= 0, int(drawn.max())) == (True, 999)
    # The mean of 1 - (1 - u)^k is k / (k + 1); three standard errors of a mean of 4000 are below 0.015.
    assert abs(float(drawn.float().mean()) / 1000 - mean) < 0.015


@pytest.mark.parametrize("number", [1, 2, 3])
def test_plain_attention_gives_the_same_losses_and_gradients_without_the_fused_kernel(
    model: InsightEditModel, pipeline: InsightEditPipeline, number: int
) -> None:
    batch = make_batch(pipeline)
    model.begin_stage(number)

    def losses() -> tuple[Tensor, Tensor, set[str]]:
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            values = torch.stack([term.values.mean() for term in model(batch, number).values()])
            values.sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return values, torch.cat(gradients), {event.key for event in profile.key_averages()}

    values, gradients, kernels = losses()
    use_plain_attention(model)
    plain_values, plain_gradients, plain_kernels = losses()
    assert any("scaled_dot_product" in kernel for kernel in kernels)
    assert not any("scaled_dot_product" in kernel for kernel in plain_kernels)
    torch.testing.assert_close(plain_values, values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain_gradients, gradients, rtol=1e-3, atol=1e-5)


def test_padding_changes_no_loss(pipeline: InsightEditPipeline, model: InsightEditModel) -> None:
    batch = make_batch(pipeline)
    longer = {**batch, **{name: F.pad(batch[name], (0, 30)) for name in ("input_ids", "attention_mask")}}
    with torch.no_grad():
        for name, term in model(batch, 2).items():
            torch.testing.assert_close(model(longer, 2)[name].values, term.values, rtol=0, atol=0)


def test_language_only_records_weigh_nothing_in_the_diffusion_and_alignment_losses(
    model: InsightEditModel, pipeline: InsightEditPipeline
) -> None:
    terms = model(make_batch(pipeline, (1.0, 0.0)), 2)
    assert terms["L_MLLM"].weights.tolist() == [1.0, 1.0]
    assert terms["L_IAA"].weights.tolist() == terms["L_diff1"].weights.tolist() == [1.0, 0.0]


def test_the_states_are_those_of_a_model_whose_vocabulary_holds_the_tokens(pipeline: InsightEditPipeline) -> None:
    inputs = pipeline.prompts(["remove it"], to_pixels([picture()]))
    states = hidden_states(pipeline.mllm, pipeline.mm_tokens, inputs)
    start = int(inputs["mm_start"][0])
    vocabulary = pipeline.mllm.get_input_embeddings()
    ids = inputs["input_ids"][:, : start + 4].clone()
    ids[0, start:] = torch.arange(396, 400)  # rows that nothing uses become the [MM] tokens'
    with torch.no_grad():
        vocabulary.weight[396:400] = pipeline.mm_tokens.input_rows.weight
        output = pipeline.mllm(input_ids=ids, pixel_values=inputs["pixel_values"], output_hidden_states=True)
    torch.testing.assert_close(states, output.hidden_states[-1][:, start - 1 :], rtol=1e-4, atol=1e-5)


def test_padding_and_neighbours_do_not_change_the_states(pipeline: InsightEditPipeline) -> None:
    pixels = to_pixels([picture(1), picture(2)])
    both = pipeline.prompts(["remove it", "remove the circle at left"], pixels)
    alone = pipeline.prompts(["remove it"], pixels[:1])
    together = hidden_states(pipeline.mllm, pipeline.mm_tokens, both)[:1]
    torch.testing.assert_close(hidden_states(pipeline.mllm, pipeline.mm_tokens, alone), together, rtol=1e-4, atol=1e-5)


def test_save_load_edit_gives_the_same_bits(
    model: InsightEditModel, pipeline: InsightEditPipeline, tmp_path: Path
) -> None:
    with torch.no_grad():  # as if trained: nothing is zero, LoRA included
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trained = model.pipeline(image_branch=True)
    model.save_pipeline(tmp_path, image_branch=True)
    assert not list(tmp_path.rglob("*.bin"))
    expected = edit(trained)
    assert edit(load_pipeline(tmp_path)).equal(expected)
    with exact_mode():
        conditions = load_conditioner(tmp_path).condition("remove it", picture())
    halves = load_editor(tmp_path)(
        image=picture(), conditions=conditions, generator=torch.Generator().manual_seed(0), output_type="pt", exact=True
    )
    assert halves.images.equal(expected)  # pyright: ignore[reportAttributeAccessIssue]
    assert not edit(trained, seed=1).equal(expected)


def test_merged_lora_equals_added_lora(model: InsightEditModel, pipeline: InsightEditPipeline) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    inputs = pipeline.prompts(["remove it"], to_pixels([picture()]))
    added = hidden_states(model.mllm, model.mm_tokens, inputs)
    merged = model.pipeline(image_branch=False).mllm
    torch.testing.assert_close(hidden_states(merged, model.mm_tokens, inputs), added, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(hidden_states(model.mllm, model.mm_tokens, inputs), added, rtol=0, atol=0)
    own = {parameter.data_ptr() for parameter in model.mllm.parameters()}
    copied = [name for name, parameter in merged.named_parameters() if parameter.data_ptr() not in own]
    assert copied
    assert all("q_proj" in name or "v_proj" in name for name in copied)


def test_exact_mode_gives_the_same_bits_whoever_shares_the_call(pipeline: Any) -> None:
    alone = edit(pipeline)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 0)]
    together = pipeline(
        ["add a star", "remove it"], [picture(3), picture()], generator=generators, output_type="pt", exact=True
    ).images
    assert together[1].equal(alone[0])


def test_free_batching_stays_close(pipeline: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 0)]
    together = pipeline(
        ["add a star", "remove it"], [picture(3), picture()], generator=generators, output_type="pt"
    ).images
    assert (together[1] - edit(pipeline)[0]).abs().max() <= 2 / 255


def test_an_edit_may_choose_its_scheduler(pipeline: Any) -> None:
    assert edit(pipeline, scheduler="ddim").equal(edit(pipeline))  # the tiny pipeline's own
    results = [edit(pipeline, scheduler=name, num_inference_steps=4) for name in SCHEDULERS]
    assert all(result.isfinite().all() for result in results)
    assert not any(results[0].equal(other) for other in results[1:])
    assert edit(pipeline).equal(edit(pipeline, scheduler=None))  # and the others have left nothing behind
    with pytest.raises(ValueError, match="scheduler is 'fast'; use one of ddim, euler, euler_a, dpm"):
        edit(pipeline, scheduler="fast")


def test_a_config_may_choose_how_edits_denoise(config: ModelConfig, tmp_path: Path) -> None:
    shutil.copytree(config.sources.diffusion, tmp_path / "diffusion")
    # Stable Diffusion's own files name PNDM, which takes 101 steps for 100.
    own = PNDMScheduler(beta_schedule="scaled_linear", beta_end=0.012, skip_prk_steps=True, steps_offset=1)
    own.save_pretrained(tmp_path / "diffusion/scheduler")
    index = tmp_path / "diffusion/model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    sources = replace(config.sources, diffusion=str(tmp_path / "diffusion"))
    assert type(build_pipeline(replace(config, sources=sources)).scheduler) is PNDMScheduler
    pipeline = build_pipeline(replace(config, sources=sources, scheduler="euler_a"))
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded: Any = load_pipeline(tmp_path / "pipeline")
    assert type(loaded.scheduler) is SCHEDULERS["euler_a"]
    for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset", "timestep_spacing"):
        assert loaded.scheduler.config[name] == own.config[name]
    assert edit(loaded).isfinite().all()
    names, _ = get_args(get_type_hints(ModelConfig)["scheduler"])
    assert set(get_args(names)) == set(SCHEDULERS)
    assert load_preset("sd15-llava7b").model.scheduler == "euler_a"


def test_no_scheduler_clips_latents() -> None:
    own = EulerDiscreteScheduler()  # its config says nothing of clipping, and DDIM's default is to clip
    assert make_scheduler(own, "ddim").config.clip_sample is False
    assert set(get_args(SchedulerName)) == set(SCHEDULERS)


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (7.5, 1.0), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)])
def test_guidance_leaves_out_only_what_weighs_nothing(text: float, image: float) -> None:
    outputs = {name: torch.randn(2, 3) for name in ("text", "image", "none")}
    expected = (
        outputs["none"] + image * (outputs["image"] - outputs["none"]) + text * (outputs["text"] - outputs["image"])
    )
    guidance = Guidance(text, image)
    given = torch.cat([outputs[name] for name in guidance.branches])
    torch.testing.assert_close(guidance.combine(given), expected)


def test_guidance_adds_up_in_float32_whatever_the_unet_is_in(pipeline: InsightEditPipeline) -> None:
    outputs = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    combined = Guidance(7.5, 1.5).combine(outputs)
    torch.testing.assert_close(combined, Guidance(7.5, 1.5).combine(outputs.float()), rtol=0, atol=0)
    unet: Any = nn.Module.to(pipeline.unet, torch.bfloat16)
    texts = torch.randn(2, 12, 16, dtype=torch.bfloat16)
    denoiser = Denoiser(unet, pipeline.scheduler)
    source = torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16)
    edit = denoiser.begin(
        EditConditions(texts[:1], texts[1:]),
        source,
        num_inference_steps=2,
        guidance=Guidance(7.5, 1.5),
        generator=torch.Generator().manual_seed(0),
    )
    started = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    assert edit.latents.equal(started * edit.scheduler.init_noise_sigma), "a seed means the same in both"
    denoiser.step([edit])
    assert edit.latents.dtype == torch.float32


def test_an_image_of_any_size_comes_back_at_its_size(pipeline: Any) -> None:
    wide = picture(size=(50, 20))
    result = pipeline("remove it", wide, generator=torch.Generator().manual_seed(0)).images
    assert result[0].size == (50, 20)
    assert pipeline.model_size(wide) == (24, 8)


def test_images_are_made_square_whole() -> None:
    pixels = torch.zeros(1, 3, 8, 32, dtype=torch.uint8)
    pixels[..., -8:] = 255  # a crop to the middle would lose it
    assert squared(pixels, 8)[..., -1].min() > 0.9


def test_a_language_model_without_a_row_for_each_image_is_refused() -> None:
    processor = SimpleNamespace(tokenizer=tiny_models.make_tokenizer(64), image_processor=Qwen2VLImageProcessorPil())
    with pytest.raises(ValueError, match=r"into one list \(pixel_values\), as Qwen2-VL's does; choose"):
        PromptEncoder(processor, num_mm_tokens=4, max_length=64)


def test_what_is_missing_is_named(pipeline: InsightEditPipeline) -> None:
    with pytest.raises(ValueError, match="image is missing"):
        pipeline("remove it")
    with pytest.raises(ValueError, match="prompt is missing"):
        pipeline(image=picture())
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        pipeline("remove it", picture(), num_inference_steps=0)
    with pytest.raises(ValueError, match="tokens; this model reads"):
        pipeline("remove it " * 40, picture())


def test_a_plain_instruct_pix2pix_folder_opens_and_edits(config: ModelConfig, tmp_path: Path) -> None:
    from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline

    parts = StableDiffusionPipeline.from_pretrained(config.sources.diffusion, safety_checker=None).components
    first = dict(UNet2DConditionModel.from_pretrained(config.sources.diffusion, subfolder="unet").config)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config({**first, "in_channels": 8})
    own: dict[str, Any] = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    own |= {"unet": unet, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs: Any = StableDiffusionInstructPix2PixPipeline(**own)
    theirs.save_pretrained(tmp_path)
    ours: Any = load_pipeline(tmp_path)
    settings = {"num_inference_steps": 3, "guidance_scale": 7.5, "image_guidance_scale": 1.5, "output_type": "np"}
    expected = theirs("remove it", picture(), generator=torch.Generator().manual_seed(0), **settings).images
    output = ours("remove it", picture(), generator=torch.Generator().manual_seed(0), **settings).images
    np.testing.assert_allclose(output, expected, atol=2 / 255)
