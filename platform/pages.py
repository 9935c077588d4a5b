"""Parts of pages that people look at: HTML that needs nothing beside it, every picture within."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INK: Final = "#1d2330"
PAPER: Final = "#ffffff"
SOFT: Final = "#667085"
RULE: Final = "#e4e7ec"
ACCENT: Final = "#2f5bd8"
GOOD: Final = "#0f7b4f"
BAD: Final = "#b3261e"
_LARGEST: Final = 384
"""Pixels of the longer side above which a picture is made smaller."""
_SMALL: Final = 96
"""Pixels up to which a picture is kept bit for bit, and shown as the pixels it has."""

STYLE: Final = f"""
body {{ margin: 0; background: {PAPER}; color: {INK}; font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.5rem; letter-spacing: -0.01em; }}
h2 {{ font-size: 1.25rem; margin: 3rem 0 0.75rem; border-top: 1px solid {RULE}; padding-top: 1.5rem; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 0.5rem; }}
.soft, .soft td {{ color: {SOFT}; }}
.summary {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 1rem; margin: 0; }}
.summary div {{ border: 1px solid {RULE}; border-radius: 8px; padding: 0.9rem 1rem; }}
.summary dd {{ margin: 0; }}
.summary .value {{ font-size: 1.7rem; font-weight: 600; line-height: 1.2; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }}
.curves img {{ width: 100%; }}
.tables {{ columns: 2 26rem; column-gap: 2.5rem; }}
.tables section {{ break-inside: avoid; padding-top: 0.1px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th {{ text-align: left; font-weight: 500; color: {SOFT}; font-size: 0.85rem; }}
th, td {{ border-bottom: 1px solid {RULE}; padding: 0.35rem 0.75rem 0.35rem 0; vertical-align: top; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
tr.total td {{ font-weight: 600; }}
.bar {{ display: inline-block; width: 4rem; height: 0.5rem; border-radius: 4px; background: {RULE}; }}
.bar i {{ display: block; height: 100%; border-radius: 4px; background: {ACCENT}; }}
.sheet img {{ width: 8rem; height: 8rem; object-fit: contain; border-radius: 4px; display: block; }}
img.pixels {{ image-rendering: pixelated; }}
.sheet td {{ vertical-align: middle; padding: 0.6rem 1rem 0.6rem 0; }}
code {{ font: 0.9em/1.4 ui-monospace, monospace; background: #f5f6f8; padding: 0.1em 0.35em; border-radius: 4px; }}
"""


def write_page(path: Path, title: str, parts: Iterable[str], style: str = "") -> None:
    """Write a page.

    Args:
        path: of the file.
        title: of the page, which is its heading too.
        parts: of its body, HTML each.
        style: CSS beside `STYLE`.
    """
    body = "\n".join((f"<h1>{html.escape(title)}</h1>", *parts))
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    page += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    path.write_text(f"{page}\n<style>{STYLE}{style}</style>\n<main>\n{body}\n</main></html>\n", encoding="utf-8")


def summary(entries: Sequence[tuple[str, str, str]]) -> str:
    """The few figures at the top: value, what it is, a remark."""
    boxes = [
        f"<div><dt class=soft>{html.escape(name)}</dt><dd class=value>{html.escape(value)}</dd>"
        f"<dd class=soft>{html.escape(remark)}</dd></div>"
        for value, name, remark in entries
    ]
    return f"<dl class=summary>{''.join(boxes)}</dl>"


def facts(entries: Mapping[str, str]) -> str:
    """Names and what they stand for, in a table."""
    rows = (
        f"<tr><td class=soft>{html.escape(name)}</td><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in entries.items()
    )
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def in_turns(kinds: Sequence[Hashable]) -> list[int]:
    """The places of things so that each kind has its turn: the first of every kind, then the second, and so on."""
    turns = Counter[Hashable]()
    order: list[tuple[int, int]] = []
    for place, kind in enumerate(kinds):
        order.append((turns[kind], place))
        turns[kind] += 1
    return [place for _, place in sorted(order)]


def inline(picture: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) within the page: small ones as they are, larger ones as JPEG of a size that can be seen."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= _SMALL:
        image.save(buffer, "PNG")
        kind, shown = "png", " class=pixels"
    else:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=88)
        kind, shown = "jpeg", ""
    return f'<img alt=""{shown} src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
