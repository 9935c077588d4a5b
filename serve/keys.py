"""API keys: who may ask for edits, and how much of the server each may have.

`keys.json` in the work folder, readable by its owner alone, holds a hash of every key and never a key. Keys are drawn
here with 256 random bits, so that a plain SHA-256 is enough: there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.workdir import Workdir

LOOK_SECONDS = 1.0
"""How long a gateway goes by what it has read: new and revoked keys count after this time at the latest."""
_LOCK_SECONDS = 30.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PREFIX = "ie-"
Count = Annotated[int, Field(ge=1)]


class Allowance(BaseModel):
    """What the holder of a key may have; None is no limit but the server's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Count | None = None
    budget_per_minute: Count | None = None
    """Pixels x steps x images in a minute."""
    at_once: Count | None = None
    """Edit requests at a time, waiting ones included, at one gateway replica."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Of two edits that wait, the one with the higher number goes first, whoever came earlier."""


class ApiKey(BaseModel):
    """A key as it is kept: everything but the key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    """Of the key, in hexadecimal."""
    created: datetime
    expires: datetime | None = None
    allowance: Allowance = Allowance()

    def is_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: the name of a key, or "" where keys are off, and what they may have."""

    name: str = ""
    allowance: Allowance = field(default_factory=Allowance)


ANYBODY = Caller()


class KeyStore:
    """The keys of a work folder."""

    def __init__(self, workdir: Workdir) -> None:
        self.path = workdir.root / "keys.json"
        self._lock = FileLock(workdir.root / "keys.lock", timeout=_LOCK_SECONDS)

    def create(self, name: str, allowance: Allowance, lifetime: timedelta | None = None) -> tuple[str, ApiKey]:
        """Make a key.

        Args:
            name: whom it is for; it stands in logs and is no secret.
            allowance: what its holder may have.
            lifetime: how long it counts; for good without it.

        Returns:
            The key itself, which cannot be had again, and what is kept of it.

        Raises:
            UsageError: the name cannot be one, or there is a key of that name.
        """
        self.check_new(name)
        key = _PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(UTC)
        kept = ApiKey(
            name=name,
            sha256=_digest(key),
            created=now,
            expires=None if lifetime is None else now + lifetime,
            allowance=allowance,
        )
        with self._changing() as keys:
            self.check_new(name)  # Again, now that nobody else makes one.
            keys[name] = kept
        return key, kept

    def check_new(self, name: str) -> None:
        """Look whether a key may have this name.

        Raises:
            UsageError: the name cannot be one, or there is a key of that name.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"The key's name {name!r} must be up to 64 letters, digits, '_', '-' and '.', and begin with one of "
                "the first two."
            )
        if any(key.name == name for key in self.all()):
            raise UsageError(f"There is a key named {name}; take another name, or revoke that one first.")

    def find(self, name: str) -> ApiKey:
        """What is kept of a key.

        Raises:
            NotFoundError: there is none of that name.
        """
        for key in self.all():
            if key.name == name:
                return key
        raise NotFoundError(f"There is no key named {name}; `insightedit serve keys list` shows all.")

    def revoke(self, name: str) -> ApiKey:
        """Forget a key: gateways refuse it from the next second on.

        Raises:
            NotFoundError: there is none of that name.
        """
        with self._changing() as keys:
            return keys.pop(self.find(name).name)

    def all(self) -> tuple[ApiKey, ...]:
        """Every key, oldest first.

        Raises:
            InsightEditError: the file cannot be read.
        """
        try:
            return _KeyFile.model_validate_json(self.path.read_bytes()).keys
        except FileNotFoundError:
            return ()
        except (OSError, ValidationError):
            raise InsightEditError(
                f"{self.path} cannot be read as a file of API keys; mend it, or remove it and create keys anew."
            ) from None

    @contextmanager
    def _changing(self) -> Generator[dict[str, ApiKey]]:
        """Every key by name; what the block makes of them is kept."""
        try:
            with self._lock:
                keys = {key.name: key for key in self.all()}
                yield keys
                _write_privately(self.path, _KeyFile(keys=tuple(keys.values())).model_dump_json(indent=2) + "\n")
        except Timeout:
            raise InsightEditError(f"{self._lock.lock_file} is held by another command; try again later.") from None


class KeyRing:
    """The keys as a gateway sees them: looked up anew every second, compared in constant time."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._looked = float("-inf")
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def find(self, key: str) -> ApiKey | None:
        """What is kept of a key that counts now; None for any other.

        Raises:
            InsightEditError: the keys cannot be read. Nobody is let in then: a key may have been revoked.
        """
        self._look()
        digest, found = _digest(key), None
        # Every key is compared, so that the time taken says nothing about where one stands.
        for kept in self._keys:
            if hmac.compare_digest(kept.sha256, digest):
                found = kept
        return None if found is None or found.is_expired(datetime.now(UTC)) else found

    def named(self, name: str) -> ApiKey | None:
        """What is kept of the key of a name, if it counts now.

        Raises:
            InsightEditError: the keys cannot be read.
        """
        self._look()
        found = next((kept for kept in self._keys if kept.name == name), None)
        return None if found is None or found.is_expired(datetime.now(UTC)) else found

    def _look(self) -> None:
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        stamp = _stamp(self._store.path)
        if stamp != self._stamp:
            self._keys = self._store.all()
            self._stamp = stamp
        self._looked = time.monotonic()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does: every change puts a new file in its place."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _write_privately(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
