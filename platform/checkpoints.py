"""Checkpoints that are whole or not there, in a folder or in an object store.

Every rank leaves its own files under a name that is used once, and a signed list of them. Rank 0 waits for all lists,
seals the checkpoint with a manifest and, last, a marker. In a folder the name is a temporary one until then.

The manifest has size and sha256 of every file and an HMAC over itself. DeepSpeed's files are pickles, and a plain
checksum proves nothing against someone who can write, so nothing is opened before the HMAC is verified with the run's
key, which is kept beside the runs and readable by their owner alone. What comes from an object store is verified where
it was copied to.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from insightedit.platform.errors import InsightEditError, NotFoundError
from insightedit.platform.manifests import FileEntry, hashed_on_disk, sha256_file, sync_folder
from insightedit.platform.storage import Store, retried

MANIFEST_NAME = "MANIFEST.json"
COMMITTED_NAME = "COMMITTED"
_KEY_NAME = "checkpoint.key"
_KEY_BYTES = 32
_TEMPORARY = "tmp-"
_FINAL = "step-"
_FIRST_POLL = 0.02
_LONGEST_POLL = 2.0
"""Seconds between looks for the other ranks' lists."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class DamagedError(InsightEditError):
    """A checkpoint is unfinished, damaged, incomplete, or was not sealed with the run's key."""


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
            stream.flush()
            os.fsync(stream.fileno())
        try:
            path.hardlink_to(own)
            sync_folder(folder)  # Without the key, what it will have sealed is lost.
        except FileExistsError:
            pass
        finally:
            own.unlink()
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise InsightEditError(f"{path} is not a checkpoint key; restore it, or delete it and the runs it sealed.")
    return key


def run_key(key: bytes, run: str, stage: int) -> bytes:
    """The secret of one stage of one run, so that a checkpoint of another is foreign."""
    return hmac.new(key, f"{run}/stage-{stage}".encode(), hashlib.sha256).digest()


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

    name: str
    folder: Path
    """On this machine."""
    info: CheckpointInfo

    def progress(self, rank: int = 0) -> dict[str, Any]:
        """What a rank kept beside weights and optimiser, such as the curve."""
        return cast(dict[str, Any], json.loads((self.folder / progress_name(rank)).read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Found:
    """What there is to go on from."""

    checkpoint: Checkpoint | None
    skipped: tuple[str, ...] = ()
    """Why newer ones were not taken, a sentence each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is kept."""

    keep: int = 2
    """The newest ones."""
    keep_best: int = 0
    """Those with the lowest `best_by`, besides the newest."""
    best_by: str | None = None
    """A loss."""


class CheckpointStore:
    """The checkpoints of one stage of one run."""

    def __init__(
        self,
        place: Store | Path,
        key: bytes,
        retention: Retention = Retention(),
        *,
        scratch: Path | None = None,
        retry_seconds: float = 600.0,
    ) -> None:
        """Open a store; nothing is read yet.

        Args:
            place: a folder that all ranks share, or a place in an object store.
            key: see `run_key`.
            retention: what is kept.
            scratch: a folder on this machine's disk, for an object store; in the system's folder for such if None.
            retry_seconds: how long a storage may fail.
        """
        self.place = Store.at(place)
        self.stop = threading.Event()
        """Ends all waiting when it is set."""
        self._key = key
        self._retention = retention
        self._retry_seconds = retry_seconds
        self._scratch = scratch or Path(tempfile.gettempdir())
        self._damaged: set[str] = set()

    # -- writing ------------------------------------------------------------------------------------------------

    def new_name(self, step: int) -> str:
        """A name that is used once, for a checkpoint after a number of steps."""
        return f"{_FINAL}{step:08d}-{uuid.uuid4().hex[:8]}"

    def contribute(self, name: str, rank: int, write: Callable[[Path], None]) -> None:
        """Leave a rank's own files and a signed list of them.

        Args:
            name: of the checkpoint, the same on every rank.
            rank: whose files they are; two ranks' have different names.
            write: writes them into an empty folder; may be called again.

        Raises:
            InsightEditError: the storage failed for too long.
        """
        own = self._own_folder(name, rank)
        self._patient(lambda: _written_anew(own, write))
        files = {file: self._patient(partial(hashed_on_disk, own / file)) for file in _plain_files(own)}
        working = self._working(name)
        for file in files:
            self._patient(partial(working.take, own / file, file))
        entries = {file: asdict(entry) for file, entry in files.items()}
        content = {"kind": "list", "name": name, "rank": rank, "files": entries}
        text = json.dumps({**content, "hmac": self._sign(content)}).encode()
        self._patient(lambda: working.write(_list_name(rank), text))
        shutil.rmtree(own, ignore_errors=True)

    def seal(self, name: str, info: CheckpointInfo, world: int, losses: Mapping[str, float] | None = None) -> None:
        """Wait for every rank's files, then finish the checkpoint and drop what is not to be kept. Rank 0 only.

        Args:
            name: of the checkpoint.
            info: what it is of.
            world: number of ranks.
            losses: the last point of each curve.

        Raises:
            InsightEditError: the storage failed for too long, or a list is not one of this run.
        """
        working = self._working(name)
        files = self._lists(name, working, world)
        self._patient(lambda: working.remove(*map(_list_name, range(world))))
        sizes = self._patient(working.sizes)
        if sizes != {file: entry.size for file, entry in files.items()}:
            raise InsightEditError(f"What was written to {working} is not what is there; check the storage.")
        entries = {file: asdict(entry) for file, entry in sorted(files.items())}
        content = {
            "kind": "checkpoint",
            "name": name,
            "info": asdict(info),
            "losses": dict(losses or {}),
            "files": entries,
        }
        text = json.dumps({**content, "hmac": self._sign(content)}, indent=1).encode()
        self._patient(lambda: working.write(MANIFEST_NAME, text))
        self._patient(lambda: self._give_name(name))
        self._patient(lambda: self.place.child(name).write(COMMITTED_NAME, _marker(text)))
        self._sync(name)
        self._drop_old()

    def clean(self) -> None:
        """Remove what interrupted writers left. Only when nobody is writing."""
        for name, files in self._listing().items():
            if name.startswith(_TEMPORARY) or COMMITTED_NAME not in files:
                log.warning("Removing a checkpoint that was never finished: %s", self.place.child(name))
                self._patient(partial(self._remove, name))

    def _own_folder(self, name: str, rank: int) -> Path:
        """Where a rank writes, on the disk that the checkpoint goes to, or on this machine's."""
        if self.place.path is not None:
            # Beside the checkpoint's own files, so that they are only renamed.
            return self.place.path / f"{_TEMPORARY}{name}-rank-{rank}"
        return self._private("writing") / f"{os.getpid()}-{name}-rank-{rank}"

    def _working(self, name: str) -> Store:
        """Where a checkpoint's files are until it is sealed."""
        return self.place.child(name if self.place.path is None else f"{_TEMPORARY}{name}")

    def _give_name(self, name: str) -> None:
        """Rename a sealed folder; an object store has no such thing, and its names are final from the start."""
        folder = self.place.path
        if folder is not None and not (folder / name).exists():
            (folder / f"{_TEMPORARY}{name}").rename(folder / name)

    def _sync(self, name: str) -> None:
        """Make the names durable."""
        if self.place.path is not None:
            for folder in (self.place.path / name, self.place.path):
                self._patient(partial(sync_folder, folder))

    def _lists(self, name: str, working: Store, world: int) -> dict[str, FileEntry]:
        """The files of all ranks, as soon as all are there."""
        files: dict[str, FileEntry] = {}
        missing, delay = set(range(world)), _FIRST_POLL
        while missing:
            present = self._patient(working.sizes)
            for rank in sorted(missing):
                if _list_name(rank) in present:
                    files |= self._list(name, working, rank)
                    missing.remove(rank)
            if missing and self.stop.wait(delay):
                raise InsightEditError(f"Checkpoint {name} was given up.")
            delay = min(2 * delay, _LONGEST_POLL)
        return files

    def _list(self, name: str, working: Store, rank: int) -> dict[str, FileEntry]:
        """The files that one rank wrote."""
        data = self._patient(lambda: working.read(_list_name(rank)))
        content = self._opened(data, f"{working}/{_list_name(rank)}", "list")
        if (content["name"], content["rank"]) != (name, rank):
            raise InsightEditError(f"{working}/{_list_name(rank)} is of another checkpoint; who else writes there?")
        return _entries(content)

    def _drop_old(self) -> None:
        """Remove what is not to be kept. What does not verify is neither counted nor removed."""
        names = sorted(
            name
            for name, files in self._listing().items()
            if name.startswith(_FINAL) and COMMITTED_NAME in files and name not in self._damaged
        )
        kept = set(names[-self._retention.keep :]) | self._best(names)
        for name in names:
            if name not in kept:
                # Without its marker first, so that a half-removed checkpoint is never a candidate.
                self._patient(partial(self.place.child(name).remove, COMMITTED_NAME))
                self._patient(partial(self._remove, name))

    def _best(self, names: list[str]) -> set[str]:
        """Those with the lowest loss; what does not say how it was is not among them."""
        if not self._retention.keep_best:
            return set()
        values: dict[str, float] = {}
        for name in names:
            with contextlib.suppress(DamagedError, NotFoundError):
                value = self._manifest(name)["losses"].get(self._retention.best_by, math.nan)
                if math.isfinite(value):
                    values[name] = value
        return set(sorted(values, key=lambda name: (values[name], name))[: self._retention.keep_best])

    # -- reading ------------------------------------------------------------------------------------------------

    def newest(self) -> Found:
        """The newest checkpoint that verifies; those that do not are skipped with a warning.

        Raises:
            InsightEditError: the storage failed for too long. That is no reason to begin from the start.
        """
        skipped: list[str] = []
        for name in sorted((name for name in self._listing() if name.startswith(_FINAL)), reverse=True):
            try:
                return Found(self.fetch(name), tuple(skipped))
            except DamagedError as error:
                log.warning("Skipping a checkpoint: %s", error)
                skipped.append(str(error))
                self._damaged.add(name)
        return Found(None, tuple(skipped))

    def fetch(self, name: str) -> Checkpoint:
        """A checkpoint on this machine's disk, verified there.

        Raises:
            DamagedError: it is not to be used.
            InsightEditError: the storage failed for too long.
        """
        if self.place.path is not None:
            folder = self.place.path / name
            return Checkpoint(name, folder, self._patient(lambda: self.verify(folder)))
        with self._locked():
            folder = self._private("reading") / name
            try:
                return Checkpoint(name, folder, self.verify(folder))
            except DamagedError:
                # Not there yet, or not whole.
                shutil.rmtree(self._private("reading"))
            self._download(name, self._private("reading") / name)
            return Checkpoint(name, folder, self.verify(folder))

    def copy_of(self, checkpoint: Checkpoint) -> Checkpoint:
        """What another rank verified, on this machine. In a folder that all share, that is it."""
        return checkpoint if self.place.path is not None else self.fetch(checkpoint.name)

    def release(self) -> None:
        """Give back the disk that copies take. Only when no rank on this machine reads one."""
        if self.place.path is None:
            with self._locked():
                shutil.rmtree(self._private("reading"))

    @contextlib.contextmanager
    def derived(self, checkpoint: Checkpoint, make: Callable[[Path], None]) -> Generator[Path]:
        """What is made of a checkpoint on this machine, once, by the first rank that wants it.

        Args:
            checkpoint: a verified one.
            make: makes it, in an empty folder that only its owner can open.

        Yields:
            The folder. It is removed with this: leave it when no rank on this machine needs it.
        """
        with self._locked():
            folder = self._private("derived") / checkpoint.name
            if not folder.is_dir():
                _written_anew(working := folder.with_name(f"{_TEMPORARY}{folder.name}"), make)
                working.rename(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)

    def verify(self, folder: Path) -> CheckpointInfo:
        """Check a checkpoint on this machine without opening any file that could run code.

        Raises:
            DamagedError: it is not to be used.
        """
        present = _plain_files(folder)
        if COMMITTED_NAME not in present:
            raise DamagedError(f"{folder} was never finished; delete it.")
        if MANIFEST_NAME not in present:
            raise DamagedError(f"{folder} has no {MANIFEST_NAME}; delete it.")
        text = (folder / MANIFEST_NAME).read_bytes()
        content = self._opened(text, folder / MANIFEST_NAME)
        if (folder / COMMITTED_NAME).read_bytes() != _marker(text):
            raise DamagedError(f"{folder / COMMITTED_NAME} is of another checkpoint; delete {folder}.")
        _check_content(content, folder.name, present, folder)
        for name, entry in _entries(content).items():
            if sha256_file(folder / name) != entry.sha256:
                raise DamagedError(f"{folder / name} differs from its manifest; delete {folder}.")
        return CheckpointInfo(**content["info"])

    def _download(self, name: str, folder: Path) -> None:
        """Copy a checkpoint here, if it is one of ours and complete."""
        remote = self.place.child(name)
        try:
            marker = self._patient(lambda: remote.read(COMMITTED_NAME))
            text = self._patient(lambda: remote.read(MANIFEST_NAME))
            # Only names that this run sealed are ever turned into paths.
            content = self._opened(text, f"{remote}/{MANIFEST_NAME}")
            _check_content(content, name, self._patient(remote.sizes), remote)
            for file in _entries(content):
                self._patient(partial(remote.fetch, file, folder / file))
        except NotFoundError as error:
            raise DamagedError(f"{remote} is not whole: {error} Delete it.") from None
        (folder / MANIFEST_NAME).write_bytes(text)
        (folder / COMMITTED_NAME).write_bytes(marker)

    def _manifest(self, name: str) -> dict[str, Any]:
        """What a checkpoint says of itself, verified; not what is in its files."""
        remote = self.place.child(name)
        return self._opened(self._patient(lambda: remote.read(MANIFEST_NAME)), f"{remote}/{MANIFEST_NAME}")

    def _opened(self, data: bytes, where: str | Path, kind: str = "checkpoint") -> dict[str, Any]:
        """The content of a sealed file."""
        try:
            content = cast(dict[str, Any], json.loads(data))
            seal = str(content.pop("hmac")).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{where} is not readable ({error}); delete its checkpoint.") from None
        if not hmac.compare_digest(seal, self._sign(content).encode()) or content["kind"] != kind:
            raise DamagedError(
                f"{where} was not sealed with this run's key, so it may be forged; delete its checkpoint."
            )
        return content

    def _sign(self, content: Mapping[str, Any]) -> str:
        return hmac.new(self._key, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()

    # -- the storage --------------------------------------------------------------------------------------------

    def _patient(self, action: Callable[[], T]) -> T:
        return retried(action, self._retry_seconds, self.stop)

    def _listing(self) -> dict[str, set[str]]:
        """Files of each checkpoint, finished or not, by its name."""
        listing: dict[str, set[str]] = {}
        if (folder := self.place.path) is not None:
            for path in self._patient(lambda: [*folder.glob(f"{_FINAL}*"), *folder.glob(f"{_TEMPORARY}*")]):
                listing[path.name] = {name for name in (COMMITTED_NAME,) if (path / name).is_file()}
            return listing
        for path in self._patient(self.place.sizes):
            name, _, file = path.partition("/")
            if name.startswith(_FINAL):
                listing.setdefault(name, set()).add(file)
        return listing

    def _remove(self, name: str) -> None:
        """Delete a checkpoint, or what bears the name of one."""
        folder = self.place.path
        if folder is None:
            self.place.child(name).delete()
        elif (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()

    def _private(self, name: str) -> Path:
        """A folder on this machine for this store, that nobody else can write to."""
        owner = self._scratch / f"insightedit-{os.getuid()}"
        folder = owner / hashlib.sha256(self.place.uri.encode()).hexdigest()[:16] / name
        owner.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = owner.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
            raise InsightEditError(
                f"{owner} is open to others; remove it, or set checkpoints.scratch to another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """One rank of this machine at a time."""
        with (self._private(".") / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def progress_name(rank: int) -> str:
    """The file of `Checkpoint.progress`."""
    return f"progress-{rank}.json"


def _plain_files(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by relative path.

    Raises:
        DamagedError: there is something else than files and folders, such as a link.
    """
    files: dict[str, int] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        if not os.path.lexists(path):
            continue
        state = path.lstat()
        if stat.S_ISREG(state.st_mode):
            files[path.relative_to(folder).as_posix()] = state.st_size
        elif not stat.S_ISDIR(state.st_mode):
            raise DamagedError(f"{path} is a link or another thing that no checkpoint has; delete {folder}.")
    return files


def _check_content(content: Mapping[str, Any], name: str, present: Mapping[str, int], where: object) -> None:
    """Check what a verified manifest says against the name and the files that are there.

    Raises:
        DamagedError: they do not agree.
    """
    if content["name"] != name:
        raise DamagedError(f"{where} is {content['name']} under another name; delete it.")
    files = _entries(content)
    if changed := present.keys() ^ (files.keys() | {MANIFEST_NAME, COMMITTED_NAME}):
        raise DamagedError(f"{where} lacks or has too much: {sorted(changed)[0]}; delete it.")
    for file, entry in files.items():
        if present[file] != entry.size:
            raise DamagedError(f"{where}/{file} has {present[file]} bytes, not {entry.size}; delete {where}.")


def _entries(content: Mapping[str, Any]) -> dict[str, FileEntry]:
    return {name: FileEntry(**entry) for name, entry in content["files"].items()}


def _marker(manifest: bytes) -> bytes:
    """What the marker holds: that it is this manifest's, to the last byte."""
    return hashlib.sha256(manifest).hexdigest().encode()


def _list_name(rank: int) -> str:
    return f"rank-{rank}.json"


def _written_anew(folder: Path, write: Callable[[Path], None]) -> None:
    """Write into a folder that has nothing of an attempt before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write(folder)
