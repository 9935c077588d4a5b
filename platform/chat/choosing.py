"""The language model that a config names."""

from __future__ import annotations

from insightedit.platform.chat import ChatModel
from insightedit.platform.chat.config import EndpointConfig, LocalModelConfig
from insightedit.platform.chat.endpoint import ChatEndpoint


def build_chat(config: EndpointConfig | LocalModelConfig) -> ChatModel:
    """Make a model that can be asked; a local one is loaded when it is first asked.

    Raises:
        UsageError: the variable with the API key is not set, or the hub has no such model.
        NotFoundError: the model's folder does not exist.
    """
    if isinstance(config, EndpointConfig):
        return ChatEndpoint(config)
    # Who asks an endpoint needs neither torch nor transformers.
    from insightedit.platform.chat.local import LocalChat  # noqa: PLC0415

    return LocalChat(config)
