"""Figures S1 to S4 of the paper's supplement, for whatever datasets there are, as PNG files for a paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from insightedit.platform.gallery.sheet import FONTS, Sheet, line_height, wrapped
from insightedit.platform.gallery.tables import DatasetFigures, Pair
from insightedit.platform.gallery.wording import Kind
from insightedit.platform.judges import TOP_SCORE, Aspect, Score
from insightedit.platform.pages import ACCENT, INK, PAPER, RULE, SOFT
from insightedit.platform.records import decode_image

WIDTH: Final = 7.2
"""Inches across, as two columns of a paper are wide."""
SLICES: Final = 24
"""Keywords of a pie that have a slice of their own."""
_LEAST: Final = 0.008
"""The share that a slice of its own needs."""
_COLOURS: Final = ("#27408b", "#3a7ca5", "#5aa9a0", "#8fbf7f", "#e3c567", "#e79f5b", "#d9695f", "#a14d79", "#6b4b8a")
_GAP: Final = 0.08
_SAID: Final = 8.0
"""Points of instructions."""
_INDENT: Final = 0.56
"""Inches that their names take."""
_KINDS: Final[tuple[Kind, ...]] = ("removal", "replacement", "addition")
"""From top to bottom."""
_ASPECTS: Final[Mapping[Aspect, str]] = {
    "instruction_adherence": "Instruction following",
    "non_overediting": "Non-overediting",
    "naturalness": "Naturalness",
    "no_artifacts": "No artifacts",
}

# -- S1: keywords -----------------------------------------------------------------------------------------------------


def draw_keywords(path: Path, counts: Mapping[str, Counter[str]]) -> None:
    """Figure S1: a pie of the keywords for each heading, one above the other."""
    there = {heading: found for heading, found in counts.items() if found}
    side, height = 3.0, 3.9
    sheet = Sheet(5.6, height * len(there))
    for number, (heading, found) in enumerate(there.items()):
        sheet.text(sheet.width / 2, number * height + 0.12, heading, 13, ha="center", weight="bold")
        said = f"{found.total():,} mentions of {len(found):,} things"
        sheet.text(sheet.width / 2, number * height + 0.36, said, 9, ha="center", color=SOFT)
        _pie(sheet.axes((sheet.width - side) / 2, number * height + 0.72, side, side), found)
    sheet.save(path)


def _pie(axes: Axes, counts: Counter[str]) -> None:
    total = counts.total()
    named = [(word, count) for word, count in counts.most_common(SLICES) if count >= _LEAST * total]
    rest, others = total - sum(count for _, count in named), len(counts) - len(named)
    ramp = LinearSegmentedColormap.from_list("keywords", _COLOURS)
    colours = [ramp(number / max(len(named) - 1, 1)) for number in range(len(named))]
    if rest:
        named.append((f"{others} more", rest))
        colours.append((0.87, 0.88, 0.9, 1.0))
    wedges = axes.pie(
        [count for _, count in named],
        colors=colours,
        startangle=90,
        counterclock=False,
        wedgeprops={"linewidth": 0.8, "edgecolor": PAPER},
    )[0]
    angles = [math.radians((wedge.theta1 + wedge.theta2) / 2) for wedge in wedges]
    labels = [f"{word}  {100 * count / total:.1f}%" for word, count in named]
    axes.set_aspect("equal")
    _label_around(axes, labels, angles)


def _label_around(axes: Axes, labels: Sequence[str], angles: Sequence[float]) -> None:
    """Words beside the slices, led to them by lines, those of a side far enough apart to be read."""
    for side in (-1, 1):
        mine = [place for place, angle in enumerate(angles) if (math.cos(angle) >= 0) == (side > 0)]
        mine.sort(key=lambda place: -math.sin(angles[place]))
        heights = _apart([1.16 * math.sin(angles[place]) for place in mine], 0.125)
        for place, height in zip(mine, heights, strict=True):
            x, y = math.cos(angles[place]), math.sin(angles[place])
            beside = side * max(abs(1.12 * x), math.sqrt(max(1.12**2 - height**2, 0)), 0.3)
            axes.plot([x, 1.06 * x, beside], [y, 1.06 * y, height], color=SOFT, linewidth=0.5, clip_on=False)
            align = "left" if side > 0 else "right"
            words: dict[str, Any] = {"fontsize": 9, "color": INK, "family": FONTS, "parse_math": False}
            axes.text(beside + side * 0.03, height, labels[place], ha=align, va="center", **words)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights from top to bottom, moved as little as it takes to have a distance between any two."""
    groups: list[tuple[float, int]] = []
    for height in heights:
        groups.append((height, 1))
        # Groups that touch become one, around the mean of where its members would be.
        while len(groups) > 1 and groups[-2][0] - groups[-1][0] < least * (groups[-2][1] + groups[-1][1]) / 2:
            (low, some), (high, others) = groups.pop(), groups.pop()
            groups.append(((low * some + high * others) / (some + others), some + others))
    return [middle + least * ((count - 1) / 2 - number) for middle, count in groups for number in range(count)]


# -- S2: examples -----------------------------------------------------------------------------------------------------


def draw_examples(path: Path, examples: Mapping[Kind, Sequence[Pair]]) -> None:
    """Figure S2: pairs of each kind in a row of their own, with the simple and the advanced instruction."""
    rows = [(kind, examples[kind]) for kind in _KINDS if examples.get(kind)]
    across = max(len(pairs) for _, pairs in rows)
    label, gap = 0.28, 0.18
    cell = (WIDTH - label - gap * (across - 1)) / across
    side = min((cell - _GAP) / 2, 1.5)
    texts = [max(_words_height(pair, cell) for pair in pairs) for _, pairs in rows]
    sheet = Sheet(WIDTH, sum(side + text + 0.3 for text in texts))
    top = 0.2
    for (kind, pairs), text in zip(rows, texts, strict=True):
        sheet.text(0.06, top + side / 2, kind.capitalize(), 11, rotation=90, va="center", weight="bold")
        for number, pair in enumerate(pairs):
            left = label + number * (cell + gap)
            if top == 0.2:
                sheet.text(left + side / 2, 0.04, "Source", 7.5, ha="center", color=SOFT)
                sheet.text(left + 1.5 * side + _GAP, 0.04, "Target", 7.5, ha="center", color=SOFT)
            sheet.picture(left, top, side, decode_image(pair.source))
            sheet.picture(left + side + _GAP, top, side, decode_image(pair.target))
            _write_words(sheet, pair, left, top + side + 0.06, cell)
        top += side + text + 0.3
    sheet.save(path)


def _worded(pair: Pair) -> list[tuple[str, str]]:
    both = (("Simple", pair.simple), ("Advanced", pair.advanced))
    return [(name, text) for name, text in both if text]


def _words_height(pair: Pair, width: float) -> float:
    lines = sum(len(wrapped(text, width - _INDENT, _SAID, 5)) for _, text in _worded(pair))
    return lines * line_height(_SAID) + 0.03 * len(_worded(pair))


def _write_words(sheet: Sheet, pair: Pair, left: float, top: float, width: float) -> None:
    """A pair's instructions, each beside its name."""
    for name, text in _worded(pair):
        sheet.text(left, top, name, _SAID, color=SOFT)
        top = sheet.text(left + _INDENT, top, text, _SAID, width=width - _INDENT, lines=5) + 0.03


# -- S3: datasets side by side ----------------------------------------------------------------------------------------


def draw_comparison(path: Path, datasets: Sequence[tuple[DatasetFigures, Sequence[Pair]]]) -> None:
    """Figure S3: a row for each dataset, its figures beside some of its pairs."""
    name_width, figures_width, gap = 1.15, 1.95, 0.16
    across = max((len(pairs) for _, pairs in datasets), default=1) or 1
    cell = (WIDTH - name_width - figures_width - gap * across) / across
    side = (cell - _GAP) / 2
    heights = [max(_row_height(one, pairs, cell, side), 1.32) for one, pairs in datasets]
    sheet = Sheet(WIDTH, sum(heights) + 0.18 * len(heights))
    top = 0.1
    for (one, pairs), height in zip(datasets, heights, strict=True):
        _name_dataset(sheet, one, top, name_width - 0.1)
        for number, pair in enumerate(pairs):
            left = name_width + number * (cell + gap)
            sheet.picture(left, top, side, decode_image(pair.source))
            sheet.picture(left + side + _GAP, top, side, decode_image(pair.target))
            quoted = f"\u201c{_most_said(pair)}\u201d"
            sheet.text(left, top + side + 0.05, quoted, 7.5, width=cell, lines=4, style="italic")
        _figure_lines(sheet, one, WIDTH - figures_width, top, figures_width)
        top += height + 0.18
        if one is not datasets[-1][0]:
            sheet.rule(0, top - 0.12, WIDTH)
    sheet.save(path)


def _row_height(one: DatasetFigures, pairs: Sequence[Pair], cell: float, side: float) -> float:
    lines = max((len(wrapped(_most_said(pair), cell, 7.5, 4)) for pair in pairs), default=0)
    return max(side + 0.05 + lines * line_height(7.5), len(figure_lines(one)) * 0.165)


def _most_said(pair: Pair) -> str:
    return pair.advanced or pair.simple


def _name_dataset(sheet: Sheet, one: DatasetFigures, top: float, width: float) -> None:
    end = sheet.text(0, top, one.name, 10.5, width=width, lines=2, weight="bold")
    tasks = ", ".join(f"{count:,} {task} records" for task, count in one.tasks.items())
    some = f" of about {one.about:,}" if one.about > one.records + one.bad else ""
    sheet.text(0, end + 0.03, f"{tasks}{some}", 7.5, width=width, lines=4, color=SOFT)


def figure_lines(one: DatasetFigures) -> list[tuple[str, str]]:
    """A dataset's figures in words, and their values."""
    outside, whole = one.outside, one.whole
    lines = [
        ("Resolution, median", f"{one.resolution[0]} x {one.resolution[1]}"),
        ("Words per instruction", f"{one.instruction_words:.1f}"),
        (f"Different words, in {one.vocabulary_of:,}", f"{one.vocabulary:,}"),
        ("With reasoning", f"{one.reasoning:.0%}"),
    ]
    for heading, means in (("outside mask", outside), ("whole picture", whole)):
        if means:
            lines.append((f"PSNR {heading}", f"{means['psnr'].mean:.1f} dB"))
        if "ssim" in means:
            lines.append((f"SSIM {heading}", f"{means['ssim'].mean:.3f}"))
    return lines


def _figure_lines(sheet: Sheet, one: DatasetFigures, left: float, top: float, width: float) -> None:
    for number, (name, value) in enumerate(figure_lines(one)):
        sheet.text(left, top + number * 0.165, name, 8, color=SOFT)
        sheet.text(left + width, top + number * 0.165, value, 8.5, ha="right", weight="bold")


# -- S4: scores -------------------------------------------------------------------------------------------------------


def draw_scores(path: Path, scored: Sequence[tuple[Pair, Mapping[Aspect, Score]]]) -> None:
    """Figure S4: pairs with the four scores, each with what the judge says."""
    side, gap = 1.2, 0.2
    left_width = 2 * side + _GAP
    words_left = left_width + gap
    words_width = WIDTH - words_left
    heights = [
        max(_scores_height(scores, words_width), side + 0.06 + _asked_height(pair, left_width))
        for pair, scores in scored
    ]
    sheet = Sheet(WIDTH, 0.1 + sum(heights) + 0.24 * len(heights))
    top = 0.1
    for number, ((pair, scores), height) in enumerate(zip(scored, heights, strict=True)):
        sheet.picture(0, top, side, decode_image(pair.source))
        sheet.picture(side + _GAP, top, side, decode_image(pair.target))
        sheet.text(0, top + side + 0.06, f"\u201c{_asked(pair)}\u201d", 8, width=left_width, lines=5, style="italic")
        _write_scores(sheet, scores, words_left, top, words_width)
        top += height + 0.24
        if number + 1 < len(scored):
            sheet.rule(0, top - 0.14, WIDTH)
    sheet.save(path)


def _asked(pair: Pair) -> str:
    return pair.simple or pair.advanced


def _asked_height(pair: Pair, width: float) -> float:
    return len(wrapped(f"''{_asked(pair)}''", width, 8, 5)) * line_height(8)


def _scores_height(scores: Mapping[Aspect, Score], width: float) -> float:
    return sum(0.2 + _said_height(score, width) for score in scores.values())


def _said_height(score: Score, width: float) -> float:
    return (len(wrapped(score.explanation, width, 7.5, 3)) * line_height(7.5) if score.explanation else 0) + 0.05


def _write_scores(sheet: Sheet, scores: Mapping[Aspect, Score], left: float, top: float, width: float) -> None:
    for aspect, name in _ASPECTS.items():
        if aspect not in scores:
            continue
        score = scores[aspect]
        sheet.text(left, top, name, 9, weight="bold")
        axes = sheet.axes(left + 1.5, top + 0.025, 0.62, 0.11)
        axes.bar(range(TOP_SCORE), [1] * TOP_SCORE, width=0.82, color=[ACCENT] * score.value + [RULE] * TOP_SCORE)
        axes.set(xlim=(-0.5, TOP_SCORE - 0.5), ylim=(0, 1))
        axes.set_axis_off()
        sheet.text(left + 2.2, top, f"{score.value} / {TOP_SCORE}", 9, weight="bold")
        if score.explanation:
            sheet.text(left, top + 0.17, score.explanation, 7.5, width=width, lines=3, color=SOFT)
        top += 0.2 + _said_height(score, width)
