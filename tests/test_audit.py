"""The audit log: one order for all readers, whoever writes at once, dies in between, or moves an alias by hand."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from empty_registry import make_workdir
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from insightedit.platform.audit import AuditLog, Change, ConflictError
from insightedit.platform.errors import InsightEditError, NotFoundError
from insightedit.platform.registry import Registry
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

VERSIONS = 4


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry with four versions, none of them promoted."""
    workdir = make_workdir(tmp_path / "work")
    registry = Registry(workdir)
    run_id = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    for _ in range(VERSIONS):
        registry.register(folder, run_id)
    return registry


@pytest.fixture
def log(registry: Registry) -> AuditLog:
    return registry.audit


def change(to: str, before: str | None = None, who: str = "ann") -> Change:
    return Change(action="promote", to_version=to, from_version=before, who=who, evidence={"viescore": 0.7})


def aliases(registry: Registry) -> dict[str, str]:
    """Where MLflow has them, whatever the log says."""
    found: Any = registry.client.get_registered_model(registry.name)
    return {alias: str(version) for alias, version in found.aliases.items()}


def test_an_entry_says_who_when_from_to_and_why(registry: Registry) -> None:
    assert registry.audit.entries() == []
    assert registry.audit.last() == 0
    registry.promote("1", {"viescore": 0.7}, reason="first")
    entry = registry.promote("2", {"viescore": 0.8}, forced=True, reason="the judge is down")
    assert registry.audit.entries()[-1] == entry
    assert (entry.number, entry.action, entry.alias) == (2, "forced", "champion")
    assert (entry.from_version, entry.to_version) == ("1", "2")
    assert (entry.reason, entry.evidence) == ("the judge is down", {"viescore": 0.8})
    assert entry.who
    assert entry.when.endswith("+00:00")
    assert [later.number for later in registry.audit.entries(after=1)] == [2]
    with pytest.raises(NotFoundError, match="There is no version 9"):
        registry.promote("9")


def test_a_challenger_that_comes_during_a_promotion_stays_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = registry.client.set_registered_model_alias

    def meanwhile(name: str, alias: str, version: str) -> None:
        move(name, alias, version)
        move(name, "challenger", "3")

    monkeypatch.setattr(registry.client, "set_registered_model_alias", meanwhile)
    registry.promote("4")
    assert aliases(registry) == {"champion": "4", "challenger": "3"}


def test_of_two_who_saw_the_same_entry_the_first_counts(log: AuditLog) -> None:
    first = log.append(change("1"), expected=0)
    with pytest.raises(ConflictError, match=r"Version 2 did not become champion: ann came first, .* to version 1"):
        log.append(change("2", who="bob"), expected=0)
    log.append(change("2", "1", who="bob"), expected=first.number)
    assert [entry.to_version for entry in log.entries()] == ["1", "2"]


def behind_its_back(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let something happen after a writer has looked at the log and before its own entry is made."""
    create = client.create_model_version

    def late(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(client, "create_model_version", create)
        act()
        return create(*args, **kwargs)

    monkeypatch.setattr(client, "create_model_version", late)


def test_whoever_is_overtaken_while_writing_is_told(
    registry: Registry, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind_its_back(registry.client, monkeypatch, lambda: log.append(change("1"), expected=0))
    with pytest.raises(ConflictError, match="ann came first"):
        log.append(change("2", who="bob"), expected=0)
    # The loser's entry is in the registry, counts for nobody, and is no hindrance.
    assert [entry.to_version for entry in log.entries()] == ["1"]
    assert log.append(change("3", "1"), expected=1).number == 3
    # It does not come alive when the entry that beat it is deleted.
    registry.client.delete_model_version(log.name, "1")
    assert [entry.to_version for entry in log.entries()] == ["3"]


@pytest.mark.parametrize("made", [True, False])
def test_an_answer_that_is_lost_is_asked_for_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    """A failed call is no proof that nothing was written."""
    client, log = registry.client, registry.audit
    create = client.create_model_version
    failures = iter([True])

    def flaky(*args: Any, **kwargs: Any) -> Any:
        fails = next(failures, False)
        if made or not fails:
            create(*args, **kwargs)
        if fails:
            raise MlflowException("the connection was reset")

    monkeypatch.setattr(client, "create_model_version", flaky)
    entry = log.append(change("1"), expected=0)
    assert log.entries() == [entry]
    log.append(change("2", "1"), expected=entry.number)
    assert [one.to_version for one in log.entries()] == ["1", "2"]


def test_a_writer_that_dies_after_its_entry_has_promoted(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote("1")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "set_registered_model_alias", die)
        with pytest.raises(KeyboardInterrupt):
            registry.promote("2")
    assert aliases(registry)["champion"] == "1"
    # Readers go by the log, so nothing waits for the aliases.
    assert registry.resolve("champion").version == "2"
    assert registry.resolve("previous").version == "1"
    assert len(registry.audit.reconcile()) == 2
    assert aliases(registry) == {"champion": "2", "previous": "1", "challenger": "4"}
    assert registry.audit.reconcile() == []


def test_an_alias_moved_by_hand_is_put_back_and_told(registry: Registry) -> None:
    assert registry.audit.reconcile() == []
    for version in ("1", "2"):
        registry.promote(version)
    registry.client.set_registered_model_alias(registry.name, "champion", "3")
    registry.client.delete_registered_model_alias(registry.name, "previous")
    assert registry.resolve("champion").version == "2"
    assert {one.version: one.aliases for one in registry.versions() if one.aliases} == {
        "4": ("challenger",),
        "2": ("champion",),
        "1": ("previous",),
    }
    expected = [
        "The alias champion is at version 3, but at version 2 by entry 2 of the audit log, which counts.",
        "The alias previous is nowhere, but at version 1 by entry 2 of the audit log, which counts.",
    ]
    assert registry.audit.astray() == expected
    assert registry.audit.reconcile() == expected
    assert aliases(registry) == {"champion": "2", "previous": "1", "challenger": "4"}


def test_rollbacks_go_back_along_the_champions(registry: Registry) -> None:
    for version in ("1", "2", "3"):
        registry.promote(version)
    assert aliases(registry) == {"champion": "3", "previous": "2", "challenger": "4"}
    entry = registry.rollback(reason="complaints")
    assert (entry.action, entry.from_version, entry.to_version, entry.reason) == ("rollback", "3", "2", "complaints")
    assert aliases(registry) == {"champion": "2", "previous": "1", "challenger": "4"}
    registry.promote("4")
    assert aliases(registry) == {"champion": "4", "previous": "2"}
    registry.rollback()
    registry.rollback()
    assert aliases(registry) == {"champion": "1"}
    with pytest.raises(NotFoundError, match="no champion before this one"):
        registry.rollback()


def test_a_champion_from_before_the_log_is_what_the_first_entry_comes_from(registry: Registry) -> None:
    registry.client.set_registered_model_alias(registry.name, "champion", "1")
    assert registry.resolve("champion").version == "1"
    registry.promote("2")
    assert aliases(registry) == {"champion": "2", "previous": "1", "challenger": "4"}
    registry.rollback()
    assert aliases(registry) == {"champion": "1", "challenger": "4"}


def test_what_is_deleted_or_foreign_in_the_log_hides_nothing_else(registry: Registry, log: AuditLog) -> None:
    for version in ("1", "2", "3"):
        registry.promote(version)
    registry.client.delete_model_version(log.name, "2")
    registry.client.create_model_version(log.name, source="models:/insightedit/1", tags={"action": "promote"})
    assert [(entry.number, entry.to_version) for entry in log.entries()] == [(1, "1"), (3, "3")]
    assert aliases(registry) == {"champion": "3", "previous": "2", "challenger": "4"}
    registry.promote("4")
    assert registry.rollback().to_version == "3"
    # The last entry is gone: the one before it counts again, and who has seen the last one is told.
    registry.client.delete_model_version(log.name, "6")
    with pytest.raises(ConflictError, match="Entry 6 is gone"):
        log.append(change("1"), expected=6)
    assert len(log.reconcile()) == 2
    assert aliases(registry) == {"champion": "4", "previous": "3"}


def test_a_champion_that_was_deleted_is_told(registry: Registry) -> None:
    for version in ("1", "2"):
        registry.promote(version)
    registry.client.delete_model_version(registry.name, "2")
    with pytest.raises(NotFoundError, match="champion is version 2, which was deleted: `insightedit rollback`"):
        registry.resolve("champion")
    assert len(registry.audit.reconcile()) == 1


def test_a_registry_that_takes_nothing_is_told(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("read-only")

    monkeypatch.setattr(registry.client, "create_model_version", refuse)
    monkeypatch.setattr("insightedit.platform.audit._wait", lambda: None)
    with pytest.raises(InsightEditError, match=r"insightedit-audit takes no entry \(read-only\)"):
        registry.audit.append(change("1"), expected=0)


PROMOTE = """
import json, sys, time
from pathlib import Path
from insightedit.platform.audit import ConflictError
from insightedit.platform.registry import Registry
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

folder, version, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
registry = Registry(Workdir.open(folder))
registry.audit.last()
(folder / f"ready-{version}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
won, lost = [], 0
for _ in range(rounds):
    try:
        won.append(registry.promote(version).number)
    except ConflictError:
        lost += 1
print(json.dumps([won, lost]))
"""


def test_processes_that_promote_at_once_agree_on_one_order(registry: Registry, tmp_path: Path) -> None:
    """Real processes in one SQLite database: each change is won by one of them, and the others are told."""
    folder, rounds, versions = tmp_path / "work", 5, ("1", "2", "3")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, str(folder), version, str(rounds)], stdout=subprocess.PIPE, text=True
        )
        for version in versions
    ]
    while not all((folder / f"ready-{version}").exists() for version in versions):
        assert all(process.poll() is None for process in running)
        time.sleep(0.01)
    (folder / "go").touch()
    results = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert [len(won) + lost for won, lost in results] == [rounds] * len(versions)
    winners = {number: version for version, (won, _) in zip(versions, results, strict=True) for number in won}
    entries = Registry(Workdir.open(folder)).audit.entries()
    assert {entry.number: entry.to_version for entry in entries} == winners
    for before, entry in itertools.pairwise(entries):
        assert entry.from_version == before.to_version
    assert registry.audit.reconcile() == []
    assert aliases(registry)["champion"] == entries[-1].to_version
