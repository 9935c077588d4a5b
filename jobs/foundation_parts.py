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
from insightedit.model.mllm import strangers
from insightedit.model.precision import multiplies_bf16
from insightedit.platform.datasets.shapes import (
    Scene,
    compound_question,
    description,
    question_answer,
    render,
    sample_edit,
    sample_scene,
    shape_masks,
    short_caption,
    statements,
    vocabulary_corpus,
)

TEXT_LENGTH = 24
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
CHAT_VISION: dict[str, Any] = {**VISION, "patch_size": 8, "num_hidden_layers": 6}
"""The language model's own tower: larger patches make shorter rows, which it learns from faster."""
NUM_PATCHES = (32 // 8) ** 2
QUESTIONS = 6
"""About each picture in a row of the language model."""
COMPOUND_SHARE, UNTOLD_SHARE = 0.7, 0.5
"""Of the questions, and of the answers, that the language model is tuned on."""
SMALLEST_INNER = 16
QUIET = 0.125
"""Of the UNet's residual stream; a power of two keeps every bit."""

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
    """Train a module: one loss a step, clipped gradients, bf16 autocast where the CPU has instructions for it."""
    bf16 = multiplies_bf16(torch.device("cpu"))
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = _Optimizer(module, how)
    for step in range(how.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(step)
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(how.rate(step))
        if (step + 1) % max(how.steps // 20, 1) == 0:
            progress(f"{name}: step {step + 1} of {how.steps}, loss {loss.item():.4f}")
    module.eval()


class _Optimizer:
    """Muon for matrices and convolutions, which learn in far fewer steps by it; AdamW for all else."""

    def __init__(self, module: nn.Module, how: Fit) -> None:
        inner = {name: p for name, p in module.named_parameters() if _is_inner(name, p)}
        rest = [p for name, p in module.named_parameters() if p.requires_grad and name not in inner]
        # Muon takes matrices only: a convolution is one of its outputs by all that each of them sees.
        self._matrices = [(p, p.detach().view(len(p), -1)) for p in inner.values()]
        self._adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=how.weight_decay, fused=True)
        self._muon = Muon([matrix for _, matrix in self._matrices], how.weight_decay)

    def step(self, rate: float) -> None:
        """Take a step at a learning rate."""
        for parameter, matrix in self._matrices:
            matrix.grad = None if parameter.grad is None else parameter.grad.view_as(matrix)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._muon.step(rate)


class Muon:
    """`torch.optim.Muon` with AdamW's learning rates, in the precision that this CPU multiplies fast.

    PyTorch's own multiplies in bfloat16 always; where the CPU has no instructions for it, this made a step of the
    language model five times as long (2.8 s, not 0.6).

    Args:
        matrices: float32, 2-D, trained in place by their `grad`.
        weight_decay: decoupled, as AdamW's.
        dtype: of the products; that of this CPU when None.
    """

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    """Of the quintic Newton-Schulz iteration, the steepest at zero."""
    ITERATIONS = 5

    def __init__(self, matrices: list[Tensor], weight_decay: float, dtype: torch.dtype | None = None) -> None:
        fast = torch.bfloat16 if multiplies_bf16(torch.device("cpu")) else torch.float32
        self._dtype = dtype or fast
        self._weight_decay = weight_decay
        self._momenta = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take a step at a learning rate, of a root mean square as AdamW's steps have."""
        for matrix, momentum in self._momenta:
            if matrix.grad is None:
                continue
            momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
            update = self._orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
            matrix.mul_(1 - rate * self._weight_decay)
            matrix.add_(update, alpha=-rate * 0.2 * math.sqrt(max(matrix.shape)))

    def _orthogonal(self, update: Tensor) -> Tensor:
        """The nearest matrix whose singular values are all about one."""
        slope, cubic, quintic = self.COEFFICIENTS
        wide = update.to(self._dtype, copy=True)
        tall = len(wide) > wide.shape[1]
        if tall:
            wide = wide.T
        wide.div_(wide.norm().clamp(min=1e-7))
        for _ in range(self.ITERATIONS):
            gram = wide @ wide.T
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), wide, beta=slope)
        return wide.T if tall else wide


def _is_inner(name: str, parameter: Tensor) -> bool:
    """Whether a weight lies between a model's inputs and outputs: no embedding, no head, nothing small."""
    if not parameter.requires_grad or parameter.ndim < 2 or "embed" in name or "lm_head" in name:
        return False
    return min(len(parameter), parameter[0].numel()) >= SMALLEST_INNER


# -- VAE ---------------------------------------------------------------------------------------------------------


def train_vae(pictures: Pictures, how: Fit, progress: Progress) -> Any:
    """An autoencoder of 32 x 32 pictures to 4 x 8 x 8 latents, its scaling factor set to their spread."""
    shape: dict[str, Any] = {
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "latent_channels": 4,
        "mid_block_add_attention": False,
        "sample_size": 32,
    }
    vae: Any = AutoencoderKL(**shape)

    # Most of a picture is ground; a shape's pixels count more, so that its edges become sharp.
    covered = torch.from_numpy(np.stack([np.logical_or.reduce(shape_masks(scene)) for scene in pictures.scenes]))

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(pictures.pixels), (how.batch,))
        pixels = pictures.pixels[rows].float() / 127.5 - 1
        weights = 1 + 3 * covered[rows].float().unsqueeze(1)
        posterior = vae.encode(pixels).latent_dist
        mean = posterior.mean.float()
        # Noise of a fixed size makes the latents smooth, as the UNet will not hit them exactly; the log-variance is
        # only kept where it will be small.
        decoded = vae.decode(mean + 0.03 * torch.randn_like(mean)).sample.float()
        error = decoded - pixels
        shape = 1e-3 * mean.square().mean() + 1e-4 * (posterior.logvar.float() + 6).square().mean()
        return (weights * (error.abs() + 2 * error.square())).mean() / weights.mean() + shape

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
        edit = sample_edit(seed, "train", fronted=False)
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
    vae: Any,
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
    noising: Any = DDPMScheduler.from_config(noise_scheduler().config)

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


@torch.no_grad()
def quieten(unet: UNet2DConditionModel, factor: float = QUIET) -> None:
    """Scale a trained UNet's residual stream, in place, without changing what it computes.

    Muon leaves large weights, on which AdamW's steps of a fixed size change little: taught to keep its source image,
    such a UNet was left with three times the error of one from random weights after 250 steps. Whatever reads the
    stream normalises it first, so all that writes to it may be scaled together, and so may what a block writes before
    its own normalisation.
    """
    writes = ("conv_in.weight", "conv_in.bias")
    inside = (".conv1.", ".conv2.", ".time_emb_proj.", ".proj_out.")
    biases = (".conv_shortcut.bias", "samplers.0.conv.bias")
    for name, parameter in unet.named_parameters():
        if name in writes or any(part in name for part in inside) or name.endswith(biases):
            parameter.mul_(factor)


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
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    shape: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**CHAT_VISION),
        "text_config": language,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_seq_length": NUM_PATCHES,
    }
    mllm = LlavaForConditionalGeneration(LlavaConfig(**shape))
    rng = random.Random(3)

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(pictures.pixels), (how.batch,))
        chat = ChatRows.pack([_questions(pictures.scenes[row], rng) for row in rows], tokenizer)
        return _answer_loss(mllm, chat, pictures.pixels[rows], mllm.get_input_embeddings()(chat.ids))

    fit(mllm, how, loss_of, "mllm", progress)
    return mllm


def tune_mllm(
    mllm: LlavaForConditionalGeneration,
    pictures: Pictures,
    tokenizer: PreTrainedTokenizerFast,
    how: Fit,
    progress: Progress,
    *,
    hard: bool,
    seed: int,
) -> None:
    """Train a language model on, in place, to answer two questions in one, and to know its answer at once.

    Of half the answers it is not told the words before: at their places stand vectors that are no words. It must say
    at its [MM] tokens what a request comes to, and those begin as the same. `hard` is as `compound_question` takes it;
    pictures, questions and what is left untold follow from `seed`.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed + 2)
    words: Any = mllm.get_input_embeddings()

    def loss_of(_step: int) -> Tensor:
        rows = torch.randint(len(pictures.pixels), (how.batch,))
        questions = [
            [
                compound_question(pictures.scenes[row], rng, hard=hard) if rng.random() < COMPOUND_SHARE else pair
                for pair in _questions(pictures.scenes[row], rng)
            ]
            for row in rows
        ]
        chat = ChatRows.pack(questions, tokenizer)
        chosen = torch.rand(how.batch, QUESTIONS + 1) < UNTOLD_SHARE
        untold = chosen.gather(1, chat.owners.clamp(min=0)) & (chat.labels >= 0)
        told = torch.where(untold[..., None], strangers(words.weight, untold.shape), words(chat.ids))
        return _answer_loss(mllm, chat, pictures.pixels[rows], told)

    fit(mllm, how, loss_of, f"mllm, {'hard' if hard else 'compound'} questions", progress)


def _answer_loss(mllm: LlavaForConditionalGeneration, chat: ChatRows, pixels: Tensor, embeddings: Tensor) -> Tensor:
    """The next-token loss of the answers, of rows whose tokens are embedded (B, L, H)."""
    bf16 = torch.is_autocast_enabled("cpu")
    states = mllm.model(
        inputs_embeds=embeddings,
        position_ids=chat.positions,
        attention_mask=chat.mask.to(torch.bfloat16 if bf16 else torch.float32),
        pixel_values=normalised(pixels),
        use_cache=False,
    ).last_hidden_state[:, :-1]
    learnt = chat.labels[:, 1:] >= 0
    return F.cross_entropy(mllm.lm_head(states[learnt]).float(), chat.labels[:, 1:][learnt])


def _questions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions about a scene with their answers; now and then one asks for a description."""
    pairs = [question_answer(scene, rng) for _ in range(QUESTIONS)]
    if rng.random() < 0.4:
        pairs[0] = DESCRIBE, description(scene)
    return pairs


@dataclass(frozen=True, slots=True)
class ChatRows:
    """Rows of one picture and several questions.

    Each question sees the picture and itself only, at the positions that it has when it is alone: a row teaches just
    what as many rows of one question would.
    """

    ids: Tensor
    """int64 (B, L)."""
    labels: Tensor
    """int64 (B, L); -1 where nothing is learnt."""
    positions: Tensor
    """int64 (B, L)."""
    owners: Tensor
    """int64 (B, L); the number of the question that a token belongs to; 0 for the picture, -1 for filling."""
    mask: Tensor
    """float32 (B, 1, L, L), added to attention's logits."""

    @classmethod
    def pack(cls, rows: list[list[tuple[str, str]]], tokenizer: PreTrainedTokenizerFast) -> ChatRows:
        """Pack questions and answers, a list for each picture."""
        user, assistant, line, image, end = (
            list[int](tokenizer(text, add_special_tokens=False).input_ids)
            for text in ("USER:", " ASSISTANT:", "\n", "<image>" * NUM_PATCHES, "</s>")
        )
        head = [SPECIAL_TOKENS.index("<s>"), *user, *image]
        packed: list[list[list[int]]] = []
        for pairs in rows:
            ids, labels, positions, owners = [*head], [-1] * len(head), [*range(len(head))], [0] * len(head)
            questions, answers = (
                tokenizer(list(texts), add_special_tokens=False).input_ids for texts in zip(*pairs, strict=True)
            )
            for owner, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
                asked, told = [*line, *question, *assistant], [*answer, *end]
                ids += [*asked, *told]
                labels += [*[-1] * len(asked), *told]
                positions += range(len(head), len(head) + len(asked) + len(told))
                owners += [owner] * (len(asked) + len(told))
            packed.append([ids, labels, positions, owners])
        ids, labels, positions, owners = (
            nn.utils.rnn.pad_sequence([torch.tensor(row[part]) for row in packed], True, filler)
            for part, filler in enumerate((0, -1, 0, -1))
        )
        seen = (owners[:, :, None] == owners[:, None]) | (owners[:, None] == 0)
        seen &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        return cls(ids, labels, positions, owners, torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None])
