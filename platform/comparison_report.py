"""A comparison for people: tables as text, Markdown and HTML, and sheets of every method's edits as in figure S6."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from insightedit.platform.intervals import Estimate
from insightedit.platform.method_comparison import Answer, Difference, MethodComparison, MethodFigures, lower_is_better
from insightedit.platform.pages import BAD, GOOD, INK, PAPER, SOFT, facts, inline, write_page
from insightedit.platform.reports import enlarged

Picture = NDArray[np.uint8]

COLUMNS: Final = (
    ("viescore", "simple", "VIEScore, simple"),
    ("viescore", "advanced", "VIEScore, advanced"),
    ("instruction_adherence", "simple", "S_i, simple"),
    ("instruction_adherence", "advanced", "S_i, advanced"),
    ("non_overediting", "all", "S_n"),
    ("psnr", "all", "PSNR, dB"),
    ("ssim", "all", "SSIM"),
    ("lpips", "all", "LPIPS"),
)
"""Of the table: measure, wording and heading."""
NAMES: Final = {
    "viescore": "VIEScore",
    "instruction_adherence": "S_i",
    "non_overediting": "S_n",
    "psnr": "background PSNR",
    "ssim": "background SSIM",
    "lpips": "background LPIPS",
}
_CELL, _GAP, _HEAD, _LINE, _CAPTION = 128, 10, 54, 20, 54
_STYLE: Final = f"""
small {{ display: block; color: {SOFT}; white-space: nowrap; }}
td.better {{ color: {GOOD}; }} td.worse {{ color: {BAD}; }}
.sheet img {{ width: 6rem; height: 6rem; image-rendering: pixelated; }}
main {{ max-width: 84rem; }}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetCase:
    """One case with what every method made of it. Pictures are uint8 (H, W, 3)."""

    instruction: str
    note: str
    source: Picture
    edits: Mapping[str, Picture]
    """By a method's title."""
    target: Picture | None


def table_rows(comparison: MethodComparison) -> list[list[str]]:
    """The table as text, its heading first."""
    columns = _columns(comparison)
    rows = [["METHOD", "SEEDS", *(heading.upper() for _, _, heading in columns)]]
    for one in comparison.methods.values():
        cells = [_cell(one, measure, wording) for measure, wording, _ in columns]
        rows.append([one.trained.title, str(len(one.trained.seeds)), *cells])
    return rows


def answer_lines(comparison: MethodComparison) -> Iterable[str]:
    """The questions with their answers and the differences behind them."""
    for answer in comparison.answers:
        yield f"{answer.question.ask} {answer.said}"
        yield from (f"  {_sentence(comparison, answer, one)}" for one in answer.differences)


def write_markdown(path: Path, comparison: MethodComparison) -> None:
    """Write table and answers as Markdown."""
    head, *rows = table_rows(comparison)
    lines = [f"# {comparison.name}: methods compared", "", *_remarks(comparison), ""]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    for answer in comparison.answers:
        lines += ["", f"**{answer.question.ask}** {answer.said}", ""]
        lines += [f"- {_sentence(comparison, answer, one)}" for one in answer.differences]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_comparison_page(
    path: Path, comparison: MethodComparison, sheet: Sequence[SheetCase], entries: Mapping[str, str]
) -> None:
    """Write the comparison as one HTML file with every picture within.

    Args:
        path: of the file.
        comparison: its figures.
        sheet: cases to show.
        entries: where it comes from.
    """
    parts = [
        *(f"<p class=soft>{html.escape(remark)}</p>" for remark in _remarks(comparison)),
        _table_html(comparison),
        "<h2>Questions</h2>",
        *(_answer_html(comparison, answer) for answer in comparison.answers),
        "<h2>Edits</h2><p class=soft>The first of every kind of edit with its advanced instruction, good or bad.</p>",
        _sheet_html(sheet),
        "<h2>Where this comes from</h2>",
        facts(entries),
    ]
    write_page(path, f"{comparison.name}: methods compared", parts, _STYLE)


def write_comparison_sheet(path: Path, cases: Sequence[SheetCase]) -> None:
    """Draw rows of source | each method | target as a PNG file, the instruction above each row."""
    heads = ["source", *(cases[0].edits if cases else ()), "target"]
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    row_height = _LINE + _CELL + 2 * _GAP
    width = len(heads) * (_CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEAD + _GAP + len(cases) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.multiline_text((_GAP + column * (_CELL + _GAP), _GAP), textwrap.fill(head, 20), fill=SOFT, font=small)
    for number, case in enumerate(cases):
        top = _HEAD + _GAP + number * row_height
        draw.text((_GAP, top), f'"{case.instruction}"', fill=INK, font=font)
        for column, picture in enumerate((case.source, *case.edits.values(), case.target)):
            if picture is not None:
                sheet.paste(enlarged(picture, _CELL), (_GAP + column * (_CELL + _GAP), top + _LINE))
    sheet.save(path, optimize=True)


def write_showcase(path: Path, groups: Mapping[str, Sequence[SheetCase]]) -> None:
    """Draw one method's edits, as figure S5: a column for each task, source and edit below the instruction.

    Args:
        path: of the PNG file.
        groups: cases by task, each with the edit of one method.
    """
    font, small = ImageFont.load_default(13), ImageFont.load_default(12)
    width, height = 2 * _CELL + 3 * _GAP, _CELL + _CAPTION + 2 * _GAP
    rows = max((len(cases) for cases in groups.values()), default=0)
    sheet = Image.new("RGB", (len(groups) * width + _GAP, _HEAD + rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (task, cases) in enumerate(groups.items()):
        left = _GAP + column * width
        draw.text((left, _GAP), f"{task}: source and edit", fill=SOFT, font=small)
        for row, case in enumerate(cases):
            top = _HEAD + row * height
            draw.multiline_text((left, top), textwrap.fill(f'"{case.instruction}"', 42), fill=INK, font=font, spacing=2)
            for place, picture in enumerate((case.source, *case.edits.values())):
                sheet.paste(enlarged(picture, _CELL), (left + place * (_CELL + _GAP), top + _CAPTION))
    sheet.save(path, optimize=True)


def _columns(comparison: MethodComparison) -> list[tuple[str, str, str]]:
    """The columns that any method has a figure for."""
    return [
        (measure, wording, heading)
        for measure, wording, heading in COLUMNS
        if any(wording in one.figures.get(measure, {}) for one in comparison.methods.values())
    ]


def _cell(one: MethodFigures, measure: str, wording: str) -> str:
    found = one.figures.get(measure, {}).get(wording)
    return "-" if found is None else f"{_number(found.mean, measure)} ({_ends(found, measure)})"


def _number(value: float, measure: str, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if measure in ("viescore", "ssim", "lpips") else f"{value:{sign}.2f}"


def _ends(found: Estimate, measure: str, sign: str = "") -> str:
    if found.interval is None:
        return "one scene"
    return " to ".join(_number(end, measure, sign) for end in found.interval)


def _sentence(comparison: MethodComparison, answer: Answer, one: Difference) -> str:
    """One difference in words."""
    wording = "" if answer.question.wording == "all" else f" on {answer.question.wording} instructions"
    less = ", less is better" if lower_is_better(one.measure) else ""
    found = one.estimate
    return (
        f"{NAMES.get(one.measure, one.measure)}{wording} against {comparison.methods[one.against].trained.title}:"
        f" {_number(found.mean, one.measure, '+')} ({_ends(found, one.measure, '+')}{less}): {one.verdict}"
    )


def _remarks(comparison: MethodComparison) -> list[str]:
    """What has to be known to read the table."""
    samples = {one.trained.samples for one in comparison.methods.values() if one.trained.samples is not None}
    given = f" Each training had {min(samples):,} samples." if len(samples) == 1 else ""
    where = f"{comparison.scenes} held-out scenes, two instructions each, judged by {comparison.judge.split()[0]}."
    remarks = [f"{where}{given} In brackets: 95% intervals, by the bootstrap over scenes and seeds."]
    if comparison.one_seed:
        remarks.append(
            "There is one seed: the intervals are over scenes alone, and do not say what another training would give."
        )
    if comparison.pending:
        remarks.append(f"Not done yet: {', '.join(comparison.pending)}.")
    return remarks


def _table_html(comparison: MethodComparison) -> str:
    columns = _columns(comparison)
    head = "".join(f"<th class=n>{html.escape(heading)}</th>" for _, _, heading in columns)
    lines: list[str] = []
    for one in comparison.methods.values():
        cells = "".join(f"<td class=n>{_cell_html(one, measure, wording)}</td>" for measure, wording, _ in columns)
        minutes = "" if one.trained.seconds is None else f"{one.trained.seconds / 60:.1f} min"
        title = f"{html.escape(one.trained.title)}<small>{minutes}</small>"
        lines.append(f"<tr><td>{title}</td><td class=n>{len(one.trained.seeds)}</td>{cells}</tr>")
    return f"<div class=wide><table><tr><th></th><th class=n>seeds</th>{head}</tr>{''.join(lines)}</table></div>"


def _cell_html(one: MethodFigures, measure: str, wording: str) -> str:
    found = one.figures.get(measure, {}).get(wording)
    return "&ndash;" if found is None else f"{_number(found.mean, measure)}<small>{_ends(found, measure)}</small>"


def _answer_html(comparison: MethodComparison, answer: Answer) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(NAMES.get(one.measure, one.measure))}</td>"
        f"<td>{html.escape(comparison.methods[one.against].trained.title)}</td>"
        f"<td class=n>{_number(one.estimate.mean, one.measure, '+')}"
        f"<small>{_ends(one.estimate, one.measure, '+')}</small></td>"
        f'<td class="{one.verdict.split()[0]}">{one.verdict}</td></tr>'
        for one in answer.differences
    )
    wording = "" if answer.question.wording == "all" else f" ({answer.question.wording} instructions)"
    head = f"<h3>{html.escape(answer.question.ask)}</h3><p>{html.escape(answer.said)}</p>"
    names = f"<tr><th>{wording}</th><th>against</th><th class=n>difference</th><th></th></tr>"
    return f"{head}<div class=wide><table>{names}{lines}</table></div>"


def _sheet_html(cases: Sequence[SheetCase]) -> str:
    heads = ["source", *(cases[0].edits if cases else ()), "target"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    rows: list[str] = []
    for case in cases:
        shown = (case.source, *case.edits.values(), case.target)
        pictures = "".join(f"<td>{'' if one is None else inline(one)}</td>" for one in shown)
        said = f"{html.escape(case.instruction)} <span class=soft>{html.escape(case.note)}</span>"
        rows.append(f"<tr><td colspan={len(heads)}>{said}</td></tr><tr>{pictures}</tr>")
    return f'<div class="wide sheet"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
