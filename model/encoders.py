"""The frozen encoders: CLIP's text and image towers and the VAE.

What they give is the same at every step of training, so it may be computed ahead, by other machines, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection


class ImageFeatures(NamedTuple):
    """What CLIP's image tower gives for a batch of B images."""

    patches: Tensor
    """(B, G * G, W), the layer before the last without the class token."""
    embeds: Tensor
    """(B, P), projected, not normalised."""


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as uint8 (B, 3, H, W)."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def squared(pixels: Tensor, side: int) -> Tensor:
    """The whole image made a square of `side` pixels, never a crop: uint8 (B, 3, H, W) to float [0, 1]."""
    scaled = pixels.float() / 255
    if pixels.shape[-2:] == (side, side):
        return scaled
    return F.interpolate(scaled, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


class FrozenEncoders(nn.Module):
    """CLIP's two towers and the VAE, never trained."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: Any,
        image_encoder: CLIPVisionModelWithProjection,
        image_processor: Any,
    ) -> None:
        super().__init__()
        self.vae: Any = vae
        self.text_encoder = text_encoder
        self.image_encoder: Any = image_encoder
        self.tokenizer = tokenizer
        self.mean, self.std = (
            nn.Buffer(torch.tensor(values).view(1, 3, 1, 1), persistent=False)
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """CLIP features of uint8 images (B, 3, H, W), each made square whole."""
        square = squared(pixels.to(self.mean.device), self.image_encoder.config.image_size)
        normal = ((square - self.mean) / self.std).to(self.image_encoder.dtype)
        output = self.image_encoder(pixel_values=normal, output_hidden_states=True)
        return ImageFeatures(output.hidden_states[-2][:, 1:], output.image_embeds)

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance (B, 2 * 4, h, w) of the VAE's posterior, unscaled, for uint8 images (B, 3, H, W)."""
        normal = pixels.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        posterior = self.vae.encode(normal).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """CLIP's last hidden states (B, T, D), cut or padded to the tower's length."""
        return encode_text(self.text_encoder, self.tokenizer, texts)

    def fingerprint(self) -> str:
        """A hash of every weight: features kept from other encoders are stale."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


def encode_text(text_encoder: CLIPTextModel, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """CLIP's last hidden states (B, T, D) of texts, cut or padded to the tower's length."""
    ids = text_ids(tokenizer, text_encoder.config.max_position_embeddings, texts)
    return text_encoder(ids.to(text_encoder.device)).last_hidden_state


def text_ids(tokenizer: Any, length: int, texts: Sequence[str]) -> Tensor:
    """Ids (B, T) of texts, cut or padded to CLIP's length T."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
