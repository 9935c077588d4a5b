"""The multimodal language model's side: the [MM] vocabulary, one teacher-forced pass, and LoRA.

The [MM] tokens are rows of our own beside the frozen vocabulary. In the token ids their places hold any valid id; a
hook on the embedding puts the rows there. So no embedding is resized, and whatever `AutoModelForImageTextToText`
loads can be used as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import peft
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from insightedit.model.configuration import LoraConfig

IMAGE_KEYS_EXCLUDED = frozenset({"input_ids", "attention_mask", "mm_start"})


class MultimodalTokens(ModelMixin, ConfigMixin):
    """The r [MM] tokens: an input row and an output row for each."""

    @register_to_config
    def __init__(self, num_tokens: int = 32, hidden_size: int = 4096) -> None:
        super().__init__()
        self.input_rows = nn.Embedding(num_tokens, hidden_size)
        self.output_rows = nn.Linear(hidden_size, num_tokens, bias=False)

    @torch.no_grad()
    def start_from(self, mllm: PreTrainedModel) -> None:
        """Begin around the mean of the frozen vocabulary's rows, each token twice as far from the others as words are.

        Tokens that begin alike give hidden states that are alike, and it takes long until each carries its own part.
        """
        input_rows, output_rows = mllm.get_input_embeddings(), _head(mllm)
        pairs: Any = ((self.input_rows, input_rows), (self.output_rows, output_rows))
        for rows, vocabulary in pairs:
            rows.weight.copy_(strangers(vocabulary.weight.float(), rows.weight.shape[:-1]))

    def positions(self, start: Tensor) -> Tensor:
        """Positions (B, r) of the tokens in rows where they begin at `start` (B,)."""
        return start[:, None] + torch.arange(self.config["num_tokens"], device=start.device)

    @contextmanager
    def inserted(self, mllm: PreTrainedModel, start: Tensor) -> Generator[None]:
        """Put the input rows into the embedding's output at positions `start` (B,) and on."""
        positions = self.positions(start)

        def insert(_module: nn.Module, _args: Any, embeddings: Tensor) -> Tensor:
            rows = self.input_rows(torch.arange(positions.shape[1], device=embeddings.device)).to(embeddings.dtype)
            index = positions[..., None].expand(-1, -1, embeddings.shape[-1])
            return embeddings.scatter(1, index, rows.expand(embeddings.shape[0], -1, -1))

        handle = mllm.get_input_embeddings().register_forward_hook(insert)
        try:
            yield
        finally:
            handle.remove()


@torch.no_grad()
def strangers(words: Tensor, shape: Sequence[int]) -> Tensor:
    """Vectors (*shape, H) around the mean of a vocabulary's rows (V, H), twice as far from each other as words are."""
    return words.mean(dim=0) + 2.0 * words.std() * torch.randn(*shape, words.shape[1], device=words.device)


def hidden_states(mllm: PreTrainedModel, tokens: MultimodalTokens, inputs: Mapping[str, Tensor]) -> Tensor:
    """One teacher-forced pass over image, instruction and [MM] tokens.

    Args:
        mllm: the language model.
        tokens: the [MM] vocabulary.
        inputs: `input_ids` (B, L), `attention_mask` (B, L), `mm_start` (B,), and the image inputs of the processor.

    Returns:
        (B, r + 1, H): last-layer states at the position before [MM_1], then at the r tokens. The states h are
        `[:, 1:]`; the states that predict the tokens are `[:, :-1]`.
    """
    start = inputs["mm_start"]
    image_inputs = {name: value for name, value in inputs.items() if name not in IMAGE_KEYS_EXCLUDED}
    with tokens.inserted(mllm, start):
        states: Tensor = mllm.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **image_inputs
        ).last_hidden_state
    positions = torch.cat([start[:, None] - 1, tokens.positions(start)], dim=1)
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def token_logits(mllm: PreTrainedModel, tokens: MultimodalTokens, states: Tensor) -> Tensor:
    """Logits (B, r, V + r) of the frozen vocabulary and the [MM] tokens side by side, from states (B, r, H)."""
    return torch.cat([_head(mllm)(states), tokens.output_rows(states)], dim=-1)


def _head(mllm: PreTrainedModel) -> nn.Module:
    head = mllm.get_output_embeddings()
    if head is None:
        raise ValueError("model.sources.mllm has no output embeddings; choose a model that writes text.")
    return head


def add_lora(mllm: PreTrainedModel, config: LoraConfig) -> None:
    """Put LoRA on the query and value projections of the language model, not of its vision tower.

    The added weights change nothing until they are trained, and are float32 whatever the model is in.
    """
    decoder = mllm.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    targets = [
        name
        for name, module in mllm.named_modules()
        if id(module) in inside and name.rsplit(".", 1)[-1] in ("q_proj", "v_proj")
    ]
    if not targets:
        raise ValueError("model.sources.mllm has no q_proj and v_proj in its language model; choose another model.")
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
        ),
        mllm,
    )
    for name, parameter in mllm.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def without_lora(mllm: PreTrainedModel) -> PreTrainedModel:
    """The language model with its LoRA merged into the weights, as plain as it was loaded.

    Weights that LoRA does not change are shared with `mllm`: of 7 billion there is no room for two.
    """
    layers = [module for module in mllm.modules() if isinstance(module, BaseTunerLayer)]
    changed = {id(parameter) for layer in layers for parameter in layer.parameters()}
    shared = {id(parameter): parameter for parameter in mllm.parameters() if id(parameter) not in changed}
    merged = copy.deepcopy(mllm, cast(dict[int, Any], shared))
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    for parameter in merged.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return merged
