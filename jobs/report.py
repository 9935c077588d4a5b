"""`insightedit data report`: what datasets are about and how they look, as figures for a paper and a page."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ray.exceptions import RayError

from insightedit.platform.cluster import cause_of, connected
from insightedit.platform.config import DatasetConfig
from insightedit.platform.datasets.shapes_world import Scene
from insightedit.platform.errors import InsightEditError
from insightedit.platform.gallery.figures import draw_comparison, draw_examples, draw_keywords, draw_scores
from insightedit.platform.gallery.page import write_gallery
from insightedit.platform.gallery.survey import Facts, Quota, facts_of, survey
from insightedit.platform.gallery.tables import DatasetFigures, Pair, figures_of, keyword_counts, pairs_of
from insightedit.platform.gallery.wording import KINDS, Kind
from insightedit.platform.ingest import Chunk, chunk_dataset, chunks_of
from insightedit.platform.judges import ASPECTS, Aspect, Judge, MadeEdit, Score, Scores, Truth
from insightedit.platform.judges.shapes import ShapesJudge, shapes_truth
from insightedit.platform.pages import in_turns
from insightedit.platform.records import decode_image

PAGE_NAME: Final = "report.html"
FIGURES_NAME: Final = "report.json"
COMPARED: Final = 200
"""Pairs of a dataset whose pictures are compared."""
_CANDIDATES: Final = 12
"""Pairs of each kind whose pictures are taken along, about."""
_BESIDE: Final = 2
"""Pairs of a dataset beside its figures."""
_MASKED: Final = frozenset({"advancededit", "magicbrush", "pairs"})
"""Readers that hand on masks when they are asked to."""
_SCORED: Final = 4
"""Pairs that are shown with their scores."""

Progress = Callable[[str, int, int], None]
"""Is told of which dataset how many rows are read, and about how many will be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetReport:
    """A report and its files."""

    datasets: Sequence[DatasetFigures]
    keywords: Mapping[str, Mapping[str, int]]
    """How often each is said, most frequent first, by heading."""
    figures: Mapping[str, str]
    """PNG files by the figure of the paper that they are like: S1 to S4. One without anything to show is not there."""
    page: str


@dataclass(frozen=True, slots=True)
class _Surveyed:
    """What was read of a dataset."""

    figures: DatasetFigures
    facts: Sequence[Facts]
    pairs: Sequence[Pair]


def report(
    datasets: Mapping[str, DatasetConfig],
    folder: Path,
    *,
    rows: int = 2000,
    seed: int = 0,
    examples: int = 3,
    judge: Judge | None = None,
    tasks: int = 2,
    progress: Progress | None = None,
) -> DatasetReport:
    """Look at datasets, and draw what is in them.

    Args:
        datasets: reader and options by the name that the figures say.
        folder: gets the page, the figures and `report.json`.
        rows: records to read of each dataset at most, about; which ones follows from the seed.
        seed: of the sample.
        examples: pairs of each kind in figure S2.
        judge: scores pairs for figure S4 where a dataset has no scores; only pairs of known truth if None.
        tasks: tasks at a time that read.
        progress: is told how far it is.

    Raises:
        UsageError: an option or an index file is wrong.
        NotFoundError: a dataset is not there.
        InsightEditError: a dataset has no record that can be used.
    """
    with connected():
        surveyed = [_survey(name, dataset, rows, seed, tasks, progress) for name, dataset in datasets.items()]
    folder.mkdir(parents=True, exist_ok=True)
    pairs = _in_turns_of_datasets(surveyed)
    keywords = keyword_counts([fact for one in surveyed for fact in one.facts])
    drawn = _draw(folder, surveyed, keywords, pairs, examples, judge)
    figures = [one.figures for one in surveyed]
    write_gallery(folder / PAGE_NAME, figures, keywords, drawn, seed)
    found = DatasetReport(
        datasets=figures,
        keywords={heading: dict(counts.most_common()) for heading, counts in keywords.items()},
        figures={heading.partition(":")[0]: str(file) for heading, (file, _) in drawn.items()},
        page=str(folder / PAGE_NAME),
    )
    (folder / FIGURES_NAME).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return found


def _survey(
    name: str, dataset: DatasetConfig, rows: int, seed: int, tasks: int, progress: Progress | None
) -> _Surveyed:
    if dataset.reader in _MASKED:
        dataset = dataset.model_copy(update={"options": {"masks": True, **dataset.options}})
    chunks = chunks_of(dataset, seed)
    about = sum(entry.rows for chunk in chunks for entry in chunk.entries)
    wanted = _enough(chunks, rows)
    each = max(len(wanted), 1)
    quota = Quota(rows=rows, compared=-(-COMPARED // each), shown=-(-_CANDIDATES // each))
    make_table = functools.partial(survey, dataset=dataset, quota=quota, seed=seed)
    facts: list[Facts] = []
    bad = 0
    try:
        for row in chunk_dataset(dataset.reader, wanted, make_table, tasks).iter_rows() if wanted else ():
            bad += row["bad"]
            if row["facts"] is not None and len(facts) < rows:
                facts.append(facts_of(row))
            if progress is not None:
                progress(name, len(facts) + bad, min(about, rows))
    except RayError as error:
        raise InsightEditError(f"Reading {name} failed: {cause_of(error)}") from error
    if not facts:
        raise InsightEditError(f"The dataset {name} has no record that can be used; see `insightedit data check`.")
    return _Surveyed(figures_of(name, dataset.reader, facts, bad, about, seed), facts, pairs_of(facts))


def _enough(chunks: Sequence[Chunk], rows: int) -> list[Chunk]:
    """The first chunks, as many as it takes to have so many rows; their entries are in the order of the seed."""
    found: list[Chunk] = []
    for chunk in chunks:
        if sum(entry.rows for one in found for entry in one.entries) >= rows:
            break
        found.append(chunk)
    return found


# -- figures ----------------------------------------------------------------------------------------------------------


def _draw(
    folder: Path,
    surveyed: Sequence[_Surveyed],
    keywords: Mapping[str, Counter[str]],
    pairs: Sequence[Pair],
    examples: int,
    judge: Judge | None,
) -> dict[str, tuple[Path, str]]:
    """Draw the figures that there is something for; by heading, the file and what it shows."""
    drawn: dict[str, tuple[Path, str]] = {}
    if any(keywords.values()):
        draw_keywords(folder / "keywords.png", keywords)
        drawn["S1: keywords"] = (
            folder / "keywords.png",
            "Keywords in simple instructions, by how often they are said.",
        )
    chosen: dict[Kind, list[Pair]] = {kind: _chosen(pairs, kind, examples) for kind in KINDS if kind != "other"}
    if any(chosen.values()):
        draw_examples(folder / "examples.png", chosen)
        said = "Removals, replacements and additions with their instructions, of a sample, not selected by eye."
        drawn["S2: examples"] = (folder / "examples.png", said)
    draw_comparison(folder / "datasets.png", [(one.figures, _various(one.pairs)[:_BESIDE]) for one in surveyed])
    drawn["S3: datasets side by side"] = (folder / "datasets.png", "Pairs of each dataset beside its figures.")
    scored = _scored(pairs, judge)
    if scored:
        draw_scores(folder / "scores.png", scored)
        said = "VIEScore's four scores from 0 to 5, with what the judge says of each."
        drawn["S4: scores"] = (folder / "scores.png", said)
    return drawn


def _in_turns_of_datasets(surveyed: Sequence[_Surveyed]) -> list[Pair]:
    """All pairs, so that each dataset has its turn."""
    pairs = [(number, pair) for number, one in enumerate(surveyed) for pair in one.pairs]
    return [pairs[place][1] for place in in_turns([number for number, _ in pairs])]


def _chosen(pairs: Sequence[Pair], kind: Kind, count: int) -> list[Pair]:
    """Pairs of a kind; those with both instructions first, each thing once before any comes twice."""
    mine = sorted((pair for pair in pairs if pair.kind == kind), key=lambda pair: -len(pair.instructions))
    whole = [pair for pair in mine if len(pair.instructions) == 2] or mine
    return [whole[place] for place in in_turns([pair.keyword for pair in whole])][:count]


def _various(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs so that each kind has its turn, other kinds last."""
    ordered = sorted(pairs, key=lambda pair: pair.kind == "other")
    return [ordered[place] for place in in_turns([pair.kind for pair in ordered])]


def _scored(pairs: Sequence[Pair], judge: Judge | None) -> list[tuple[Pair, dict[Aspect, Score]]]:
    """Pairs with scores, each combination of them once before any comes twice."""
    known = [(pair, pair.scores) for pair in pairs if len(pair.scores) == len(ASPECTS)] or _judged(pairs, judge)
    # Those whose judge says more come first.
    known.sort(key=lambda one: -sum(bool(score.explanation) for score in one[1].values()))
    places = in_turns([tuple(score.value for score in scores.values()) for _, scores in known])
    return [known[place] for place in places[:_SCORED]]


def _judged(pairs: Sequence[Pair], judge: Judge | None) -> list[tuple[Pair, dict[Aspect, Score]]]:
    """Have some pairs judged; without a judge for all, those whose truth is known."""
    some = _various(pairs if judge is not None else [pair for pair in pairs if _truth(pair)])[:_SCORED]
    edits = [
        MadeEdit(
            source=decode_image(pair.source),
            edit=decode_image(pair.target),
            instruction=pair.instructions[0],
            truth=_truth(pair),
        )
        for pair in some
    ]
    verdicts = (judge or ShapesJudge()).judge(edits)
    return [
        (pair, {aspect: getattr(verdict, aspect) for aspect in ASPECTS})
        for pair, verdict in zip(some, verdicts, strict=True)
        if isinstance(verdict, Scores)
    ]


def _truth(pair: Pair) -> Truth | None:
    details: Mapping[str, Any] = pair.details
    if not {"scene", "target_scene"} <= details.keys():
        return None
    return shapes_truth(Scene.from_json(details["scene"]), Scene.from_json(details["target_scene"]))
