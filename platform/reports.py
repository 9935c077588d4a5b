"""What people look at: sheets of edits as PNG, and a report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from insightedit.platform.evaluation import Evaluation, Figures, JudgedEdit, pixels_8bit
from insightedit.platform.judges import Failed

_INK, _PAPER, _SOFT, _RULE, _ACCENT = "#1d2330", "#ffffff", "#667085", "#e4e7ec", "#2f5bd8"
_CELL, _GAP, _TEXT_WIDTH = 160, 24, 260


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetRow:
    """One edit of a sheet. Pictures are uint8 (H, W, 3)."""

    source: NDArray[np.uint8]
    instruction: str
    edit: NDArray[np.uint8]
    target: NDArray[np.uint8]
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
    turns: dict[tuple[str, str], int] = {}
    order: list[tuple[int, int]] = []
    for index, one in enumerate(judged):
        kind = (one.case.task, one.case.wording)
        turns[kind] = turns.get(kind, -1) + 1
        order.append((turns[kind], index))
    # The second turn of a kind comes after the first turn of every other.
    chosen = [judged[index] for _, index in sorted(order)[:count]]
    return [_sheet_row(one) for one in chosen]


def write_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Draw rows of source | instruction | edit | target as a PNG file, pictures enlarged without smoothing."""
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    height = _GAP + 24 + len(rows) * (_CELL + _GAP)
    sheet = Image.new("RGB", (3 * _CELL + _TEXT_WIDTH + 5 * _GAP, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = (_GAP, 2 * _GAP + _CELL, 3 * _GAP + _CELL + _TEXT_WIDTH, 4 * _GAP + 2 * _CELL + _TEXT_WIDTH)
    for left, heading in zip(lefts, ("source", "instruction", "edit", "target"), strict=True):
        draw.text((left, _GAP - 8), heading, fill=_SOFT, font=small)
    for number, row in enumerate(rows):
        top = _GAP + 24 + number * (_CELL + _GAP)
        for left, picture in zip((lefts[0], *lefts[2:]), (row.source, row.edit, row.target), strict=True):
            sheet.paste(_enlarged(picture), (left, top))
        text = textwrap.fill(row.instruction, 28)
        draw.multiline_text((lefts[1], top + 8), text, fill=_INK, font=font, spacing=6)
        draw.text((lefts[1], top + _CELL - 24), row.note, fill=_SOFT, font=small)
    sheet.save(path, optimize=True)


def write_report(path: Path, report: Report) -> None:
    """Write a report as one self-contained HTML file."""
    parts = [
        f"<h1>{html.escape(report.title)}</h1>",
        _summary(report.summary),
        "<h2>Training</h2>",
        *(_stage_curves(heading, curves) for heading, curves in report.curves.items()),
        "<h2>Evaluation</h2>",
        _evaluation_tables(report.evaluation),
        "<h2>Held-out edits</h2><p class=soft>The first of every kind of edit, good or bad.</p>",
        _sheet_table(report.sheet),
        "<h2>Where this comes from</h2>",
        _facts(report.facts),
    ]
    write_page(path, report.title, parts)


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write pieces of HTML as one page in the reports' style."""
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    page += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    path.write_text(f"{page}\n<style>{_STYLE}</style>\n<main>\n{body}\n</main></html>\n", encoding="utf-8")


_STYLE = f"""
body {{ margin: 0; background: {_PAPER}; color: {_INK}; font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.5rem; letter-spacing: -0.01em; }}
h2 {{ font-size: 1.25rem; margin: 3rem 0 0.75rem; border-top: 1px solid {_RULE}; padding-top: 1.5rem; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 0.5rem; }}
.soft, .soft td {{ color: {_SOFT}; }}
.summary {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 1rem; margin: 0; }}
.summary div {{ border: 1px solid {_RULE}; border-radius: 8px; padding: 0.9rem 1rem; }}
.summary dd {{ margin: 0; }}
.summary .value {{ font-size: 1.7rem; font-weight: 600; line-height: 1.2; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }}
.curves img {{ width: 100%; }}
.tables {{ columns: 2 26rem; column-gap: 2.5rem; }}
.tables section {{ break-inside: avoid; padding-top: 0.1px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th {{ text-align: left; font-weight: 500; color: {_SOFT}; font-size: 0.85rem; }}
th, td {{ border-bottom: 1px solid {_RULE}; padding: 0.35rem 0.75rem 0.35rem 0; vertical-align: top; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
tr.total td {{ font-weight: 600; }}
.bar {{ display: inline-block; width: 4rem; height: 0.5rem; border-radius: 4px; background: {_RULE}; }}
.bar i {{ display: block; height: 100%; border-radius: 4px; background: {_ACCENT}; }}
.sheet img {{ width: 8rem; height: 8rem; image-rendering: pixelated; border-radius: 4px; display: block; }}
.sheet td {{ vertical-align: middle; padding: 0.6rem 1rem 0.6rem 0; }}
code {{ font: 0.9em/1.4 ui-monospace, monospace; background: #f5f6f8; padding: 0.1em 0.35em; border-radius: 4px; }}
"""


def _sheet_row(one: JudgedEdit) -> SheetRow:
    unseen = f", unseen {' and '.join(one.case.held_out)}" if one.case.held_out else ""
    verdict = one.verdict
    if isinstance(verdict, Failed):
        note = f"not judged: {verdict.reason}"
    else:
        note = f"S_i {verdict.instruction_adherence.value}, S_n {verdict.non_overediting.value}{unseen}"
    return SheetRow(
        source=one.case.source,
        instruction=one.case.instruction,
        edit=pixels_8bit(one.edit),
        target=one.case.target,
        note=note,
    )


def _enlarged(picture: NDArray[np.uint8]) -> Image.Image:
    """A picture fitted into a cell: whole multiples where it is smaller, so that its pixels stay square."""
    image = Image.fromarray(picture)
    side = max(image.size)
    if side > _CELL:
        return image.resize((image.width * _CELL // side, image.height * _CELL // side), Image.Resampling.LANCZOS)
    times = _CELL // side
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _summary(entries: Sequence[tuple[str, str, str]]) -> str:
    boxes = [
        f"<div><dt class=soft>{html.escape(name)}</dt><dd class=value>{html.escape(value)}</dd>"
        f"<dd class=soft>{html.escape(remark)}</dd></div>"
        for value, name, remark in entries
    ]
    return f"<dl class=summary>{''.join(boxes)}</dl>"


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
    axes.plot(list(curve.steps), list(curve.values), color=_ACCENT, linewidth=1.4)
    positive = min(curve.values, default=0.0) > 0
    if positive and max(curve.values) > 10 * min(curve.values):
        axes.set_yscale("log")
    axes.set_title(curve.name, loc="left", fontsize=10, color=_INK)
    axes.tick_params(labelsize=8, colors=_SOFT, length=3)
    axes.grid(visible=True, color=_RULE, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_RULE)
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
    both = {"simple instructions": evaluation.simple, "advanced instructions": evaluation.advanced}
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
        f"<tr><td>{_inline(row.source)}</td>"
        f"<td>{html.escape(row.instruction)}<br><span class=soft>{html.escape(row.note)}</span></td>"
        f"<td>{_inline(row.edit)}</td><td>{_inline(row.target)}</td></tr>"
        for row in rows
    )
    return f'<div class="wide sheet"><table>{head}{body}</table></div>'


def _inline(picture: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _facts(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td class=soft>{html.escape(k)}</td><td><code>{html.escape(v)}</code></td></tr>" for k, v in facts.items()
    )
    return f"<div class=wide><table>{''.join(rows)}</table></div>"
