"""Who may become champion, what is refused and what is written down of it, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from empty_registry import make_workdir
from judged_versions import case_table, empty_pipeline, even_table, keep_evaluation

from insightedit.jobs.promote import Promotion, promote, rollback
from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import GateRefusedError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.results import CaseResult
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

GATE = PromotionConfig()
Add = Callable[..., ModelVersion]


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return make_workdir(tmp_path / "work")


@pytest.fixture
def add(workdir: Workdir, tmp_path: Path) -> Add:
    registry = Registry(workdir)
    run_id = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id

    def register(results: float | Sequence[CaseResult] | None, cases: str = "cases") -> ModelVersion:
        table = even_table(results) if isinstance(results, float | int) else results
        tags = {} if table is None else keep_evaluation(registry, workdir, table, cases)
        return registry.register(empty_pipeline(tmp_path / "pipeline"), run_id, tags)

    return register


def judged_already(version: ModelVersion) -> None:
    raise AssertionError(f"version {version.version} was judged again")


def as_quick(folders: Sequence[Path]) -> list[float]:
    return [0.2 for _ in folders]


def run(workdir: Workdir, version: str, gate: PromotionConfig = GATE, **options: object) -> Promotion:
    return promote(workdir, version, gate, judged_already, as_quick, **options)  # pyright: ignore[reportArgumentType]


def aliases(workdir: Workdir) -> dict[str, str]:
    return {alias: version.version for version in Registry(workdir).versions() for alias in version.aliases}


def test_the_first_champion_must_beat_a_copy_of_the_source(workdir: Workdir, add: Add) -> None:
    add(0.5)
    with pytest.raises(GateRefusedError, match=r"Version 1 is not promoted: \[minimum\] its VIEScore is 0\.500 on 80"):
        run(workdir, "1")
    assert aliases(workdir) == {"challenger": "1"}
    add(0.6)
    done = run(workdir, "challenger")
    assert (done.champion, done.before, done.entry) == ("2", None, 1)
    assert done.evidence is not None
    assert (done.evidence.viescore, done.evidence.champion_viescore) == (0.6, None)
    assert [verdict.gate for verdict in done.evidence.gates] == ["minimum"]
    assert aliases(workdir) == {"champion": "2"}


def test_only_a_better_challenger_becomes_champion(workdir: Workdir, add: Add) -> None:
    versions = [add(viescore) for viescore in (0.7, 0.7, 0.6, 0.8)]
    run(workdir, "1")
    for version, figures in (("2", r"\+0\.000 "), ("3", r"-0\.100 .* \(most by test-000-simple \(-0\.10\), ")):
        with pytest.raises(GateRefusedError, match=rf"in place of version 1: \[better\] .* by {figures}"):
            run(workdir, version)
    run(workdir, "4", reason="it removes better")
    assert aliases(workdir) == {"champion": "4", "previous": "1"}
    entry = Registry(workdir).audit.entries()[-1]
    assert (entry.action, entry.from_version, entry.to_version) == ("promote", "1", "4")
    assert entry.reason == "it removes better"
    assert (entry.evidence["viescore"], entry.evidence["champion_viescore"]) == (0.8, 0.7)
    assert entry.evidence["evaluation_run"] == versions[3].tags["evaluation.run"]
    assert entry.evidence["champion_evaluation_run"] == versions[0].tags["evaluation.run"]
    gates = {gate["gate"]: gate for gate in entry.evidence["gates"]}
    assert list(gates) == ["minimum", "judged", "better", "tasks", "latency"]
    assert gates["better"]["figures"]["gain"] == pytest.approx(0.1)
    assert gates["latency"]["figures"]["ratio"] == 1
    with pytest.raises(NotFoundError, match="no version 9"):
        run(workdir, "9")


def test_a_refusal_says_which_gate_with_which_figures_and_cases(workdir: Workdir, add: Add) -> None:
    add(even_table(0.7, 100))
    run(workdir, "1")
    add(case_table([(0.9, 0.9) if scene % 5 else (0.2, 0.4) for scene in range(100)]))
    with pytest.raises(GateRefusedError) as raised:
        run(workdir, "2")
    said = str(raised.value)
    assert "[tasks] the task remove changed by -0.400 (95% interval" in said
    assert "on 40 cases of 20 scenes" in said
    assert "(most by test-000-simple (-0.50), test-005-simple (-0.50)" in said
    assert "\n" not in said
    gates = json.loads(json.dumps(raised.value.evidence))["gates"]
    assert [gate["gate"] for gate in gates if not gate["passed"]] == ["tasks"]
    assert aliases(workdir)["champion"] == "1"


def test_a_forced_promotion_needs_a_reason_and_is_written_down(workdir: Workdir, add: Add) -> None:
    for viescore in (0.7, 0.6, 0.8):
        add(viescore)
    run(workdir, "1")
    with pytest.raises(UsageError, match="needs a reason"):
        run(workdir, "2", force=True)
    with pytest.raises(GateRefusedError):
        run(workdir, "2", reason="just so")
    done = run(workdir, "2", force=True, reason="the old one draws what it must not")
    assert (done.champion, done.before, done.forced) == ("2", "1", True)
    entry = Registry(workdir).audit.entries()[-1]
    assert (entry.action, entry.reason) == ("forced", "the old one draws what it must not")
    assert entry.who
    refused = [gate["gate"] for gate in entry.evidence["gates"] if not gate["passed"]]
    assert refused[0] == "better"
    done = run(workdir, "3", force=True, reason="to be sure")
    assert done.forced is False
    assert Registry(workdir).audit.entries()[-1].action == "promote", "nothing had to be forced"


def test_a_slow_version_is_refused_and_time_is_taken_only_if_all_else_is_well(workdir: Workdir, add: Add) -> None:
    versions = [add(viescore) for viescore in (0.7, 0.8, 0.6)]
    run(workdir, "1")
    asked: list[list[Path]] = []

    def measure(folders: Sequence[Path]) -> list[float]:
        asked.append(list(folders))
        return [0.5, 0.2]

    with pytest.raises(GateRefusedError, match=r"\[latency\] an edit takes 0\.500 s and the champion's 0\.200 s"):
        promote(workdir, "2", GATE, judged_already, measure)
    assert asked == [[versions[1].folder, versions[0].folder]]
    with pytest.raises(GateRefusedError, match=r"\[better\]"):
        promote(workdir, "3", GATE, judged_already, measure)
    assert promote(workdir, "2", PromotionConfig(max_latency_ratio=0), judged_already, measure).champion == "2"
    assert len(asked) == 1


def test_a_dry_run_decides_and_moves_nothing(workdir: Workdir, add: Add) -> None:
    add(0.7)
    add(0.4)
    assert run(workdir, "1", dry_run=True).champion == "1"
    with pytest.raises(GateRefusedError):
        run(workdir, "2", dry_run=True)
    assert run(workdir, "2", dry_run=True, force=True, reason="why not").forced
    assert "champion" not in aliases(workdir)
    assert Registry(workdir).audit.entries() == []


def test_promoting_the_champion_again_changes_nothing(workdir: Workdir, add: Add) -> None:
    add(0.7)
    run(workdir, "1")
    done = run(workdir, "1")
    assert (done.champion, done.before, done.evidence) == ("1", "1", None)
    assert len(Registry(workdir).audit.entries()) == 1


@pytest.mark.parametrize("known", [None, "other cases", "no table"])
def test_both_are_judged_on_the_same_cases(workdir: Workdir, add: Add, known: str | None) -> None:
    """A figure on other cases, or one of which nothing but the mean is left, is worth nothing, however high."""
    add(0.8)
    run(workdir, "1")
    second = add(None if known is None else 0.99, known or "")
    registry = Registry(workdir)
    if known == "no table":
        registry.set_tags("2", {"evaluation.cases": "cases"})
        (Path(registry.client.download_artifacts(second.tags["evaluation.run"], "")) / "results.parquet").unlink()
    scores = {"1": 0.8, "2": 0.7}
    judged: list[str] = []

    def judge(version: ModelVersion) -> None:
        judged.append(version.version)
        table = even_table(scores[version.version])
        registry.set_tags(version.version, keep_evaluation(registry, workdir, table, "new cases"))

    with pytest.raises(GateRefusedError, match=r"\[better\] its VIEScore differs from the champion's by -0\.100"):
        promote(workdir, "2", GATE, judge, as_quick)
    assert sorted(judged) == ["1", "2"]
    with pytest.raises(AssertionError, match="judged again"):
        run(workdir, "2", scenes=41)
    assert aliases(workdir) == {"champion": "1", "challenger": "2"}


def test_a_damaged_version_is_never_promoted(workdir: Workdir, add: Add) -> None:
    version = add(0.9)
    (version.folder / "model_index.json").write_text("{ }")
    with pytest.raises(InsightEditError, match=r"model_index\.json"):
        run(workdir, "1", force=True, reason="I must")
    assert aliases(workdir) == {"challenger": "1"}


def test_a_champion_that_is_damaged_on_disk_gives_way(workdir: Workdir, add: Add) -> None:
    champion = add(0.7)
    run(workdir, "1")
    add(0.8)
    (champion.folder / "model_index.json").write_text("{ }")
    done = run(workdir, "2")
    assert done.evidence is not None
    assert done.evidence.gates[-1].found.startswith("not measured, since the champion is damaged: model_index.json in")
    with pytest.raises(InsightEditError, match=r"model_index\.json in .* has 3 bytes, not the 2"):
        rollback(workdir)
    assert aliases(workdir) == {"champion": "2", "previous": "1"}


def test_a_version_that_names_foreign_code_is_never_promoted(workdir: Workdir, add: Add, tmp_path: Path) -> None:
    registry = Registry(workdir)
    first = add(0.9)
    index = {"_class_name": "InsightEditPipeline", "unet": ["insightedit.model.unet", "InsightEditUNet"]}
    folder = empty_pipeline(tmp_path / "foreign")
    for number, library in (("2", "os"), ("3", "stable_diffusion")):
        (folder / "model_index.json").write_text(json.dumps(index | {"safety_checker": [library, "system"]}))
        assert registry.register(folder, first.run_id or "", first.tags).version == number
    with pytest.raises(InsightEditError, match="takes safety_checker from 'os'"):
        run(workdir, "2", force=True, reason="I must")
    assert run(workdir, "3").champion == "3"


def test_rollback_goes_back_to_a_whole_version(workdir: Workdir, add: Add) -> None:
    with pytest.raises(NotFoundError, match="no champion yet"):
        rollback(workdir)
    versions = [add(viescore) for viescore in (0.6, 0.7)]
    run(workdir, "1")
    with pytest.raises(NotFoundError, match="no champion before this one"):
        rollback(workdir)
    run(workdir, "2")
    assert rollback(workdir, dry_run=True).champion == "1"
    assert aliases(workdir) == {"champion": "2", "previous": "1"}
    done = rollback(workdir, "complaints")
    assert (done.champion, done.before, done.entry) == ("1", "2", 3)
    assert aliases(workdir) == {"champion": "1"}
    assert Registry(workdir).audit.entries()[-1].reason == "complaints"
    run(workdir, "2")
    (versions[0].folder / "model_index.json").unlink()
    with pytest.raises(InsightEditError, match=r"model_index\.json is missing"):
        rollback(workdir)
    assert aliases(workdir) == {"champion": "2", "previous": "1"}
