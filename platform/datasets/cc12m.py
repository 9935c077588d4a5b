"""CC12M: pictures of the web with captions, as the list of addresses and a folder, or as tars of img2dataset."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np

from insightedit.platform.datasets.reading import (
    Entry,
    FolderOptions,
    as_mapping,
    fingerprint_of,
    parse_options,
    read_file,
    text_field,
)
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask

_VERSION: Final = 1
_LIST: Final = "cc12m.tsv"
_HEADER: Final = b"url\tcaption\n"
"""The list has none as it is published; img2dataset needs one, and its manual says to add this."""
_PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp")
_LINES: Final = 500
"""Lines of the list in one entry."""
_BLOCK: Final = 1 << 24
"""Bytes of the list that are looked at together."""
_LARGEST: Final = 1 << 26
"""Bytes of an entry's lines, and of a file in a tar, above which they are no captions and no picture."""
_SAMPLE_BYTES: Final = 1 << 15
"""What a sample of 256 pixels takes in a tar, about."""
_TORN: Final = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)
"""What `tarfile` raises over damage."""


class Lines(NamedTuple):
    """The place of an entry: bytes `start` up to `stop` of the list, whose first line is the picture number `first`."""

    start: int
    stop: int
    first: int


class CC12MOptions(FolderOptions):
    """Where the pictures of CC12M are, and what of those that are not."""

    images: Path = Path("images")
    """Folder of the pictures of `cc12m.tsv`, relative to the root."""
    skip_missing: bool = False
    """Leave out rows without a picture, of which a list of web addresses has many, instead of counting each as a bad
    row (`missing_file`)."""


class CC12MReader:
    """Reader of CC12M in either of two forms, the first of these that the root holds.

    1. Tars, as img2dataset writes them with `--output_format webdataset`: in each, files of one name belong together.
       The caption is in the `.txt`, or else the field `caption` of the `.json`. The key is `TAR/NAME`.
    2. `cc12m.tsv` as it is published, an address and a caption a line, and a folder of pictures as img2dataset writes
       them with `--output_format files`: the picture of the line number N, from zero, is called N with nine digits, and
       lies in a folder named by the first five of them or beside such folders: `images/00001/000012345.jpg`. The key is
       the picture's name. The first line may be img2dataset's header, which does not count.
    """

    name: ClassVar[str] = "cc12m"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("caption",)
    needs: ClassVar[str] = "img2dataset's tars, or cc12m.tsv and a folder of pictures"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """The tars, or parts of the list."""
        parsed = parse_options(CC12MOptions, self.name, options)
        tars = _tars(parsed.root)
        if tars:
            return [Entry(tar.name, _rows_about(tar)) for tar in tars]
        return _line_entries(_list_file(parsed))

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read a tar from its start to its end, or a part of the list."""
        parsed = parse_options(CC12MOptions, self.name, options)
        lines = isinstance(entry.place, Lines)
        for row in _list_rows(parsed, entry.place) if lines else _tar_rows(parsed.root / entry.place):
            if not (parsed.skip_missing and isinstance(row, BadRow) and row.reason == "missing_file"):
                yield row

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do.

        Tars are known by name and size, the list by its content, and the millions of pictures beside it by name.
        """
        parsed = parse_options(CC12MOptions, self.name, options)
        tars = _tars(parsed.root)
        if tars:
            return fingerprint_of(self.name, _VERSION, parsed, tars)
        digest = hashlib.sha256(fingerprint_of(self.name, _VERSION, parsed, [_list_file(parsed)]).encode())
        for parent, folders, names in os.walk(parsed.root / parsed.images):
            folders.sort()
            digest.update(json.dumps([Path(parent).name, sorted(names)]).encode())
        return digest.hexdigest()


def _tars(root: Path) -> list[Path]:
    """The tars of the root, sorted."""
    return sorted(root.glob("*.tar"))


def _rows_about(tar: Path) -> int:
    """About how many samples a tar has: what img2dataset counted, or a guess by its size."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        count = as_mapping(json.loads(tar.with_name(f"{tar.stem}_stats.json").read_bytes())).get("successes")
        if isinstance(count, int):
            return max(1, count)
    return max(1, tar.stat().st_size // _SAMPLE_BYTES)


def _list_file(options: CC12MOptions) -> Path:
    """The list of addresses and captions.

    Raises:
        NotFoundError: it or the folder of its pictures is missing.
    """
    path, pictures = options.root / _LIST, options.root / options.images
    if not path.is_file():
        raise NotFoundError(f"{options.root} holds neither .tar files nor {_LIST}; download CC12M there.")
    if not pictures.is_dir():
        raise NotFoundError(
            f"There is no folder {pictures} with the pictures of {_LIST}; download them there with img2dataset"
            " --output_format files, or name another folder in the option 'images'."
        )
    return path


def _line_entries(path: Path) -> list[Entry]:
    """Cut the list into parts of `_LINES` lines; it is read once, and of it only the places of cuts are kept."""
    bounds, lines = _cuts(path)
    if not lines:
        raise UsageError(f"{path} is empty; download it again.")
    entries: list[Entry] = []
    for part, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop - start > _LARGEST:
            raise UsageError(f"{path} has lines of millions of characters; download it again.")
        entries.append(Entry(Lines(start, stop, part * _LINES), min(_LINES, lines - part * _LINES)))
    return entries


def _cuts(path: Path) -> tuple[list[int], int]:
    """Offsets of the start, of every `_LINES`-th line's end and of the end of the list, and the number of lines."""
    ended = 0
    with path.open("rb") as file:
        position = len(_HEADER) if file.read(len(_HEADER)) == _HEADER else 0
        file.seek(position)
        bounds, last = [position], _HEADER
        while block := file.read(_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            bounds += (ends[(-ended - 1) % _LINES :: _LINES] + position + 1).tolist()
            ended, position, last = ended + len(ends), position + len(block), block
    rest = not last.endswith(b"\n")
    return bounds + [position] * (bounds[-1] < position), ended + rest


def _list_rows(options: CC12MOptions, place: Lines) -> Iterator[Record | BadRow]:
    """The rows of a part of the list."""
    try:
        with (options.root / _LIST).open("rb") as file:
            file.seek(place.start)
            content = file.read(place.stop - place.start)
    except OSError as error:
        yield BadRow(_LIST, "invalid_archive", f"Lines from {place.first} on of {_LIST} cannot be read: {error}.")
        return
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), place.first):
        yield _line_row(options, f"{number:09d}", line)


def _line_row(options: CC12MOptions, key: str, line: bytes) -> Record | BadRow:
    """The record of a line, or why there is none."""
    try:
        source = _picture(options.root / options.images, key)
        url, tab, caption = _text(line, f"Line {int(key)} of {_LIST}").partition("\t")
        return _record(key, source, caption if tab else None, url)
    except BadRowError as error:
        return BadRow(key, error.reason, str(error))


def _picture(folder: Path, key: str) -> bytes:
    """The picture of a line; looking for its few possible names is faster than listing folders of ten thousand."""
    for parent in (f"{key[:5]}/", ""):
        for suffix in _PICTURES:
            name = f"{parent}{key}{suffix}"
            if (folder / name).is_file():
                return read_file(folder, name)
    raise BadRowError("missing_file", f"There is no picture {key}.jpg in {folder / key[:5]} or {folder}.")


def _tar_rows(path: Path) -> Iterator[Record | BadRow]:
    """The rows of a tar; where it is torn, one `BadRow` follows what was whole before."""
    torn: BadRow | None = None
    name, parts = "", dict[str, bytes]()
    try:
        for next_name, suffix, content in _members(path):
            if parts and next_name != name:
                yield _sample_row(path.stem, name, parts)
                parts = {}
            name = next_name
            parts[suffix] = content
    except _TORN as error:
        torn = BadRow(path.name, "invalid_archive", f"{path} cannot be read after the sample {name!r}: {error}.")
    last = _sample_row(path.stem, name, parts) if parts else None
    if isinstance(last, Record) or (last and not torn):
        yield last
    if torn:
        yield torn


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name without suffix, suffix and content of a tar's files that are part of samples, in order."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, dot, ending = base.partition(".")
            content = tar.extractfile(member) if member.isreg() and _of_sample(dot + ending) else None
            if content is not None:
                if member.size > _LARGEST:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                yield f"{folder}/{stem}" if folder else stem, dot + ending, content.read()
        # tarfile takes a header that it cannot read for the end, but only a block of zeros is one.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")


def _of_sample(suffix: str) -> bool:
    """Whether files of this suffix are read."""
    return suffix in {*_PICTURES, ".txt", ".json"}


def _sample_row(tar: str, name: str, parts: Mapping[str, bytes]) -> Record | BadRow:
    """The record of a sample, or why there is none."""
    key = f"{tar}/{name}"
    try:
        source = next((parts[suffix] for suffix in _PICTURES if suffix in parts), None)
        if source is None:
            raise BadRowError("missing_file", f"{name} has no picture in {tar}.tar.")
        if ".txt" in parts:
            return _record(key, source, _text(parts[".txt"], f"{key}.txt"), _address(parts, key))
        details = _details(parts, key)
        return _record(key, source, details.get("caption"), details.get("url"))
    except BadRowError as error:
        return BadRow(key, error.reason, str(error))


def _details(parts: Mapping[str, bytes], key: str) -> Mapping[str, Any]:
    """What the `.json` of a sample says."""
    if ".json" not in parts:
        raise BadRowError("missing_field", f"{key} has neither a .txt nor a .json with a caption.")
    try:
        return as_mapping(json.loads(parts[".json"]))
    except (ValueError, RecursionError) as error:
        raise BadRowError("invalid_json", f"{key}.json cannot be read as a JSON object: {error}") from None


def _address(parts: Mapping[str, bytes], key: str) -> object:
    """The address in the `.json` of a sample whose caption is known; it may be missing or broken."""
    with contextlib.suppress(BadRowError):
        return _details(parts, key).get("url")
    return None


def _text(content: bytes, what: str) -> str:
    """UTF-8 text."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadRowError("missing_field", f"{what} is no UTF-8 text: {error}.") from None


def _record(key: str, source: bytes, caption: object, url: object) -> Record:
    """A record of a picture and its caption; the address is kept where it is a text."""
    return Record(
        key=key,
        dataset=CC12MReader.name,
        task="caption",
        source=source,
        instruction=text_field({"caption": caption}, "caption", "empty_instruction"),
        meta=json.dumps({"url": url} if isinstance(url, str) else {}),
    )
