"""Checkpoints: whole or not there, and nothing is opened that this run did not seal."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from insightedit.platform.checkpoints import (
    COMMITTED_NAME,
    MANIFEST_NAME,
    Checkpoint,
    CheckpointInfo,
    CheckpointStore,
    checkpoint_key,
    file_names,
    hash_files,
)
from insightedit.platform.errors import InsightEditError, UsageError

KEY = b"k" * 32


def info(step: int) -> CheckpointInfo:
    return CheckpointInfo(stage=2, step=step, position=8 * step, world_size=2, fingerprint="f", trained="t")


def write(store: CheckpointStore, step: int) -> Checkpoint:
    folder = store.temporary()
    (folder / "state").mkdir()
    (folder / "state" / "weights.pt").write_bytes(bytes([step]) * 1000)
    (folder / "random-0.pt").write_bytes(b"random")
    return store.commit(folder, info(step), hash_files(folder, file_names(folder)))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", KEY, keep=3)


def test_the_newest_is_found_and_says_what_it_is(store: CheckpointStore) -> None:
    assert store.newest() is None
    for step in (5, 10):
        write(store, step)
    newest = store.newest()
    assert newest is not None
    assert newest.info == info(10)
    assert file_names(newest.folder) == [COMMITTED_NAME, MANIFEST_NAME, "random-0.pt", "state/weights.pt"]


def test_old_ones_are_dropped(store: CheckpointStore) -> None:
    for step in range(1, 6):
        write(store, step)
    assert sorted(path.name for path in store.folder.iterdir()) == [f"step-{step:08d}" for step in (3, 4, 5)]


def truncate(folder: Path) -> None:
    path = folder / "state" / "weights.pt"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "state" / "weights.pt"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


def link(folder: Path) -> None:
    path = folder / "random-0.pt"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def forge(folder: Path) -> None:
    """Change a file and seal it anew, without the key."""
    flip(folder)
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    content.pop("hmac")
    entry = content["files"]["state/weights.pt"]
    entry["sha256"] = hashlib.sha256((folder / "state" / "weights.pt").read_bytes()).hexdigest()
    seal = hmac.new(b"x" * 32, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()
    path.write_text(json.dumps({**content, "hmac": seal}))


def advance(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace('"step": 2', '"step": 9'))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "differs from its manifest"),
    "flipped": (flip, "differs from its manifest"),
    "missing file": (lambda folder: (folder / "random-0.pt").unlink(), "lacks or has too much: random-0.pt"),
    "added file": (lambda folder: (folder / "more.pt").write_text("x"), "lacks or has too much: more.pt"),
    "link": (link, "differs from its manifest"),
    "no marker": (lambda folder: (folder / COMMITTED_NAME).unlink(), "never finished"),
    "no manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), "not a readable manifest"),
    "torn manifest": (lambda folder: (folder / MANIFEST_NAME).write_text('{"stage": 2,'), "not a readable manifest"),
    "other manifest": (lambda folder: (folder / MANIFEST_NAME).write_text("[]"), "not a readable manifest"),
    "another step": (advance, "forged"),
    "forged": (forge, "forged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_ones_are_skipped_with_a_reason(
    store: CheckpointStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, 1)
    hurt, reason = DAMAGE[damage]
    hurt(write(store, 2).folder)
    found = store.newest()
    assert found is not None
    assert found.info.step == 1
    assert reason in caplog.text


def test_nothing_is_unpickled_before_it_is_verified(store: CheckpointStore, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "dead"),)

    folder = write(store, 1).folder
    (folder / "state" / "weights.pt").write_bytes(pickle.dumps(Canary()))
    assert store.newest() is None
    assert not (tmp_path / "dead").exists()


def test_another_key_opens_nothing(store: CheckpointStore) -> None:
    write(store, 1)
    with pytest.raises(InsightEditError, match="forged"):
        CheckpointStore(store.folder, b"o" * 32).verify(store.folder / "step-00000001")


def test_an_interrupted_writer_leaves_nothing_behind(store: CheckpointStore) -> None:
    write(store, 1)
    (store.temporary() / "half.pt").write_text("x")
    unmarked = write(store, 2)
    (unmarked.folder / COMMITTED_NAME).unlink()
    store.clean()
    newest = store.newest()
    assert newest is not None
    assert newest.info.step == 1
    assert not list(store.folder.glob("tmp-*"))
    assert write(store, 2) == store.newest()


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    key = checkpoint_key(tmp_path)
    assert checkpoint_key(tmp_path) == key
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(InsightEditError, match="not a checkpoint key"):
        checkpoint_key(tmp_path)


def test_only_the_same_training_resumes() -> None:
    from insightedit.platform.worker import check_resumable

    check_resumable(info(3), info(3), "run")
    other = CheckpointInfo(stage=2, step=3, position=24, world_size=4, fingerprint="f", trained="t")
    with pytest.raises(UsageError, match=r"with 4 workers and cannot go on with 2; set workers\.count to 4"):
        check_resumable(other, info(3), "run")
    other = CheckpointInfo(stage=2, step=3, position=24, world_size=2, fingerprint="g", trained="t")
    with pytest.raises(UsageError, match="another config"):
        check_resumable(other, info(3), "run")
