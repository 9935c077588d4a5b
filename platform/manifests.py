"""The manifest of a model folder: size and sha256 of every file, safetensors only.

A folder is written first and its manifest last, so that a folder with a manifest is a whole one. Nothing is loaded from
a folder before its manifest is verified. A manifest shows damage, not malice: whoever can write the files can write it
too. That is why formats that can run code are refused whatever the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from insightedit.platform.errors import InsightEditError, NotFoundError

MANIFEST_NAME = "MANIFEST.json"
# What a pipeline folder is made of: weights as safetensors, the rest text. `.model` is a SentencePiece vocabulary.
# Everything else is refused: pickles (.bin, .pt, .ckpt, ...) and Python files run code when they are opened.
ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".md", ".model"})
_LIBRARIES = frozenset({"diffusers", "transformers", "stable_diffusion"})
"""What a part's class may come from, besides this package; the last one is diffusers' folder of safety checkers."""
_FORMAT = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a folder: its size in bytes and its sha256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a model folder by their path below it, with `/` between folders."""

    files: dict[str, FileEntry]

    @property
    def digest(self) -> str:
        """sha256 over all files: two folders with the same digest hold the same bytes."""
        return hashlib.sha256(self._files_json().encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        """The text of `MANIFEST.json`."""
        return f'{{"format": {_FORMAT}, "files": {self._files_json()}}}\n'

    def _files_json(self) -> str:
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        return json.dumps(files, sort_keys=True)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest without looking at the files.

        Raises:
            NotFoundError: there is no folder or no manifest in it.
            InsightEditError: the manifest is not one.
        """
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise NotFoundError(f"There is no model folder {folder}: train or import a model first.")
        if not path.is_file():
            raise NotFoundError(f"{folder} has no {MANIFEST_NAME}, so it may not be whole: register the model again.")
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            entries = {str(k): FileEntry(int(v["size"]), str(v["sha256"])) for k, v in text["files"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InsightEditError(f"{path} is not a readable manifest ({error}): register the model again.") from None
        return cls(entries)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hashed_on_disk(path: Path) -> FileEntry:
    """Size and sha256 of a file that is on the disk when this returns."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return FileEntry(path.stat().st_size, sha256_file(path))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder by relative path, its manifest left out.

    Raises:
        InsightEditError: a file is a link or of a format that is not allowed in a model version.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise InsightEditError(f"{name} in {folder} is a link: copy the file itself into the folder.")
        if path.is_dir() or name == MANIFEST_NAME:
            continue
        if path.suffix not in ALLOWED_SUFFIXES:
            raise InsightEditError(
                f"{name} in {folder} is refused: a model version holds safetensors and text files only, so save its"
                " weights as safetensors and remove it."
            )
        files[name] = path
    return files


def write_manifest(folder: Path) -> Manifest:
    """Write `MANIFEST.json` for the files that are in a folder now, and return it."""
    files = {name: FileEntry(path.stat().st_size, sha256_file(path)) for name, path in model_files(folder).items()}
    manifest = Manifest(files)
    temporary = folder / f"{MANIFEST_NAME}.tmp"
    temporary.write_text(manifest.to_json(), encoding="utf-8")
    temporary.replace(folder / MANIFEST_NAME)
    return manifest


def verify_manifest(folder: Path) -> Manifest:
    """Check every file of a folder against its manifest.

    Raises:
        NotFoundError: the folder or its manifest is missing.
        InsightEditError: a file is missing, added, of another size, changed, a link or of a refused format.
    """
    manifest = Manifest.read(folder)
    present = model_files(folder)
    for name in sorted(manifest.files.keys() - present.keys()):
        raise InsightEditError(f"{name} is missing from {folder}: restore it or register the model again.")
    for name in sorted(present.keys() - manifest.files.keys()):
        raise InsightEditError(f"{name} in {folder} is not in its {MANIFEST_NAME}: remove it or register it again.")
    # Sizes first: a truncated file is found without reading gigabytes.
    for name, entry in manifest.files.items():
        size = present[name].stat().st_size
        if size != entry.size:
            raise InsightEditError(
                f"{name} in {folder} has {size} bytes, not the {entry.size} of its {MANIFEST_NAME}:"
                " restore it or register the model again."
            )
    for name, entry in manifest.files.items():
        if sha256_file(present[name]) != entry.sha256:
            raise InsightEditError(
                f"{name} in {folder} differs from its {MANIFEST_NAME} (sha256): restore it or register the model again."
            )
    return manifest


def check_classes(folder: Path) -> None:
    """Refuse a pipeline folder whose index names classes of other packages: loading imports what is named there.

    Raises:
        NotFoundError: there is no index.
        InsightEditError: it is none, or names something else.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise NotFoundError(f"{folder} is not a pipeline folder (it has no {path.name}): name one that is.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        pairs = {name: value for name, value in index.items() if isinstance(value, list)}
    except (ValueError, AttributeError) as error:
        raise InsightEditError(f"{path} is no index of a pipeline ({error}): save the pipeline again.") from None
    for name, value in pairs.items():
        library = value[0] if value else ""
        if library is not None and library not in _LIBRARIES and not str(library).startswith("insightedit."):
            raise InsightEditError(
                f"{path} takes {name} from {library!r}, and only diffusers, transformers and insightedit are loaded:"
                " save the pipeline without it."
            )
