"""Editing with a trained model: a diffusers pipeline with InstructPix2Pix's arguments.

An edit has two halves, which serving runs on different machines: `condition` is one pass of the language model and the
bridging module; `denoise` is the UNet's many steps between the VAE's two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModelWithProjection, PreTrainedModel

from insightedit.model.bridge import BidirectionalInteraction, ImageAlignmentAdapter, QFormer
from insightedit.model.configuration import SamplingConfig
from insightedit.model.denoiser import Denoiser
from insightedit.model.encoders import FrozenEncoders, encode_text, to_pixels
from insightedit.model.guidance import EditConditions, Guidance
from insightedit.model.mllm import MultimodalTokens, hidden_states
from insightedit.model.prompts import PromptEncoder
from insightedit.model.unet import InsightEditUNet

_CONDITIONER_PARTS = (
    "text_encoder",
    "tokenizer",
    "image_encoder",
    "image_processor",
    "mllm",
    "mllm_processor",
    "mm_tokens",
    "qformer",
    "bim",
    "adapter",
)
_EDITOR_PARTS = ("vae", "unet")

SHARD_SIZE = "2GB"
"""Of the files that a part is saved in: what is read lies in memory twice, one file at a time."""

StepCallback = Callable[["InsightEditPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class EditOutput(BaseOutput):
    """Edited images, as asked for by `output_type`."""

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor


@contextmanager
def exact_mode() -> Generator[None]:
    """One thread: with rows of one shape, the same request gives the same bits on one kind of processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class InsightEditPipeline(DiffusionPipeline):
    """Edits images by written instructions.

    A folder of it loads with `from_pretrained`, whole or in halves (`load_conditioner`, `load_editor`). A folder of
    InstructPix2Pix loads as well: without a language model, the text encoder alone conditions the denoiser.
    """

    _optional_components: ClassVar[list[str]] = [*_CONDITIONER_PARTS, *_EDITOR_PARTS]
    model_cpu_offload_seq = "text_encoder->image_encoder->mllm->unet->vae"

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        unet: UNet2DConditionModel | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: Any = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        image_processor: Any = None,
        mllm: PreTrainedModel | None = None,
        mllm_processor: Any = None,
        mm_tokens: MultimodalTokens | None = None,
        qformer: QFormer | None = None,
        bim: BidirectionalInteraction | None = None,
        adapter: ImageAlignmentAdapter | None = None,
        resolution: int | None = None,
        prompt_length: int = 512,
        image_branch: bool = True,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
    ) -> None:
        """Join the parts.

        Args:
            resolution: side of the square whose area an image has inside the model; None keeps each image's size.
            prompt_length: positions of the language model for one edit.
            image_branch: whether f_img takes part (from stage 3 on).
            num_inference_steps: an edit's steps where the call says nothing; likewise both guidance scales.
        """
        super().__init__()
        if unet is not None and not isinstance(unet, InsightEditUNet):
            unet = InsightEditUNet.from_unet(unet)
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            image_processor=image_processor,
            mllm=mllm,
            mllm_processor=mllm_processor,
            mm_tokens=mm_tokens,
            qformer=qformer,
            bim=bim,
            adapter=adapter,
        )
        self.register_to_config(
            resolution=resolution,
            prompt_length=prompt_length,
            image_branch=image_branch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
        )
        self._prompts: PromptEncoder | None = None
        self._encoders: FrozenEncoders | None = None

    @property
    def defaults(self) -> SamplingConfig:
        """What an edit uses where the call says nothing."""
        names = [field.name for field in fields(SamplingConfig)]
        return SamplingConfig(**{name: self.config[name] for name in names})

    @property
    def prompts(self) -> PromptEncoder:
        """The language model's prompts, read from its processor on first use."""
        if self._prompts is None:
            tokens = cast(MultimodalTokens, self.mm_tokens)
            self._prompts = PromptEncoder(
                self.mllm_processor, tokens.config["num_tokens"], self.config["prompt_length"]
            )
        return self._prompts

    @property
    def encoders(self) -> FrozenEncoders:
        """The frozen encoders as one module."""
        if self._encoders is None:
            self._encoders = FrozenEncoders(
                self.vae, self.text_encoder, self.tokenizer, self.image_encoder, self.image_processor
            )
        return self._encoders

    # -- the first half: what to do -----------------------------------------------------------------------------

    @torch.no_grad()
    def condition(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        together: bool = False,
    ) -> EditConditions:
        """One pass of the language model, Q-Former, BIM and adapter for each edit.

        Args:
            prompt: instructions, B.
            image: source images, B, of any sizes.
            negative_prompt: B texts, or one for all, in place of the empty text.
            together: one pass for all of them, which differs from theirs by rounding.

        Raises:
            ValueError: the numbers of prompts and images differ, or a prompt is too long.
        """
        prompts, images = _listed(prompt), _listed(image)
        if len(prompts) != len(images):
            raise ValueError(f"prompt has {len(prompts)} entries and image {len(images)}; give as many of both.")
        negatives = _listed(negative_prompt) if negative_prompt is not None else [""]
        null_text = self._encode_texts(negatives)
        null_text = null_text.expand(len(prompts), -1, -1) if len(negatives) == 1 else null_text
        if self.mllm is None:
            return EditConditions(self._encode_texts(prompts), null_text)
        if together:
            text, image_tokens, spatial = self._condition_rows(prompts, images)
        else:
            rows = [self._condition_rows([text], [picture]) for text, picture in zip(prompts, images, strict=True)]
            texts, image_rows, spatials = zip(*rows, strict=True)
            text, image_tokens = torch.cat(texts), torch.cat(image_rows)
            spatial = None if spatials[0] is None else torch.cat(cast("tuple[Tensor, ...]", spatials))
        if not self.config["image_branch"]:
            return EditConditions(text, null_text, spatial=spatial)
        null_image = self.adapter.project(torch.zeros_like(self.adapter.map(self._zero_states())))
        return EditConditions(text, null_text, image_tokens, null_image.expand_as(image_tokens), spatial)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """CLIP's states (B, T, D), always in rows of one shape."""
        return torch.cat([encode_text(self.text_encoder, self.tokenizer, [text]) for text in texts])

    def _condition_rows(
        self, prompts: Sequence[str], images: Sequence[Image.Image]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """f_txt, f_img and v of B edits in one pass; a model without BIM has no v."""
        pixels = [to_pixels([image]) for image in images]
        inputs = self.prompts.encode_text(prompts)
        seen = [self.prompts.encode_images(one) for one in pixels]
        inputs |= {name: torch.cat([one[name] for one in seen]) for name in seen[0]}
        inputs = {name: x.to(self.mllm.device) for name, x in inputs.items()}
        states = hidden_states(self.mllm, self.mm_tokens, inputs)[:, 1:].to(self.qformer.dtype)
        text, spatial = self.qformer(states), None
        if self.bim is not None:
            patches = torch.cat([self.encoders.encode_images(one).patches for one in pixels]).to(states.dtype)
            text, spatial = self.bim(text, patches)
        return text, self.adapter(states), spatial

    def _zero_states(self) -> Tensor:
        shape = (1, self.mm_tokens.config["num_tokens"], self.mm_tokens.config["hidden_size"])
        return torch.zeros(shape, dtype=self.adapter.dtype, device=self.adapter.device)

    # -- the second half: doing it ------------------------------------------------------------------------------

    def model_size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height inside the model: the image's shape, the model's area, a multiple of what it divides by."""
        multiple = 2 ** (len(self.vae.config.block_out_channels) + len(self.unet.config["block_out_channels"]) - 2)
        width, height = image.size
        scale = self.config["resolution"] / (width * height) ** 0.5 if self.config["resolution"] else 1.0
        return (
            max(round(width * scale / multiple), 1) * multiple,
            max(round(height * scale / multiple), 1) * multiple,
        )

    @torch.no_grad()
    def denoise(
        self,
        conditions: EditConditions,
        pixels: Tensor,
        *,
        num_inference_steps: int,
        guidance: Guidance,
        generators: Sequence[torch.Generator | None],
        eta: float = 0.0,
        image_branch_scale: float = 1.0,
        scheduler: str | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> Tensor:
        """The UNet's steps between the VAE's two halves.

        Args:
            conditions: of B edits.
            pixels: source images uint8 (B, 3, H, W) of the model's own size.
            generators: B, one for each edit's noise.
            scheduler: one of `schedulers.SCHEDULERS` in place of the pipeline's own.
            latents: starting noise (B, 4, h, w) in place of the generators'.

        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """
        denoiser = Denoiser(self.unet, self.scheduler)
        edits = [
            denoiser.begin(
                conditions.row(row),
                self.encode(pixels[row : row + 1]),
                num_inference_steps=num_inference_steps,
                guidance=guidance,
                generator=generator,
                eta=eta,
                image_branch_scale=image_branch_scale,
                scheduler=scheduler,
                latents=None if latents is None else latents[row : row + 1],
            )
            for row, generator in enumerate(generators)
        ]
        progress: Any = self.progress_bar
        for index, timestep in enumerate(progress(edits[0].timesteps)):
            denoiser.step(edits)
            if callback_on_step_end is not None:
                current = torch.cat([edit.latents for edit in edits])
                current = callback_on_step_end(self, index, timestep, {"latents": current}).get("latents", current)
                for edit, own in zip(edits, current.split(1), strict=True):
                    edit.latents = own
        return self.decode(torch.cat([edit.latents for edit in edits]))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Source images uint8 (B, 3, H, W) of the model's own size to the latents (B, 4, h, w) that the UNet reads."""
        normal = pixels.to(self.unet.device, self.vae.dtype) / 127.5 - 1
        return self.vae.encode(normal).latent_dist.mode().to(self.unet.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) to images (B, 3, H, W), float32 in [0, 1]."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    # -- both -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        *,
        conditions: EditConditions | None = None,
        image_branch_scale: float = 1.0,
        scheduler: str | None = None,
        exact: bool = False,
    ) -> EditOutput | tuple[Any]:
        """Edit images.

        Args:
            prompt: the instruction, or one for each image.
            image: the source image, or several. Each is edited at the model's own size and given back at its own.
            num_inference_steps: steps of the scheduler; the model's own default if None, as for both scales.
            guidance_scale: how strongly the instruction guides, s_T.
            image_guidance_scale: how strongly the source image guides, s_I.
            negative_prompt: what the edit should keep away from.
            num_images_per_prompt: edits of each image, with noise of their own.
            eta: DDIM's eta.
            generator: the noise's source: one for all, or one for each edit.
            latents: starting noise (B, 4, h, w).
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W); the last two need images of one size.
            return_dict: an `EditOutput` instead of a tuple.
            callback_on_step_end: as in diffusers: (pipeline, step, timestep, {"latents"}) -> {"latents"}.
            conditions: what `condition` gave, in place of `prompt`.
            image_branch_scale: weight of the image branch.
            scheduler: one of `schedulers.SCHEDULERS` in place of the pipeline's own.
            exact: run every edit alone, in rows of one shape, on one thread: the same request, the same bits.

        Raises:
            ValueError: image or instruction are missing, their numbers do not fit, or there is no such scheduler.
        """
        images = self._checked(image, prompt, conditions)
        own = self.defaults
        steps = own.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = Guidance(
            own.guidance_scale if guidance_scale is None else guidance_scale,
            own.image_guidance_scale if image_guidance_scale is None else image_guidance_scale,
        )
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; use 1 or more.")
        count = len(images) * num_images_per_prompt
        generators = _generators(generator, count)
        results: list[Tensor] = []
        with exact_mode() if exact else _as_it_is():
            if conditions is None:
                conditions = self.condition(cast(Any, prompt), images, negative_prompt)
            conditions = conditions.repeated(num_images_per_prompt)
            images = [one for one in images for _ in range(num_images_per_prompt)]
            for rows in self._batches(images, alone=exact):
                resized = [images[row].resize(self.model_size(images[row]), Image.Resampling.BICUBIC) for row in rows]
                edited = self.denoise(
                    EditConditions.joined([conditions.row(row) for row in rows]),
                    to_pixels(resized),
                    num_inference_steps=steps,
                    guidance=guidance,
                    generators=[generators[row] for row in rows],
                    eta=eta,
                    image_branch_scale=image_branch_scale,
                    scheduler=scheduler,
                    latents=None if latents is None else latents[rows],
                    callback_on_step_end=callback_on_step_end,
                )
                results.extend(edited.cpu())
        output = _outputs(results, images, output_type)
        return EditOutput(images=output) if return_dict else (output,)

    def _checked(self, image: Any, prompt: Any, conditions: EditConditions | None) -> list[Image.Image]:
        if image is None:
            raise ValueError("image is missing; give a PIL image or a list of them.")
        images = _listed(image)
        if prompt is None and conditions is None:
            raise ValueError("prompt is missing; give an instruction, or conditions.")
        if conditions is not None and len(conditions) != len(images):
            raise ValueError(f"conditions are of {len(conditions)} edits and image has {len(images)} entries.")
        return images

    def _batches(self, images: Sequence[Image.Image], *, alone: bool) -> list[list[int]]:
        """Rows that run together: of one size, or each by itself."""
        if alone:
            return [[row] for row in range(len(images))]
        if len({self.model_size(image) for image in images}) == 1:
            return [list(range(len(images)))]
        return [[row] for row in range(len(images))]


@contextmanager
def _as_it_is() -> Generator[None]:
    yield


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, Image.Image)) else list(value)


def _generators(generator: Any, count: int) -> list[torch.Generator | None]:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"generator has {len(generator)} entries for {count} edits; give one for each.")
    return list(generator)


def as_images(results: Iterable[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Results (3, h, w) in [0, 1] at the model's size as images of the given widths and heights."""
    arrays = [(x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for x in results]
    edited = [Image.fromarray(array) for array in arrays]
    return [
        one if one.size == size else one.resize(size, Image.Resampling.BICUBIC)
        for one, size in zip(edited, sizes, strict=True)
    ]


def _outputs(results: Sequence[Tensor], images: Sequence[Image.Image], output_type: str) -> Any:
    """Results (3, h, w) in [0, 1] at the model's size as what was asked for, at the source images' sizes."""
    if output_type == "pil":
        return as_images(results, [image.size for image in images])
    stacked = torch.stack(list(results))
    if output_type == "pt":
        return stacked
    if output_type == "np":
        return stacked.permute(0, 2, 3, 1).numpy()
    raise ValueError(f"output_type is {output_type!r}; use 'pil', 'np' or 'pt'.")


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> InsightEditPipeline:
    """Load a whole pipeline from a folder of safetensors."""
    return _load(folder, dtype, leave_out=())


def load_conditioner(folder: str | Path, dtype: torch.dtype = torch.float32) -> InsightEditPipeline:
    """Load only what `condition` needs: the language model, the encoders and the bridging module."""
    return _load(folder, dtype, leave_out=_EDITOR_PARTS)


def load_editor(folder: str | Path, dtype: torch.dtype = torch.float32) -> InsightEditPipeline:
    """Load only what `denoise` needs: UNet, VAE and scheduler."""
    return _load(folder, dtype, leave_out=_CONDITIONER_PARTS)


def _load(folder: str | Path, dtype: torch.dtype, leave_out: Sequence[str]) -> InsightEditPipeline:
    absent: dict[str, Any] = dict.fromkeys(leave_out)
    pipeline: InsightEditPipeline = InsightEditPipeline.from_pretrained(
        str(folder), dtype=dtype, use_safetensors=True, local_files_only=True, variant=_variant(folder), **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _variant(folder: str | Path) -> str | None:
    """How diffusers names the files of a folder that has its weights in half precision alone."""
    names = [path.name for path in Path(folder).glob("*/*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None
