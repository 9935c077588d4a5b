"""How often the gates are wrong at the default number of cases: 200 trials each, made of a real model's scores.

`INSIGHTEDIT_GATE_TRIALS=5000 pytest tests/test_gate_errors.py -s` gives the figures more sharply.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from gate_trials import Shared, Way, real, trial

from insightedit.platform.config import EvaluationConfig, PromotionConfig
from insightedit.platform.evaluation import least_scenes
from insightedit.platform.gates import decide

TRIALS = int(os.environ.get("INSIGHTEDIT_GATE_TRIALS", "200"))
SCENES = least_scenes(EvaluationConfig())
GATE = PromotionConfig()


def passes(by: float, shared: Shared, way: Way) -> float:
    """The share of trials in which a version that is better by this much becomes champion."""
    rng = np.random.default_rng(0)
    passed = 0
    refusals: dict[str, int] = {}
    for _ in range(TRIALS):
        verdicts = decide(*trial(rng, SCENES, by, shared, way), GATE)
        refused = {verdict.gate for verdict in verdicts if not verdict.passed}
        passed += not refused
        for gate in refused:
            refusals[gate] = refusals.get(gate, 0) + 1
    sys.stdout.write(f"{by:+.2f} {shared:<6}{way:<6} {passed / TRIALS:7.2%} of {TRIALS} pass; refused by {refusals}\n")
    return passed / TRIALS


def test_trials_differ_by_what_they_shall() -> None:
    rng = np.random.default_rng(1)
    assert len(real().tasks) == SCENES
    for by in (-0.05, 0.0, 0.05):
        for shared in ("apart", "kin"):
            gains = []
            for _ in range(50):
                version, champion = trial(rng, SCENES, by, shared, "edits")
                gains.append(
                    np.mean([one.viescore or 0.0 for one in version])
                    - np.mean([one.viescore or 0.0 for one in champion])
                )
            assert np.mean(gains) == pytest.approx(by, abs=0.01)


@pytest.mark.parametrize("shared", ["apart", "kin"])
def test_equal_versions_pass_in_five_percent_or_less(shared: Shared) -> None:
    assert passes(0.0, shared, "steps") <= 0.05


@pytest.mark.parametrize(("shared", "way"), [("apart", "edits"), ("kin", "steps")])
def test_worse_versions_hardly_ever_pass(shared: Shared, way: Way) -> None:
    assert passes(-0.05, shared, way) <= 0.01


@pytest.mark.parametrize(("shared", "way"), [("apart", "steps"), ("apart", "edits"), ("kin", "steps")])
def test_better_versions_mostly_pass(shared: Shared, way: Way) -> None:
    assert passes(0.05, shared, way) >= 0.80
