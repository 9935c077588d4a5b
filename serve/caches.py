"""What is kept of earlier work, under the hash of what it was made from."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from insightedit.serve.uploads import Pixels

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """The values used last, within a number of bytes. For one thread."""

    def __init__(self, limit: int, size_of: Callable[[Value], int]) -> None:
        """Begin empty.

        Args:
            limit: in bytes; 0 keeps nothing.
            size_of: a value's size in bytes.
        """
        self._limit = limit
        self._size_of = size_of
        self._values: OrderedDict[str, Value] = OrderedDict()
        self.bytes = 0

    def get(self, key: str) -> Value | None:
        """The value, if it is still there."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: Value) -> None:
        """Keep a value, and let go of those that were not used for longest. One that is too large is not kept."""
        if self._size_of(value) > self._limit:
            return
        if key in self._values:
            self.bytes -= self._size_of(self._values.pop(key))
        self._values[key] = value
        self.bytes += self._size_of(value)
        while self.bytes > self._limit:
            _, oldest = self._values.popitem(last=False)
            self.bytes -= self._size_of(oldest)


def content_key(pixels: Pixels, *texts: str) -> str:
    """A hash of an image and texts that go with it."""
    digest = hashlib.sha256(repr((pixels.shape, texts)).encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()
