"""ReasonSeg: pictures with questions whose answer is a part of the picture, painted."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from insightedit.platform.datasets.reading import (
    Entry,
    as_mapping,
    attempt,
    fingerprint_of,
    parse_options,
    read_file,
    text_field,
)
from insightedit.platform.datasets.segmentation import (
    SegmentationOptions,
    Wish,
    find_folder,
    make_wish,
    paint,
    polygon,
    segment_record,
)
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask, decode_image

_VERSION: Final = 1
_TARGET: Final = 1
_VOID: Final = 255
_SUFFIXES: Final = {".jpg", ".json"}


class ReasonSegOptions(SegmentationOptions):
    """Options of ReasonSeg."""

    split: str = "train"
    """Which folder: `train`, `val` or `test`."""


class ReasonSegReader:
    """Reader of ReasonSeg; see `insightedit.platform.datasets.Reader`. An entry is one picture."""

    name: ClassVar[str] = "reasonseg"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("segment",)
    needs: ClassVar[str] = "train/*.jpg, each with a .json of the same name"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """Names of pictures and annotations, without their suffix."""
        parsed = parse_options(ReasonSegOptions, self.name, options)
        folder = find_folder([parsed.root / parsed.split], "pictures")
        return [Entry(stem) for stem in sorted({path.stem for path in folder.iterdir() if path.suffix in _SUFFIXES})]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Paint the answer in one picture."""
        parsed = parse_options(ReasonSegOptions, self.name, options)
        yield attempt(f"{parsed.split}-{entry.place}", self._record, parsed, str(entry.place))

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        parsed = parse_options(ReasonSegOptions, self.name, options)
        folder = find_folder([parsed.root / parsed.split], "pictures")
        files = [path for path in folder.iterdir() if path.suffix in _SUFFIXES]
        return fingerprint_of(self.name, _VERSION, parsed, files)

    def _record(self, options: ReasonSegOptions, stem: str) -> Record:
        key, folder = f"{options.split}-{stem}", options.root / options.split
        source = read_file(folder, f"{stem}.jpg")
        row = _annotation(read_file(folder, f"{stem}.json"))
        wish = _wish(row, random.Random(f"{options.seed}:{key}"), options)
        pixels = decode_image(source)
        height, width, _ = pixels.shape
        target = paint(pixels, _mask(row, (height, width)), wish.colour)
        meta = {"split": options.split, "is_sentence": row.get("is_sentence") is True}
        return segment_record(self.name, key, source, wish, target=target, category="reasoning", meta=meta)


def _annotation(data: bytes) -> Mapping[str, Any]:
    """Parse an annotation: UTF-8, or cp1252 as some of the files are."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    try:
        return as_mapping(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise BadRowError("invalid_json", f"The annotation is not a JSON object: {error}") from None


def _wish(row: Mapping[str, Any], rng: random.Random, options: ReasonSegOptions) -> Wish:
    """The question, and what to do with the answer; it is called by its name where SmartEdit's annotations have one."""
    lines = row.get("text")
    if not isinstance(lines, list):
        raise BadRowError("missing_field", "The field text is missing or no list.")
    questions = [" ".join(line.split()) for line in cast(list[Any], lines) if isinstance(line, str) and line.strip()]
    if not questions:
        raise BadRowError("empty_instruction", "The field text has no question.")
    question = rng.choice(questions)
    wish = make_wish(text_field(row, "Name") if row.get("Name") else "the object", rng, options.wording)
    stop = "" if question[-1] in ".?!" else "."
    return Wish(f"{question}{stop} {wish.instruction}", wish.colour, wish.wording)


def _mask(row: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw the polygons, largest first, so that what lies within another is not lost."""
    shapes = row.get("shapes")
    if not isinstance(shapes, list):
        raise BadRowError("missing_field", "The field shapes is missing or no list.")
    polygons = [
        (corners, value)
        for shape in map(as_mapping, cast(list[Any], shapes))
        if (value := _value(shape)) and (corners := _corners(shape, size))
    ]
    height, width = size
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for corners, value in sorted(polygons, key=lambda drawn: -_area(drawn[0])):
        draw.polygon(corners, fill=value)
    return np.asarray(canvas) == _TARGET


def _value(shape: Mapping[str, Any]) -> int:
    """What a shape is drawn with; 0 for one that is not drawn."""
    label = text_field(shape, "label").lower()
    if label == "flag":
        return 0
    return _VOID if "ignore" in label else _TARGET


def _corners(shape: Mapping[str, Any], size: tuple[int, int]) -> list[float]:
    """The points of a shape as x and y in turn."""
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in cast(list[Any], points)):
        raise BadRowError("invalid_mask", "The points of a shape are no list of pairs.")
    return polygon([number for point in cast(list[list[Any]], points) for number in point], size)


def _area(corners: list[float]) -> float:
    """Area of a polygon, in pixels, by the shoelace formula."""
    x, y = np.array(corners[::2]), np.array(corners[1::2])
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
