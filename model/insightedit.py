"""InsightEdit as one module to train: the joining of language model, bridging module and denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from insightedit.model.bridge import BidirectionalInteraction, ImageAlignmentAdapter, QFormer
from insightedit.model.configuration import BimConfig, DiffusionConfig, LoraConfig, ModelConfig
from insightedit.model.encoders import encode_text
from insightedit.model.losses import LossTerm, mm_token_loss, squared_error
from insightedit.model.memory import halve
from insightedit.model.mllm import MultimodalTokens, add_lora, hidden_states, token_logits, without_lora
from insightedit.model.pipeline import SHARD_SIZE, InsightEditPipeline
from insightedit.model.schedulers import make_scheduler
from insightedit.model.stages import STAGES, part_of
from insightedit.model.unet import AttentionContext, InsightEditUNet
from insightedit.model.weights import (
    load_diffusion,
    load_image_encoder,
    load_image_processor,
    load_mllm,
    load_mllm_processor,
)


def build_pipeline(
    config: ModelConfig, dtype: torch.dtype = torch.float32, *, halve_mllm: bool = False
) -> InsightEditPipeline:
    """The untrained InsightEdit: pretrained sources, and InsightEdit's own parts freshly initialised.

    Own parts follow torch's random state. The UNet gets eight input channels, the new ones zero.

    Args:
        config: the model.
        dtype: of all weights; the pretrained ones are read in it, so that there is never a second copy of them.
        halve_mllm: read the language model as its files have it, and keep it as `halve` does: of 7 billion weights
            there is then no copy in float32 at any time.
    """
    diffusion = load_diffusion(config.sources, dtype)
    channels = 2 * diffusion["vae"].config.latent_channels
    diffusion["unet"] = InsightEditUNet.from_unet(diffusion["unet"], in_channels=channels)
    diffusion["scheduler"] = make_scheduler(diffusion["scheduler"], config.scheduler)
    image_encoder: Any = load_image_encoder(config.sources, dtype)
    if config.conditioning == "text":
        return join_text_parts(config, diffusion, image_encoder)
    mllm = load_mllm(config.sources, "auto" if halve_mllm else dtype)
    if halve_mllm:
        halve(mllm)
    pipeline = join_parts(config, diffusion, image_encoder, mllm)
    for part in (pipeline.mm_tokens, pipeline.qformer, pipeline.bim, pipeline.adapter):
        if part is not None:
            nn.Module.to(part, dtype)  # diffusers' own warns of nothing
    return pipeline


def join_text_parts(config: ModelConfig, diffusion: dict[str, Any], image_encoder: Any) -> InsightEditPipeline:
    """InstructPix2Pix: the text encoder alone conditions the UNet. Arguments as in `join_parts`.

    The image encoder takes no part in edits; shards have its features, and that they fit is checked by it.
    """
    return InsightEditPipeline(
        **diffusion,
        image_encoder=image_encoder,
        image_processor=load_image_processor(config.sources),
        **_own_settings(config),
    )


def _own_settings(config: ModelConfig) -> dict[str, Any]:
    """What a fresh pipeline keeps beside its parts."""
    return {
        "resolution": config.resolution,
        "prompt_length": config.prompt_length,
        "image_branch": False,
        "num_inference_steps": config.sampling.num_inference_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "image_guidance_scale": config.sampling.image_guidance_scale,
    }


def join_parts(config: ModelConfig, diffusion: dict[str, Any], image_encoder: Any, mllm: Any) -> InsightEditPipeline:
    """InsightEdit's own parts, freshly initialised, around pretrained ones.

    Args:
        config: the model.
        diffusion: the parts of Stable Diffusion by their names in a pipeline, with InsightEdit's UNet.
        image_encoder: CLIP's vision tower with its projection.
        mllm: the language model.
    """
    unet: InsightEditUNet = diffusion["unet"]
    text = diffusion["text_encoder"].config
    width = mllm.get_input_embeddings().weight.shape[1]
    mm_tokens = MultimodalTokens(config.num_mm_tokens, width)
    mm_tokens.start_from(mllm)
    return InsightEditPipeline(
        **diffusion,
        image_encoder=image_encoder,
        image_processor=load_image_processor(config.sources),
        mllm=mllm,
        mllm_processor=load_mllm_processor(config.sources),
        mm_tokens=mm_tokens,
        qformer=_build_qformer(config, text.max_position_embeddings, text.hidden_size, width),
        bim=_build_bim(
            config.bim, text.hidden_size, image_encoder.config.hidden_size, unet.config["block_out_channels"][0]
        ),
        adapter=ImageAlignmentAdapter(
            num_mm_tokens=config.num_mm_tokens,
            input_size=width,
            hidden_size=config.adapter.hidden_size,
            embed_size=image_encoder.config.projection_dim,
            context_size=unet.config["cross_attention_dim"],
            num_tokens=config.adapter.num_tokens,
            pooling=config.adapter.pooling,
        ),
        **_own_settings(config),
    )


def _build_bim(config: BimConfig, text_size: int, width: int, channels: int) -> BidirectionalInteraction | None:
    if not config.enabled:
        return None
    return BidirectionalInteraction(
        text_size=text_size,
        width=width,
        spatial_channels=channels,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        mlp_size=config.mlp_size,
        text_weight=config.text_weight,
    )


def _build_qformer(config: ModelConfig, queries: int, size: int, width: int) -> QFormer:
    return QFormer(
        num_queries=queries,
        hidden_size=size,
        encoder_hidden_size=width,
        num_layers=config.qformer.num_layers,
        num_heads=config.qformer.num_heads,
        intermediate_size=config.qformer.intermediate_size,
        cross_attention_frequency=config.qformer.cross_attention_frequency,
        dropout=config.qformer.dropout,
    )


class InsightEditModel(nn.Module):
    """What trains, and what it takes to compute its losses from features of the frozen encoders.

    A batch holds, for B samples: the language model's `input_ids`, `attention_mask`, `mm_start` and image inputs;
    `clip_patches` (B, G * G, W) of the source; `source_embeds` and `target_embeds` (B, P); `text_states` (B, T, D) of
    the caption; `source_latents` (B, 4, h, w), unscaled; `target_moments` (B, 8, h, w); `diffusion_weight` (B,), 0
    where there is no target; and `seed` (B,), which all of a sample's noise follows from, so that it does not depend
    on how samples are spread over workers. A model that a text encoder conditions reads `text_ids` (B, T) in place of
    the language model's inputs.
    """

    def __init__(self, pipeline: InsightEditPipeline, lora: LoraConfig, diffusion: DiffusionConfig) -> None:
        """Take a pipeline's parts; they are trained in place.

        Args:
            pipeline: a whole pipeline, fresh or trained.
            lora: what is added to its language model.
            diffusion: how timesteps and dropped conditions are drawn.
        """
        super().__init__()
        self.mllm = pipeline.mllm
        self.mm_tokens: MultimodalTokens = pipeline.mm_tokens
        self.qformer: QFormer = pipeline.qformer
        self.bim: BidirectionalInteraction | None = pipeline.bim
        self.adapter: ImageAlignmentAdapter = pipeline.adapter
        self.unet: InsightEditUNet = pipeline.unet
        # Without a language model it reads the instructions, frozen.
        self.text_encoder = pipeline.text_encoder if self.mllm is None else None
        if self.mllm is not None:
            add_lora(self.mllm, lora)
        with torch.no_grad():
            self.null_text = nn.Buffer(encode_text(pipeline.text_encoder, pipeline.tokenizer, [""]))
        vae: AutoencoderKL = pipeline.vae
        self.latent_scale = float(vae.config["scaling_factor"])
        self.diffusion = diffusion
        self.noise_scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.query_variance = torch.zeros(())
        self._settled: tuple[nn.Module, ...] = ()
        # Not a submodule: the frozen encoders are no part of what is trained and kept in checkpoints.
        object.__setattr__(self, "_pipeline", pipeline)

    @property
    def own_pipeline(self) -> InsightEditPipeline:
        """The pipeline whose parts are trained, with the frozen encoders."""
        return cast(InsightEditPipeline, self._pipeline)

    def begin_stage(self, number: int) -> None:
        """Choose what trains. Stage 3 begins with the text's keys and values copied into the image branch."""
        stage = STAGES[number]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in stage.trains)
        self._settled = ()
        if number == 3:
            self._settled = tuple(part for part in (self.mllm, self.qformer, self.bim) if part is not None)
            self.unet.start_image_branch()

    def train(self, mode: bool = True) -> InsightEditModel:
        """As of any module, but that what stage 3 leaves alone conditions as in an edit: nothing of it drops out."""
        super().train(mode)
        for part in self._settled:
            part.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor], stage: int) -> dict[str, LossTerm]:
        """The losses of a stage's equation, by their names in the seed."""
        if self.text_encoder is not None:
            return self._text_losses(batch, stage)
        inputs = _unpadded({name: x for name, x in batch.items() if name not in _OWN_INPUTS})
        around = hidden_states(self.mllm, self.mm_tokens, inputs)
        states = around[:, 1:]
        queries = self.qformer(states)
        mapped = self.adapter.map(states)
        self.query_variance = queries.detach().float().var(dim=1).mean()
        every = torch.ones_like(batch["diffusion_weight"])
        if stage == 1:
            return {
                "L_LLM": LossTerm(self._token_loss(around), every),
                "L_IB": LossTerm(squared_error(mapped, batch["source_embeds"]), every),
                "L_TB": LossTerm(squared_error(queries, batch["text_states"]), every),
            }
        edits = batch["diffusion_weight"]
        f_txt, spatial = queries, None
        if self.bim is not None:
            f_txt, spatial = self.bim(queries, batch["clip_patches"].to(queries.dtype))
        alignment = LossTerm(squared_error(mapped, batch["target_embeds"]), edits)
        if stage == 2:
            return {
                "L_MLLM": LossTerm(self._token_loss(around), every),
                "L_IAA": alignment,
                "L_diff1": LossTerm(self._diffusion_loss(batch, f_txt, None, spatial), edits),
            }
        diffusion = self._diffusion_loss(batch, f_txt, mapped, spatial)
        return {"L_IAA": alignment, "L_diff2": LossTerm(diffusion, edits)}

    def _text_losses(self, batch: Mapping[str, Tensor], stage: int) -> dict[str, LossTerm]:
        """InstructPix2Pix's loss: L_diff1 on the text encoder's states. What there is no module for is 0."""
        if stage != 2 or self.text_encoder is None:
            raise ValueError(f"stage {stage} trains parts that model.conditioning: text leaves out.")
        with torch.no_grad():
            text = self.text_encoder(batch["text_ids"]).last_hidden_state
        edits = batch["diffusion_weight"]
        nothing = torch.zeros_like(edits)
        return {
            "L_MLLM": LossTerm(nothing, torch.ones_like(edits)),
            "L_IAA": LossTerm(nothing, edits),
            "L_diff1": LossTerm(self._diffusion_loss(batch, text, None, None), edits),
        }

    def _token_loss(self, around: Tensor) -> Tensor:
        logits = token_logits(self.mllm, self.mm_tokens, around[:, :-1])
        return mm_token_loss(logits, logits.shape[-1] - self.mm_tokens.config["num_tokens"])

    def _diffusion_loss(
        self, batch: Mapping[str, Tensor], f_txt: Tensor, mapped: Tensor | None, v: Tensor | None
    ) -> Tensor:
        """L_diff1 (without f_img) and L_diff2 of equations 3 and 4, for each sample (B,)."""
        timesteps = self.noise_scheduler.config.num_train_timesteps
        draws = draw_noise(batch["seed"], batch["source_latents"].shape, timesteps, self.diffusion.high_noise)
        mean, log_variance = batch["target_moments"].float().chunk(2, dim=1)
        target = (mean + draws.posterior * (0.5 * log_variance).exp()) * self.latent_scale
        noisy = self.noise_scheduler.add_noise(target, draws.noise, draws.timesteps)
        # One draw for both: below p the text is dropped, below 2p both, below 3p the source.
        share = self.diffusion.condition_drop
        text_dropped = (draws.drop < 2 * share)[:, None, None]
        source_kept = (draws.drop < share) | (draws.drop >= 3 * share)
        text = torch.where(text_dropped, self.null_text.to(f_txt.dtype), f_txt)
        source = batch["source_latents"].float() * source_kept[:, None, None, None]
        image = None
        if mapped is not None:
            image = self.adapter.project(mapped.masked_fill(text_dropped[:, 0], 0.0))
        output = self.unet.denoise(torch.cat([noisy, source], dim=1), draws.timesteps, AttentionContext(text, image), v)
        return squared_error(output, self._diffusion_target(target, draws.noise, draws.timesteps))

    def _diffusion_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.noise_scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        raise ValueError(f"the scheduler's prediction_type is {kind!r}; use 'epsilon' or 'v_prediction'.")

    def pipeline(self, *, image_branch: bool) -> InsightEditPipeline:
        """A pipeline of the present weights, the language model's LoRA merged into a copy.

        Args:
            image_branch: whether f_img takes part: True once stage 3 has trained it.
        """
        own = self.own_pipeline
        # Without a language model, an edit takes what InstructPix2Pix has and nothing else.
        unused = {"mllm"} if self.mllm is not None else {"mllm", "image_encoder", "image_processor"}
        parts = {name: part for name, part in own.components.items() if name not in unused}
        mllm = None if self.mllm is None else without_lora(self.mllm)
        result = InsightEditPipeline(**parts, mllm=mllm, **_settings(own), image_branch=image_branch)
        result.set_progress_bar_config(disable=True)
        return result

    def save_pipeline(self, folder: str | Path, *, image_branch: bool) -> None:
        """Write the present weights as a pipeline folder of safetensors."""
        pipeline = self.pipeline(image_branch=image_branch)
        pipeline.save_pretrained(str(folder), safe_serialization=True, max_shard_size=SHARD_SIZE)


_OWN_INPUTS = frozenset(
    {
        "clip_patches",
        "source_embeds",
        "target_embeds",
        "text_states",
        "source_latents",
        "target_moments",
        "diffusion_weight",
        "seed",
        "position",
    }
)


def _unpadded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows as long as the longest needs: nothing attends to the padding behind them, but it would take its time."""
    length = int(inputs["attention_mask"].sum(dim=1).max())
    return {name: x[:, :length] if name in ("input_ids", "attention_mask") else x for name, x in inputs.items()}


class Draws(NamedTuple):
    """What chance decides for B samples."""

    noise: Tensor
    """(B, 4, h, w), epsilon."""
    posterior: Tensor
    """(B, 4, h, w), the noise of the target's latents around their mean."""
    timesteps: Tensor
    """(B,) int64."""
    drop: Tensor
    """(B,) uniform in [0, 1), which conditions are dropped."""


def draw_noise(seeds: Tensor, shape: torch.Size, num_timesteps: int, high_noise: float = 1.0) -> Draws:
    """Draw for each of the seeds (B,) by itself.

    Args:
        seeds: one for each sample.
        shape: of the latents (B, 4, h, w).
        num_timesteps: T of the noise schedule.
        high_noise: see `DiffusionConfig`.
    """
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        rows.append(
            (
                torch.randn(shape[1:], generator=generator),
                torch.randn(shape[1:], generator=generator),
                torch.rand((), generator=generator, dtype=torch.float64),
                torch.rand((), generator=generator),
            )
        )
    noise, posterior, uniform, drop = (torch.stack(column).to(seeds.device) for column in zip(*rows, strict=True))
    # The power underflows for the largest u: the last timestep.
    timesteps = (num_timesteps * (1 - (1 - uniform) ** high_noise)).long().clamp(max=num_timesteps - 1)
    return Draws(noise, posterior, timesteps, drop)


def _settings(pipeline: InsightEditPipeline) -> dict[str, Any]:
    names = ("resolution", "prompt_length", "num_inference_steps", "guidance_scale", "image_guidance_scale")
    return {name: pipeline.config[name] for name in names}
