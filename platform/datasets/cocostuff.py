"""COCO-Stuff: pictures with a class for every pixel; one class is painted, or one is asked for that is not there."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from insightedit.platform.datasets.reading import Entry, attempt, fingerprint_of, parse_options, read_file
from insightedit.platform.datasets.segmentation import (
    SegmentationOptions,
    check_size,
    make_wish,
    paint,
    segment_record,
    tidy,
)
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask, decode_image

VOID: Final = 255
"""Value of a pixel without a class."""
NEVER_LABELLED: Final = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
"""Labels that COCO names and never annotated, such as window and door; a picture without them may still show them."""
LEAVE: Final = "Leave the picture as it is."
_VERSION: Final = 1


class CocoStuffOptions(SegmentationOptions):
    """Options of COCO-Stuff."""

    split: str = "train2017"
    """Which pictures and maps: the name of their folders."""
    absent: float = Field(default=0.2, ge=0, le=1)
    """Share of records that ask for a class that is not in the picture; their target is the source."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a dataset's files are, and the names of all classes by label. Folders are named from the root."""

    maps: str
    pictures: str
    labels: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Place:
    """One picture."""

    stem: str
    layout: _Layout


class CocoStuffReader:
    """Reader of COCO-Stuff; see `insightedit.platform.datasets.Reader`. An entry is one picture and its label map."""

    name: ClassVar[str] = "cocostuff"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("segment",)
    needs: ClassVar[str] = "stuffthingmaps/train2017/*.png, train2017/*.jpg and labels.txt"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """All label maps of a split, by name."""
        parsed = parse_options(CocoStuffOptions, self.name, options)
        layout = _layout(parsed)
        return [Entry(_Place(path.stem, layout)) for path in sorted((parsed.root / layout.maps).glob("*.png"))]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Paint one picture."""
        parsed = parse_options(CocoStuffOptions, self.name, options)
        place: _Place = entry.place
        key = f"{parsed.split}-{place.stem}"
        yield attempt(key, self._record, parsed, key, place)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        parsed = parse_options(CocoStuffOptions, self.name, options)
        root, layout = parsed.root, _layout(parsed)
        files = [root / "labels.txt", *(root / layout.maps).glob("*.png"), *(root / layout.pictures).glob("*.jpg")]
        return fingerprint_of(self.name, _VERSION, parsed, files)

    def _record(self, options: CocoStuffOptions, key: str, place: _Place) -> Record:
        layout, names = place.layout, place.layout.labels
        source = read_file(options.root / layout.pictures, f"{place.stem}.jpg")
        pixels = decode_image(source)
        labels = _label_map(read_file(options.root / layout.maps, f"{place.stem}.png"))
        check_size(pixels, labels.shape)
        present = _present(labels, names)
        if not present:
            return self._untouched(key, source, options)
        rng = random.Random(f"{options.seed}:{key}")
        absent = sorted(set(names) - NEVER_LABELLED - set(present)) if rng.random() < options.absent else []
        label = rng.choice(absent or present)
        wish = make_wish(names[label], rng, options.wording)
        return segment_record(
            self.name,
            key,
            source,
            wish,
            target=None if absent else paint(pixels, labels == label, wish.colour),
            category=tidy(names[label]),
            meta={"split": options.split, "label": label},
        )

    def _untouched(self, key: str, source: bytes, options: CocoStuffOptions) -> Record:
        return Record(
            key=key,
            dataset=self.name,
            task="segment",
            source=source,
            target=source,
            instruction=LEAVE,
            meta=json.dumps({"split": options.split, "painted": False}),
        )


def _load_labels(path: Path) -> dict[int, str]:
    """Read `id: name` lines; 0 is for pixels without a class, and left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise NotFoundError(f"There is no file {path}; copy it from the repository nightrome/cocostuff.") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}; copy it again from nightrome/cocostuff.") from None
    labels: dict[int, str] = {}
    for line in filter(str.strip, lines):
        match = re.fullmatch(r"(\d{1,3}): (.*\S)\s*", line)
        if match is None:
            raise UsageError(f"{path} has the line {line!r}; every line must be an id, a colon and a name.")
        labels[int(match[1])] = match[2]
    labels.pop(0, None)
    return labels


def _layout(options: CocoStuffOptions) -> _Layout:
    """Find the files of a split. Maps and pictures may share a folder, so what counts is which files are in it."""
    root, split = options.root, options.split
    maps = _folder_with("*.png", root, (f"stuffthingmaps/{split}", f"annotations/{split}", split))
    pictures = _folder_with("*.jpg", root, (split, f"images/{split}"))
    return _Layout(maps, pictures, _load_labels(root / "labels.txt"))


def _folder_with(pattern: str, root: Path, candidates: Sequence[str]) -> str:
    for name in candidates:
        if any((root / name).glob(pattern)):
            return name
    raise NotFoundError(f"{root} has no {pattern} in any of {', '.join(candidates)}; put them in one of these folders.")


def _label_map(data: bytes) -> NDArray[np.int64]:
    """Decode a label map to labels (H, W), which are a pixel's value plus one; 0 where there is no class."""
    try:
        pixels = decode_image(data)
    except BadRowError as error:
        raise BadRowError("invalid_mask", f"The label map is broken. {error}") from None
    values = pixels[..., 0]
    if (pixels != values[..., None]).any():
        raise BadRowError("invalid_mask", "The label map has colours; it must be a grayscale picture.")
    return np.where(values == VOID, 0, values.astype(np.int64) + 1)


def _present(labels: NDArray[np.int64], names: Mapping[int, str]) -> list[int]:
    """The labels of a map, in order."""
    present = [int(label) for label in np.unique(labels) if label]
    for label in present:
        if label not in names:
            raise BadRowError(
                "invalid_mask", f"The label map has the value {label - 1}, which labels.txt does not name."
            )
    return present
