"""What people look at: sheets of edits as PNG, and a report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from insightedit.platform.evaluation import Evaluation, Figures, JudgedEdit
from insightedit.platform.judges import Failed
from insightedit.platform.pages import ACCENT, INK, PAPER, RULE, SOFT, facts, in_turns, inline, summary, write_page

_CELL, _GAP, _TEXT_WIDTH = 160, 24, 260


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetRow:
    """One edit of a sheet. Pictures are uint8 (H, W, 3)."""

    source: NDArray[np.uint8]
    instruction: str
    edit: NDArray[np.uint8]
    target: NDArray[np.uint8] | None
    note: str
    """A short line below the instruction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One figure over the steps of a stage."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The content of `report.html`."""

    title: str
    summary: Sequence[tuple[str, str, str]]
    """The few figures at the top: value, what it is, a remark."""
    curves: Mapping[str, Sequence[Curve]]
    """The losses of each stage by its heading."""
    evaluation: Evaluation
    sheet: Sequence[SheetRow]
    facts: Mapping[str, str]
    """Where it came from and what to type next."""


def sheet_rows(judged: Sequence[JudgedEdit], count: int) -> list[SheetRow]:
    """A sheet's rows: edits of every task and both wordings in turn, the first of each, good or bad."""
    order = in_turns([(one.case.task, one.case.wording) for one in judged])
    return [_sheet_row(judged[place]) for place in order[:count]]


def write_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Draw rows of source | instruction | edit | target as a PNG file, pictures enlarged without smoothing."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    height = _GAP + 24 + len(rows) * (_CELL + _GAP)
    sheet = Image.new("RGB", (3 * _CELL + _TEXT_WIDTH + 5 * _GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = (_GAP, 2 * _GAP + _CELL, 3 * _GAP + _CELL + _TEXT_WIDTH, 4 * _GAP + 2 * _CELL + _TEXT_WIDTH)
    for left, heading in zip(lefts, ("source", "instruction", "edit", "target"), strict=True):
        draw.text((left, _GAP - 8), heading, fill=SOFT, font=small)
    for number, row in enumerate(rows):
        top = _GAP + 24 + number * (_CELL + _GAP)
        for left, picture in zip((lefts[0], *lefts[2:]), (row.source, row.edit, row.target), strict=True):
            if picture is not None:
                sheet.paste(enlarged(picture, _CELL), (left, top))
        text = textwrap.fill(row.instruction, 28)
        draw.multiline_text((lefts[1], top + 8), text, fill=INK, font=font, spacing=6)
        note = textwrap.fill(row.note, 38)
        draw.multiline_text((lefts[1], top + _CELL - 6), note, fill=SOFT, font=small, anchor="ld")
    sheet.save(path, optimize=True)


def write_report(path: Path, report: Report) -> None:
    """Write a report as one self-contained HTML file."""
    parts = [
        summary(report.summary),
        "<h2>Training</h2>",
        *(_stage_curves(heading, curves) for heading, curves in report.curves.items()),
        "<h2>Evaluation</h2>",
        _evaluation_tables(report.evaluation),
        "<h2>Held-out edits</h2><p class=soft>The first of every kind of edit, good or bad.</p>",
        _sheet_table(report.sheet),
        "<h2>Where this comes from</h2>",
        facts(report.facts),
    ]
    write_page(path, report.title, parts)


def _sheet_row(one: JudgedEdit) -> SheetRow:
    unseen = f", unseen {' and '.join(one.case.held_out)}" if one.case.held_out else ""
    verdict = one.verdict
    if isinstance(verdict, Failed):
        note = "no edit was made" if verdict.reason == "no_edit" else f"not judged: {verdict.reason}"
    else:
        note = f"S_i {verdict.instruction_adherence.value}, S_n {verdict.non_overediting.value}{unseen}"
    return SheetRow(
        source=one.case.source,
        instruction=one.case.instruction,
        edit=one.edit,
        target=one.case.target,
        note=note,
    )


def enlarged(picture: NDArray[np.uint8], cell: int) -> Image.Image:
    """A picture fitted into a cell: whole multiples where it is smaller, so that its pixels stay square."""
    image = Image.fromarray(picture)
    side = max(image.size)
    if side > cell:
        return image.resize((image.width * cell // side, image.height * cell // side), Image.Resampling.LANCZOS)
    times = cell // side
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _stage_curves(heading: str, curves: Sequence[Curve]) -> str:
    images = [
        f'<img alt="{html.escape(curve.name)} over steps" src="data:image/svg+xml;base64,{_curve_svg(curve)}">'
        for curve in curves
    ]
    return f"<h3>{html.escape(heading)}</h3><div class=curves>{''.join(images)}</div>"


def _curve_svg(curve: Curve) -> str:
    """A curve as base64 of an SVG, on a logarithmic axis where it falls by more than a factor of ten."""
    figure = Figure(figsize=(3.6, 2.1), layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.plot(list(curve.steps), list(curve.values), color=ACCENT, linewidth=1.4)
    positive = min(curve.values, default=0.0) > 0
    if positive and max(curve.values) > 10 * min(curve.values):
        axes.set_yscale("log")
    axes.set_title(curve.name, loc="left", fontsize=10, color=INK)
    axes.tick_params(labelsize=8, colors=SOFT, length=3)
    axes.grid(visible=True, color=RULE, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _evaluation_tables(evaluation: Evaluation) -> str:
    before = {"the model before stage 1": evaluation.before_training} if evaluation.before_training else {}
    controls = {
        **before,
        "the source unchanged": evaluation.copy_baseline,
        "instructions of other scenes": evaluation.shuffled,
    }
    both = {f"{name} instructions": figures for name, figures in evaluation.wordings().items()}
    tables = (
        ("Instructions", {"all": evaluation.overall, **both}),
        ("Controls", controls),
        ("By task", evaluation.by_task),
        ("By what training never showed", evaluation.held_out),
        ("Advanced instructions by the reasoning they need", evaluation.by_form),
    )
    return f"<div class=tables>{''.join(_figures_table(name, rows) for name, rows in tables)}</div>"


def _figures_table(heading: str, rows: Mapping[str, Figures]) -> str:
    head = (
        "<tr><th></th><th class=n>edits</th><th class=n>S_i</th><th class=n>S_n</th><th class=n>VIEScore</th><th></th>"
    )
    body = "".join(_figures_row(name, figures) for name, figures in rows.items())
    return f"<section class=wide><h3>{html.escape(heading)}</h3><table>{head}</tr>{body}</table></section>"


def _figures_row(name: str, figures: Figures) -> str:
    numbers = (f"{figures.instruction:.2f}", f"{figures.non_overedit:.2f}", f"{figures.viescore:.3f}")
    cells = "".join(f"<td class=n>{number}</td>" for number in (str(figures.edits), *numbers))
    bar = f'<span class=bar><i style="width:{100 * figures.viescore:.0f}%"></i></span>'
    total = " class=total" if name == "all" else ""
    return f"<tr{total}><td>{html.escape(name.replace('_', ' '))}</td>{cells}<td>{bar}</td></tr>"


def _sheet_table(rows: Sequence[SheetRow]) -> str:
    head = "<tr><th>source</th><th>instruction</th><th>edit</th><th>target</th></tr>"
    body = "".join(
        f"<tr><td>{inline(row.source)}</td>"
        f"<td>{html.escape(row.instruction)}<br><span class=soft>{html.escape(row.note)}</span></td>"
        f"<td>{inline(row.edit)}</td><td>{'' if row.target is None else inline(row.target)}</td></tr>"
        for row in rows
    )
    return f'<div class="wide sheet"><table>{head}{body}</table></div>'
