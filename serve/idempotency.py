"""`Idempotency-Key`: a request that is sent again under its key is answered with the same images, and edited once.

The first request under a key writes a record into the gateways' shared store before anything is edited: what the
request is (a fingerprint), and the seed and the model version that it gets. Others wait for that one. Its gateway holds
the record by a lease and renews it; when the gateway dies, the lease runs out and the next request under the key does
the edit again, with the recorded seed and version. Whoever is first to have an image keeps it, and everybody answers
with what was kept: so no key is ever answered with two different images, even where two gateways edit for it.

Errors are not kept: a request that failed may be sent again under its key.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers

from insightedit.serve.answers import CompletedEvent
from insightedit.serve.forms import EditRequest
from insightedit.serve.logs import LOGGER
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import StateSettings
from insightedit.serve.state_store import Clock, Entry, StateStore, StoreFullError, StoreUnreachableError

logger = logging.getLogger(LOGGER)

HEADER = "idempotency-key"
REPLAYED_HEADER = "idempotent-replayed"
MOST_CHARACTERS = 255
_CHARACTERS = "[!-~]"
KEY_PARAMETER: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Sent again under the same key, the same request is answered with the same images and edited once.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MOST_CHARACTERS, "pattern": f"^{_CHARACTERS}+$"},
}
"""What the OpenAPI document says of it."""
IMAGES_PART = 0.5
"""Of the store that images of keys may fill: they can be made again, what else is in it cannot."""
# Without the store there is no answer under a key: it might be a second one.
_UNAVAILABLE = "What Idempotency-Key needs is not to be had at present; send the request again, or without the key."
_RENEWALS = 3
"""Of a lease while it lasts: one that comes late does no harm."""
_NOT_COMPARED = frozenset({"stream", "partial_images", "timeout"})
"""Fields that change how an answer comes, and not what it is."""


def key_of(headers: Headers) -> str | None:
    """The key that a request is sent under.

    Raises:
        ApiError: 400 for what cannot be one.
    """
    keys = headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or not re.fullmatch(f"{_CHARACTERS}{{1,{MOST_CHARACTERS}}}", keys[0]):
        message = f"Idempotency-Key must be 1 to {MOST_CHARACTERS} printable ASCII characters, no blanks, given once."
        raise ApiError(400, "invalid_value", message, "Idempotency-Key")
    return keys[0]


def fingerprint(wanted: EditRequest) -> str:
    """What tells a request from another one that has not the same answer."""
    fields = wanted.fields.model_dump_json(exclude={*_NOT_COMPARED, "images", "mask"}, exclude_defaults=True)
    digest = hashlib.sha256(fields.encode())
    for upload in (*wanted.images, wanted.mask):
        digest.update(hashlib.sha256(b"" if upload is None else upload.data).digest())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request under a key."""

    scope: str
    """Whose key it is: keys of different callers have nothing to do with each other."""
    key: str
    fingerprint: str
    images: int
    """How many its answer has."""

    @property
    def name(self) -> str:
        """What its entries in the store are named after."""
        return f"{self.scope}/{hashlib.sha256(self.key.encode()).hexdigest()}"


class _Record(BaseModel):
    """What is written down of a key, in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    seed: int
    version: str
    owner: str = ""
    """Who is editing for it; nobody if it is empty."""
    lease_end: float = 0.0
    done: bool = False
    """Whether every image has been made."""

    def entry(self, expires: float) -> Entry:
        """How it is written down."""
        return Entry(self.model_dump_json().encode(), expires)


class Claim:
    """The right to edit for a request, and the seed and version of its images. Without a key there is no more to it."""

    def __init__(self, seed: int, version: str, kept: list[CompletedEvent] | None = None) -> None:
        self.seed = seed
        self.version = version
        self.kept = kept
        """The images, if they have been made: then there is nothing to do."""

    async def keep(self, image: CompletedEvent) -> CompletedEvent:
        """Keep an image that has just been made.

        Returns:
            The image to answer with: that of the first one who kept it.

        Raises:
            ApiError: 410 if the key has been answered with another image, which is not to be had any more.
        """
        return image

    async def move(self, version: str) -> bool:
        """Have the images made by another version.

        Returns:
            Whether they may be: not once one of them has been kept.
        """
        self.version = version
        return True


class _KeyedClaim(Claim):
    def __init__(self, keys: IdempotencyKeys, request: KeyedRequest, lease: _Lease) -> None:
        super().__init__(lease.record.seed, lease.record.version)
        self._keys = keys
        self._request = request
        self._lease = lease

    async def keep(self, image: CompletedEvent) -> CompletedEvent:
        """See `Claim.keep`."""
        return await self._keys.keep(self._request.name, image)

    async def move(self, version: str) -> bool:
        """See `Claim.move`. Whoever takes the work over finds the other version recorded."""
        if await self._keys.any_kept(self._request):
            return False
        await self._lease.write(version=version)
        return await super().move(version)


class IdempotencyKeys:
    """The keys of all gateways that share a store."""

    def __init__(self, store: StateStore, settings: StateSettings, clock: Clock = time.time) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    @asynccontextmanager
    async def claimed(self, request: KeyedRequest, seed: int, version: str) -> AsyncGenerator[Claim]:
        """Let one request at a time edit under a key, or have what was made.

        Args:
            request: under its key.
            seed: what it gets if it is the first one.
            version: of the model, likewise.

        Raises:
            ApiError: 422 if the key is another request's, 503 if the store is not to be had.
        """
        with store_errors(_UNAVAILABLE):
            taken = await self._take(request, seed, version)
        if isinstance(taken, Claim):
            yield taken
            return
        lease = _Lease(self._store, f"key/{request.name}", taken, self._settings, self._clock)
        async with lease.held():
            yield _KeyedClaim(self, request, lease)

    async def _take(self, request: KeyedRequest, seed: int, version: str) -> _Record | Claim:
        """The record, once it is ours; or the images, once they are there."""
        name, pause = f"key/{request.name}", 0.05
        while True:
            found = await self._store.get(name)
            before = _Record(fingerprint=request.fingerprint, seed=seed, version=version)
            if found is not None:
                before = _Record.model_validate_json(found)
                if before.fingerprint != request.fingerprint:
                    message = "This Idempotency-Key came with another request before; give every request its own."
                    raise ApiError(422, "idempotency_key_reused", message, "Idempotency-Key")
                if before.done and (kept := await self._kept(request)):
                    return Claim(before.seed, before.version, kept)
            if before.owner and before.lease_end > self._clock():
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 1.0)
                continue
            now = self._clock()
            end = now + self._settings.lease_seconds
            mine = before.model_copy(update={"owner": uuid.uuid4().hex, "lease_end": end, "done": False})
            if await self._store.change({name: found}, {name: mine.entry(now + self._settings.key_seconds)}):
                return mine

    async def _kept(self, request: KeyedRequest) -> list[CompletedEvent] | None:
        """Every image, or None if one of them is gone."""
        found = [await self._store.get(f"image/{request.name}/{index}") for index in range(request.images)]
        return None if None in found else [CompletedEvent.model_validate_json(one) for one in found if one is not None]

    async def any_kept(self, request: KeyedRequest) -> bool:
        """Whether an image has been made and kept for a request, whether it is still there or not.

        Raises:
            ApiError: 503 if the store is not to be had.
        """
        with store_errors(_UNAVAILABLE):
            marks = [await self._store.get(f"digest/{request.name}/{index}") for index in range(request.images)]
        return any(mark is not None for mark in marks)

    async def keep(self, name: str, image: CompletedEvent) -> CompletedEvent:
        """See `Claim.keep`.

        An image's digest is kept longer than the image, and also where there is no room for that.
        """
        now = self._clock()
        file, mark = f"image/{name}/{image.image_index}", f"digest/{name}/{image.image_index}"
        digest = hashlib.sha256(image.b64_json.encode()).digest()
        whole = {file: Entry(image.model_dump_json().encode(), now + self._settings.answer_seconds)}
        marked = {mark: Entry(digest, now + self._settings.key_seconds)}
        with store_errors(_UNAVAILABLE):
            try:
                first = await self._store.change({mark: None}, {**whole, **marked}, IMAGES_PART)
            except StoreFullError:
                logger.warning("the store has no room for an image of an idempotency key")
                first = await self._store.change({mark: None}, marked)
            if first:
                return image
            kept = await self._store.get(file)
            if kept is not None:
                return CompletedEvent.model_validate_json(kept)
            if await self._store.get(mark) == digest:
                with suppress(StoreFullError):
                    await self._store.change({mark: digest, file: None}, whole, IMAGES_PART)
                return image
        message = "This Idempotency-Key was answered with an image that is not kept any more; send it under a new one."
        raise ApiError(410, "answer_gone", message, "Idempotency-Key")


class _Lease:
    """A record while it is ours."""

    def __init__(self, store: StateStore, name: str, record: _Record, settings: StateSettings, clock: Clock) -> None:
        self._store = store
        self._name = name
        self.record = record
        self._settings = settings
        self._clock = clock
        self._over = asyncio.Event()
        self._writing = asyncio.Lock()

    @asynccontextmanager
    async def held(self) -> AsyncGenerator[None]:
        """Renew the lease until the block ends; give it up then, done if nothing was raised."""
        renewing = asyncio.ensure_future(self._renew())
        done = False
        try:
            yield
            done = True
        finally:
            # Not cancelled: what a change that was cut off has made of the record is not known.
            self._over.set()
            await renewing
            await self.write(owner="", lease_end=0.0, done=done)

    async def _renew(self) -> None:
        while not self._over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.lease_seconds / _RENEWALS):
                    await self._over.wait()
                    return
            await self.write(lease_end=self._clock() + self._settings.lease_seconds)

    async def write(self, **changes: str | float | bool) -> None:
        """Change the record, unless it is somebody else's by now: what has been kept is safe from either."""
        async with self._writing:
            after = self.record.model_copy(update=changes)
            expires = self._clock() + self._settings.key_seconds
            expected = {self._name: self.record.entry(expires).value}
            try:
                if await self._store.change(expected, {self._name: after.entry(expires)}):
                    self.record = after
            except (StoreFullError, StoreUnreachableError) as error:
                logger.warning("the lease of an idempotency key cannot be changed: %s", error)


@contextmanager
def store_errors(message: str) -> Generator[None]:
    """Refuse, with a message, what needs the store while that is not to be had."""
    try:
        yield
    except (StoreFullError, StoreUnreachableError) as error:
        logger.warning("a request that needs the store is refused: %s", error)
        raise ApiError(503, "unavailable", message, retry_after=1) from None
