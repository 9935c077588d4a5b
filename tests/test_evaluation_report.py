"""The page of an evaluation, and the intervals on it."""

from __future__ import annotations

import html.parser
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from empty_registry import make_workdir

from insightedit.jobs.evaluate import EvaluationResult, Progress, evaluate
from insightedit.platform.config import EvaluationConfig, RunConfig, load_preset
from insightedit.platform.evaluation import EditCase, Pixels, unit_range
from insightedit.platform.evaluation_report import EvaluationPage, write_evaluation_report
from insightedit.platform.intervals import estimate
from insightedit.platform.registry import CHAMPION, ModelVersion, Registry
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

SCENES = 12


# -- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(3, 2, 400)
    found = estimate(values.tolist(), [f"s{number}" for number in range(400)])
    assert (found.mean, found.cases, found.scenes) == (pytest.approx(values.mean()), 400, 400)
    assert found.interval is not None
    low, high = found.interval
    expected = 1.96 * values.std() / math.sqrt(400)
    assert high - found.mean == pytest.approx(expected, rel=0.1)
    assert found.mean - low == pytest.approx(expected, rel=0.1)
    assert estimate(values.tolist(), [f"s{number}" for number in range(400)]) == found


def test_cases_of_one_scene_are_drawn_together() -> None:
    """A second case that repeats the first of its scene adds nothing, so the interval stays as wide as it was."""
    rng = np.random.default_rng(2)
    values, scenes = rng.normal(0, 1, 100).tolist(), [str(number) for number in range(100)]
    once = estimate(values, scenes)
    assert estimate(values * 2, scenes * 2).interval == pytest.approx(once.interval)
    apart = estimate(values * 2, [str(number) for number in range(200)]).interval
    assert apart is not None
    assert once.interval is not None
    assert apart[1] - apart[0] < 0.8 * (once.interval[1] - once.interval[0])
    assert estimate(values, ["one"] * 100).interval is None


def test_scenes_of_different_sizes_weigh_by_their_cases() -> None:
    found = estimate([0, 0, 0, 1], ["large", "large", "large", "small"])
    assert found.mean == 0.25
    assert found.interval == (0.0, 1.0), "either scene may be drawn twice"


# -- the page ---------------------------------------------------------------------------------------------------------


class Halfway:
    """Goes a share of the way from source to target, another one for each case in turn."""

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Pixels]:
        return [self._one(number, case) for number, case in enumerate(cases)]

    def _one(self, number: int, case: EditCase) -> Pixels:
        assert case.target is not None
        source, target = unit_range(case.source), unit_range(case.target)
        return (source + np.float32(self._shares[number % len(self._shares)]) * (target - source)).clip(0, 1)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_preset("nano").model_copy(update={"evaluation": EvaluationConfig(scenes=SCENES)})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    return make_workdir(tmp_path_factory.mktemp("report") / "work")


def _register(workdir: Workdir, folder: Path) -> ModelVersion:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(f'{{"_class_name": "{folder.name}"}}')
    registry = Registry(workdir)
    run = registry.client.create_run(ensure_experiment(registry.client, workdir))
    return registry.register(folder, run.info.run_id)


@pytest.fixture(scope="module")
def compared(config: RunConfig, workdir: Workdir, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    """A version that is better on most cases and worse on some, beside a champion that was judged on the same ones."""
    folder = tmp_path_factory.mktemp("versions")
    first = _register(workdir, folder / "first")
    evaluate(first, config, workdir, editor=Halfway([0.51]))
    Registry(workdir).promote(first.version)
    second = _register(workdir, folder / "second")
    return evaluate(second, config, workdir, editor=Halfway([1.0, 1.0, 1.0, 1.0, 0.0]))


class _Text(html.parser.HTMLParser):
    """What a reader sees, and what the page would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]
        assert tag != "script"


def _read(path: Path) -> _Text:
    return _Text(path.read_text(encoding="utf-8"))


def test_the_page_compares_with_the_champion_case_by_case(compared: EvaluationResult, workdir: Workdir) -> None:
    page = _read(compared.report)
    text = " ".join(page.words)
    assert compared.report.parent == workdir.reports
    # 24 cases: 19 or 20 of them 0.2 better, the others 0.3 worse.
    worse = sum(number % 5 == 4 for number in range(2 * SCENES))
    gain = ((2 * SCENES - worse) * 0.2 - worse * 0.3) / (2 * SCENES)
    assert f"{2 * SCENES - worse} better, {worse} worse, 0 the same" in re.sub(r"\s+", " ", text)
    assert f"{gain:+.3f}" in page.words
    assert "Gained most" in page.words
    assert "Lost most" in page.words
    assert "version 1" in page.words, "the champion's edits are shown beside"
    assert any("better: +0." in word for word in page.words), "an interval above 0 is said to be better"
    kept = Registry(workdir).client.download_artifacts(compared.run_id, "report.html")
    assert Path(kept).read_bytes() == compared.report.read_bytes()


def test_the_page_needs_nothing_beside_it(compared: EvaluationResult) -> None:
    page = _read(compared.report)
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert len(compared.report.read_bytes()) < 3_000_000


def test_scores_stand_with_intervals_and_the_judges_words(compared: EvaluationResult) -> None:
    page = _read(compared.report)
    rows = compared.judged
    scores = [getattr(one.verdict, "viescore", math.nan) for one in rows]
    found = estimate(scores, [one.case.scene for one in rows])
    assert found.interval is not None
    assert " to ".join(f"{end:.3f}" for end in found.interval) in page.words
    for word in ("simple", "advanced", "remove", "recolour", "combination", "naturalness", "SSIM"):
        assert any(word in one for one in page.words), word
    assert any("No weights: set evaluation.metrics.lpips" in word for word in page.words)
    assert any("of the way from the source to what was asked for" in word for word in page.words)


def test_without_a_champion_of_the_same_cases_the_page_says_what_to_do(
    config: RunConfig, compared: EvaluationResult, workdir: Workdir, tmp_path: Path
) -> None:
    other = config.model_copy(update={"evaluation": EvaluationConfig(scenes=3)})
    result = evaluate(tmp_path / "a <b> folder", other, workdir, editor=Halfway([0.9]))
    text = " ".join(_read(result.report).words)
    assert "The champion, version 1, was not judged on these cases: run `insightedit evaluate 1`" in text
    assert "Evaluation of a <b> folder" in text
    own = evaluate(Registry(workdir).resolve(CHAMPION), other, workdir, editor=Halfway([0.9]))
    assert "This is the champion itself." in " ".join(_read(own.report).words)
    alone = make_workdir(tmp_path / "alone")
    first = evaluate(tmp_path / "folder", other, alone, editor=Halfway([0.9]))
    assert "There is no champion to compare with." in " ".join(_read(first.report).words)


def test_what_an_instruction_says_is_never_markup(compared: EvaluationResult, tmp_path: Path) -> None:
    hostile = "<script>alert('&')</script>"
    judged = [replace(one, case=replace(one.case, instruction=hostile)) for one in compared.judged]
    page = EvaluationPage(
        name=hostile, evaluation=compared.evaluation, judged=judged, champion=None, without_champion="", facts={}
    )
    write_evaluation_report(tmp_path / "page.html", page)
    assert hostile in _read(tmp_path / "page.html").words
