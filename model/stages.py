"""The three stages of training as data: what trains, with which losses (the seed's section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, cast

from insightedit.model.configuration import ModelConfig

Part = Literal["mm_tokens", "lora", "qformer", "mapper", "bim", "unet", "adapter", "image_branch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage."""

    number: int
    trains: frozenset[Part]
    losses: tuple[str, ...]
    """Names of the terms of its equation, in its order."""


_WHOLE_MODULES: Final = frozenset({"mm_tokens", "qformer", "bim"})

STAGES: dict[int, Stage] = {
    # Equation 2: the [MM] tokens, the Q-Former and the mapper learn to speak CLIP.
    1: Stage(number=1, trains=frozenset({"mm_tokens", "qformer", "mapper"}), losses=("L_LLM", "L_IB", "L_TB")),
    # Equation 3: the textual branch.
    2: Stage(
        number=2,
        trains=frozenset({"mm_tokens", "lora", "qformer", "mapper", "bim", "unet"}),
        losses=("L_MLLM", "L_IAA", "L_diff1"),
    ),
    # Equation 4: the image branch.
    3: Stage(number=3, trains=frozenset({"mapper", "adapter", "image_branch"}), losses=("L_IAA", "L_diff2")),
}


def parts_trained(number: int, model: ModelConfig) -> frozenset[Part]:
    """The parts that a stage trains, of those that the model has."""
    trains = STAGES[number].trains
    if model.conditioning == "text":
        return trains & {"unet"}
    return trains if model.bim.enabled else trains - {"bim"}


def part_of(parameter: str) -> Part | None:
    """The part a parameter of `InsightEditModel` belongs to, by its name; None for what never trains."""
    root = parameter.split(".", 1)[0]
    if root == "mllm":
        return "lora" if ".lora_" in parameter else None
    if root == "adapter":
        return "mapper" if parameter.startswith("adapter.mapper.") else "adapter"
    if root == "unet":
        return "image_branch" if ".processor." in parameter else "unet"
    if root in _WHOLE_MODULES:
        return cast(Part, root)
    return None
