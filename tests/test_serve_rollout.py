"""The rollout of a version as a machine of states: what brings it forward, what sends it back, and what does not."""

from __future__ import annotations

import random

import pytest
from pydantic import ValidationError

from insightedit.platform.errors import UsageError
from insightedit.serve.rollout import SECONDS_KEPT, Evidence, Rollout, Tally, why_worse
from insightedit.serve.settings import RolloutSettings, read_settings

SETTINGS = RolloutSettings(load_seconds=100, min_requests=20, min_seconds=60, max_seconds=900)
BEGUN = Rollout.begun("2", "1", entry=7, now=0)
CANARY = BEGUN.loaded(10)
WELL = Evidence(new=Tally(answers=20, seconds=(0.5,) * 20), old=Tally(answers=180, seconds=(0.5,) * 180))


def evidence(seed: int, count: int, loss: float, spread: float = 0.0) -> Evidence:
    """Pairs of edits in which the new version is worse by `loss`, each by something else."""
    chance = random.Random(seed)
    return Evidence(pairs=tuple((0.5 - loss + chance.gauss(0, spread), 0.5) for _ in range(count)))


def test_a_good_version_loads_has_its_share_and_takes_all() -> None:
    assert (BEGUN.state, BEGUN.over) == ("loading", False)
    assert BEGUN.seen(WELL, 50, SETTINGS) == BEGUN.waited(100, SETTINGS) == BEGUN
    assert (CANARY.state, CANARY.since) == ("canary", 10)
    assert CANARY.loaded(20) == CANARY.seen(WELL, 69, SETTINGS) == CANARY.waited(5000, SETTINGS) == CANARY
    full = CANARY.seen(WELL, 70, SETTINGS)
    assert (full.state, full.since, full.over, full.reason) == ("full", 70, True, "")
    assert full.failed("too late", 80) == full


def test_too_few_edits_keep_it_waiting_and_not_forever() -> None:
    few = Evidence(new=Tally(answers=19))
    assert CANARY.seen(few, 909, SETTINGS) == CANARY
    assert CANARY.seen(few, 910, SETTINGS).state == "full"
    assert CANARY.seen(Evidence(), 910, SETTINGS).state == "full"


def test_a_version_that_does_not_load_is_given_up() -> None:
    late = BEGUN.waited(101, SETTINGS)
    assert (late.state, late.reason) == ("rolled_back", "it did not load within 100 seconds")
    assert late.loaded(102) == late.seen(WELL, 500, SETTINGS) == late


def test_what_rules_a_version_out_is_said() -> None:
    broken = BEGUN.failed("its folder is damaged", 3)
    assert (broken.state, broken.since, broken.reason) == ("rolled_back", 3, "its folder is damaged")
    worse = Evidence(new=Tally(answers=1, failures=3))
    assert CANARY.seen(worse, 900, SETTINGS).reason == "3 of 4 edits failed by it and not by the old version"
    # The edits that it makes before it has its share say as much.
    assert BEGUN.seen(worse, 5, SETTINGS).state == "rolled_back"


@pytest.mark.parametrize(("answers", "failures", "out"), [(0, 3, True), (0, 2, False), (57, 3, False), (56, 3, True)])
def test_failures(answers: int, failures: int, out: bool) -> None:
    worse = why_worse(Evidence(new=Tally(answers=answers, failures=failures)), SETTINGS)
    assert (worse is not None) is out


@pytest.mark.parametrize(
    ("new", "old", "count", "out"),
    [(1.5, 1, 8, False), (1.7, 1, 8, True), (1.7, 1, 7, False), (0.05, 0.01, 8, False), (9, 9, 20, False)],
)
def test_slowness(new: float, old: float, count: int, out: bool) -> None:
    seen = Evidence(new=Tally(seconds=(new,) * count), old=Tally(seconds=(old,) * 50))
    worse = why_worse(seen, SETTINGS)
    assert (worse is not None) is out
    if out:
        assert worse == "an edit takes 1.70 seconds by it and 1.00 by the old version"


def test_one_slow_edit_is_none() -> None:
    seen = Evidence(new=Tally(seconds=(1.0,) * 8 + (60.0,)), old=Tally(seconds=(1.0,) * 8))
    assert why_worse(seen, SETTINGS) is None


def test_quality_is_compared_on_the_same_edits() -> None:
    assert why_worse(evidence(0, 4, loss=0.3), SETTINGS) == (
        "its quality is 0.20 and the old version's 0.50, on the same 4 edits"
    )
    assert why_worse(evidence(0, 3, loss=0.3), SETTINGS) is None
    assert why_worse(evidence(0, 500, loss=-0.3), SETTINGS) is None


def test_chance_rules_nobody_out() -> None:
    """Judges differ by 0.2 from edit to edit. Looked at once, equal versions and those within the margin stay."""
    wrongly = sum(why_worse(evidence(seed, 20, loss=0.0, spread=0.2), SETTINGS) is not None for seed in range(200))
    within = sum(why_worse(evidence(seed, 20, loss=0.1, spread=0.2), SETTINGS) is not None for seed in range(200))
    found = sum(why_worse(evidence(seed, 20, loss=0.3, spread=0.2), SETTINGS) is not None for seed in range(200))
    assert wrongly == 0
    assert within <= 10
    assert found >= 190


@pytest.mark.parametrize(
    ("new", "old", "out"),
    [((2, 8), (9, 1), True), ((5, 4), (9, 1), False), ((8, 2), (9, 1), False), ((1, 2), (90, 10), False)],
)
def test_users_verdicts(new: tuple[int, int], old: tuple[int, int], out: bool) -> None:
    tallies = [Tally(accepted=accepted, rejected=rejected) for accepted, rejected in (new, old)]
    worse = why_worse(Evidence(new=tallies[0], old=tallies[1]), SETTINGS)
    assert worse == ("users reject 80% of its edits and 10% of the old version's" if out else None)


def test_what_gateways_have_seen_is_added_up() -> None:
    tally = Tally().answered(1.0).answered(2.0).failed()
    one = Evidence(new=tally, pairs=((0.5, 0.6),))
    both = Evidence.total([one, Evidence.model_validate_json(one.model_dump_json())])
    assert both.new == Tally(answers=4, failures=2, seconds=(1, 2, 1, 2))
    assert both.pairs == ((0.5, 0.6), (0.5, 0.6))
    many = Tally()
    for number in range(SECONDS_KEPT + 5):
        many = many.answered(float(number))
    assert (many.answers, many.seconds[0], len(many.seconds)) == (SECONDS_KEPT + 5, 5.0, SECONDS_KEPT)


def test_settings_are_checked() -> None:
    assert read_settings(None, ["rollout.share=0.2", "rollout.sticky=true"]).rollout.share == 0.2
    with pytest.raises(UsageError, match=r"rollout\.share is wrong"):
        read_settings(None, ["rollout.share=0.9"])
    with pytest.raises(ValidationError, match="max_seconds 10 is less than min_seconds 60"):
        RolloutSettings(max_seconds=10)
