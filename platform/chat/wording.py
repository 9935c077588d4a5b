"""What language models wrote, as JSON: they wrap it into fences and prose, and forget quotes and brackets."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import json_repair

_THOUGHTS: Final = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
"""What reasoning models think aloud before they answer; it often holds drafts of the answer."""


class AnswerError(ValueError):
    """An answer that cannot be used; the message is a sentence that the model can be told."""


def without_thoughts(text: str) -> str:
    """An answer without what a reasoning model thought aloud before it."""
    return _THOUGHTS.sub("", text)


def load_answer(text: str) -> Any:
    """The JSON of an answer, mended where it has to be: the last of the values that it holds, prose left out.

    Raises:
        AnswerError: there is none.
    """
    said = without_thoughts(text)
    starts = [place for mark in "{[" if (place := said.find(mark)) >= 0]
    if not starts:
        raise AnswerError("there is no JSON in it.")
    found = said[min(starts) :]
    try:
        return json.loads(found)
    except ValueError:
        pass
    try:
        return json_repair.loads(found, skip_json_loads=True)
    except (ValueError, RecursionError):
        raise AnswerError("its JSON cannot be read.") from None
