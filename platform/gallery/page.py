"""The report of datasets as one HTML file: the four figures, what they say in tables, and how it is judged."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from insightedit.platform.gallery.tables import DatasetFigures
from insightedit.platform.pages import summary, write_page

_STYLE: Final = """
main { max-width: 70rem; }
p { max-width: 46rem; }
figure { margin: 0; } figure img { max-width: 100%; } figure.narrow img { max-width: 34rem; }
figcaption { margin: 0.75rem 0; max-width: 46rem; }
"""
_HOW: Final = (
    """The kind of an edit is the dataset's own name of it, or else the first verb that says it. Keywords are what
    follows the verb of a simple instruction up to the first preposition, the last word of it, singular.""",
    """An instruction counts as one with reasoning when it asks, describes a thing by a clause or by what it is for,
    compares, excludes, counts, refers to another thing's property, or leaves the thing without its name. This is a rule
    over words, the same for all datasets; where a dataset calls its instructions simple and advanced itself, the table
    says for how many of them the rule agrees.""",
    """Different words are counted in the same number of instructions of each dataset, as larger samples have more.""",
    """PSNR and SSIM compare target and source. Outside the mask, what differs was not asked for; over the whole picture
    the edit itself counts too. Pictures are compared at 512 pixels of the shorter side at most. PSNR ends at 100 dB,
    which is no difference at all.""",
)
"""How each figure is found."""


def write_gallery(
    path: Path,
    datasets: Sequence[DatasetFigures],
    keywords: Mapping[str, Counter[str]],
    figures: Mapping[str, tuple[Path, str]],
    seed: int,
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        datasets: their figures.
        keywords: how often each is said, by heading.
        figures: of each heading, the PNG file and what it shows.
        seed: of the sample.
    """
    read = sum(one.records for one in datasets)
    bad = sum(one.bad for one in datasets)
    top = [
        (f"{read:,}", "records read", f"of about {sum(one.about for one in datasets):,}, chosen with seed {seed}"),
        (f"{len(datasets)}", "datasets", ", ".join(one.name for one in datasets)),
        (f"{bad:,}", "rows that cannot be used", "see `insightedit data check`" if bad else "none"),
    ]
    parts = [
        summary(top),
        "<h2>Datasets</h2>",
        _datasets(datasets),
        *(part for heading, (file, caption) in figures.items() for part in _figure(heading, file, caption)),
        "<h2>Keywords</h2>",
        *(_keywords(heading, counts) for heading, counts in keywords.items() if counts),
        "<h2>How this is found</h2>",
        *(f"<p class=soft>{html.escape(text)}</p>" for text in _HOW),
    ]
    write_page(path, "Datasets", parts, _STYLE)


def _figure(heading: str, file: Path, caption: str) -> tuple[str, str]:
    data = base64.b64encode(file.read_bytes()).decode()
    kind = " class=narrow" if file.stem == "keywords" else ""
    image = f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
    words = f"<b>{html.escape(heading)}.</b> {html.escape(caption)}"
    return f"<h2>{html.escape(heading)}</h2>", f"<figure{kind}>{image}<figcaption>{words}</figcaption></figure>"


def _datasets(datasets: Sequence[DatasetFigures]) -> str:
    """A column for each dataset, a row for each figure."""
    rows: dict[str, list[str]] = {}
    for one in datasets:
        for name, value in _values(one).items():
            rows.setdefault(name, []).append(value)
    head = "".join(f"<th class=n>{html.escape(one.name)}</th>" for one in datasets)
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td class=n>{html.escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows.items()
    )
    return f"<div class=wide><table><tr><th></th>{head}</tr>{lines}</table></div>"


def _values(one: DatasetFigures) -> dict[str, str]:
    measured = {
        f"{name.upper()} {where}": f"{means[name].mean:.{places}f} ({means[name].pairs} pairs)"
        if name in means
        else "-"
        for where, means in (("outside the mask", one.outside), ("over the whole picture", one.whole))
        for name, places in (("psnr", 1), ("ssim", 3))
    }
    return {
        "records read": f"{one.records:,} of about {max(one.about, one.records + one.bad):,}",
        "rows that cannot be used": f"{one.bad:,}",
        "edits by kind": _listed(one.kinds),
        "median resolution": f"{one.resolution[0]} x {one.resolution[1]}",
        "smallest and largest": f"{one.smallest[0]} x {one.smallest[1]}, {one.largest[0]} x {one.largest[1]}",
        "words per instruction": f"{one.instruction_words:.1f}",
        "by wording": ", ".join(f"{name} {value:.1f}" for name, value in one.words_by_wording.items()) or "-",
        "different words": f"{one.vocabulary:,} in {one.vocabulary_of:,} instructions",
        "instructions with reasoning": f"{one.reasoning:.1%}",
        "called advanced by the dataset": "-" if one.labelled is None else f"{one.labelled:.1%}",
        "the rule agrees with that for": "-" if one.agreement is None else f"{one.agreement:.1%}",
        "signs of reasoning": _listed(one.signs),
        **measured,
    }


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "-"


def _keywords(heading: str, counts: Counter[str]) -> str:
    words = ", ".join(f"{word} {count:,}" for word, count in counts.most_common(200))
    return f"<h3>{html.escape(heading)}</h3><p class=soft>{html.escape(words)}</p>"
