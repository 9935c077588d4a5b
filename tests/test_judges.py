"""The exact judge against a plain reading of the paper's definitions, pixel by pixel in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from insightedit.platform.datasets.shapes import Edit, Scene, Shape, render, sample_edit, shape_masks
from insightedit.platform.errors import UsageError
from insightedit.platform.judges import ASPECTS, MadeEdit, Score, Scores, Verdict, original_viescore, viescore
from insightedit.platform.judges.shapes import (
    ShapesJudge,
    cell_errors,
    edit_region,
    judge_edit,
    shapes_keep_regions,
    shapes_truth,
)

Picture = NDArray[np.float32]


def _picture(scene: Scene) -> Picture:
    return (render(scene) / 255).astype(np.float32)


def _brute_region(source: Picture, target: Picture) -> set[tuple[int, int]]:
    height, width, _ = source.shape
    region: set[tuple[int, int]] = set()
    for y in range(height):
        for x in range(width):
            if any(source[y, x, c] != target[y, x, c] for c in range(3)):
                region |= {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    return {(y, x) for y, x in region if 0 <= y < height and 0 <= x < width}


def _brute_mean(first: Picture, second: Picture, pixels: set[tuple[int, int]]) -> float:
    errors = [abs(float(first[y, x, c]) - float(second[y, x, c])) for y, x in pixels for c in range(3)]
    return math.fsum(errors) / len(errors)


def _brute_scores(edit: Edit, made: Picture) -> tuple[float, float]:
    """S_i and S_n before rounding, from the scenes alone."""
    source, target = _picture(edit.source), _picture(edit.target)
    m = _brute_region(source, target)
    everything = {(y, x) for y in range(32) for x in range(32)}
    regions: list[set[tuple[int, int]]] = []
    for shape, mask in zip(edit.source.shapes, shape_masks(edit.source), strict=True):
        if shape in edit.target.shapes:
            regions.append({(y, x) for y, x in everything - m if mask[y, x]})
    regions.append(everything - m - set[tuple[int, int]]().union(*regions))
    worst = max(_brute_mean(made, target, region) for region in regions if region)
    s_n = 5 * min(max(1 - worst / 0.25, 0), 1)
    s_i = 5 * min(max(1 - _brute_mean(made, target, m) / _brute_mean(source, target, m), 0), 1)
    return s_i, s_n


@pytest.mark.parametrize("seed", range(12))
def test_the_judge_equals_the_definitions(seed: int) -> None:
    edit = sample_edit(seed, "test")
    source, target = _picture(edit.source), _picture(edit.target)
    rng = np.random.default_rng(seed)
    share = np.float32(rng.uniform(0, 1.2))
    noise = rng.uniform(-0.3, 0.3, source.shape).astype(np.float32) * np.float32(rng.uniform(0, 1))
    made = np.clip(source + share * (target - source) + noise, 0, 1).astype(np.float32)
    score = judge_edit(source, target, made, shapes_keep_regions(edit.source, edit.target))
    s_i, s_n = _brute_scores(edit, made)
    assert score.s_i_raw == pytest.approx(s_i, abs=1e-9)
    assert score.s_n_raw == pytest.approx(s_n, abs=1e-9)
    assert score.instruction == int(s_i + 0.5)
    assert score.non_overedit == int(s_n + 0.5)
    assert score.viescore == pytest.approx((int(s_i + 0.5) + int(s_n + 0.5)) / 10)


@pytest.mark.parametrize("seed", range(100, 140))
def test_copying_scores_half_and_the_target_scores_one(seed: int) -> None:
    edit = sample_edit(seed, "test")
    source, target = _picture(edit.source), _picture(edit.target)
    keep = shapes_keep_regions(edit.source, edit.target)
    copied, perfect = (judge_edit(source, target, made, keep) for made in (source, target))
    assert (copied.instruction, copied.non_overedit, copied.viescore) == (0, 5, 0.5)
    assert (perfect.instruction, perfect.non_overedit, perfect.viescore) == (5, 5, 1.0)


@pytest.mark.parametrize("error", [0.0, 0.02, 0.1, 0.3])
def test_where_nothing_should_change_both_scores_are_one(error: float) -> None:
    scene = sample_edit(7, "test").source
    source = _picture(scene)
    made = np.where(source < 0.5, source + error, source - error).astype(np.float32)
    score = judge_edit(source, source, made, shapes_keep_regions(scene, scene))
    assert (score.instruction, score.s_i_raw) == (score.non_overedit, score.s_n_raw)
    assert score.s_n_raw == pytest.approx(5 * max(1 - error / 0.25, 0), abs=1e-5)


def test_scores_are_rounded_half_up() -> None:
    """Exact binary fractions, so that both raw scores are 2.5 itself; rounding half to even would give 2."""
    source, target = np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 3), np.float32)
    target[0, 0] = 1.0
    keep = [~edit_region(source, target)]
    made = target / 2
    made[keep[0]] = 0.125
    score = judge_edit(source, target, made, keep)
    assert (score.s_i_raw, score.s_n_raw) == (2.5, 2.5)
    assert (score.instruction, score.non_overedit) == (3, 3)
    made[keep[0]] = np.nextafter(np.float32(0.125), np.float32(1))  # a hair further from the target
    assert judge_edit(source, target, made, keep).non_overedit == 2


def test_the_worst_region_counts_not_the_mean() -> None:
    """A whole shape lost elsewhere must cost all of S_n, though it is a small part of the picture."""
    source, target = np.zeros((16, 16, 3), np.float32), np.zeros((16, 16, 3), np.float32)
    target[:3, :3] = 1
    shape = np.zeros((16, 16), np.bool_)
    shape[12:14, 12:14] = True
    rest = ~shape & ~edit_region(source, target)
    made = target.copy()
    made[shape] = 0.25
    assert judge_edit(source, target, made, [shape, rest]).non_overedit == 0
    assert judge_edit(source, target, made, [shape | rest]).non_overedit == 5


def test_the_region_grows_by_one_pixel_and_stops_at_the_edge() -> None:
    source, target = np.zeros((5, 6, 3), np.float32), np.zeros((5, 6, 3), np.float32)
    target[0, 0, 1] = 0.5
    target[3, 4, 2] = 0.5
    expected = np.zeros((5, 6), np.bool_)
    expected[:2, :2] = True
    expected[2:5, 3:6] = True
    assert np.array_equal(edit_region(source, target), expected)


@pytest.mark.parametrize("seed", range(200, 230))
def test_regions_to_keep_and_the_edited_region_cover_the_picture_once(seed: int) -> None:
    edit = sample_edit(seed, "test")
    region = edit_region(_picture(edit.source), _picture(edit.target))
    keep = shapes_keep_regions(edit.source, edit.target)
    assert len(keep) == len(set(edit.source.shapes) & set(edit.target.shapes)) + 1
    assert np.array_equal(sum(mask.astype(int) for mask in [region, *keep]), np.ones((32, 32), int))


def test_viescore_is_equation_1() -> None:
    assert [viescore(0, 5), viescore(5, 5), viescore(0, 0), viescore(3, 4)] == [0.5, 1.0, 0.0, 0.7]


def test_wrong_pictures_are_refused() -> None:
    good = np.zeros((4, 4, 3), np.float32)
    everywhere = [np.ones((4, 4), np.bool_)]
    with pytest.raises(ValueError, match=r"edit must be floats in \[0, 1\]"):
        judge_edit(good, good, good + 2, everywhere)
    with pytest.raises(ValueError, match="edit must be floats"):
        judge_edit(good, good, np.full_like(good, np.nan), everywhere)
    with pytest.raises(ValueError, match="one shape"):
        judge_edit(good, good, good[:3], everywhere)
    with pytest.raises(ValueError, match="boolean masks"):
        judge_edit(good, good, good, [np.ones((3, 4), np.bool_)])
    with pytest.raises(ValueError, match="outside the edited region"):
        judge_edit(good, good + 1, good, everywhere)


# -- the judge of shapes behind the interface of every judge ---------------------------------------------------------


def _made(seed: int, picture: NDArray[np.uint8] | None = None) -> MadeEdit:
    """An edit of a test scene whose outcome is the picture, or else the true target."""
    edit = sample_edit(seed, "test")
    target = render(edit.target)
    return MadeEdit(
        source=render(edit.source),
        edit=target if picture is None else picture,
        instruction=edit.simple,
        truth=shapes_truth(edit.source, edit.target),
    )


def _values(verdict: Verdict) -> list[int]:
    assert isinstance(verdict, Scores)
    return [getattr(verdict, aspect).value for aspect in ASPECTS]


def test_the_judge_of_shapes_gives_four_scores_with_explanations() -> None:
    judge, told = ShapesJudge(), list[tuple[int, int]]()
    perfect, copied = _made(3), _made(3, render(sample_edit(3, "test").source))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    verdicts = judge.judge([perfect, copied, _made(3, noise)], lambda done, of: told.append((done, of)))
    assert [_values(verdict) for verdict in verdicts[:2]] == [[5, 5, 5, 5], [0, 5, 5, 5]]
    noisy = _values(verdicts[2])
    assert noisy[1] <= 1
    assert max(noisy[2:]) <= 1
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert judge.costs.requests == 0
    for verdict in verdicts:
        assert isinstance(verdict, Scores)
        assert all(getattr(verdict, aspect).explanation.endswith(".") for aspect in ASPECTS)
        raw = (verdict.instruction_adherence.raw, verdict.non_overediting.raw)
        assert [int((value or 0.0) + 0.5) for value in raw] == _values(verdict)[:2]


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_scene_is_natural_all_the_same(seed: int) -> None:
    """Perceptual quality does not ask for the instruction: what another edit makes of the scene looks right."""
    scene = sample_edit(seed, "test").source
    other = Scene(scene.ground, (*scene.shapes[:1], Shape("heart", "pink", "small", (scene.shapes[0].cell + 4) % 9)))
    assert _values(ShapesJudge().judge([_made(seed, render(other))])[0])[2:] == [5, 5]


def test_one_broken_cell_is_an_artifact_and_hardly_unnatural() -> None:
    made = _made(11)
    broken = made.edit.copy()
    broken[:10, :10] = np.random.default_rng(1).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    before, after = cell_errors(made.edit / 255, _ground(made)), cell_errors(broken / 255, _ground(made))
    assert before.max() < 0.003  # half a step of 8 bits
    assert np.array_equal(before[1:], after[1:])
    values = _values(ShapesJudge().judge([_made(11, broken)])[0])
    assert values[2] >= 4
    assert values[3] <= 2


def _ground(made: MadeEdit) -> NDArray[np.float64]:
    assert made.truth is not None
    return made.truth.ground / 255


def test_without_its_truth_no_edit_is_judged_exactly() -> None:
    unknown = replace(_made(1), truth=None)
    with pytest.raises(UsageError, match=r"evaluation\.judge is shapes, which judges only edits whose truth is known"):
        ShapesJudge().judge([unknown])


# -- scores and their aggregation -------------------------------------------------------------------------------------


def test_scores_join_by_equation_1_and_as_their_authors_do() -> None:
    """The original's worked by hand: sqrt(min(3, 4) * min(5, 2)) of 10 on its scale of 0 to 10, halved to 0 to 5."""
    scores = Scores(
        instruction_adherence=Score(3, "a"),
        non_overediting=Score(4, "b"),
        naturalness=Score(5, "c"),
        no_artifacts=Score(2, "d"),
    )
    assert scores.viescore == pytest.approx(0.7)
    assert scores.original_viescore == pytest.approx(math.sqrt(6) / 5)
    assert original_viescore((6, 8), (10, 4)) * 5 == pytest.approx(math.sqrt(24))
    assert original_viescore((0, 5), (5, 5)) == 0
    for value in (-1, 6):
        with pytest.raises(ValueError, match="integer from 0 to 5"):
            Score(value, "")
