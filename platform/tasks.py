"""What the training loop asks of what it trains: the loop itself knows no model and no dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from PIL import Image
from torch import Tensor, nn

from insightedit.model.stages import Part
from insightedit.platform.streams import Collate, Encode


class TrainingTask(Protocol):
    """Something to train in stages. Tasks are pickled, so they hold settings, not weights."""

    @property
    def key(self) -> str:
        """Names the collate function; equal for equal settings."""
        ...

    def build_model(self, *, halved: bool = False) -> nn.Module:
        """The untrained model, on the CPU, equal in every process that has the same torch seed.

        With `halved`, what no stage trains may be read in bfloat16 at once, as `frozen: bf16` keeps it.

        It has `begin_stage(number)`, which chooses what trains, and `forward(batch, stage)`, which returns a
        `LossTerm` for each loss of the stage by name.
        """
        ...

    def make_collate(self) -> Collate:
        """The function that turns rows of prepared shards into a batch's arrays."""
        ...

    def make_encoder(self) -> Encode:
        """The function that adds the frozen encoders' features to rows of shards that were not encoded ahead."""
        ...

    def part_of(self, parameter: str) -> Part | None:
        """The part that a parameter of the model belongs to, by its name: what `learning_rates` are given to."""
        ...

    def loss_weights(self, batch: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """How much each sample counts (B,) in each loss of the stage: the weights that `forward` will return."""
        ...

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Figures of the last forward pass, to be logged beside the losses."""
        ...

    def pictures(self, model: nn.Module, stage: int) -> dict[str, Image.Image]:
        """Validation edits by the model as it is, by name."""
        ...
