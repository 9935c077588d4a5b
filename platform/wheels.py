"""This package as a wheel that a Ray cluster can install, made of the files that run here.

It is made anew instead of being built by setuptools, for three reasons. An installed package has no source tree to
build from. Ray installs a wheel with everything it requires, which for this one are gigabytes that the cluster's image
has already, so this one requires nothing. And Ray knows a wheel by its file name alone, so the name has to change with
the content.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import insightedit
from insightedit import __version__

_PACKAGE = "insightedit"
_NOT_PACKED = {"__pycache__"}
_DATE = (1980, 1, 1, 0, 0, 0)
"""Of every entry: the same files give the same bytes."""


def write_wheel(folder: Path) -> Path:
    """Write the wheel.

    Args:
        folder: where; the file's name says the version and a digest of the content.
    """
    files = dict(_files(Path(insightedit.__path__[0])))
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    version = f"{__version__}+{digest.hexdigest()[:16]}"
    path = folder / f"{_PACKAGE}-{version}-py3-none-any.whl"
    information = f"{_PACKAGE}-{version}.dist-info"
    files[f"{information}/METADATA"] = f"Metadata-Version: 2.1\nName: {_PACKAGE}\nVersion: {version}\n".encode()
    files[f"{information}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: {_PACKAGE}\nRoot-Is-Purelib: true\nTag: py3-none-any\n".encode()
    )
    record = "".join(f"{name},{_record_hash(content)},{len(content)}\n" for name, content in files.items())
    files[f"{information}/RECORD"] = f"{record}{information}/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), content, zipfile.ZIP_DEFLATED)
    return path


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Name in the wheel and content of every file of the package, in a fixed order."""
    # In a source tree the package's folders are links.
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(set(folders) - _NOT_PACKED)
        for name in sorted(names):
            path = Path(parent) / name
            yield f"{_PACKAGE}/{path.relative_to(root).as_posix()}", path.read_bytes()


def _record_hash(content: bytes) -> str:
    """A digest as RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
