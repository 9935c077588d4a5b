"""The evaluation: cases, figures with editors whose score is known, what is kept, and real pipelines on Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from empty_registry import make_workdir
from PIL import Image
from stand_in_endpoint import Asked, Reaction, Say, StandIn, Status, in_turn

from insightedit.jobs.evaluate import CONTROL_SCENES, Progress, evaluate
from insightedit.platform.chat.config import EndpointConfig
from insightedit.platform.config import DatasetConfig, EvaluationConfig, RunConfig, load_preset
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.evaluation import (
    EditCase,
    Pixels,
    cases_fingerprint,
    evaluation_cases,
    figures,
    judge,
    shuffled,
    unit_range,
)
from insightedit.platform.registry import Registry
from insightedit.platform.results import RESULTS_FILE, read_results

SCENES = 60


class Oracle:
    """Knows the target of every picture and instruction that belong together, and hands back any other picture."""

    def __init__(self, cases: Sequence[EditCase], share: float = 1.0) -> None:
        self._targets = {(case.instruction, case.source.tobytes()): case.target for case in cases}
        self._share = share

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Pixels]:
        """The share of the way from source to target."""
        if progress is not None:
            progress(len(cases), len(cases))
        return [self._one(case) for case in cases]

    def _one(self, case: EditCase) -> Pixels:
        source = unit_range(case.source)
        found = self._targets.get((case.instruction, case.source.tobytes()))
        target = source if found is None else unit_range(found)
        return (source + np.float32(self._share) * (target - source)).clip(0, 1)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    preset = load_preset("nano")
    return preset.model_copy(update={"evaluation": EvaluationConfig(scenes=SCENES)})


@pytest.fixture(scope="module")
def cases(config: RunConfig) -> list[EditCase]:
    return evaluation_cases(config.evaluation)


def test_cases_follow_from_the_config(config: RunConfig, cases: list[EditCase]) -> None:
    assert len(cases) == 2 * SCENES
    assert len({case.key for case in cases}) == 2 * SCENES
    assert Counter(case.wording for case in cases) == {"simple": SCENES, "advanced": SCENES}
    assert {case.task for case in cases} == {"remove", "add", "replace", "recolour", "move"}
    assert {held for case in cases for held in case.held_out} == {"combination", "wording"}
    again = evaluation_cases(config.evaluation)
    assert cases_fingerprint(again) == cases_fingerprint(cases)
    assert [case.key for case in evaluation_cases(config.evaluation, 5)] == [case.key for case in cases[:10]]
    other = evaluation_cases(EvaluationConfig(scenes=SCENES, seed=1))
    assert cases_fingerprint(other) != cases_fingerprint(cases)
    with pytest.raises(UsageError, match=r"evaluation\.benchmark is 'seed'; benchmarks are "):
        evaluation_cases(EvaluationConfig(benchmark=DatasetConfig(reader="seed")))
    assert len(evaluation_cases(EvaluationConfig())) == 400


def test_both_instructions_of_a_scene_start_from_the_same_noise(cases: list[EditCase]) -> None:
    for simple, advanced in zip(cases[::2], cases[1::2], strict=True):
        assert simple.seed == advanced.seed
        assert simple.target is not None
        assert advanced.target is not None
        assert np.array_equal(simple.target, advanced.target)
        assert simple.instruction != advanced.instruction


def test_shuffling_gives_every_scene_the_instruction_of_another(cases: list[EditCase]) -> None:
    own = {case.source.tobytes(): set[str]() for case in cases}
    for case in cases:
        own[case.source.tobytes()].add(case.instruction)
    asked = Counter(case.instruction for case in cases)
    for case, before in zip(shuffled(cases), cases, strict=True):
        assert case.instruction not in own[case.source.tobytes()]
        assert asked[case.instruction] >= 1
        assert case.target is before.target
        assert case.wording == before.wording
    with pytest.raises(UsageError, match="2 scenes or more"):
        shuffled(cases[:2])


@pytest.mark.parametrize(
    ("share", "instruction", "viescore"),
    [(1.0, 5, 1.0), (0.0, 0, 0.5), (0.51, 3, 0.8), (0.71, 4, 0.9), (0.69, 3, 0.8)],
)
def test_editors_whose_score_is_known(cases: list[EditCase], share: float, instruction: float, viescore: float) -> None:
    result = figures(judge(cases, Oracle(cases, share).edit(Path(), cases)))
    assert result.edits == len(cases)
    assert (result.instruction, result.non_overedit) == (instruction, 5)
    assert result.viescore == pytest.approx(viescore)


def test_overediting_costs(cases: list[EditCase]) -> None:
    grey = [np.full_like(unit_range(case.source), 0.5) for case in cases]
    result = figures(judge(cases, grey))
    assert result.viescore < 0.4
    assert result.non_overedit < 3


def test_a_perfect_editor_is_evaluated_and_kept(config: RunConfig, cases: list[EditCase], tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path / "work")
    before = figures(judge(cases[:20], (unit_range(case.source) for case in cases[:20])))
    told: list[tuple[int, int]] = []
    result = evaluate(
        tmp_path / "pipeline",
        config,
        workdir,
        editor=Oracle(cases),
        before_training=before,
        progress=lambda done, total: told.append((done, total)),
    )
    edits = 2 * SCENES + 2 * CONTROL_SCENES
    assert told == [(edits, edits)]
    content = result.evaluation.to_json()
    assert (content["scenes"], content["edits"]) == (SCENES, 2 * SCENES)
    assert (content["viescore"], content["instruction"], content["non_overedit"]) == (1.0, 5.0, 5.0)
    assert content["copy_baseline"]["viescore"] == 0.5
    assert content["before_training"] == {
        "edits": 20,
        "viescore": 0.5,
        "instruction": 0.0,
        "non_overedit": 5.0,
        "failed": 0,
    }
    assert content["shuffled"] == {
        "edits": 2 * CONTROL_SCENES,
        "viescore": 0.5,
        "instruction": 0.0,
        "non_overedit": 5.0,
        "failed": 0,
    }
    assert content["simple"]["edits"] == content["advanced"]["edits"] == SCENES
    assert sum(group["edits"] for group in content["by_task"].values()) == 2 * SCENES
    assert sum(group["edits"] for group in content["by_form"].values()) == SCENES
    assert set(content["held_out"]) == {"combination", "wording", "none"}

    client = Registry(workdir).client
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["all.viescore"] == 1.0
    assert run.data.tags["evaluation.cases"] == cases_fingerprint(cases)
    artifacts = Path(client.download_artifacts(result.run_id, ""))
    assert json.loads((artifacts / "evaluation.json").read_text()) == content
    table = pq.read_table(artifacts / "cases.parquet").to_pylist()
    assert [row["instruction"] for row in table] == [case.instruction for case in cases]
    assert {row["viescore"] for row in table} == {1.0}
    results = read_results(artifacts / RESULTS_FILE)
    assert [row.case for row in results] == [case.key for case in cases]
    assert {(row.instruction_adherence, row.non_overediting, row.viescore, row.failure) for row in results} == {
        (5, 5, 1.0, "")
    }
    assert len({(row.scene, row.seed) for row in results}) == SCENES
    # Rendered targets differ from their sources inside the edit region alone.
    assert {(row.metrics["psnr"], row.metrics["mse"], row.metrics["l1"]) for row in results} == {(100.0, 0.0, 0.0)}
    assert content["measured"]["psnr"] == {"mean": 100.0, "edits": 2 * SCENES}
    assert run.data.metrics["metric.psnr"] == 100.0
    assert content["unmeasured"].keys() == {"lpips", "clip_score", "clip_i", "dino"}
    assert not any("lpips" in name for name in run.data.metrics), "what is missing is no 0"
    with Image.open(artifacts / "sheet.png") as sheet:
        assert sheet.height > 10 * 160


def test_a_language_model_judges_and_what_it_cannot_judge_is_in_no_mean(config: RunConfig, tmp_path: Path) -> None:
    """It gives 5 and 3 to all it can; one edit's request is turned down, and every scene's control is judged by its own
    instruction."""
    few = evaluation_cases(EvaluationConfig(scenes=3))
    declined = few[1].instruction

    def react(asked: Asked) -> Reaction:
        if declined in asked.texts[0].replace("\\", ""):
            return Status(400, body=b'{"error": {"message": "no thanks"}}')
        names = ("naturalness", "no_artifacts") if len(asked.pictures) == 1 else ("instruction_adherence",)
        scores = {name: {"explanation": "So.", "score": 5} for name in names}
        return Say(json.dumps({"non_overediting": {"explanation": "Well.", "score": 3}, **scores}))

    workdir = make_workdir(tmp_path / "work")
    with StandIn(react) as endpoint:
        judge_config = EndpointConfig(endpoint=endpoint.url, model="eyes")
        asking = config.model_copy(update={"evaluation": EvaluationConfig(scenes=3, judge=judge_config)})
        told: list[tuple[int, int]] = []
        result = evaluate(
            tmp_path / "pipeline",
            asking,
            workdir,
            editor=Oracle(few),
            judging=lambda done, total: told.append((done, total)),
        )
        instructions = {case.instruction for case in few}
        asked = [one for one in endpoint.asked if len(one.pictures) == 2]
        assert all(any(json.dumps(text) in one.texts[0] for text in instructions) for one in asked)
    content = result.evaluation.to_json()
    assert (content["edits"], content["failed"], content["instruction"], content["viescore"]) == (5, 1, 5.0, 0.8)
    assert content["copy_baseline"]["failed"] == content["shuffled"]["failed"] == 1
    assert content["judge"].startswith("eyes ")
    assert content["costs"]["requests"] == len(endpoint.asked)
    assert content["costs"]["failures"] == {"rejected": 3}
    assert told[-1] == (6, 6)
    client = Registry(workdir).client
    run = client.get_run(result.run_id)
    assert (run.data.metrics["all.failed"], run.data.metrics["judge.requests"]) == (1.0, float(len(endpoint.asked)))
    assert run.data.tags["evaluation.cases"] == cases_fingerprint(few, content["judge"]) != cases_fingerprint(few)
    results = read_results(Path(client.download_artifacts(result.run_id, RESULTS_FILE)))
    assert [one.failure for one in results if one.failure] == ["judge rejected: HTTP 400: no thanks"]
    assert [one.viescore for one in results] == [0.8, None, 0.8, 0.8, 0.8, 0.8]
    assert results[0].explanations["non_overediting"] == "Well."
    assert results[1].non_overediting is None


def test_where_nothing_can_be_judged_the_evaluation_says_why(config: RunConfig, tmp_path: Path) -> None:
    few = evaluation_cases(EvaluationConfig(scenes=2))
    with StandIn(in_turn(Status(400, body=b'{"error": {"message": "no pictures here"}}'))) as endpoint:
        judge_config = EndpointConfig(endpoint=endpoint.url, model="blind")
        asking = config.model_copy(update={"evaluation": EvaluationConfig(scenes=2, judge=judge_config)})
        with pytest.raises(InsightEditError, match="None of 4 edits could be judged: HTTP 400: no pictures here"):
            evaluate(tmp_path / "pipeline", asking, make_workdir(tmp_path / "work"), editor=Oracle(few))
