"""What the language model reads: the image, the instruction, and the places of the [MM] tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from insightedit.model.encoders import squared

# A word that no chat template changes; the template is cut where it stands.
_MARK = "INSTRUCTION_GOES_HERE"


class PromptEncoder:
    """Turns instructions and images into rows of one length for the language model.

    The chat template is the model's own: `user: image, instruction; assistant: [MM_1] ... [MM_r]`. Rows are padded on
    the right, behind the [MM] tokens, where a causal model does not see the padding.
    """

    def __init__(self, processor: Any, num_mm_tokens: int, max_length: int) -> None:
        """Read the template once.

        Args:
            processor: the model's processor, of tokens and images.
            num_mm_tokens: r.
            max_length: length of every row.

        Raises:
            ValueError: the image alone needs more than `max_length`, or a batch of images has no row for each.
        """
        self.num_mm_tokens = num_mm_tokens
        self.max_length = max_length
        self._tokenizer = processor.tokenizer
        self._image_processor = processor.image_processor
        self._side = _image_side(self._image_processor)
        _check_rows(self._image_processor)
        user = [{"type": "image"}, {"type": "text", "text": _MARK}]
        template: str = processor.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True)
        before, _, after = template.partition(_MARK)
        before = before.rstrip(" ")  # tokenizers put a space before a text's first word by themselves
        blank = Image.new("RGB", (self._side, self._side))
        self._prefix: list[int] = processor(images=blank, text=before, return_tensors="pt").input_ids[0].tolist()
        if self._prefix and self._prefix[-1] == self._tokenizer.eos_token_id:
            self._prefix.pop()
        self._suffix: list[int] = self._tokenizer(after, add_special_tokens=False).input_ids
        self._room = max_length - len(self._prefix) - len(self._suffix) - num_mm_tokens
        if self._room < 1:
            raise ValueError(
                f"model.prompt_length is {max_length}, and image, template and [MM] tokens take "
                f"{max_length - self._room}; set it to {max_length - self._room + 64} or more."
            )

    def __call__(self, instructions: Sequence[str], pixels: Tensor, *, cut: bool = False) -> dict[str, Tensor]:
        """Encode a batch.

        Args:
            instructions: B texts.
            pixels: uint8 (B, 3, H, W), made square whole.
            cut: shorten an instruction that is too long; otherwise it is an error.

        Returns:
            `input_ids` and `attention_mask` (B, L), `mm_start` (B,), and the image inputs of the processor.

        Raises:
            ValueError: an instruction does not fit.
        """
        return {**self.encode_text(instructions, cut=cut), **self.encode_images(pixels)}

    def encode_text(self, instructions: Sequence[str], *, cut: bool = False) -> dict[str, Tensor]:
        """The token side of a batch: `input_ids` and `attention_mask` (B, L), `mm_start` (B,)."""
        filler = self._tokenizer.pad_token_id
        filler = self._tokenizer.eos_token_id if filler is None else filler
        ids = torch.full((len(instructions), self.max_length), filler, dtype=torch.long)
        mask = torch.zeros_like(ids)
        starts: list[int] = []
        for row, tokens in enumerate(self._tokenizer(list(instructions), add_special_tokens=False).input_ids):
            if len(tokens) > self._room and not cut:
                raise ValueError(f"the instruction has {len(tokens)} tokens; this model reads {self._room} at most.")
            text = [*self._prefix, *tokens[: self._room], *self._suffix]
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text) + self.num_mm_tokens] = 1
            starts.append(len(text))
        return {"input_ids": ids, "attention_mask": mask, "mm_start": torch.tensor(starts)}

    @property
    def image_side(self) -> int:
        """Side in pixels of the squares that the model's image processor ends with."""
        return self._side

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """The image side of a batch: what the model's image processor gives for uint8 (B, 3, H, W)."""
        square = (squared(pixels, self._side) * 255).round().to(torch.uint8)
        images = [Image.fromarray(np.ascontiguousarray(array)) for array in square.permute(0, 2, 3, 1).numpy()]
        return dict(self._image_processor(images=images, return_tensors="pt"))


def _check_rows(image_processor: Any) -> None:
    """Check that images are rows of what a processor gives: batches are cut into rows.

    Raises:
        ValueError: they are not.
    """
    blank = Image.new("RGB", (64, 64))
    given: dict[str, Tensor] = dict(image_processor(images=[blank, blank], return_tensors="pt"))
    if joined := [name for name, x in given.items() if len(x) != 2]:
        raise ValueError(
            f"model.sources.mllm has an image processor that puts the patches of all images into one list"
            f" ({joined[0]}), as Qwen2-VL's does; choose a model with a row for each image, such as LLaVA."
        )


def _image_side(image_processor: Any) -> int:
    """The side in pixels of the square that an image processor ends with."""
    sizes = [getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None)]
    for size in sizes:
        for key in ("height", "shortest_edge", "longest_edge"):
            if size and size.get(key):
                return int(size[key])
    return 336
