"""Where the pictures come from: a folder, a bucket or a dataset, cut into blocks that can be read anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
from PIL import Image, ImageOps

from insightedit.platform.construction.config import ConstructionConfig, ImagesConfig
from insightedit.platform.construction.photos import Photo, Rejected
from insightedit.platform.datasets import Entry, reader_named
from insightedit.platform.datasets.pairs import PICTURE_SUFFIXES
from insightedit.platform.errors import NotFoundError
from insightedit.platform.records import BadRow, BadRowError, encode_png, open_image
from insightedit.platform.storage import Store

_ORIENTATION: Final = 0x0112
"""EXIF's tag of how a camera was held."""
_SUFFIXES: Final = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}
"""How the files that are kept as they are begin; others become PNG."""


@dataclass(frozen=True, slots=True)
class Block:
    """Pictures that go through the steps together.

    Attributes:
        number: of the block; with it all names of files are known before anything is read.
        places: names of files, or entries of a reader.
    """

    number: int
    places: tuple[str | Entry, ...]


def blocks_of(config: ConstructionConfig) -> list[Block]:
    """Cut the pictures into blocks, in an order that never changes.

    Raises:
        UsageError: the URI, the reader or one of its options is wrong.
        NotFoundError: there are no pictures.
    """
    images, each = config.images, config.images_per_block
    places: Sequence[str | Entry]
    places = reader_named(images.reader).entries(images.options) if images.reader is not None else _files(images)
    if not places:
        raise NotFoundError(f"There are no pictures in {images.place or images.reader}; look at construction.images.")
    return [Block(start // each, tuple(places[start : start + each])) for start in range(0, len(places), each)]


def fingerprint_of(images: ImagesConfig) -> str:
    """A sha256 that changes when the pictures do; files are known by name and size."""
    if images.reader is not None:
        return reader_named(images.reader).fingerprint(images.options)
    sizes = Store.at(images.place or "").sizes()
    return hashlib.sha256(json.dumps([[name, sizes[name]] for name in _files(images)]).encode()).hexdigest()


def read_block(images: ImagesConfig, block: Block) -> list[Photo]:
    """Read the pictures of a block; what cannot be read is a photo that is out, with the reason."""
    photos: list[Photo] = []
    for found in _found(images, block):
        photo = Photo(name=f"{block.number:06d}-{len(photos):03d}", key=found.key, truth=found.truth)
        try:
            photo.data, photo.suffix = _formed(found.data, images.shorter_side)
        except BadRowError as error:
            photo.drop("read", Rejected(error.reason, str(error)))
        if found.bad is not None:
            photo.rejections.clear()
            photo.drop("read", found.bad)
        photos.append(photo)
    return photos


@dataclass(frozen=True, slots=True)
class _Found:
    key: str
    data: bytes
    truth: dict[str, Any] | None = None
    bad: Rejected | None = None


def _files(images: ImagesConfig) -> list[str]:
    store = Store.at(images.place or "")
    return [name for name in store.sizes() if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES]


def _found(images: ImagesConfig, block: Block) -> Iterator[_Found]:
    for place in block.places:
        if isinstance(place, Entry):
            yield from _of_entry(images, place)
        else:
            try:
                yield _Found(place, Store.at(images.place or "").read(place))
            except NotFoundError as error:
                yield _Found(place, b"", bad=Rejected("missing_file", str(error)))


def _of_entry(images: ImagesConfig, entry: Entry) -> Iterator[_Found]:
    """The distinct source pictures of a reader's entry: an edit often has several instructions."""
    seen: set[bytes] = set()
    for row in reader_named(images.reader or "").read(images.options, entry):
        if isinstance(row, BadRow):
            yield _Found(row.key, b"", bad=Rejected(row.reason, row.detail))
        elif row.source is None:
            yield _Found(row.key, b"", bad=Rejected("missing_file", "The record has no source picture."))
        elif row.source not in seen:
            seen.add(row.source)
            truth: Any = row.details().get("scene")
            yield _Found(row.key, row.source, truth)


def _formed(data: bytes, shorter_side: int | None) -> tuple[bytes, str]:
    """A picture's file, upright and reduced, and the ending of its name; as it is where it needs neither.

    Raises:
        BadRowError: it is no whole picture.
    """
    image, size = open_image(data, at_least=shorter_side)
    is_turned = image.getexif().get(_ORIENTATION, 1) != 1
    is_large = shorter_side is not None and min(size) > shorter_side
    suffix = next((suffix for magic, suffix in _SUFFIXES.items() if data.startswith(magic)), None)
    if suffix is not None and not is_turned and not is_large:
        return data, suffix
    upright = ImageOps.exif_transpose(image)
    if shorter_side is not None and is_large:
        scale = shorter_side / min(upright.size)
        sides = (max(round(upright.width * scale), 1), max(round(upright.height * scale), 1))
        upright = upright.resize(sides, Image.Resampling.LANCZOS)
    return encode_png(np.asarray(upright)), "png"
