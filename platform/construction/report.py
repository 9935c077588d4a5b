"""The report of a construction: figures as JSON, a list of what was turned down, pictures of every step, a page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.construction.counts import Counts, StepCounts, count
from insightedit.platform.construction.output import read_photos, read_sample
from insightedit.platform.construction.photos import Photo
from insightedit.platform.construction.precision import precision_of
from insightedit.platform.construction.sheet import write_steps
from insightedit.platform.journals import append_entry, read_entries
from insightedit.platform.pages import write_page
from insightedit.platform.storage import Store

REPORT: Final = "report"
"""Folder of the report in the output."""
_RUNS: Final = "runs.jsonl"
_REASONS: Final = 6


def note_run(out: Path, seconds: float, blocks: int) -> None:
    """Write down how long a run took, so that the times of all runs are known at the end."""
    (out / REPORT).mkdir(parents=True, exist_ok=True)
    append_entry(out / REPORT / _RUNS, {"seconds": seconds, "blocks": blocks})


def write_report(out: Path, config: ConstructionConfig) -> Counts:
    """Write everything that can be said about a construction so far into its folder.

    Raises:
        NotFoundError: no block is done.
    """
    store, folder = Store.at(out), out / REPORT
    photos = list(read_photos(store))
    seconds = sum(run["seconds"] for run in read_entries(folder / _RUNS))
    counts = count(photos, seconds, precision_of(photos, store, by_truth=config.judge == "shapes"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(counts.to_json(), indent=1) + "\n", encoding="utf-8")
    lines = (json.dumps({"photo": photo.key, **one.model_dump()}) for photo in photos for one in photo.rejections)
    (folder / "rejections.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    sample = list(read_sample(store, photos, config.sample))
    write_steps(folder / "steps.png", sample)
    _write_page(folder, counts, sample)
    return counts


def _write_page(folder: Path, counts: Counts, sample: Sequence[Photo]) -> None:
    picture = base64.b64encode((folder / "steps.png").read_bytes()).decode()
    pairs = ", ".join(f"{number} {task}" for task, number in counts.pairs.items()) or "no pairs"
    about = ", ".join(f"{number} {what}" for what, number in counts.about.items()) or "-"
    scores = ", ".join(f"{name} {value:.2f}" for name, value in counts.scores.items()) or "-"
    parts = [
        (
            f"<p>{counts.photos} pictures, {counts.photos_with_pairs} of them with pairs: {html.escape(pairs)};"
            f" {counts.pairs_per_hour:,.0f} pairs an hour. {counts.kept} of {counts.changes} edits were kept.</p>"
        ),
        (
            f"<p>{counts.simple} simple and {counts.advanced} advanced instructions, whose reasoning is about:"
            f" {html.escape(about)}.</p><p>Mean scores of what was kept: {html.escape(scores)}.</p>"
        ),
        "<h2>Steps</h2>",
        _table(("step", "pictures", "seconds each", "requests", "tokens", "turned down"), _steps(counts.steps)),
        *_truth(counts.truth),
        (
            "<h2>Every step of some pictures</h2>"
            f'<div class=wide><img alt="pictures of every step" src="data:image/png;base64,{picture}"></div>'
        ),
        "<h2>The same in words</h2>",
        *(_in_words(photo) for photo in sample),
    ]
    write_page(folder / "report.html", "Constructed pairs", parts)


def _steps(steps: Mapping[str, StepCounts]) -> Iterator[tuple[str, ...]]:
    for name, step in steps.items():
        spent = step.spent
        most = list(step.rejected.items())[:_REASONS]
        asked = (
            f"{spent.requests} ({spent.retries} again, {spent.cached} kept)" if spent.requests + spent.cached else ""
        )
        tokens = str(spent.prompt_tokens + spent.completion_tokens) if spent.requests else ""
        seconds = f"{spent.seconds / max(step.photos, 1):.3f}" if name not in ("read", "filter") else ""
        reasons = ", ".join(f"{number} {reason}" for reason, number in most)
        yield name, str(step.photos or ""), seconds, asked, tokens, reasons


def _truth(truth: Mapping[str, Mapping[str, float]]) -> list[str]:
    """How right each step was; nothing where that is not known."""
    rows = [(step, name, f"{value:.3f}") for step, figures in truth.items() for name, value in figures.items()]
    return ["<h2>Beside the truth</h2>", _table(("step", "what", "figure"), rows)] if rows else []


def _in_words(photo: Photo) -> str:
    """All that is known of a photo."""
    things = [(thing.name, thing.category, thing.caption) for thing in photo.things]
    rows = [
        (
            change.named,
            "kept" if change.kept else "out",
            "; ".join([*words.simple, *(f"{one.text} ({one.about})" for one in words.advanced)]) if words else "",
            "; ".join(f"{aspect} {one.value}: {one.explanation}" for aspect, one in (change.scores or {}).items()),
        )
        for change in photo.changes
        for words in (change.there,)
    ]
    out = [(one.step, one.what, one.reason, one.detail) for one in photo.rejections]
    return (
        f"<h3>{html.escape(photo.key)}</h3><p>{html.escape(photo.caption)}</p>"
        + _table(("thing", "category", "caption"), things)
        + _table(("edit", "", "instructions", "scores"), rows)
        + _table(("turned down by", "what", "reason", "detail"), out)
    )


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    """A table; nothing where there are no rows."""
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<div class=wide><table><tr>{heads}</tr>{body}</table></div>" if body else ""
