"""The judge that a config names."""

from __future__ import annotations

from typing import Final

from insightedit.platform.chat.cache import AnswerCache
from insightedit.platform.chat.choosing import build_chat
from insightedit.platform.chat.config import JudgeConfig
from insightedit.platform.judges import Judge
from insightedit.platform.judges.mllm import MllmJudge
from insightedit.platform.judges.shapes import ShapesJudge
from insightedit.platform.workdir import Workdir

CACHE: Final = "judged"
"""The folder of a work folder with the answers of language models."""


def build_judge(config: JudgeConfig, workdir: Workdir) -> Judge:
    """Make a judge. A local model is loaded when it is first asked something that it has not answered before.

    Args:
        config: which.
        workdir: where answers are kept.

    Raises:
        UsageError: the variable with the API key is not set.
    """
    if isinstance(config, str):
        return ShapesJudge()
    return MllmJudge(build_chat(config), AnswerCache(workdir.root / CACHE))
