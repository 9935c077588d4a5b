"""Work folders with an MLflow database that is made once: making its tables takes seconds."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from insightedit.platform.registry import Registry
from insightedit.platform.workdir import Workdir


def make_workdir(folder: Path) -> Workdir:
    """A work folder with an empty registry."""
    workdir = Workdir.open(folder)
    (workdir.root / "mlflow.db").write_bytes(_empty_database())
    return workdir


@cache
def _empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Workdir.open(folder)
        assert Registry(workdir).versions() == []
        return (workdir.root / "mlflow.db").read_bytes()
