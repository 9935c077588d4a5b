"""Where one project's registry, runs, shards and logs live."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from insightedit.platform.errors import UsageError

if TYPE_CHECKING:
    from insightedit.platform.shared_registry import SharedRegistry

ENVIRONMENT_VARIABLE = "INSIGHTEDIT_WORKDIR"
TRACKING_VARIABLE = "INSIGHTEDIT_TRACKING_URI"
"""Comes before `registry.yaml`."""
SHARED_FILE = "registry.yaml"
DEFAULT_FOLDER = "insightedit-work"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Workdir:
    """The folder that every command shares; what one command made there, the next one finds."""

    root: Path

    @classmethod
    def open(cls, path: str | Path | None = None) -> Workdir:
        """Open a work folder, made if it is missing.

        Args:
            path: the folder; without it `INSIGHTEDIT_WORKDIR`, then `./insightedit-work`.

        Raises:
            UsageError: the path exists and is not a folder, or is a URI.
        """
        root = cls.place(path)
        if root.exists() and not root.is_dir():
            raise UsageError(f"--workdir {root} is a file; name a folder instead.")
        root.mkdir(parents=True, exist_ok=True)
        return cls(root)

    @staticmethod
    def place(path: str | Path | None = None) -> Path:
        """Where the work folder is; on a cluster it may not be seen from here.

        Raises:
            UsageError: it is a URI.
        """
        place = Path(path or os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_FOLDER)
        if place.parts[0].endswith(":"):
            raise UsageError(
                f"--workdir {place} must be a folder; only shards (data.store) and checkpoints (checkpoints.store) can"
                " lie in an object store."
            )
        return place.expanduser().absolute()

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking and registry: the folder's own database, or what a team shares.

        Raises:
            UsageError: `registry.yaml` cannot be read.
        """
        shared = self._shared()
        own = f"sqlite:///{self.root / 'mlflow.db'}"
        return os.environ.get(TRACKING_VARIABLE) or (shared.tracking_uri if shared else "") or own

    @property
    def artifact_root(self) -> str | None:
        """Where a new experiment's artifacts go; None leaves it to the tracking server.

        Raises:
            UsageError: `registry.yaml` cannot be read.
        """
        shared = self._shared()
        if shared and shared.artifacts:
            return shared.artifacts
        return None if self.tracking_uri.startswith("http") else self.artifacts.as_uri()

    def _shared(self) -> SharedRegistry | None:
        path = self.root / SHARED_FILE
        if not path.is_file():
            return None
        # Only here: `insightedit --help` is quick.
        from insightedit.platform.shared_registry import SharedRegistry  # noqa: PLC0415

        return SharedRegistry.read(path)

    @property
    def versions(self) -> Path:
        """Copies of model versions whose files are in a store."""
        return self.root / "versions"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts: the files of runs and of model versions."""
        return self.root / "artifacts"

    @property
    def data(self) -> Path:
        """Prepared shards, a folder for each dataset."""
        return self.root / "data"

    @property
    def runs(self) -> Path:
        """Checkpoints and states of training runs, a folder for each run."""
        return self.root / "runs"

    @property
    def edited(self) -> Path:
        """Edits that evaluations made; all of it may be deleted at any time."""
        return self.root / "edited"

    @property
    def reports(self) -> Path:
        """The pages of evaluations."""
        return self.root / "reports"

    @property
    def logs(self) -> Path:
        """Logs of long-lived processes."""
        return self.root / "logs"

    @property
    def serve_state(self) -> Path:
        """What `serve up` started: address, process and version."""
        return self.root / "serve.json"


def run_name(name: str | None, preset: str) -> str:
    """The name of a run: the one that was given, or a new one after the preset.

    Raises:
        UsageError: it cannot be the name of a folder and of a job.
    """
    if name is None:
        return f"{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not _RUN_NAME.fullmatch(name):
        raise UsageError(
            f"--name {name} must be letters, digits, '_', '-' and '.', and begin with one of the first two."
        )
    return name
