"""A model that transformers loads: a folder or a hub id, any `AutoModelForImageTextToText` with its processor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from insightedit.model.configuration import SourcesConfig
from insightedit.model.weights import load_mllm, load_mllm_processor
from insightedit.platform.chat import Answer, Conversation, NoReply, OnAnswer, Reply, Usage, shown
from insightedit.platform.chat.config import LocalModelConfig
from insightedit.platform.errors import NotFoundError, UsageError


class LocalChat:
    """A local model that answers greedily, so that the same question has one answer; see `ChatModel`.

    It is loaded when it is first asked: a judge whose answers are all kept needs none.
    """

    def __init__(self, config: LocalModelConfig) -> None:
        """Make ready; no weights are loaded.

        Raises:
            NotFoundError: it is a folder and does not exist.
            UsageError: it is a hub id that cannot be found.
        """
        self.usage = Usage()
        self.identity = _identity(config)
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        """Model and processor."""
        place = str(Path(self._config.local).expanduser())
        sources = SourcesConfig(diffusion="", image_encoder="", mllm=place)
        try:
            processor, model = load_mllm_processor(sources), load_mllm(sources, "auto")
        except (OSError, ValueError) as error:
            raise UsageError(str(error).replace("model.sources.mllm is", "local is")) from error
        if getattr(processor, "chat_template", None) is None:
            raise UsageError(f"local is {self._config.local}, whose processor has no chat template; add one to it.")
        return model.to(self._device).eval(), processor

    def ask(self, conversations: Sequence[Conversation], on_answer: OnAnswer) -> None:
        """Have conversations answered, `batch` at a time.

        Raises:
            UsageError: the model cannot be loaded.
        """
        for start in range(0, len(conversations), self._config.batch):
            batch = conversations[start : start + self._config.batch]
            for number, answer in enumerate(self._answers(batch), start):
                on_answer(number, answer)

    def _answers(self, batch: Sequence[Conversation]) -> list[Answer]:
        model, _ = self._model
        self.usage.requests += len(batch)
        try:
            texts = self._generated(model, self._inputs(batch))
        except (RuntimeError, ValueError, IndexError) as error:  # too long for the model, or for the memory
            return [NoReply("rejected", f"The model failed: {' '.join(str(error).split())[:200]}")] * len(batch)
        return [Reply(text) if text.strip() else NoReply("empty", "The model said nothing.") for text in texts]

    def _inputs(self, batch: Sequence[Conversation]) -> Any:
        """Token ids and pixels of conversations, padded on the left: answers are written on the right."""
        model, processor = self._model
        messages = [[_message(turn.role, turn.text, len(turn.pictures)) for turn in one] for one in batch]
        prompts = [processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in messages]
        pictures = [
            [shown(picture, self._config.picture_side) for turn in one for picture in turn.pictures] for one in batch
        ]
        inputs = processor(text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
        return inputs.to(self._device, model.dtype)

    @torch.inference_mode()
    def _generated(self, model: Any, inputs: Any) -> list[str]:
        _, processor = self._model
        prompt: Tensor = inputs["input_ids"]
        written: Tensor = model.generate(
            **inputs, max_new_tokens=self._config.max_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
        )[:, prompt.shape[1] :]
        padding = processor.tokenizer.pad_token_id
        self.usage.prompt_tokens += int(inputs["attention_mask"].sum())
        self.usage.completion_tokens += int((written != padding).sum())
        return processor.batch_decode(written, skip_special_tokens=True)


def _message(role: str, text: str, pictures: int) -> dict[str, Any]:
    """A turn as chat templates take it."""
    return {"role": role, "content": [*([{"type": "image"}] * pictures), {"type": "text", "text": text}]}


def _identity(config: LocalModelConfig) -> str:
    """The model's files, by name, size and time of change, or its commit on the hub; and the settings."""
    folder = Path(config.local).expanduser()
    content: Any
    if folder.is_dir():
        stats = [(str(path.relative_to(folder)), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
        content = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    elif config.local.startswith((".", "/", "~")):
        raise NotFoundError(f"local is {config.local}, and there is no such folder; name a folder or a hub id.")
    else:
        try:
            content = getattr(AutoConfig.from_pretrained(config.local), "_commit_hash", None)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())
            raise UsageError(f"local is {config.local}, which is no folder and no model of the hub: {why}") from error
    settings = repr((content, config.max_tokens, config.picture_side))
    return f"{config.local} {hashlib.sha256(settings.encode()).hexdigest()[:16]}"
