"""What steers an edit: its conditions, and how strongly each of them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EditConditions:
    """All that the denoiser needs to know of B edits besides their source images."""

    text: Tensor
    """f_txt (B, T, D)."""
    null_text: Tensor
    """CLIP's states (B, T, D) of the negative prompt, or of the empty text."""
    image: Tensor | None = None
    """f_img (B, N, D); None for a model without an image branch."""
    null_image: Tensor | None = None
    """f_img (B, N, D) of zeros: the dropped image condition."""
    spatial: Tensor | None = None
    """v (B, C, G, G), before it is resized to the latents; None for a model without BIM."""

    def __len__(self) -> int:
        return self.text.shape[0]

    def row(self, index: int) -> EditConditions:
        """The conditions of one edit, as a batch of one."""
        return EditConditions(**{name: x[index : index + 1] for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    def repeated(self, times: int) -> EditConditions:
        """Each edit `times` times in a row."""
        return EditConditions(**{name: x.repeat_interleave(times, dim=0) for name, x in self.tensors().items()})

    @staticmethod
    def joined(parts: Sequence[EditConditions]) -> EditConditions:
        """Several batches as one."""
        names = parts[0].tensors()
        return EditConditions(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in names})


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance over text and source image, in InstructPix2Pix's form.

    eps = eps(0, 0) + s_I (eps(0, I) - eps(0, 0)) + s_T (eps(T, I) - eps(0, I)). A branch whose weight is 0 is not run.
    """

    text: float
    image: float

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches to run, in the order text, image, none."""
        weights = {"text": self.text, "image": self.image - self.text, "none": 1 - self.image}
        return tuple(name for name, weight in weights.items() if weight != 0)

    def combine(self, outputs: Tensor) -> Tensor:
        """Outputs (branches * B, ...) of the denoiser, branch by branch, to (B, ...) in float32.

        In bfloat16 the sum of large weights, which nearly cancel, would be off by eight times its rounding.
        """
        weights = {"text": self.text, "image": self.image - self.text, "none": 1 - self.image}
        chunks = outputs.float().chunk(len(self.branches))
        total = weights[self.branches[0]] * chunks[0]
        for name, chunk in zip(self.branches[1:], chunks[1:], strict=True):
            total = total + weights[name] * chunk
        return total
