"""The four trainings of the nano foundation: VAE, CLIP, text-to-image UNet, and the language model.

Each sees single pictures of the shapes world and sentences about them, from the train split; none sees an edit.
Shapes: B pictures, L tokens of a row, T CLIP positions, h x w latents.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from insightedit.model.encoders import encode_text
from insightedit.platform.datasets.shapes import (
    Scene,
    question_answer,
    render,
    sample_edit,
    sample_scene,
    short_caption,
    statements,
    vocabulary_corpus,
)

TEXT_LENGTH = 24
NUM_PATCHES = 64
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
DESCRIBE = "describe the picture"
CHAT_TEMPLATE = (
    "{% for message in messages %}USER:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "projection_dim": 128,
}

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How long and how fast one part is trained."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: int = 100

    def rate(self, step: int) -> float:
        """The learning rate at a step: linear warm-up, then a cosine down to 2%."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * max(0.02, cosine)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Scenes of one split and their pictures, drawn once."""

    scenes: list[Scene]
    pixels: Tensor
    """uint8 (N, 3, 32, 32)."""

    @classmethod
    def draw(cls, count: int, seed: int, split: Any = "train") -> Pictures:
        """Draw `count` scenes of a split."""
        rng = random.Random(f"foundation-{split}-{seed}")
        scenes = [sample_scene(rng, split) for _ in range(count)]
        arrays = np.stack([render(scene) for scene in scenes])
        return cls(scenes, torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous())


def fit(module: nn.Module, how: Fit, loss_of: Callable[[int], Tensor], name: str, progress: Progress) -> None:
    """Train a module: one loss a step, AdamW, clipped gradients, bf16 autocast."""
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=how.weight_decay)
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % max(how.steps // 20, 1) == 0:
            progress(f"{name}: step {step + 1} of {how.steps}, loss {loss.item():.4f}")
    module.eval()


# -- VAE ---------------------------------------------------------------------------------------------------------


def train_vae(pictures: Pictures, how: Fit, progress: Progress) -> AutoencoderKL:
    """An autoencoder of 32 x 32 pictures to 4 x 8 x 8 latents, its scaling factor set to their spread."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=32,
    )

    def loss_of(_step: int) -> Tensor:
        pixels = pictures.pixels[torch.randint(len(pictures.pixels), (how.batch,))].float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        mean = posterior.mean.float()
        # Noise of a fixed size makes the latents smooth, as the UNet will not hit them exactly; the log-variance is
        # only kept where it will be small.
        decoded = vae.decode(mean + 0.05 * torch.randn_like(mean)).sample.float()
        error = decoded - pixels
        shape = 1e-3 * mean.square().mean() + 1e-4 * (posterior.logvar.float() + 6).square().mean()
        return error.abs().mean() + 2 * error.square().mean() + shape

    fit(vae, how, loss_of, "vae", progress)
    with torch.no_grad():
        spread = vae.encode(pictures.pixels[:1024].float() / 127.5 - 1).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(float(1 / spread), 5))
    return vae


# -- CLIP --------------------------------------------------------------------------------------------------------


def build_tokenizer(length: int, *, ends: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the shapes world's words whole and spells all others."""
    rng = random.Random(0)
    corpus = [*vocabulary_corpus(), *["USER: ASSISTANT:", DESCRIBE] * 50]
    for seed in range(3000):
        edit = sample_edit(seed, "train")
        corpus += [edit.simple, edit.advanced, *statements(edit.source, rng, 4)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=length
    )


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's normalisation of 32 x 32 pictures, without a crop."""
    size = {"height": 32, "width": 32}
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)


def normalised(pixels: Tensor) -> Tensor:
    """What the image processor makes of uint8 (B, 3, 32, 32)."""
    processor = image_processor()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (processor.image_mean, processor.image_std))
    return (pixels.float() / 255 - mean) / std


def clip_token_ids(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """Token ids (B, T) of captions, cut or padded to CLIP's length."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids


def train_clip(pictures: Pictures, tokenizer: PreTrainedTokenizerFast, how: Fit, progress: Progress) -> CLIPModel:
    """CLIP's two towers, trained to match pictures with short captions."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=128))
    rng = random.Random(1)
    matches = torch.arange(how.batch)

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(pictures.pixels), (how.batch,))
        ids = clip_token_ids(tokenizer, (short_caption(pictures.scenes[row], rng) for row in rows))
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        logits = clip(input_ids=ids, pixel_values=normalised(pictures.pixels[rows])).logits_per_image.float()
        return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2

    fit(clip, how, loss_of, "clip", progress)
    return clip


# -- text-to-image UNet ------------------------------------------------------------------------------------------


def noise_scheduler() -> DDIMScheduler:
    """v-prediction on betas of zero terminal SNR, trailing steps: few steps are enough (a departure from SD 1.5)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def train_unet(
    pictures: Pictures,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
    how: Fit,
    progress: Progress,
) -> UNet2DConditionModel:
    """A UNet that draws from a caption: latents 4 x 8 x 8, captions through the frozen text tower."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 112),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,
    )
    rng = random.Random(2)
    with torch.no_grad():
        pieces = [vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean for chunk in pictures.pixels.split(256)]
        latents = torch.cat(pieces) * vae.config["scaling_factor"]
        captions = [short_caption(scene, rng) for scene in pictures.scenes]
        chunks = [captions[start : start + 256] for start in range(0, len(captions), 256)]
        states = torch.cat([encode_text(text_encoder, tokenizer, chunk) for chunk in chunks])
        nothing = encode_text(text_encoder, tokenizer, [""])
    noising = DDPMScheduler.from_config(noise_scheduler().config)

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(latents), (how.batch,))
        clean, noise = latents[rows], torch.randn(how.batch, *latents.shape[1:])
        steps = torch.randint(noising.config["num_train_timesteps"], (how.batch,))
        dropped = (torch.rand(how.batch) < 0.1)[:, None, None]
        context = torch.where(dropped, nothing, states[rows])
        output = unet(noising.add_noise(clean, noise, steps), steps, encoder_hidden_states=context).sample
        return (output.float() - noising.get_velocity(clean, noise, steps)).square().mean()

    fit(unet, how, loss_of, "unet", progress)
    return unet


# -- language model ----------------------------------------------------------------------------------------------


def train_mllm(
    pictures: Pictures, tokenizer: PreTrainedTokenizerFast, how: Fit, progress: Progress
) -> LlavaForConditionalGeneration:
    """A LLaVA with a vision tower of its own, trained to describe pictures and to answer questions about them.

    A row holds one picture and several questions, so that a step teaches much. Only answers are learnt.
    """
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=400,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    mllm = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=language,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=NUM_PATCHES,
        )
    )
    rng = random.Random(3)

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(pictures.pixels), (how.batch,))
        ids, labels = _chat_rows([pictures.scenes[row] for row in rows], tokenizer, rng)
        logits = mllm(input_ids=ids, pixel_values=normalised(pictures.pixels[rows])).logits[:, :-1]
        learnt = labels[:, 1:] >= 0
        return F.cross_entropy(logits[learnt].float(), labels[:, 1:][learnt])

    fit(mllm, how, loss_of, "mllm", progress)
    return mllm


def _chat_rows(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, rng: random.Random, questions: int = 6
) -> tuple[Tensor, Tensor]:
    """Token ids and labels (B, L) of rows of questions and answers; labels are -1 where nothing is learnt."""
    user, assistant, line, image, end = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in ("USER:", " ASSISTANT:", "\n", "<image>" * NUM_PATCHES, "</s>")
    )
    rows: list[tuple[list[int], list[int]]] = []
    for scene in scenes:
        pairs = [question_answer(scene, rng) for _ in range(questions)]
        if rng.random() < 0.4:
            pairs.insert(rng.randrange(3), (DESCRIBE, short_caption(scene, rng)))
        encoded = [tokenizer(list(texts), add_special_tokens=False).input_ids for texts in zip(*pairs, strict=True)]
        ids = [tokenizer.bos_token_id, *user, *image]
        labels = [-1] * len(ids)
        for number, (question, answer) in enumerate(zip(*encoded, strict=True)):
            asked = [*(user if number else []), *line, *question, *assistant]
            ids += [*asked, *answer, *end]
            labels += [*[-1] * len(asked), *answer, *end]
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    padded_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    padded_labels = torch.tensor([labels + [-1] * (length - len(labels)) for _, labels in rows])
    return padded_ids, padded_labels
