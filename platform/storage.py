"""Folders on a disk or in an object store, through one small interface.

A file appears whole or not at all, in both: on a disk it is written under a temporary name and renamed, and an object
store puts objects whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError

_TEMPORARY = ".tmp-"
_CHUNK_BYTES = 8 << 20
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 30.0
"""Seconds before a failing storage is tried again."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class StorageError(InsightEditError):
    """A storage does not do what it is asked to; it may later."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder, as a path or as a URI such as `s3://bucket/folder`.

    Credentials, region and endpoint of S3 come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_REGION`,
    `AWS_ENDPOINT_URL`, ...). Region and endpoint may be in the URI's query, as in
    `s3://bucket/folder?endpoint_override=host:9000&scheme=http`; credentials may not, as a URI is shown and tracked.
    """

    uri: str

    @classmethod
    def at(cls, place: str | Path | Store) -> Store:
        """The store at a place; a path is made absolute.

        Raises:
            UsageError: the URI is of no known kind, or holds credentials.
        """
        if isinstance(place, Store):
            return place
        text = str(place).removeprefix("file://")
        if "://" not in text:
            return cls(str(Path(text).expanduser().absolute()))
        if "@" in text:
            kind = text.partition("://")[0]
            raise UsageError(f"A {kind} URI holds credentials; give them in the environment instead.")
        _opened(text)
        return cls(text)

    def __str__(self) -> str:
        """The folder, without the settings of its URI."""
        return self.uri.partition("?")[0]

    @property
    def path(self) -> Path | None:
        """The folder on this machine's disks; None in an object store."""
        return None if "://" in self.uri else Path(self.uri)

    def child(self, name: str) -> Store:
        """A folder in this one."""
        place, question, query = self.uri.partition("?")
        return Store(f"{place.rstrip('/')}/{name}{question}{query}")

    def parent(self) -> tuple[Store, str]:
        """The folder around this one, and what this one is called there."""
        place, question, query = self.uri.partition("?")
        folder, _, name = place.rstrip("/").rpartition("/")
        return Store(f"{folder or '/'}{question}{query}"), name

    @contextlib.contextmanager
    def open(self, name: str) -> Generator[Any]:
        """A file to read from anywhere in it.

        Raises:
            NotFoundError: there is none.
            InsightEditError: the storage failed.
        """
        system, root = _opened(self.uri)
        with self._failing(name), system.open_input_file(f"{root}/{name}") as file:
            yield file

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            NotFoundError: there is none.
            InsightEditError: the storage failed.
        """
        with self.open(name) as file:
            return bytes(file.read())

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, whole or not at all, over what was there.

        Raises:
            InsightEditError: the storage failed.
        """
        system, root = _opened(self.uri)
        with self._failing(name):
            if self.path is not None:
                write_file(self.path / name, data)
                return
            with system.open_output_stream(f"{root}/{name}") as file:
                file.write(data)

    def take(self, path: Path, name: str) -> None:
        """Move a local file into the folder, whole or not at all; one on the same disk is renamed.

        Raises:
            InsightEditError: the storage failed.
        """
        system, root = _opened(self.uri)
        with self._failing(name):
            if self.path is not None:
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(self.path / name)
                return
            with path.open("rb") as source, system.open_output_stream(f"{root}/{name}") as file:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
        path.unlink()

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file of the folder to a local path.

        Raises:
            NotFoundError: there is none.
            InsightEditError: the storage failed.
        """
        system, root = _opened(self.uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._failing(name), system.open_input_stream(f"{root}/{name}") as source, path.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the folder, by its name from there; empty where there is no folder."""
        system, root = _opened(self.uri)
        selector = fs.FileSelector(root, allow_not_found=True, recursive=True)
        with self._failing(""):
            files = [info for info in system.get_file_info(selector) if info.type == fs.FileType.File]
        names = {info.path.removeprefix(f"{root}/"): int(info.size) for info in files}
        return {name: size for name, size in sorted(names.items()) if _TEMPORARY not in name}

    def remove(self, *names: str) -> None:
        """Delete files; nothing happens to those that are not there."""
        system, root = _opened(self.uri)
        for name in names:
            with self._failing(name), contextlib.suppress(FileNotFoundError):
                system.delete_file(f"{root}/{name}")

    def remove_torn(self) -> None:
        """Delete what writers left that were killed while they wrote; an object store has nothing of the kind."""
        if self.path is not None:
            for path in self.path.rglob(f"{_TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def delete(self) -> None:
        """Delete the folder and all in it; nothing happens where there is none."""
        system, root = _opened(self.uri)
        with self._failing(""), contextlib.suppress(FileNotFoundError):
            system.delete_dir(root)

    @contextlib.contextmanager
    def _failing(self, name: str) -> Generator[None]:
        """Say in our words what failed."""
        where = f"{self}/{name}".rstrip("/")
        try:
            yield
        except FileNotFoundError:
            raise NotFoundError(f"There is no {where}.") from None
        except OSError as error:
            raise StorageError(f"{where} cannot be reached: {error}; check the storage and its access.") from error


def retried(action: Callable[[], T], seconds: float, stop: threading.Event | None = None) -> T:
    """What an action on a storage gives, tried again while the storage fails.

    Args:
        action: may be done twice.
        seconds: how long a failing storage is waited for.
        stop: ends the waiting early when it is set.

    Raises:
        NotFoundError: a file is not there; a storage that says so does not fail.
        StorageError: the storage failed for so long.
    """
    stop = stop or threading.Event()
    began, delay = time.monotonic(), _FIRST_DELAY
    while True:
        try:
            return action()
        except (StorageError, OSError) as error:
            waited = time.monotonic() - began
            if stop.is_set() or waited + delay > seconds:
                raise StorageError(f"Storage failed for {waited:.0f} s: {error}") from error
            log.warning("Storage fails, trying again in %.1f s: %s", delay, error)
        stop.wait(delay)
        delay = min(2 * delay, _LONGEST_DELAY)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole, on the disk, or not at all."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=64)
def _opened(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it; kept, as making an S3 client takes time."""
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    try:
        system, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise UsageError(f"{Store(uri)} is no storage that is known, or is not configured.") from error
    return system, path.rstrip("/")
