"""The errors that reach people: one sentence each, and the exit code that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class InsightEditError(Exception):
    """Something failed. The message is one sentence that names the field or file and the way out."""

    exit_code: ClassVar[int] = 1


class UsageError(InsightEditError, ValueError):
    """The command, the config or the input is wrong."""

    exit_code = 2


class GateRefusedError(InsightEditError):
    """A promotion gate refused a model version."""

    exit_code = 3

    def __init__(self, message: str, evidence: Mapping[str, Any] | None = None) -> None:
        """Say what was refused.

        Args:
            message: one sentence.
            evidence: what every gate has found, as JSON has it.
        """
        super().__init__(message)
        self.evidence = dict(evidence or {})


class NotFoundError(InsightEditError):
    """A file, a dataset, a run or a model version does not exist."""

    exit_code = 4


class ClusterError(InsightEditError):
    """The Ray cluster could not be reached."""

    exit_code = 5
