"""Pictures of every step: each row a picture, what was found in it, and its edits with instructions and scores."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from insightedit.platform.construction.photos import Change, Photo, Picture
from insightedit.platform.records import decode_image

_INK, _SOFT, _PAPER, _GOOD, _BAD = "#1d2330", "#667085", "#ffffff", "#12805c", "#c4320a"
_CELL, _GAP, _TEXT, _LINES = 208, 16, 34, 11
_COLOURS: Final = ((240, 60, 70), (60, 120, 250), (40, 190, 90), (250, 180, 20), (170, 70, 220), (20, 190, 200))


def write_steps(path: Path, photos: Sequence[Photo], edits_each: int = 4) -> None:
    """Draw photos with their pictures as rows into a PNG file: the picture, its things, its edits.

    Args:
        path: of the file.
        photos: whose `data` and `painted` are there.
        edits_each: edits of a photo at most; those that were kept first.
    """
    shown = [sorted((c for c in photo.changes if c.painted), key=_is_out)[:edits_each] for photo in photos]
    columns = 2 + max((len(changes) for changes in shown), default=0)
    height = _CELL + 20 + _LINES * 15 + 2 * _GAP
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, max(len(photos), 1) * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (photo, changes) in enumerate(zip(photos, shown, strict=True)):
        cells = [
            (photo.pixels, photo.key, _INK, photo.caption),
            (_with_masks(photo), "things", _INK, ", ".join(thing.name for thing in photo.things)),
            *(_cell(photo, change) for change in changes),
        ]
        for column, (picture, heading, colour, text) in enumerate(cells):
            left, top = _GAP + column * (_CELL + _GAP), row * height + _GAP
            sheet.paste(_fitted(picture), (left, top))
            draw.text((left, top + _CELL + 4), _short(heading), fill=colour, font=ImageFont.load_default(13))
            lines = textwrap.wrap(text, _TEXT, max_lines=_LINES, placeholder=" ...")
            font = ImageFont.load_default(12)
            draw.multiline_text((left, top + _CELL + 22), "\n".join(lines), fill=_SOFT, font=font, spacing=3)
    sheet.save(path, optimize=True)


def _is_out(change: Change) -> bool:
    return not change.kept


def _cell(photo: Photo, change: Change) -> tuple[Picture, str, str, str]:
    """An edit: its picture, in words, a colour that says whether it was kept, and its instructions and scores."""
    words = [*change.there.simple[:1], *(one.text for one in change.there.advanced[:1])] if change.there else []
    scores = " ".join(str(graded.value) for graded in (change.scores or {}).values())
    why = [one.reason for one in photo.rejections if one.what == change.named and not change.kept]
    text = " / ".join([*words, *([f"scores {scores}"] if scores else []), *why])
    return decode_image(change.painted), change.named, _GOOD if change.kept else _BAD, text


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
