"""Features of the frozen encoders for records, computed once and ahead of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from insightedit.model.configuration import SourcesConfig
from insightedit.model.encoders import FrozenEncoders, squared
from insightedit.model.weights import load_diffusion, load_image_encoder, load_image_processor
from insightedit.platform.errors import UsageError
from insightedit.platform.pictures import decode_squares, to_tensor
from insightedit.platform.shards import Table, add_features

_IMAGES = 64
_TEXTS = 256


def load_encoders(sources: SourcesConfig) -> FrozenEncoders:
    """The frozen encoders of a model's sources, in float32.

    Raises:
        UsageError: a source cannot be loaded.
    """
    try:
        diffusion = load_diffusion(sources, parts=("vae", "text_encoder", "tokenizer"))
        image_encoder, image_processor = load_image_encoder(sources), load_image_processor(sources)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return FrozenEncoders(**diffusion, image_encoder=image_encoder, image_processor=image_processor)


class RecordEncoder:
    """Adds to a table of records what training needs of its pictures and texts.

    `clip_patches` and `source_embeds` of the source; `source_latents`, the mode of the VAE's posterior; `target_embeds`
    and `target_moments` of the target; `text_states` of what the picture's words should come to: the reply where
    there is one, or else the instruction or caption; and `diffusion_weight`, which is 0 where there is no target, and
    the source stands in for it. Features are kept in half precision.
    """

    def __init__(self, sources: SourcesConfig, resolution: int, threads: int = 1) -> None:
        """Load the encoders.

        Args:
            sources: of the model.
            resolution: side in pixels of the squares that the VAE encodes.
            threads: of torch.
        """
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoders = load_encoders(sources)
        self.fingerprint = encoders.fingerprint()
        self._encoders = encoders.to(self._device)
        self._resolution = resolution
        # Each picture is decoded once, large enough for both towers.
        self._side = max(resolution, encoders.image_encoder.config.image_size)

    def __call__(self, table: Table) -> Table:
        """Encode the records of a table."""
        sources, targets = table.column("source"), table.column("target")
        # Records often share pictures: each is encoded once.
        files: list[bytes] = [*sources.to_pylist(), *filter(None, targets.to_pylist())]
        distinct = list(dict.fromkeys(files))
        place = {data: number for number, data in enumerate(distinct)}
        source = np.array([place[data] for data in sources.to_pylist()])
        pairs = zip(targets.to_pylist(), sources.to_pylist(), strict=True)
        target = np.array([place[data or own] for data, own in pairs])
        patches, embeds, moments = self._encode_images(distinct)
        features = {
            "clip_patches": patches[source],
            "source_embeds": embeds[source],
            "source_latents": moments[source][:, : moments.shape[1] // 2],
            "target_embeds": embeds[target],
            "target_moments": moments[target],
            "text_states": self._encode_texts(_spoken(table)),
            "diffusion_weight": np.array([data is not None for data in targets.to_pylist()], np.float32),
        }
        return add_features(table, features)

    def _encode_images(self, files: Sequence[bytes]) -> list[NDArray[Any]]:
        """Patches, embeddings and moments of encoded pictures."""
        parts: list[list[NDArray[Any]]] = []
        for start in range(0, len(files), _IMAGES):
            pixels = to_tensor(decode_squares(files[start : start + _IMAGES], self._side))
            features = self._encoders.encode_images(pixels)
            square = (squared(pixels, self._resolution) * 255).round().to(torch.uint8)
            moments = self._encoders.encode_latents(square)
            parts.append([_half(tensor) for tensor in (features.patches, features.embeds, moments)])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _encode_texts(self, texts: Sequence[str]) -> NDArray[Any]:
        starts = range(0, len(texts), _TEXTS)
        return np.concatenate([_half(self._encoders.encode_text(texts[start : start + _TEXTS])) for start in starts])


def _spoken(table: Table) -> list[str]:
    """The text of each record that stage 1 aligns with: its reply, or its instruction where it has none."""
    pairs = zip(table.column("reply").to_pylist(), table.column("instruction").to_pylist(), strict=True)
    return [reply or instruction for reply, instruction in pairs]


def _half(tensor: Tensor) -> NDArray[Any]:
    return tensor.half().cpu().numpy()
