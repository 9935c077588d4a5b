"""The page of an evaluation: scores and metrics with intervals, what changed against the champion, and the edits."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.evaluation import Evaluation, Figures, JudgedEdit, case_results
from insightedit.platform.intervals import Estimate, estimate
from insightedit.platform.metrics import METRICS
from insightedit.platform.pages import ACCENT, BAD, GOOD, INK, RULE, SOFT, facts, in_turns, inline, summary, write_page
from insightedit.platform.results import SCORES, CaseResult

Picture = NDArray[np.uint8]

SHEET_ROWS: Final = 20
EXAMPLES: Final = 6
"""Cases of each list of the best, the worst, the gained and the lost."""
_SCORE_NAMES: Final = {
    "viescore": "VIEScore",
    "instruction_adherence": "S_i, instruction",
    "non_overediting": "S_n, non-overediting",
    "naturalness": "naturalness",
    "no_artifacts": "no artifacts",
}
_WIDTH: Final = 240
"""Pixels of a drawn interval."""

STYLE: Final = f"""
main {{ max-width: 74rem; }}
p {{ max-width: 46rem; }}
td.est {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td.est small {{ display: block; color: {SOFT}; font-size: 0.75rem; line-height: 1.2; font-weight: 400; }}
th.est {{ text-align: right; }}
tr.total td {{ border-bottom: 2px solid {RULE}; }}
tr.group td {{ border-bottom: 0; padding-top: 0.9rem; color: {SOFT}; font-size: 0.85rem; }}
.better {{ color: {GOOD}; }} .worse {{ color: {BAD}; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1.25rem; }}
.card {{ border: 1px solid {RULE}; border-radius: 8px; padding: 1rem; }}
.card p {{ margin: 0.5rem 0 0; }}
.card .pictures {{ display: flex; gap: 0.5rem; }}
.card figure {{ margin: 0; flex: 1; min-width: 0; }}
.card figcaption {{ font-size: 0.75rem; color: {SOFT}; }}
.card img {{ width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; display: block; }}
.card ul {{ margin: 0.5rem 0 0; padding: 0; list-style: none; font-size: 0.85rem; }}
.card li {{ margin-top: 0.35rem; }}
.score {{ display: inline-block; min-width: 1.3rem; font-weight: 600; }}
table.narrow {{ width: auto; }} table.narrow td, table.narrow th {{ padding-right: 2rem; }}
td svg {{ display: block; margin-top: 0.3rem; }}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """The champion's edits of the same cases."""

    name: str
    """As people know it: `version 2`."""
    results: Mapping[str, CaseResult]
    """By case."""
    edits: Mapping[str, Picture]
    """By case; those that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPage:
    """What the page shows."""

    name: str
    """Of what was evaluated: `version 3`, or a folder."""
    evaluation: Evaluation
    judged: Sequence[JudgedEdit]
    champion: Baseline | None
    without_champion: str
    """Why nothing is compared, where that is so."""
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Row:
    """One case with all that is known of it."""

    edit: JudgedEdit
    result: CaseResult
    before: CaseResult | None
    """The champion's."""

    @property
    def gain(self) -> float | None:
        """By how much the VIEScore is higher than the champion's."""
        mine, its = self.result.viescore, self.before.viescore if self.before else None
        return None if mine is None or its is None else mine - its


def write_evaluation_report(path: Path, page: EvaluationPage) -> None:
    """Write the page as one HTML file."""
    rows = _rows(page.judged, page.champion.results if page.champion else {})
    about = (
        f"<p class=soft>Means with 95% intervals by the bootstrap over {page.evaluation.scenes} scenes, judged by"
        f" <code>{html.escape(page.evaluation.judge)}</code>. VIEScore is from 0 to 1, the others from 0 to 5.</p>"
    )
    parts = [
        _top(page, rows),
        f"<h2>Scores</h2>{about}",
        _scores_table(rows),
        _controls(page.evaluation),
        "<h2>Against the champion</h2>",
        *_changes(page, rows),
        "<h2>Metrics</h2>",
        _metrics_table(page.evaluation, rows),
        "<h2>Best and worst</h2>",
        *_extremes(page, rows),
        *_failures(rows),
        "<h2>Side by side</h2><p class=soft>Of every task and wording in turn, the first of each, good or bad.</p>",
        _sheet(page, rows),
        "<h2>Where this comes from</h2>",
        facts(page.facts),
    ]
    write_page(path, f"Evaluation of {page.name}", parts, STYLE)


def shown_cases(judged: Sequence[JudgedEdit], champion: Mapping[str, CaseResult]) -> set[str]:
    """The cases whose pictures the page shows, beside the champion's edit."""
    rows = _rows(judged, champion)
    gained, lost = _gained_and_lost(rows)
    return {row.result.case for row in (*gained, *lost, *_sheet_rows(rows), *_best(rows), *_worst(rows))}


def _rows(judged: Sequence[JudgedEdit], champion: Mapping[str, CaseResult]) -> list[_Row]:
    results = case_results(judged)
    return [_Row(edit, result, champion.get(result.case)) for edit, result in zip(judged, results, strict=True)]


# -- the top ----------------------------------------------------------------------------------------------------------


def _top(page: EvaluationPage, rows: Sequence[_Row]) -> str:
    scores = {name: _estimate(rows, _of(name)) for name in ("viescore", "instruction_adherence", "non_overediting")}
    entries = [
        (_number(found.mean, name), _SCORE_NAMES[name], _interval_text(found, name))
        for name, found in scores.items()
        if found
    ]
    change = _estimate(rows, lambda row: row.gain)
    if page.champion and change:
        entries.append((f"{change.mean:+.3f}", f"against {page.champion.name}", _said(change)))
    failed = page.evaluation.overall.failed
    entries.append((str(len(rows) - failed), "edits judged", f"{failed} could not be" if failed else "all of them"))
    return summary(entries)


def _said(change: Estimate) -> str:
    """What an interval of a difference says."""
    if change.interval is None:
        return "one scene says nothing"
    low, high = change.interval
    verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    return f"{verdict}: {low:+.3f} to {high:+.3f}"


# -- tables -----------------------------------------------------------------------------------------------------------


def _groups(rows: Sequence[_Row]) -> dict[str, dict[str, list[_Row]]]:
    """The rows by heading and group."""
    return {
        "": {"all": list(rows)},
        "by wording": _split(rows, lambda row: (row.result.wording,)),
        "by task": _split(rows, lambda row: (row.result.task,)),
        "by what training never showed": _split(rows, lambda row: row.edit.case.held_out),
    }


def _split(rows: Iterable[_Row], names: Callable[[_Row], Iterable[str]]) -> dict[str, list[_Row]]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        for name in names(row):
            if name:
                groups.setdefault(name, []).append(row)
    # As people count: simple before advanced, tasks by name.
    return {name: groups[name] for name in sorted(groups, key=lambda name: (name != "simple", name))}


def _scores_table(rows: Sequence[_Row]) -> str:
    columns = [name for name in _SCORE_NAMES if any(_of(name)(row) is not None for row in rows)]
    head = "".join(f"<th class=est>{_SCORE_NAMES[name]}</th>" for name in columns)
    lines = _grouped_lines(rows, columns, drawn="viescore")
    return f"<div class=wide><table><tr><th></th><th class=n>edits</th>{head}<th></th></tr>{lines}</table></div>"


def _metrics_table(evaluation: Evaluation, rows: Sequence[_Row]) -> str:
    """The metrics that there are, by group, and why the others are not there."""
    columns = list(evaluation.measured)
    arrows = {"higher": "&uarr;", "lower": "&darr;"}
    head = "".join(f"<th class=est>{_metric_name(name)} {arrows[METRICS[name].better]}</th>" for name in columns)
    table = ""
    if columns:
        lines = _grouped_lines(rows, [f"metric.{name}" for name in columns])
        table = f"<div class=wide><table><tr><th></th><th class=n>edits</th>{head}</tr>{lines}</table></div>"
        meaning = "; ".join(f"{_metric_name(name)}: {METRICS[name].title}" for name in columns)
        table += f"<p class=soft>{html.escape(meaning)}.</p>"
    missing = (
        f"<li><b>{_metric_name(name)}</b> {html.escape(why)}</li>" for name, why in evaluation.unmeasured.items()
    )
    lacking = f"<p class=soft>Missing:</p><ul class=soft>{''.join(missing)}</ul>" if evaluation.unmeasured else ""
    return table + lacking


def _metric_name(name: str) -> str:
    return {"clip_score": "CLIP score", "clip_i": "CLIP-I"}.get(name, name.upper())


def _grouped_lines(rows: Sequence[_Row], columns: Sequence[str], drawn: str | None = None) -> str:
    lines: list[str] = []
    for heading, groups in _groups(rows).items():
        if heading and groups:
            lines.append(f"<tr class=group><td colspan={len(columns) + 3}>{heading}</td></tr>")
        for name, group in groups.items():
            found = {column: _estimate(group, _of(column)) for column in columns}
            cells = "".join(_cell(found[column], column) for column in columns)
            graph = f"<td>{_drawn(found[drawn])}</td>" if drawn else ""
            total = "" if heading else " class=total"
            shown = html.escape(name.replace("_", " "))
            lines.append(f"<tr{total}><td>{shown}</td><td class=n>{len(group)}</td>{cells}{graph}</tr>")
    return "".join(lines)


def _cell(found: Estimate | None, name: str) -> str:
    if found is None:
        return "<td class=est>&ndash;</td>"
    return f"<td class=est>{_number(found.mean, name)}<small>{_interval_text(found, name)}</small></td>"


def _controls(evaluation: Evaluation) -> str:
    """What an editor scores that does nothing, and one that does something else."""
    controls: dict[str, Figures] = {
        "the source unchanged": evaluation.copy_baseline,
        "edits by instructions of other scenes": evaluation.shuffled,
    }
    if evaluation.before_training:
        controls["the model before stage 1"] = evaluation.before_training
    lines = "".join(
        f"<tr><td>{name}</td><td class=n>{one.edits}</td><td class=est>{one.viescore:.3f}</td>"
        f"<td class=est>{one.instruction:.2f}</td><td class=est>{one.non_overedit:.2f}</td></tr>"
        for name, one in controls.items()
    )
    head = "<th></th><th class=n>edits</th><th class=est>VIEScore</th><th class=est>S_i</th><th class=est>S_n</th>"
    return f"<h3>Controls</h3><div class=wide><table class=narrow><tr>{head}</tr>{lines}</table></div>"


# -- the champion -----------------------------------------------------------------------------------------------------


def _changes(page: EvaluationPage, rows: Sequence[_Row]) -> list[str]:
    """Differences to the champion, case by case."""
    if page.champion is None:
        return [f"<p class=soft>{html.escape(page.without_champion)}</p>"]
    gains = [row.gain for row in rows if row.gain is not None]
    if not gains:
        return ["<p class=soft>No case has a score of both.</p>"]
    counts = f"{sum(gain > 0 for gain in gains)} better, {sum(gain < 0 for gain in gains)} worse"
    intro = (
        f"<p class=soft>VIEScore minus that of {html.escape(page.champion.name)} on the same cases and noise: {counts},"
        f" {sum(gain == 0 for gain in gains)} the same. Intervals are of the paired difference;"
        " a promotion decides by a test of its own.</p>"
    )
    gained, lost = _gained_and_lost(rows)
    parts = [intro, _changes_table(rows)]
    for heading, some in (("Gained most", gained), ("Lost most", lost)):
        if some:
            parts += [f"<h3>{heading}</h3>", _cards(page, some)]
    return parts


def _changes_table(rows: Sequence[_Row]) -> str:
    lines: list[str] = []
    most = _widest(rows)
    for heading, groups in _groups(rows).items():
        if heading and groups:
            lines.append(f"<tr class=group><td colspan=7>{heading}</td></tr>")
        for name, group in groups.items():
            change = _estimate(group, lambda row: row.gain)
            if change is None:
                continue
            gains = [row.gain for row in group if row.gain is not None]
            counts = (sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains), len(gains))
            low, high = change.interval or (0.0, 0.0)
            kind = " better" if low > 0 else " worse" if high < 0 else ""
            cells = "".join(f"<td class=n>{count}</td>" for count in counts)
            lines.append(
                f"<tr{'' if heading else ' class=total'}><td>{html.escape(name.replace('_', ' '))}</td>{cells}"
                f'<td class="est{kind}">{change.mean:+.3f}<small>{_signed(change)}</small></td>'
                f"<td>{_drawn(change, (-most, most), zero=True)}</td></tr>"
            )
    head = "<tr><th></th><th class=n>better</th><th class=n>worse</th><th class=n>of</th><th class=est>difference</th>"
    return f"<div class=wide><table>{head}<th></th></tr>{''.join(lines)}</table></div>"


def _widest(rows: Sequence[_Row]) -> float:
    """How far from 0 any interval of a difference reaches."""
    changes = [_estimate(group, lambda row: row.gain) for groups in _groups(rows).values() for group in groups.values()]
    ends = [abs(end) for change in changes if change for end in (change.mean, *(change.interval or ()))]
    return max(ends, default=0.0) or 1.0


def _gained_and_lost(rows: Sequence[_Row]) -> tuple[list[_Row], list[_Row]]:
    """The cases that changed most, the largest changes first."""
    gained = sorted((row for row in rows if (row.gain or 0) > 0), key=lambda row: -(row.gain or 0))
    lost = sorted((row for row in rows if (row.gain or 0) < 0), key=lambda row: row.gain or 0)
    return gained[:EXAMPLES], lost[:EXAMPLES]


# -- single cases -----------------------------------------------------------------------------------------------------


def _extremes(page: EvaluationPage, rows: Sequence[_Row]) -> list[str]:
    return ["<h3>Worst</h3>", _cards(page, _worst(rows)), "<h3>Best</h3>", _cards(page, _best(rows))]


def _worst(rows: Sequence[_Row]) -> list[_Row]:
    return sorted((row for row in rows if row.result.viescore is not None), key=_goodness)[:EXAMPLES]


def _best(rows: Sequence[_Row]) -> list[_Row]:
    return sorted((row for row in rows if row.result.viescore is not None), key=_goodness, reverse=True)[:EXAMPLES]


def _goodness(row: _Row) -> tuple[float, float]:
    """VIEScore, and among equals the scores of quality."""
    quality = [getattr(row.result, name) for name in ("naturalness", "no_artifacts")]
    return row.result.viescore or 0.0, float(sum(value for value in quality if value is not None))


def _cards(page: EvaluationPage, rows: Sequence[_Row]) -> str:
    return f"<div class=cards>{''.join(_card(page, row) for row in rows)}</div>"


def _card(page: EvaluationPage, row: _Row) -> str:
    """One case with its pictures and the judge's words."""
    pictures = "".join(
        f"<figure>{inline(picture)}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, picture in _pictures(page, row)
    )
    change = f", {row.gain:+.2f} against {page.champion.name}" if page.champion and row.gain is not None else ""
    kind = " ".join(filter(None, (row.result.task, row.result.wording)))
    words = "".join(
        f"<li><span class=score>{value}</span> {html.escape(_SCORE_NAMES[name])}"
        f"<span class=soft>: {html.escape(row.result.explanations.get(name, ''))}</span></li>"
        for name in SCORES
        if (value := getattr(row.result, name)) is not None
    )
    scored = "not judged" if row.result.viescore is None else f"VIEScore {row.result.viescore:.2f}{change}"
    return (
        f"<div class=card><div class=pictures>{pictures}</div><p>{html.escape(row.result.instruction)}</p>"
        f"<p class=soft>{html.escape(kind)} &middot; {html.escape(scored)}</p><ul>{words}</ul></div>"
    )


def _pictures(page: EvaluationPage, row: _Row) -> list[tuple[str, Picture]]:
    case = row.edit.case
    pictures = [("source", case.source), (page.name, row.edit.edit)]
    if page.champion and row.result.case in page.champion.edits:
        pictures.append((page.champion.name, page.champion.edits[row.result.case]))
    return pictures if case.target is None else [*pictures, ("target", case.target)]


def _failures(rows: Sequence[_Row]) -> list[str]:
    """Cases without a score, by reason."""
    reasons = Counter(row.result.failure for row in rows if row.result.failure)
    if not reasons:
        return []
    lines = (f"<tr><td class=n>{count}</td><td>{html.escape(why)}</td></tr>" for why, count in reasons.most_common(12))
    return ["<h2>Without a score</h2>", f"<div class=wide><table>{''.join(lines)}</table></div>"]


def _sheet(page: EvaluationPage, rows: Sequence[_Row]) -> str:
    lines: list[str] = []
    targets = ["target"] if any(row.edit.case.target is not None for row in rows) else []
    heads = ["source", page.name, *([page.champion.name] if page.champion else []), *targets]
    for row in _sheet_rows(rows):
        pictures = dict(_pictures(page, row))
        result = row.result
        kind = " ".join(
            filter(None, (result.task, result.wording, *(f"unseen {one}" for one in row.edit.case.held_out)))
        )
        scored = "not judged" if result.viescore is None else f"VIEScore {result.viescore:.2f}"
        cells = "".join(f"<td>{inline(pictures[name]) if name in pictures else ''}</td>" for name in heads)
        note = f"{html.escape(result.instruction)}<br><span class=soft>{html.escape(f'{kind}, {scored}')}</span>"
        lines.append(f"<tr><td>{note}</td>{cells}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("instruction", *heads))
    return f'<div class="wide sheet"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _sheet_rows(rows: Sequence[_Row]) -> list[_Row]:
    """Rows of every task and wording in turn, the first of each."""
    return [rows[index] for index in in_turns([(row.result.task, row.result.wording) for row in rows])[:SHEET_ROWS]]


# -- numbers ----------------------------------------------------------------------------------------------------------


def _of(name: str) -> Callable[[_Row], float | None]:
    """Reads a score or, after `metric.`, a metric of a row."""
    if name.startswith("metric."):
        return lambda row: row.result.metrics.get(name.removeprefix("metric."))
    return lambda row: getattr(row.result, name)


def _estimate(rows: Iterable[_Row], read: Callable[[_Row], float | None]) -> Estimate | None:
    """The mean over those rows that have a value."""
    known = [(value, row.result.scene) for row in rows if (value := read(row)) is not None]
    return estimate([value for value, _ in known], [scene for _, scene in known]) if known else None


def _number(value: float, name: str) -> str:
    metric = name.removeprefix("metric.")
    places = 2 if metric in (*SCORES, "psnr", "clip_score") else 5 if metric in ("mse", "l2") else 3
    return f"{value:.{places}f}"


def _interval_text(found: Estimate, name: str) -> str:
    if found.interval is None:
        return "one scene"
    return " to ".join(_number(end, name) for end in found.interval)


def _signed(found: Estimate) -> str:
    return "one scene" if found.interval is None else " to ".join(f"{end:+.3f}" for end in found.interval)


def _drawn(found: Estimate | None, ends: tuple[float, float] = (0.0, 1.0), *, zero: bool = False) -> str:
    """A mean as a dot on its interval, between two ends."""
    if found is None:
        return ""
    low, high = found.interval or (found.mean, found.mean)
    start, mean, stop = (
        min(max((value - ends[0]) / (ends[1] - ends[0]), 0), 1) * _WIDTH for value in (low, found.mean, high)
    )
    middle = f'<line x1="{_WIDTH / 2}" x2="{_WIDTH / 2}" y1="0" y2="16" stroke="{SOFT}" stroke-dasharray="2 2"/>'
    return (
        f'<svg width="{_WIDTH + 12}" height="16" viewBox="-6 0 {_WIDTH + 12} 16" role="img" aria-label="interval">'
        f'<line x1="0" x2="{_WIDTH}" y1="8" y2="8" stroke="{RULE}" stroke-width="2"/>{middle if zero else ""}'
        f'<line x1="{start:.1f}" x2="{stop:.1f}" y1="8" y2="8" stroke="{ACCENT}" stroke-width="5" opacity="0.45"/>'
        f'<circle cx="{mean:.1f}" cy="8" r="3.5" fill="{INK}"/></svg>'
    )
