"""The gates: the test against its exact form, and versions whose verdict is known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from judged_versions import TASKS, case_table, even_table
from pydantic import ValidationError

from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import UsageError
from insightedit.platform.gates import Pairs, Verdict, compare, decide, latency_gate, paired, sign_flip_p
from insightedit.platform.results import CaseResult

GATE = PromotionConfig()


def refused(verdicts: list[Verdict]) -> list[str]:
    return [verdict.gate for verdict in verdicts if not verdict.passed]


def noisy(mean: float, seed: int, scenes: int = 200) -> list[CaseResult]:
    """Scores that are whole tenths, those of one scene alike."""
    rng = np.random.default_rng(seed)
    scene = rng.normal(mean, 0.15, size=(scenes, 1)) + rng.normal(0, 0.1, size=(scenes, 2))
    return case_table(np.round(scene.clip(0, 1), 1).tolist())


def test_the_test_is_the_exact_one() -> None:
    """All sign choices of nine scenes, counted."""
    sums = np.array([0.3, 0.1, 0.2, -0.1, 0.0, 0.5, -0.2, 0.1, 0.4])
    totals = [np.dot(sums, signs) for signs in itertools.product((-1, 1), repeat=len(sums))]
    exact = np.mean(np.array(totals) >= sums.sum() - 1e-9)
    assert sign_flip_p(sums) == pytest.approx(exact, abs=0.01)
    both = sign_flip_p(np.stack([sums, -sums]))
    assert both[0] == sign_flip_p(sums)
    assert both[1] > 1 - exact
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert sign_flip_p(np.ones(60)) == pytest.approx(1e-4)


def test_a_scene_counts_once_however_many_cases_it_has() -> None:
    """Ten cases of one scene that all gained are one observation, which proves nothing."""
    champion = [replace(one, scene="all the same") for one in even_table(0.5, 5)]
    version = [replace(one, viescore=0.9) for one in champion]
    tested = compare(paired(version, champion))
    assert (tested.cases, tested.scenes) == (10, 1)
    assert tested.gain == pytest.approx(0.4)
    assert tested.p == pytest.approx(0.5, abs=0.05)
    assert (tested.low, tested.high) == (-1, 1)


@pytest.mark.parametrize("scenes", [2, 3, 5, 20])
def test_intervals_hold_the_truth_also_of_few_scenes(scenes: int) -> None:
    rng = np.random.default_rng(scenes)
    held = 0
    for _ in range(400):
        gains = (rng.normal(0, 0.02, (scenes, 1)) + rng.normal(0, 0.01, (scenes, 2))).ravel()
        names = tuple(map(str, range(len(gains))))
        numbers = np.repeat(np.arange(scenes), 2)
        tested = compare(Pairs(cases=names, scenes=numbers, tasks=("",) * len(names), gains=gains, unjudged=0))
        held += tested.low <= 0 <= tested.high
    assert 0.92 * 400 <= held <= 0.98 * 400


def test_a_better_version_passes_and_an_equal_one_does_not() -> None:
    champion = noisy(0.7, 0)
    assert refused(decide(noisy(0.78, 1), champion, GATE)) == []
    assert refused(decide(champion, champion, GATE)) == ["better"]
    verdicts = decide(noisy(0.6, 1), champion, GATE)
    assert "better" in refused(verdicts)
    better = next(verdict for verdict in verdicts if verdict.gate == "better")
    assert better.figures["gain"] == pytest.approx(-0.1, abs=0.05)
    assert better.figures["low"] < better.figures["gain"] < better.figures["high"]
    assert "on 400 cases of 200 scenes" in better.found
    lost = [float(case.partition("(")[2].rstrip(")")) for case in better.cases]
    assert len(lost) == 5
    assert lost == sorted(lost)
    assert lost[-1] < -0.2


def test_a_margin_asks_for_more_and_non_inferiority_for_less() -> None:
    champion = noisy(0.7, 0)
    version = noisy(0.75, 1)
    assert refused(decide(version, champion, PromotionConfig(margin=0.1))) == ["better"]
    lower = [replace(one, viescore=round(one.viescore - 0.1, 1) if i % 11 == 0 else one.viescore)
             for i, one in enumerate(champion) if one.viescore is not None]  # fmt: skip
    assert refused(decide(lower, champion, PromotionConfig(compare="not-worse", margin=0.03))) == []
    assert refused(decide(lower, champion, PromotionConfig(compare="not-worse", margin=0.008)))[0] == "not-worse"
    with pytest.raises(ValidationError, match="margin must be above 0"):
        PromotionConfig(compare="not-worse")


def test_a_task_that_falls_is_found_though_all_the_rest_gains() -> None:
    champion = noisy(0.6, 0)
    gains = {**dict.fromkeys(TASKS, 0.2), "move": -0.3}
    version = [
        replace(one, viescore=min(max(round(one.viescore + gains[one.task], 1), 0.0), 1.0))
        for one in champion
        if one.viescore is not None
    ]
    verdicts = decide(version, champion, GATE)
    assert refused(verdicts) == ["tasks"]
    (fallen,) = (verdict for verdict in verdicts if not verdict.passed)
    assert "the task move changed by -0." in fallen.found
    assert fallen.figures["level"] == GATE.task_level / 5
    assert all(int(case[5:8]) % 5 == 4 for case in fallen.cases), "a case of another task decided"
    assert refused(decide(version, champion, PromotionConfig(task_margin=0.35))) == []


def test_the_first_champion_needs_minimum_scores_of_nearly_all_cases() -> None:
    assert refused(decide(even_table(0.5), None, GATE)) == ["minimum"], "a copy of the source is no champion"
    (verdict,) = decide(even_table(0.6), None, GATE)
    assert (verdict.passed, verdict.figures) == (True, {"viescore": pytest.approx(0.6), "least": 0.5})
    unjudged = [replace(one, viescore=None, failure="judge refused: no answer") for one in even_table(0.6)[:3]]
    assert refused(decide([*unjudged, *even_table(0.6)[3:]], None, GATE)) == ["judged"], "of 80 cases"
    assert refused(decide([*unjudged[:1], *even_table(0.6)[1:]], None, GATE)) == []


def test_other_minimum_scores_can_be_asked_for() -> None:
    version = [replace(one, instruction_adherence=3, metrics={"ssim": 0.9}) for one in even_table(0.8)]
    asked = PromotionConfig(minimum={"instruction_adherence": 2.5, "ssim": 0.95})
    passed, followed, alike = decide(version, None, asked)
    assert (passed.passed, followed.passed, alike.passed) == (True, True, False)
    assert "its ssim is 0.900 on 80 cases, and a champion needs more than 0.950" in alike.found
    given_up = [replace(one, instruction_adherence=None, failure="edit failed: black") for one in version[:40]]
    followed = decide([*given_up, *version[40:]], None, asked)[1]
    assert (followed.passed, followed.figures["instruction_adherence"]) == (False, 1.5)
    none_made = [replace(one, viescore=None, metrics={}, failure="edit failed: black") for one in version]
    assert refused(decide(none_made, None, asked))[:3] == ["minimum"] * 3
    with pytest.raises(UsageError, match=r"has dino for no case: .*promotion\.minimum"):
        decide(version, None, PromotionConfig(minimum={"dino": 0.1}))
    with pytest.raises(UsageError, match=r"promotion\.minimum asks for much lpips, of which less is better"):
        decide(version, None, PromotionConfig(minimum={"lpips": 0.1}))


def test_an_edit_that_was_not_made_has_none_of_a_metric_that_is_asked_for() -> None:
    version = [replace(one, metrics={"ssim": 0.99}) for one in even_table(0.8)]
    given_up = [replace(one, viescore=None, metrics={}, failure="edit failed: black") for one in version[:4]]
    verdict = decide([*given_up, *version[4:]], None, PromotionConfig(minimum={"ssim": 0.95}))[1]
    assert (verdict.passed, verdict.figures["ssim"]) == (False, pytest.approx(0.99 * 76 / 80))


def test_what_is_not_judged_decides_nothing_and_is_limited() -> None:
    champion = noisy(0.7, 0)
    version = noisy(0.8, 1)
    holes = [
        replace(one, viescore=None, failure="judge timeout: no") if i < 12 else one for i, one in enumerate(version)
    ]
    verdicts = decide(holes, champion, GATE)
    assert refused(verdicts) == ["judged"]
    assert "3.0% of the cases" in verdicts[1].found
    assert refused(decide(holes, champion, PromotionConfig(max_unjudged=0.05))) == []
    assert paired(holes, champion).unjudged == 12
    broken = [
        replace(one, viescore=None, failure="edit failed: black") if i < 100 else one for i, one in enumerate(version)
    ]
    assert "better" in refused(decide(broken, champion, GATE)), "an edit that was not made scores 0"
    nothing = [replace(one, viescore=None, failure="judge timeout: no") for one in version]
    with pytest.raises(UsageError, match="for no case"):
        decide(nothing, champion, GATE)
    assert refused(decide(version, nothing, GATE)) == ["judged"]


def test_only_the_same_cases_and_seeds_compare() -> None:
    champion = noisy(0.7, 0)
    for other in (champion[:-1], [replace(champion[0], seed=99), *champion[1:]]):
        with pytest.raises(UsageError, match="not of the same cases and seeds"):
            decide(other, champion, GATE)
    assert compare(paired(champion[::-1], champion)).gain == 0, "rows are matched by name, not by place"


def test_an_edit_may_not_take_much_longer() -> None:
    assert latency_gate(0.30, 0.21, 1.5).passed
    slow = latency_gate(0.40, 0.20, 1.5)
    assert not slow.passed
    assert "2.00 times as long, and 1.50 is the most" in slow.found
