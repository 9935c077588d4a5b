"""Checkpoints: whole or not there, and nothing is opened that this run did not seal."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pickle
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from insightedit.platform.checkpoints import (
    COMMITTED_NAME,
    MANIFEST_NAME,
    Checkpoint,
    CheckpointInfo,
    CheckpointStore,
    Retention,
    checkpoint_key,
    run_key,
)
from insightedit.platform.errors import InsightEditError, UsageError

KEY = b"k" * 32
FILES = {"state/weights.pt": 0, "state/more-1.pt": 1, "random-0.pt": 0, "random-1.pt": 1}
"""By the rank that writes each."""


def info(step: int) -> CheckpointInfo:
    return CheckpointInfo(stage=2, step=step, position=8 * step, world_size=2, fingerprint="f", trained="t")


def content(name: str, step: int) -> bytes:
    return f"{name} {step} ".encode() * 50


def contribute(store: CheckpointStore, name: str, step: int, rank: int) -> None:
    def write_files(folder: Path) -> None:
        for file, owner in FILES.items():
            if owner == rank:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(content(file, step))

    store.contribute(name, rank, write_files)


def write(store: CheckpointStore, step: int, loss: float = 1.0) -> Path:
    """A whole checkpoint; its folder."""
    name = store.new_name(step)
    for rank in (1, 0):
        contribute(store, name, step, rank)
    store.seal(name, info(step), 2, {"L_IAA": loss})
    assert store.place.path is not None
    return store.place.path / name


def newest(store: CheckpointStore) -> Checkpoint:
    checkpoint = store.newest().checkpoint
    assert checkpoint is not None
    for file in FILES:
        assert (checkpoint.folder / file).read_bytes() == content(file, checkpoint.info.step)
    return checkpoint


def steps_of(store: CheckpointStore) -> list[int]:
    assert store.place.path is not None
    return sorted(int(path.name.split("-")[1]) for path in store.place.path.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", KEY, Retention(keep=3), retry_seconds=0)


def test_the_newest_is_found_and_says_what_it_is(store: CheckpointStore) -> None:
    assert store.newest().checkpoint is None
    for step in (5, 10):
        write(store, step)
    checkpoint = newest(store)
    assert checkpoint.info == info(10)
    files = {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.folder.rglob("*.*")}
    assert files == {*FILES, MANIFEST_NAME}
    assert store.newest().skipped == ()


def test_a_checkpoint_waits_for_every_rank(store: CheckpointStore) -> None:
    name = store.new_name(4)
    contribute(store, name, 4, 0)
    late = threading.Timer(0.3, contribute, (store, name, 4, 1))
    late.start()
    store.seal(name, info(4), 2)
    late.join()
    assert newest(store).info == info(4)
    # Given up, it is never sealed.
    other = store.new_name(5)
    contribute(store, other, 5, 0)
    store.stop.set()
    with pytest.raises(InsightEditError, match="given up"):
        store.seal(other, info(5), 2)
    assert newest(store).info == info(4)


def test_a_list_of_files_that_no_rank_signed_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    forger = CheckpointStore(tmp_path / "checkpoints", b"x" * 32)
    name = store.new_name(4)
    contribute(store, name, 4, 0)
    contribute(forger, name, 4, 1)
    with pytest.raises(InsightEditError, match="not sealed with this run's key"):
        store.seal(name, info(4), 2)
    # Nor is a list of another checkpoint.
    first, second = store.new_name(6), store.new_name(6)
    for rank in (0, 1):
        contribute(store, first, 6, rank)
    contribute(store, second, 6, 0)
    place = tmp_path / "checkpoints"
    (place / f"tmp-{first}" / "rank-1.json").rename(place / f"tmp-{second}" / "rank-1.json")
    with pytest.raises(InsightEditError, match="of another checkpoint"):
        store.seal(second, info(6), 2)
    assert store.newest().checkpoint is None


def test_old_ones_are_dropped(store: CheckpointStore) -> None:
    for step in range(1, 6):
        write(store, step)
    assert steps_of(store) == [3, 4, 5]


def test_the_best_are_kept_too(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", KEY, Retention(keep=1, keep_best=2, best_by="L_IAA"))
    for step, loss in enumerate((0.5, 0.2, 0.9, 0.3, float("nan"), 0.8)):
        write(store, step, loss)
    assert steps_of(store) == [1, 3, 5]
    write(store, 6, 0.1)
    assert steps_of(store) == [1, 6]


def test_damaged_ones_do_not_push_out_the_newest_that_verifies(tmp_path: Path) -> None:
    writer = CheckpointStore(tmp_path / "checkpoints", KEY, Retention(keep=9))
    folders = [write(writer, step) for step in range(1, 5)]
    for folder in folders[2:]:
        flip(folder)
    store = CheckpointStore(tmp_path / "checkpoints", KEY, Retention(keep=2))
    assert newest(store).info.step == 2
    write(store, 5)
    # 3 and 4 are left for whoever wants to know why.
    assert steps_of(store) == [2, 3, 4, 5]


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


def link_folder(folder: Path) -> None:
    (folder / "state").rename(folder.parent / "elsewhere")
    (folder / "state").symlink_to(folder.parent / "elsewhere")


def link_all(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def forge(folder: Path) -> None:
    """Change a file and seal it anew, without the key."""
    flip(folder)
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    content.pop("hmac")
    entry = content["files"]["state/weights.pt"]
    entry["sha256"] = hashlib.sha256((folder / "state" / "weights.pt").read_bytes()).hexdigest()
    seal = hmac.new(b"x" * 32, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()
    rewrite(folder, json.dumps({**content, "hmac": seal}))


def rewrite(folder: Path, manifest: str) -> None:
    """Another manifest with the marker that it would have."""
    (folder / MANIFEST_NAME).write_text(manifest)
    (folder / COMMITTED_NAME).write_text(hashlib.sha256(manifest.encode()).hexdigest())


def advance(folder: Path) -> None:
    rewrite(folder, (folder / MANIFEST_NAME).read_text().replace('"step": 2', '"step": 9'))


def rename(folder: Path) -> None:
    """An old state under a new name, as if it were the newest."""
    folder.rename(folder.with_name("step-00000009-00000000"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"weights.pt has 949 bytes, not 950"),
    "flipped": (flip, "differs from its manifest"),
    "missing file": (lambda folder: (folder / "random-0.pt").unlink(), "lacks or has too much: random-0.pt"),
    "added file": (lambda folder: (folder / "more.pt").write_text("x"), "lacks or has too much: more.pt"),
    "link": (link, "is a link"),
    "link to a folder": (link_folder, "is a link"),
    "link to all": (link_all, "is a link"),
    "pipe": (lambda folder: os.mkfifo(folder / "pipe"), "is a link or another thing"),
    "no marker": (lambda folder: (folder / COMMITTED_NAME).unlink(), "never finished"),
    "other marker": (lambda folder: (folder / COMMITTED_NAME).write_text(""), "COMMITTED is of another"),
    "no manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), "has no MANIFEST"),
    "torn manifest": (lambda folder: rewrite(folder, '{"stage": 2,'), "is not readable"),
    "other manifest": (lambda folder: rewrite(folder, "[]"), "is not readable"),
    "deep manifest": (lambda folder: rewrite(folder, "[" * 100_000), "is not readable"),
    "odd seal": (lambda folder: rewrite(folder, '{"hmac": "\\ud800"}'), "is not readable"),
    "another step": (advance, "forged"),
    "another name": (rename, "under another name"),
    "forged": (forge, "forged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_ones_are_skipped_with_a_reason(
    store: CheckpointStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, 1)
    hurt, reason = DAMAGE[damage]
    hurt(write(store, 2))
    found = store.newest()
    assert found.checkpoint is not None
    assert found.checkpoint.info == info(1)
    assert len(found.skipped) == 1
    assert reason in found.skipped[0]
    assert reason in caplog.text


def test_nothing_is_unpickled_before_it_is_verified(store: CheckpointStore, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "dead"),)

    folder = write(store, 1)
    (folder / "state" / "weights.pt").write_bytes(pickle.dumps(Canary()))
    assert store.newest().checkpoint is None
    assert not (tmp_path / "dead").exists()


def test_another_key_opens_nothing(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, 1)
    for key in (b"o" * 32, run_key(KEY, "run", 1)):
        found = CheckpointStore(tmp_path / "checkpoints", key).newest()
        assert found.checkpoint is None
        assert "not sealed with this run's key" in found.skipped[0]
    assert len({run_key(KEY, "run", 1), run_key(KEY, "run", 2), run_key(KEY, "other", 1), KEY}) == 4


def test_an_interrupted_writer_leaves_nothing_behind(store: CheckpointStore, tmp_path: Path) -> None:
    write(store, 1)
    contribute(store, store.new_name(2), 2, 1)
    (write(store, 2) / COMMITTED_NAME).unlink()
    store.clean()
    assert newest(store).info.step == 1
    assert steps_of(store) == [1]
    write(store, 2)
    assert newest(store).info.step == 2


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

    two = range(2, 3)
    check_resumable(info(3), info(3), "run", two)
    other = CheckpointInfo(stage=2, step=3, position=24, world_size=4, fingerprint="f", trained="t")
    with pytest.raises(UsageError, match=r"with 4 workers and cannot go on with 2; set workers\.count to 4"):
        check_resumable(other, info(3), "run", two)
    check_resumable(other, info(3), "run", range(2, 5))
    for world in (2, 4):
        other = CheckpointInfo(stage=2, step=3, position=24, world_size=world, fingerprint="g", trained="t")
        with pytest.raises(UsageError, match="another config"):
            check_resumable(other, info(3), "run", range(2, 5))
