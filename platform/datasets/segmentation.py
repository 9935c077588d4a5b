"""What the segmentation datasets share: a mask becomes an edit that paints what it shows in a colour.

The target is half picture and half colour on the mask; the instruction names what is painted, and the colour either by
its name or by something that has it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import pycocotools.mask as coco_mask
from numpy.typing import NDArray
from pydantic import Field

from insightedit.platform.datasets.reading import FolderOptions, as_mapping
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRowError, Record, decode_image, encode_png

Wording = Literal["simple", "advanced", "mixed"]

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (255, 0, 0),
    "purple": (128, 0, 128),
    "blue": (0, 0, 255),
    "green": (0, 128, 0),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
"""What is painted with, as 8-bit RGB."""
BEARERS: Final[dict[str, tuple[str, ...]]] = {
    "red": ("a ripe tomato", "a fire engine", "a stop sign"),
    "purple": ("an eggplant", "a ripe plum", "red paint mixed with blue paint"),
    "blue": ("a sapphire", "the sea on a map", "a cloudless sky at noon"),
    "green": ("fresh grass", "an emerald", "leaves in summer"),
    "yellow": ("a ripe lemon", "the petals of a sunflower", "the yolk of an egg"),
    "white": ("fresh snow", "milk", "a blank sheet of paper"),
    "black": ("coal", "a raven", "the sky on a night without moon or stars"),
    "gray": ("an elephant", "wet concrete", "black paint mixed with white paint"),
}
"""What everybody knows the colour of."""
SIMPLE_WORDINGS: Final = (
    "Mark the pixels of {object} in {color} and leave the rest as it is.",
    "Paint {object} {color}, and keep everything else unchanged.",
    "Tint {object} {color}; no other pixel may change.",
    "Lay a see-through {color} layer over {object} and touch nothing else.",
    "Highlight {object} in {color}. The other pixels stay the same.",
    "Show where {object} is: give its pixels a {color} tint and keep the background.",
    "Cover {object} with {color} so that it still shows through.",
    "Find {object} in the picture and dye it {color}; the rest stays.",
    "Make the area of {object} {color} and preserve all other areas.",
    "Segment {object}: mix {color} into its pixels, and into no others.",
    "Put a {color} mask on {object}, with the rest of the image untouched.",
    "Shade {object} in {color} without altering its surroundings.",
)
ADVANCED_WORDINGS: Final = (
    "Let {object} take on {color}, and let nothing else change.",
    "Show the picture as if {object} were seen through glass in {color}.",
    "Work out which pixels belong to {object}, and tint just those in {color}.",
    "Someone wants to see at a glance where {object} is: glaze it in {color} and leave the rest alone.",
    "A painter lays a thin coat in {color} over {object} and over nothing else. Show the outcome.",
    "Of everything in the picture only {object} matters here. Mark it in {color}.",
    "Blend {object} half and half with {color}; all that is not part of it keeps its look.",
    "Cast a light in {color} that falls on {object} alone.",
)
"""Here `{color}` is the colour of something, and which one is left to the reader."""

_LONGEST_RUN_BITS: Final = 35


class SegmentationOptions(FolderOptions):
    """Options of all segmentation datasets."""

    wording: Wording = "mixed"
    """How a colour is asked for: by its name (`simple`), by what has it (`advanced`), or half of each (`mixed`)."""
    seed: int = Field(default=0, ge=0)
    """Chooses wordings, colours, and what is painted where there is a choice."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be painted.

    Attributes:
        instruction: the user's words.
        colour: a key of `COLOURS`.
        wording: how the colour is asked for.
    """

    instruction: str
    colour: str
    wording: Literal["simple", "advanced"]


def make_wish(name: str, rng: random.Random, wording: Wording) -> Wish:
    """Ask for something to be painted in a random colour.

    Args:
        name: what is painted, in the words of the dataset.
        rng: chooses colour and words.
        wording: as in `SegmentationOptions`.
    """
    kind = rng.choice(("simple", "advanced")) if wording == "mixed" else wording
    colour = rng.choice(list(COLOURS))
    words = colour if kind == "simple" else f"the colour of {rng.choice(BEARERS[colour])}"
    template = rng.choice(SIMPLE_WORDINGS if kind == "simple" else ADVANCED_WORDINGS)
    return Wish(template.format(object=tidy(name), color=words), colour, kind)


def tidy(text: str) -> str:
    """Lower case, with single blanks."""
    return " ".join(text.lower().split())


def segment_record(
    dataset: str,
    key: str,
    source: bytes,
    wish: Wish,
    *,
    target: bytes | None,
    category: str = "",
    meta: Mapping[str, object],
) -> Record:
    """A record of a painted picture; without a target nothing is painted, and the source itself is the target."""
    details = {**meta, "colour": wish.colour, "wording": wish.wording, "painted": target is not None}
    return Record(
        key=key,
        dataset=dataset,
        task="segment",
        source=source,
        target=source if target is None else target,
        instruction=wish.instruction,
        category=category,
        meta=json.dumps(details),
    )


def paint(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: str) -> bytes:
    """Mix a colour half and half into a part of a picture.

    Args:
        pixels: (H, W, 3), uint8 RGB.
        mask: (H, W), true where the colour goes.
        colour: a key of `COLOURS`.

    Returns:
        The picture as a PNG file.

    Raises:
        BadRowError: the mask has another size (`mask_size`), or covers nothing (`invalid_mask`).
    """
    check_size(pixels, mask.shape)
    if not mask.any():
        raise BadRowError("invalid_mask", "The mask covers no pixel of the picture.")
    mixed = np.rint(0.5 * pixels[mask] + 0.5 * np.array(COLOURS[colour]))
    painted = pixels.copy()
    painted[mask] = mixed.astype(np.uint8)
    return encode_png(painted)


def paint_instances(source: bytes, segmentations: Sequence[Any], size: tuple[int, int], colour: str) -> bytes:
    """Paint COCO segmentations, all in one colour.

    Args:
        source: the encoded picture.
        segmentations: the `segmentation` of each annotation: polygons, or an RLE.
        size: height and width that the annotations are for.
        colour: a key of `COLOURS`.

    Returns:
        The painted picture as a PNG file.

    Raises:
        BadRowError: the picture is broken or has another size, or a segmentation cannot be decoded.
    """
    pixels = decode_image(source)
    check_size(pixels, size)
    mask = np.zeros(size, np.bool_)
    for segmentation in segmentations:
        mask |= instance_mask(segmentation, size)
    return paint(pixels, mask, colour)


def check_size(pixels: NDArray[np.uint8], size: tuple[int, ...]) -> None:
    """Check a picture against the height and width of its mask.

    Raises:
        BadRowError: they differ (`mask_size`).
    """
    if pixels.shape[:2] != size:
        height, width = pixels.shape[:2]
        raise BadRowError("mask_size", f"The mask is {size[1]}x{size[0]}, its picture {width}x{height}.")


def instance_mask(segmentation: object, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of one COCO annotation.

    Args:
        segmentation: an RLE object, or a list of polygons (flat lists of x and y) and RLE objects.
        size: height and width of the picture.

    Returns:
        (H, W), true on the object.

    Raises:
        BadRowError: it cannot be decoded (`invalid_mask`), or is for another size (`mask_size`).
    """
    parts = cast(list[Any], segmentation if isinstance(segmentation, list) else [segmentation])
    mask = np.zeros(size, np.bool_)
    for part in parts:
        if isinstance(part, dict):
            mask |= rle_mask(cast(Mapping[str, Any], part), size)
    polygons = [checked for part in parts if not isinstance(part, dict) if (checked := polygon(part, size))]
    if polygons:
        mask |= _decode_polygons(polygons, size)
    return mask


def polygon(numbers: object, size: tuple[int, int]) -> list[float]:
    """Check a polygon.

    Args:
        numbers: x and y of its corners, in turn, in pixels.
        size: height and width of the picture.

    Returns:
        The numbers; none where fewer than three corners enclose nothing.

    Raises:
        BadRowError: it is no such list, or leads far out of the picture (`invalid_mask`).
    """
    if not isinstance(numbers, list) or len(cast(list[Any], numbers)) % 2:
        raise BadRowError("invalid_mask", "A polygon is not a list of pairs of numbers.")
    corners = cast(list[Any], numbers)
    for place, number in enumerate(corners):
        # A rasteriser takes memory by the length of a side: a corner far away would take all there is.
        extent = size[1 - place % 2]
        if not isinstance(number, int | float) or not -extent <= number <= 2 * extent:
            raise BadRowError("invalid_mask", f"A polygon has the coordinate {number!r}, far out of the picture.")
    return [float(number) for number in corners] if len(corners) >= 6 else []


def _decode_polygons(polygons: list[list[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Rasterise polygons as COCO does. Each has at least six numbers: four would be taken for a box."""
    runs: Any = coco_mask.frPyObjects(cast(Any, polygons), *size)
    return np.asarray(coco_mask.decode(coco_mask.merge(runs)), np.bool_)


def rle_mask(rle: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode COCO's run lengths, which go down the columns and begin with what is not on the mask.

    pycocotools does not check that the runs fill the picture, and then returns memory that was never written.

    Args:
        rle: `size` (height, width), and `counts` as numbers or as COCO's compressed text.
        size: height and width of the picture.

    Returns:
        (H, W), true on the mask.

    Raises:
        BadRowError: it cannot be decoded (`invalid_mask`), or is for another size (`mask_size`).
    """
    stated = rle.get("size")
    if stated != list(size):
        raise BadRowError("mask_size", f"The RLE is for height and width {stated}, its picture has {list(size)}.")
    counts = rle.get("counts")
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in cast(list[Any], runs)):
        raise BadRowError("invalid_mask", "The counts of an RLE are no run lengths.")
    lengths = cast(list[int], runs)
    if sum(lengths) != math.prod(size):
        raise BadRowError("invalid_mask", f"An RLE has {sum(lengths)} pixels, its picture {math.prod(size)}.")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(size, order="F")


def _run_lengths(text: str) -> list[int]:
    """Read compressed counts: 5 bits a character, lowest first; from the fourth on, the change since two before."""
    runs: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - ord("0")
        if not 0 <= code < 64 or bits >= _LONGEST_RUN_BITS:
            raise BadRowError("invalid_mask", "The counts of an RLE are no compressed run lengths.")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (code & 16) << (bits - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    if bits:
        raise BadRowError("invalid_mask", "The counts of an RLE end within a number.")
    return runs


def rows_of(index: object, field: str, path: Path) -> list[Any]:
    """A list in a dataset's index.

    Raises:
        UsageError: the index has no such list.
    """
    rows = cast(dict[str, Any], index).get(field) if isinstance(index, dict) else None
    if not isinstance(rows, list):
        raise UsageError(f"{path} has no list {field!r}; download it again.")
    return cast(list[Any], rows)


def by_id(rows: Iterable[Any], field: str = "id") -> dict[str, Any]:
    """Rows of an index by their id as text; as in COCO's own reader the last of one id counts.

    A row whose id is missing, or neither number nor text, goes by its place in the index.
    """
    found: dict[str, Any] = {}
    for number, row in enumerate(rows):
        value = cast(dict[str, Any], row).get(field) if isinstance(row, dict) else None
        found[str(value) if isinstance(value, int | str) else f"row-{number}"] = row
    return found


def listed(rows: Mapping[str, Any], identity: object, what: str) -> Mapping[str, Any]:
    """The row of an index that another row refers to.

    Args:
        rows: by their ids, as from `by_id`.
        identity: the id that is referred to.
        what: the kind of row, for people.

    Raises:
        BadRowError: there is none (`missing_field`).
    """
    if not isinstance(identity, int | str):
        raise BadRowError("missing_field", f"The id of the {what} is missing or no number.")
    if str(identity) not in rows:
        raise BadRowError("missing_field", f"The {what} {identity} is not in the dataset's index.")
    return as_mapping(rows[str(identity)])


def size_of(image: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an image of a COCO index.

    Raises:
        BadRowError: they are missing.
    """
    height, width = image.get("height"), image.get("width")
    if type(height) is not int or type(width) is not int:
        raise BadRowError("missing_field", "The fields height and width of an image are missing or no numbers.")
    return height, width


def find_folder(candidates: Iterable[Path], what: str) -> Path:
    """The first of some folders that exists.

    Raises:
        NotFoundError: none does.
    """
    places = list(candidates)
    for place in places:
        if place.is_dir():
            return place
    raise NotFoundError(f"The {what} are in none of {', '.join(map(str, places))}; put them in one of these folders.")
