"""Where the files of a model version lie: a folder that this machine sees, or a store behind MLflow.

A version in a store (S3, or a tracking server that hands artifacts on) is copied once into the work folder's
`versions/`. Such a copy is a cache: it is verified whenever it is used, and fetched again if it does not verify.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from insightedit.platform.errors import InsightEditError
from insightedit.platform.manifests import Manifest, write_manifest


def seen_folder(uri: str) -> Path | None:
    """The folder that a URI names; None for one in a store."""
    parsed = urlparse(uri)
    return Path(unquote(parsed.path)) if parsed.scheme in ("", "file") else None


def copy_whole(folder: Path, target: Path, only: frozenset[str] | None) -> Manifest:
    """Copy a folder under a temporary name, write its manifest, and only then give it its name.

    Args:
        folder: what to copy.
        target: must not be there.
        only: the files to copy, as paths below the folder; all of them if None.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        if only is None:
            shutil.copytree(folder, temporary)
        for name in sorted(only or ()):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
        manifest = write_manifest(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def download(source: str, target: Path, tracking_uri: str) -> None:
    """Fetch a version's files into a folder, which has its name only once they are all there.

    Raises:
        InsightEditError: the store does not give them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        try:
            fetched = Path(download_artifacts(artifact_uri=source, dst_path=temporary, tracking_uri=tracking_uri))
        except Exception as error:  # whatever the store's client raises
            raise InsightEditError(f"{source} cannot be fetched ({_line(error)}): see whether it is there.") from error
        try:
            fetched.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody else has fetched it meanwhile
                raise


def delete(source: str, tracking_uri: str) -> None:
    """Delete a version's files.

    Raises:
        InsightEditError: it cannot be done.
    """
    folder = seen_folder(source)
    try:
        if folder is None:
            repository: Any = get_artifact_repository(source, tracking_uri=tracking_uri)
            repository.delete_artifacts()
        elif folder.is_dir():
            shutil.rmtree(folder)
    except (OSError, MlflowException) as error:
        raise InsightEditError(
            f"The files of a deleted version are left at {source} ({_line(error)}): delete them by hand."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
