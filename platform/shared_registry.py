"""`registry.yaml`: the MLflow that the people of a team share, each with a work folder of their own."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

import yaml
from pydantic import BaseModel, ConfigDict

from insightedit.platform.errors import UsageError


class SharedRegistry(BaseModel):
    """`registry.yaml` in a work folder: the MLflow that a team shares."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tracking_uri: str = ""
    """A tracking server, `http://mlflow.example:5000`, or a database, `postgresql://mlflow.example/mlflow`."""
    artifacts: str = ""
    """Where a new experiment's files go, `s3://bucket/folder`; empty leaves it to the tracking server."""

    @classmethod
    def read(cls, path: Path) -> SharedRegistry:
        """Read the file.

        Raises:
            UsageError: it is no such file, or has a password in it.
        """
        try:
            shared = cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (ValueError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())[:200]
            raise UsageError(f"{path} must have tracking_uri and perhaps artifacts: {said}.") from None
        for uri in (shared.tracking_uri, shared.artifacts):
            if urlparse(uri).password:
                raise UsageError(
                    f"{path} holds a password: give it in INSIGHTEDIT_TRACKING_URI, MLFLOW_TRACKING_PASSWORD or"
                    " PGPASSWORD."
                )
        return shared
