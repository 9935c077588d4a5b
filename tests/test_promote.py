"""The gate: who may become champion, what is refused, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from empty_registry import make_workdir

from insightedit.jobs.promote import promote, rollback
from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import GateRefusedError, InsightEditError, NotFoundError
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

GATE = PromotionConfig()


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return make_workdir(tmp_path / "work")


@pytest.fixture
def add(workdir: Workdir, tmp_path: Path) -> Callable[..., ModelVersion]:
    registry = Registry(workdir)
    run_id = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id

    def register(viescore: float | None, cases: str = "cases") -> ModelVersion:
        folder = tmp_path / "pipeline"
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text("{}")
        tags = {} if viescore is None else {"viescore": str(viescore), "evaluation.cases": cases}
        return registry.register(folder, run_id, tags)

    return register


def judged_already(version: ModelVersion) -> None:
    raise AssertionError(f"version {version.version} was judged again")


def aliases(workdir: Workdir) -> dict[str, str]:
    return {alias: version.version for version in Registry(workdir).versions() for alias in version.aliases}


def test_the_first_champion_must_beat_a_copy_of_the_source(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    add(0.5)
    with pytest.raises(GateRefusedError, match=r"Version 1 is not promoted: its VIEScore is 0\.500, .* than 0\.500"):
        promote(workdir, "1", GATE, judged_already)
    assert aliases(workdir) == {"challenger": "1"}
    add(0.6)
    done = promote(workdir, "challenger", GATE, judged_already)
    assert (done.champion, done.before) == ("2", None)
    assert done.evidence is not None
    assert (done.evidence.viescore, done.evidence.champion_viescore) == (0.6, None)
    assert aliases(workdir) == {"champion": "2"}


def test_only_a_better_challenger_becomes_champion(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    for viescore in (0.7, 0.7, 0.69, 0.75, 0.755):
        add(viescore)
    promote(workdir, "1", GATE, judged_already)
    for version in ("2", "3"):
        with pytest.raises(GateRefusedError, match=r"the champion's \(version 1\) 0\.700 on the same"):
            promote(workdir, version, GATE, judged_already)
    promote(workdir, "4", GATE, judged_already)
    assert aliases(workdir) == {"champion": "4", "previous": "1", "challenger": "5"}
    with pytest.raises(GateRefusedError, match=r"by more than 0\.010"):
        promote(workdir, "5", PromotionConfig(margin=0.01), judged_already)
    entry = Registry(workdir).audit.entries()[-1]
    assert (entry.action, entry.from_version, entry.to_version) == ("promote", "1", "4")
    assert entry.evidence["viescore"] == 0.75
    assert entry.evidence["champion_viescore"] == 0.7
    with pytest.raises(NotFoundError, match="no version 9"):
        promote(workdir, "9", GATE, judged_already)


def test_a_dry_run_decides_and_moves_nothing(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    add(0.7)
    add(0.4)
    assert promote(workdir, "1", GATE, judged_already, dry_run=True).champion == "1"
    with pytest.raises(GateRefusedError):
        promote(workdir, "2", GATE, judged_already, dry_run=True)
    assert "champion" not in aliases(workdir)
    assert Registry(workdir).audit.entries() == []


def test_promoting_the_champion_again_changes_nothing(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    add(0.7)
    promote(workdir, "1", GATE, judged_already)
    done = promote(workdir, "1", GATE, judged_already)
    assert (done.champion, done.before, done.evidence) == ("1", "1", None)
    assert len(Registry(workdir).audit.entries()) == 1


@pytest.mark.parametrize("known", [None, 0.99])
def test_both_are_judged_on_the_same_cases(
    workdir: Workdir, add: Callable[..., ModelVersion], known: float | None
) -> None:
    """A figure on other cases is worth nothing, however high."""
    add(0.8)
    promote(workdir, "1", GATE, judged_already)
    add(known, "other cases")
    scores = {"1": 0.8, "2": 0.7}
    judged: list[str] = []

    def judge(version: ModelVersion) -> None:
        judged.append(version.version)
        tags = {"viescore": str(scores[version.version]), "evaluation.cases": "new cases"}
        Registry(workdir).set_tags(version.version, tags)

    with pytest.raises(GateRefusedError, match=r"0\.700 .* 0\.800"):
        promote(workdir, "2", GATE, judge)
    assert sorted(judged) == ["1", "2"]
    assert aliases(workdir) == {"champion": "1", "challenger": "2"}


def test_a_damaged_version_is_never_promoted(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    version = add(0.9)
    (version.folder / "model_index.json").write_text("{ }")
    with pytest.raises(InsightEditError, match=r"model_index\.json"):
        promote(workdir, "1", GATE, judged_already)
    assert aliases(workdir) == {"challenger": "1"}


def test_rollback_goes_back_to_a_whole_version(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    with pytest.raises(NotFoundError, match="no champion yet"):
        rollback(workdir)
    versions = [add(viescore) for viescore in (0.6, 0.7)]
    promote(workdir, "1", GATE, judged_already)
    with pytest.raises(NotFoundError, match="no champion before this one"):
        rollback(workdir)
    promote(workdir, "2", GATE, judged_already)
    assert rollback(workdir, dry_run=True).champion == "1"
    assert aliases(workdir) == {"champion": "2", "previous": "1"}
    done = rollback(workdir, "complaints")
    assert (done.champion, done.before) == ("1", "2")
    assert aliases(workdir) == {"champion": "1"}
    assert Registry(workdir).audit.entries()[-1].reason == "complaints"
    promote(workdir, "2", GATE, judged_already)
    (versions[0].folder / "model_index.json").unlink()
    with pytest.raises(InsightEditError, match=r"model_index\.json is missing"):
        rollback(workdir)
    assert aliases(workdir) == {"champion": "2", "previous": "1"}
