"""Answers that were given, on disk: an edit is paid for once, and a run that was killed asks only for what is missing.

A file for each answer, put in place whole by a rename, so that several processes may share a folder and none ever
reads half an answer. Failures are not kept: the next run asks again.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pydantic import BaseModel, ValidationError


class KeptAnswer(BaseModel, extra="forbid", frozen=True):
    """What is kept of one answer."""

    model: str
    """Who gave it, and how it was asked."""
    question: str
    instruction: str
    text: str
    """All that the model wrote."""


class AnswerCache:
    """The answers in a folder."""

    def __init__(self, folder: Path) -> None:
        """Open a folder, which need not be there yet."""
        self._folder = folder

    def get(self, key: str) -> KeptAnswer | None:
        """The answer of a key; None where there is none, or a damaged one."""
        try:
            return KeptAnswer.model_validate_json(self._path(key).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def put(self, key: str, answer: KeptAnswer) -> None:
        """Keep an answer. Where two processes asked the same, the later answer stays."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{key}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        temporary.write_text(answer.model_dump_json(), encoding="utf-8")
        temporary.replace(path)

    def _path(self, key: str) -> Path:
        # A folder of a hundred thousand files is slow to list.
        return self._folder / key[:2] / f"{key}.json"
