"""A contact sheet of a dataset: some of its records as one picture, for people to see what they have."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from insightedit.platform.records import Record, open_image

_INK, _SOFT, _PAPER = "#1d2330", "#667085", "#ffffff"
_SIDE, _GAP, _LINES, _COLUMNS = 150, 16, 4, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Contact:
    """One record of a sheet, with its pictures made small."""

    heading: str
    text: str
    pictures: tuple[bytes, ...]

    @classmethod
    def of(cls, record: Record) -> Contact:
        """A record whose pictures are known to be whole."""
        text = f"{record.instruction}  >  {record.reply}" if record.task == "chat" else record.instruction
        heading = f"{record.task} {record.category}".strip()
        pictures = tuple(_thumbnail(data) for data in (record.source, record.target) if data is not None)
        return cls(heading=heading, text=text, pictures=pictures)


def write_contact_sheet(path: Path, contacts: Sequence[Contact]) -> None:
    """Draw records as cards, source and target side by side over their words, into a PNG file."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    width, height = 2 * _SIDE + 3 * _GAP, _SIDE + _GAP + 22 + _LINES * 18
    rows = -(-len(contacts) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width, rows * (height + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, contact in enumerate(contacts):
        left = (number % _COLUMNS) * width + _GAP
        top = (number // _COLUMNS) * (height + _GAP) + _GAP
        for place, data in enumerate(contact.pictures):
            picture = open_image(data)[0]
            sheet.paste(picture, (left + place * (_SIDE + _GAP), top + (_SIDE - picture.height) // 2))
        draw.text((left, top + _SIDE + 6), contact.heading, fill=_SOFT, font=small)
        lines = textwrap.wrap(contact.text, 44, max_lines=_LINES, placeholder=" ...")
        draw.multiline_text((left, top + _SIDE + 24), "\n".join(lines), fill=_INK, font=font, spacing=4)
    sheet.save(path, optimize=True)


def _thumbnail(data: bytes) -> bytes:
    image, _ = open_image(data, at_least=_SIDE)
    scale = _SIDE / max(image.size)
    shape = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    # Small pictures are shown as the pixels they are.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    buffer = io.BytesIO()
    image.resize(shape, how).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
