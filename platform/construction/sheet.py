"""Pictures of every step: each row a picture, what was found in it, and its edits with instructions and scores."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from insightedit.platform.construction.photos import Change, Photo, Picture
from insightedit.platform.records import decode_image

_INK, _SOFT, _PAPER, _GOOD, _BAD = "#1d2330", "#667085", "#ffffff", "#12805c", "#c4320a"
_CELL, _GAP, _TEXT, _LINES = 208, 16, 34, 11
_COLOURS: Final = ((240, 60, 70), (60, 120, 250), (40, 190, 90), (250, 180, 20), (170, 70, 220), (20, 190, 200))


class _Cell(NamedTuple):
    """A picture over its heading, in a colour, and some lines of text."""

    picture: Picture
    heading: str
    colour: str
    lines: list[str]


def write_steps(path: Path, photos: Sequence[Photo], edits_each: int = 4) -> None:
    """Draw photos with their pictures as rows into a PNG file: the picture, its things, its edits.

    Args:
        path: of the file.
        photos: whose `data` and `painted` are there.
        edits_each: edits of a photo at most; those that were kept first.
    """
    rows = [_cells(photo, edits_each) for photo in photos if photo.data]
    heights = [_CELL + 28 + max(len(cell.lines) for cell in row) * 15 + _GAP for row in rows]
    width = max(map(len, rows), default=1) * (_CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), _PAPER)
    draw, top = ImageDraw.Draw(sheet), _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = _GAP + column * (_CELL + _GAP)
            sheet.paste(_fitted(cell.picture), (left, top))
            draw.text((left, top + _CELL + 4), _short(cell.heading), fill=cell.colour, font=ImageFont.load_default(13))
            font = ImageFont.load_default(12)
            draw.multiline_text((left, top + _CELL + 22), "\n".join(cell.lines), fill=_SOFT, font=font, spacing=3)
        top += height
    sheet.save(path, optimize=True)


def _cells(photo: Photo, edits_each: int) -> list[_Cell]:
    """The picture with its caption, its things, and its edits."""
    changes = sorted((change for change in photo.changes if change.painted), key=_is_out)[:edits_each]
    things = ", ".join(thing.name for thing in photo.things) or "; ".join(one.reason for one in photo.rejections)
    return [
        _Cell(photo.pixels, photo.key, _INK, _wrapped(photo.caption)),
        _Cell(_with_masks(photo), "things", _INK, _wrapped(things)),
        *(_cell(photo, change) for change in changes),
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _TEXT, max_lines=_LINES, placeholder=" ...")


def _is_out(change: Change) -> bool:
    return not change.kept


def _cell(photo: Photo, change: Change) -> _Cell:
    """An edit: its picture, in words, a colour that says whether it was kept, and its instructions and scores."""
    words = [*change.there.simple[:1], *(one.text for one in change.there.advanced[:1])] if change.there else []
    scores = " ".join(str(graded.value) for graded in (change.scores or {}).values())
    why = [one.reason for one in photo.rejections if one.what == change.named and not change.kept]
    text = " / ".join([*words, *([f"scores {scores}"] if scores else []), *why])
    return _Cell(decode_image(change.painted), change.named, _GOOD if change.kept else _BAD, _wrapped(text))


def _with_masks(photo: Photo) -> Picture:
    """The picture with each thing's mask in a colour of its own."""
    pixels = photo.pixels.astype(np.float32)
    for number, thing in enumerate(photo.things):
        if thing.mask is not None:
            mask = thing.mask.mask()
            pixels[mask] = 0.4 * pixels[mask] + 0.6 * np.array(_COLOURS[number % len(_COLOURS)], np.float32)
    return pixels.astype(np.uint8)


def _fitted(picture: Picture) -> Image.Image:
    """A picture fitted into a cell; small ones show the pixels that they are."""
    image = Image.fromarray(picture)
    scale = _CELL / max(image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), how)


def _short(text: str) -> str:
    return text if len(text) <= _TEXT - 4 else f"{text[: _TEXT - 7]}..."
