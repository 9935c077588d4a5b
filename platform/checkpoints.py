"""Checkpoints that are whole or not there.

A checkpoint is written under a temporary name by all ranks, sealed with a manifest and renamed; a marker comes last.
The manifest has size and sha256 of every file and an HMAC over itself. DeepSpeed's files are pickles, and a plain
checksum proves nothing against someone who can write, so nothing is opened before the HMAC is verified with the run's
key, which is kept beside the runs and readable by their owner alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from insightedit.platform.errors import InsightEditError
from insightedit.platform.manifests import FileEntry, sha256_file

MANIFEST_NAME = "MANIFEST.json"
COMMITTED_NAME = "COMMITTED"
_KEY_NAME = "checkpoint.key"
_KEY_BYTES = 32
_TEMPORARY = "tmp-"

log = logging.getLogger(__name__)


def checkpoint_key(folder: Path) -> bytes:
    """The secret that seals checkpoints, made once in a folder, readable by its owner alone.

    Raises:
        InsightEditError: the file is there and is no key.
    """
    path = folder / _KEY_NAME
    if not path.exists():
        # A link is made of a whole file, so two processes that start together agree on one key.
        own = folder / f"{_KEY_NAME}.{uuid.uuid4().hex}"
        with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(_KEY_BYTES))
        try:
            path.hardlink_to(own)
        except FileExistsError:
            pass
        finally:
            own.unlink()
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise InsightEditError(f"{path} is not a checkpoint key; restore it, or delete it and the runs it sealed.")
    return key


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """What a checkpoint is of."""

    stage: int
    step: int
    """Optimiser steps that were done."""
    position: int
    """Samples that were consumed."""
    world_size: int
    fingerprint: str
    """Of the config that the weights depend on."""
    trained: str
    """A sha256 over names and shapes of the parameters in it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    info: CheckpointInfo


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one stage of one run."""

    folder: Path
    key: bytes
    keep: int = 2

    def temporary(self) -> Path:
        """A new folder to write a checkpoint into."""
        path = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        path.mkdir(parents=True)
        return path

    def commit(self, temporary: Path, info: CheckpointInfo, files: Mapping[str, FileEntry]) -> Checkpoint:
        """Seal a written folder, give it its name, mark it, and drop the oldest beyond `keep`."""
        content = {**asdict(info), "files": {name: asdict(entry) for name, entry in sorted(files.items())}}
        sealed = {**content, "hmac": self._sign(content)}
        _write_synced(temporary / MANIFEST_NAME, json.dumps(sealed, indent=1))
        final = self.folder / f"step-{info.step:08d}"
        if final.exists():
            # Left by a run that was interrupted before its marker, or that did not verify: this one replaces it.
            shutil.rmtree(final)
        temporary.rename(final)
        _write_synced(final / COMMITTED_NAME, "")
        _sync_folder(self.folder)
        self._drop_old()
        return Checkpoint(final, info)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; those that do not are skipped with a warning."""
        for folder in reversed(self._folders()):
            try:
                return Checkpoint(folder, self.verify(folder))
            except InsightEditError as error:
                log.warning("Skipping a checkpoint: %s", error)
        return None

    def verify(self, folder: Path) -> CheckpointInfo:
        """Check a checkpoint without opening any file that could run code.

        Raises:
            InsightEditError: it is unfinished, damaged, incomplete, or was not sealed with this key.
        """
        if not (folder / COMMITTED_NAME).is_file():
            raise InsightEditError(f"{folder} was never finished; delete it.")
        content, seal = _read_manifest(folder)
        if not hmac.compare_digest(seal, self._sign(content)):
            raise InsightEditError(f"{folder} was not sealed with this run's key, so it may be forged; delete it.")
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        if changed := present ^ (files.keys() | {MANIFEST_NAME, COMMITTED_NAME}):
            raise InsightEditError(f"{folder} lacks or has too much: {sorted(changed)[0]}; delete it.")
        for name, entry in files.items():
            path = folder / name
            if path.is_symlink() or path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
                raise InsightEditError(f"{path} differs from its manifest; delete {folder}.")
        return CheckpointInfo(**content)

    def clean(self) -> None:
        """Remove what interrupted writers left. Only when nobody is writing."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def _drop_old(self) -> None:
        whole = [folder for folder in self._folders() if (folder / COMMITTED_NAME).is_file()]
        for folder in whole[: -self.keep]:
            # Without its marker first, so that a half-removed checkpoint is never a candidate.
            (folder / COMMITTED_NAME).unlink()
            shutil.rmtree(folder)

    def _sign(self, content: Mapping[str, Any]) -> str:
        return hmac.new(self.key, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and sha256 of files below a folder, each on the disk when this returns."""
    entries: dict[str, FileEntry] = {}
    for name in names:
        path = folder / name
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        entries[name] = FileEntry(path.stat().st_size, sha256_file(path))
    return entries


def file_names(folder: Path) -> list[str]:
    """The files below a folder by relative path, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """A manifest's content and its HMAC."""
    path = folder / MANIFEST_NAME
    try:
        content = cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
        return content, str(content.pop("hmac"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InsightEditError(f"{path} is not a readable manifest ({error}); delete {folder}.") from None


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
