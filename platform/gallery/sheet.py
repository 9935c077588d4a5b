"""A page of a figure: pictures and words at places in inches, from the top left."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from insightedit.platform.pages import INK, PAPER, RULE

DPI: Final = 220
FONTS: Final = ("STIXGeneral", "DejaVu Sans")
"""Both come with matplotlib, so that figures are the same everywhere; the second has what the first lacks."""
_LINE: Final = 1.22
"""Line height in font sizes."""
_ASCENT: Final = 0.82
"""From the top of a line to the foot of its letters, in font sizes."""
_POINTS: Final = 72


class Sheet:
    """A figure of a size in inches."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes in a box."""
        return self.figure.add_axes(self._box(left, top, width, height))

    def picture(self, left: float, top: float, side: float, pixels: NDArray[np.uint8]) -> None:
        """A picture (H, W, 3) in the middle of a square box; a small one is shown as the pixels it has."""
        height, width = pixels.shape[:2]
        wide, high = side * min(width / height, 1), side * min(height / width, 1)
        axes = self.axes(left + (side - wide) / 2, top + (side - high) / 2, wide, high)
        small = max(height, width) < side * DPI / 2
        axes.imshow(pixels, interpolation="nearest" if small else "antialiased", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=RULE, linewidth=0.5)

    def text(
        self, left: float, top: float, text: str, size: float, *, width: float = 0, lines: int = 0, **style: Any
    ) -> float:
        """Words below a line at `top`; returns where they end.

        Args:
            left: in inches; with `ha` given, of what that says.
            top: in inches.
            text: what they say.
            size: of the letters, in points.
            width: in inches at which lines are broken; 0 never breaks them.
            lines: the most there are; 0 for all.
            style: of matplotlib's text.
        """
        shown = wrapped(text, width, size, lines) if width else [text]
        style = {"color": INK, "va": "baseline", "family": FONTS} | style
        foot = top + _ASCENT * size / _POINTS if style["va"] == "baseline" else top
        for number, line in enumerate(shown):
            place = self._place(left, foot + number * line_height(size))
            self.figure.text(*place, line, fontsize=size, parse_math=False, **style)
        return top + len(shown) * line_height(size)

    def rule(self, left: float, top: float, width: float) -> None:
        """A thin line across."""
        axes = self.axes(left, top, width, 0.01)
        axes.axhline(0.5, color=RULE, linewidth=0.8)
        axes.set_axis_off()

    def save(self, path: Path) -> None:
        """Write it as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})

    def _box(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height

    def _place(self, left: float, top: float) -> tuple[float, float]:
        return left / self.width, 1 - top / self.height


def line_height(size: float) -> float:
    """Inches from one line of letters of a size in points to the next."""
    return _LINE * size / _POINTS


def wrapped(text: str, width: float, size: float, lines: int = 0) -> list[str]:
    """Break words into lines of a width in inches; what is beyond the last line becomes dots."""
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if found[-1] and text_width(longer, size) > width:
            found.append(word)
        else:
            found[-1] = longer
    if lines and len(found) > lines:
        last = found[lines - 1]
        while last and text_width(f"{last} ...", size) > width:
            last = last.rpartition(" ")[0]
        found = [*found[: lines - 1], f"{last} ..."]
    return found


def text_width(text: str, size: float) -> float:
    """Inches that words take, a little more than less: drawn letters stand at whole pixels."""
    return 1.03 * sum(_letter_width(letter) for letter in text) * size / _POINTS


@functools.cache
def _letter_width(letter: str) -> float:
    """The width of a letter at one point, kerning left out."""
    font = FontProperties(family=list(FONTS), size=100)
    # The path of a blank is empty, so every letter is measured between two that are not.
    both, alone = (TextPath((0, 0), text, prop=font).get_extents().width for text in (f"n{letter}n", "nn"))
    return max(both - alone, 20) / 100
