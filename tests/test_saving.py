"""Saving behind training, with DeepSpeed's real files: to folders and to a real S3 server that may fail."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
import toy_training as toy
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file
from test_training import plan
from torch import Tensor

from insightedit.platform import storage
from insightedit.platform.checkpoints import CheckpointInfo, CheckpointStore, Retention
from insightedit.platform.cluster import connected
from insightedit.platform.config import CheckpointsConfig
from insightedit.platform.engine import StageLosses, load_state, snapshot_state, start_engine, trained_parameters
from insightedit.platform.errors import InsightEditError
from insightedit.platform.saving import CheckpointSaver
from insightedit.platform.storage import Store, retried
from insightedit.platform.trainer import WEIGHTS_NAME, train_stages

KEY = b"k" * 32
BUCKET = "insightedit-checkpoints"
CONFIG = toy.toy_config({2: {"steps": 50}}).stages[2]
NAMES = ("L_MLLM", "L_IAA", "L_diff1")


pytestmark = pytest.mark.usefixtures("one_rank")


class Training:
    """A toy model under DeepSpeed, and its checkpoints."""

    def __init__(self, store: CheckpointStore, *, wait: bool = False) -> None:
        torch.manual_seed(0)
        self.model = toy.ToyModel(0.3)
        self.model.begin_stage(2)
        self.engine: Any = start_engine(
            StageLosses(self.model, 2, CONFIG, NAMES, 1.0),
            CONFIG,
            toy.ToyTask().part_of,
            micro_batch=4,
            accumulation=1,
            device=torch.device("cpu"),
        )
        self.store = store
        self.saver = CheckpointSaver(store, 0, 1, wait=wait)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            arrays = toy.toy_arrays(4, self.step, 1.0)
            batch = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
            batch["seed"] = torch.arange(4) + 10 * self.step
            loss, _ = self.engine(batch, torch.full((3,), 4.0))
            self.engine.backward(loss)
            self.engine.step()
            self.step += 1

    def save(self, loss: float = 1.0) -> None:
        info = CheckpointInfo(
            stage=2, step=self.step, position=4 * self.step, world_size=1, fingerprint="f", trained="t"
        )
        self.saver.save(
            self.store.new_name(self.step),
            info,
            lambda: snapshot_state(self.engine, 0),
            losses={"L_IAA": loss},
            progress={"curve": [self.step]},
        )

    def resume(self) -> tuple[str, ...]:
        """Go on from the newest checkpoint; what was skipped."""
        self.store.clean()
        found = self.store.newest()
        if found.checkpoint is not None:
            load_state(self.engine, found.checkpoint.folder, 0)
            self.step = found.checkpoint.info.step
            assert found.checkpoint.progress() == {"curve": [self.step]}
            self.store.release()
        return found.skipped

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in trained_parameters(self.model).items()}

    def close(self) -> None:
        self.saver.abandon()
        self.engine.destroy()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Begins trainings and ends them."""
    running: list[Training] = []

    def begin(place: Path | Store, *, wait: bool = False, keep: int = 2, retry_seconds: float = 0) -> Training:
        store = CheckpointStore(
            place, KEY, Retention(keep=keep), scratch=tmp_path / "scratch", retry_seconds=retry_seconds
        )
        running.append(Training(store, wait=wait))
        return running[-1]

    yield begin
    for training in running:
        training.close()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def undisturbed(start: Callable[..., Training], folder: Path, steps: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Weights after numbers of steps, of a training without checkpoints."""
    training = start(folder)
    weights: list[dict[str, Tensor]] = []
    for step in steps:
        training.train(step - training.step)
        weights.append(training.weights())
    return weights


# -- in a folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [False, True])
def test_what_is_saved_is_the_state_when_it_was_asked_for(
    start: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    (expected,) = undisturbed(start, tmp_path / "other", (9,))
    training = start(tmp_path / "checkpoints", wait=wait)
    training.train(3)
    gate = threading.Event()
    contribute = training.store.contribute

    def slow(*args: Any) -> None:
        assert wait or gate.wait(30)
        contribute(*args)

    monkeypatch.setattr(training.store, "contribute", slow)
    training.save()
    before = training.saver.stalled
    # Nothing is written before these steps, and they are not in it.
    training.train(4)
    assert (training.store.newest().checkpoint is not None) == wait
    gate.set()
    training.saver.finish()
    assert training.saver.stalled > before > 0
    resumed = start(tmp_path / "checkpoints")
    assert resumed.resume() == ()
    assert resumed.step == 3
    resumed.train(6)
    assert same(resumed.weights(), expected)


def test_one_save_waits_for_the_one_before(
    start: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(tmp_path / "checkpoints")
    seal = training.store.seal
    monkeypatch.setattr(training.store, "seal", lambda *args: (time.sleep(0.4), seal(*args)))
    for _ in range(2):
        training.train(1)
        training.save()
    assert training.saver.stalled > 0.3
    training.saver.finish()
    found = training.store.newest().checkpoint
    assert found is not None
    assert found.info.step == 2


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def canary(path: Path) -> None:
    """A pickle that leaves a mark where it is opened."""

    class Canary:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, (str(path.parents[2] / "dead"),)

    path.write_bytes(pickle.dumps(Canary()))


HURT: dict[str, Callable[[Path], object]] = {
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, -1),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "removed": lambda path: path.unlink(),
    "added": lambda path: path.with_name(path.name + ".more").touch(),
    "link": lambda path: (path.rename(path.parents[1] / "aside"), path.symlink_to(path.parents[1] / "aside")),
    "canary": canary,
}


def test_no_file_can_be_changed_in_any_way(start: Callable[..., Training], tmp_path: Path) -> None:
    (first,) = undisturbed(start, tmp_path / "other", (2,))
    training = start(tmp_path / "whole")
    for _ in range(2):
        training.train(2)
        training.save()
    training.saver.finish()
    last = training.store.newest().checkpoint
    assert last is not None
    files = sorted(path.relative_to(last.folder) for path in last.folder.rglob("*") if path.is_file())
    # Weights, optimiser, random states, progress, manifest, marker.
    assert len(files) == 6
    place = tmp_path / "hurt"
    other = start(place)
    for file in files:
        for name, hurt in HURT.items():
            shutil.copytree(tmp_path / "whole", place)
            hurt(place / last.name / file)
            if name == "empty" and (last.folder / file).stat().st_size == 0:
                continue
            # Where the marker is gone, `clean` has removed what was not finished.
            skipped = other.resume()
            assert len(skipped) == (0 if (file.name, name) in {("COMMITTED", "removed")} else 1), (file, name)
            assert all(str(place / last.name) in reason for reason in skipped)
            assert other.step == 2
            assert same(other.weights(), first), (file, name)
            assert not (place / "dead").exists()
            assert not (tmp_path / "dead").exists()
            shutil.rmtree(place)


def test_a_writer_that_dies_at_any_step_leaves_no_bad_checkpoint(
    start: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third = undisturbed(start, tmp_path / "other", (2, 4, 6))
    operation = 0
    while True:
        place = tmp_path / f"checkpoints-{operation}"
        training = start(place, keep=1)
        training.train(2)
        training.save()
        training.saver.finish()
        with monkeypatch.context() as patch:
            died = die_at(patch, operation)
            training.train(2)
            training.save()
            if not died(training):
                break
        resumed = start(place, keep=1)
        assert resumed.resume() == ()
        assert resumed.step in (2, 4)
        if resumed.step == 2:
            assert same(resumed.weights(), first)
        resumed.train(6 - resumed.step)
        assert same(resumed.weights(), third)
        resumed.save()
        resumed.saver.finish()
        assert [path.name.split("-")[1] for path in place.iterdir()] == ["00000006"]
        operation += 1
    # Files written, hashed, moved, listed, sealed, renamed, marked; the old one unmarked and removed.
    assert operation > 15


class Killed(BaseException):
    """Stands for a process that ends."""


def die_at(patch: pytest.MonkeyPatch, operation: int) -> Callable[[Training], bool]:
    """End the thread that writes at one of its changes to the disk; half of a file may be written then."""
    left = [operation]

    def dying(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name == "checkpoint":
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)

    for owner, name in (
        (torch, "save"),
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "mkdir"),
    ):
        dying(owner, name)

    def died(training: Training) -> bool:
        try:
            training.saver.finish()
        except InsightEditError as error:
            return isinstance(error.__cause__, Killed)
        return False

    return died


def check_until_it_fails(saver: CheckpointSaver) -> None:
    for _ in range(200):
        saver.check()
        time.sleep(0.05)


def test_an_error_behind_training_is_raised_in_it(
    start: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start(tmp_path / "checkpoints")

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    training.save()
    message = r"^A checkpoint could not be written\. Storage failed for 0 s: No space left on device"
    with pytest.raises(InsightEditError, match=message):
        check_until_it_fails(training.saver)
    training.saver.check()


def test_a_failing_disk_is_tried_again(
    start: Callable[..., Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_FIRST_DELAY", 0.01)
    training = start(tmp_path / "checkpoints", retry_seconds=20)
    failures: list[str] = []
    chance = random.Random(1)
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (torch, "save")):
        original = getattr(owner, name)

        def flaky(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            if chance.random() < 0.25:
                failures.append(str(original))
                raise OSError("stale file handle")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, flaky)
    training.train(1)
    training.save()
    training.saver.finish()
    monkeypatch.undo()
    assert len(failures) > 3
    assert start(tmp_path / "checkpoints").resume() == ()
    assert [path.name.split("-")[0] for path in (tmp_path / "checkpoints").iterdir()] == ["step"]


def test_trying_again_ends() -> None:
    calls: list[float] = []

    def fail() -> None:
        calls.append(time.monotonic())
        raise OSError("no")

    with pytest.raises(InsightEditError, match=r"^Storage failed for [12] s: no"):
        retried(fail, 2.0)
    assert len(calls) == 3
    assert np.diff(calls) == pytest.approx([0.5, 1.0], abs=0.3)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(InsightEditError, match="no"):
        retried(fail, 600.0, stop)


# -- in an object store ---------------------------------------------------------------------------------------------


class Door:
    """A proxy on loopback before a server: open, or it hangs up on everybody."""

    def __init__(self, port: int) -> None:
        self.closed = False
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self.closed:
                # An answer as a busy store gives it.
                threading.Thread(target=self._refuse, args=(client,), daemon=True).start()
                continue
            server = socket.create_connection(("127.0.0.1", self._port))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _refuse(self, client: socket.socket) -> None:
        with client:
            client.settimeout(1)
            client.recv(1 << 16)
            client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.closed:
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()

    def stop(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    """The way to an S3 server; credentials and endpoint are in the environment, as on a cluster."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    door = Door(port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=BUCKET)
        yield door
    door.stop()
    server.stop()


@pytest.fixture
def bucket(door: Door, tmp_path: Path) -> Store:
    del door
    return Store.at(f"s3://{BUCKET}/{tmp_path.name}")


def files_by_name(place: Store) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in place.sizes():
        name, _, file = path.partition("/")
        found.setdefault(name, set()).add(file)
    return found


def test_an_object_store_resumes_bit_for_bit(start: Callable[..., Training], bucket: Store, tmp_path: Path) -> None:
    (expected,) = undisturbed(start, tmp_path / "other", (9,))
    training = start(bucket)
    for _ in range(3):
        training.train(2)
        training.save()
    training.saver.finish()
    found = files_by_name(bucket)
    assert sorted(name.split("-")[1] for name in found) == ["00000004", "00000006"]
    resumed = start(bucket)
    assert resumed.resume() == ()
    assert resumed.step == 6
    resumed.train(3)
    assert same(resumed.weights(), expected)
    # No copy is left on this machine, and what there was only its owner could open.
    scratch = tmp_path / "scratch"
    assert not [path for path in scratch.rglob("*") if path.is_file() and path.name != "lock"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in scratch.iterdir())


def test_objects_cannot_be_changed_in_any_way(start: Callable[..., Training], bucket: Store, tmp_path: Path) -> None:
    (first,) = undisturbed(start, tmp_path / "other", (2,))
    training = start(bucket)
    for _ in range(2):
        training.train(2)
        training.save()
    training.saver.finish()
    last = sorted(files_by_name(bucket))[-1]
    remote = bucket.child(last)
    for file in files_by_name(bucket)[last]:
        data = remote.read(file)
        for changed in (b"x" + data[1:], data[:-1], b"", data + b"\0"):
            remote.write(file, changed)
            assert len(training.resume()) == 1, file
            assert training.step == 2
            assert same(training.weights(), first)
        remote.write(file, data)
    remote.write("more", b"x")
    assert "has too much: more" in training.resume()[0]
    remote.remove("more")
    assert training.resume() == ()
    assert training.step == 4


def test_what_an_interrupted_upload_left_is_removed(start: Callable[..., Training], bucket: Store) -> None:
    training = start(bucket)
    training.train(2)
    training.save()
    training.saver.finish()
    bucket.child("step-00000009-0abc").write("state/half.pt", b"x")
    assert training.resume() == ()
    assert training.step == 2
    assert len(files_by_name(bucket)) == 1


def test_training_goes_on_while_a_store_fails(
    start: Callable[..., Training], bucket: Store, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_LONGEST_DELAY", 1.0)
    (expected,) = undisturbed(start, tmp_path / "other", (9,))
    training = start(bucket, retry_seconds=60)
    training.train(2)
    training.save()
    training.saver.finish()
    stalled = training.saver.stalled
    door.closed = True
    try:
        training.train(2)
        training.save()
        training.train(5)
        training.saver.check()
        assert training.saver.stalled - stalled < 2
        opened = threading.Timer(3, lambda: setattr(door, "closed", False))
        opened.start()
        training.saver.finish()
    finally:
        door.closed = False
    assert same(training.weights(), expected)
    resumed = start(bucket, retry_seconds=60)
    # It fails again while it is read: it is waited for, and no older checkpoint is taken.
    door.closed = True
    threading.Timer(3, lambda: setattr(door, "closed", False)).start()
    assert resumed.resume() == ()
    assert resumed.step == 4
    resumed.train(5)
    assert same(resumed.weights(), expected)


def test_a_store_that_stays_away_is_told(start: Callable[..., Training], bucket: Store, door: Door) -> None:
    training = start(bucket, retry_seconds=1)
    training.train(1)
    door.closed = True
    try:
        training.save()
        message = r"^A checkpoint could not be written\. Storage failed for \d+ s: s3://.* cannot be reached: "
        with pytest.raises(InsightEditError, match=message):
            training.saver.finish()
        with pytest.raises(InsightEditError, match=r"^Storage failed for \d+ s: s3://"):
            training.store.newest()
    finally:
        door.closed = False
    training.save()
    training.saver.finish()
    assert training.resume() == ()


@pytest.mark.slow
def test_a_killed_worker_goes_on_from_an_object_store(tmp_path: Path, bucket: Store) -> None:
    stages = {1: {"steps": 9, "checkpoint_every": 4}, 2: {"steps": 9, "checkpoint_every": 4, "zero": 3}}
    weights: list[dict[str, Tensor]] = []
    with connected(cpus=8):
        for name, checkpoints in (
            ("whole", CheckpointsConfig(upload="wait")),
            ("killed", CheckpointsConfig(store=bucket.uri, scratch=str(tmp_path / "scratch"))),
        ):
            config = toy.toy_config(stages, max_failures=1).model_copy(update={"checkpoints": checkpoints})
            mark = str(tmp_path / "killed")
            training = plan(tmp_path, config, name, dropout=0.3, die_at=(2, 7, mark) if checkpoints.store else None)
            train_stages(training)
            weights.append(load_file(training.stage_folder(2) / WEIGHTS_NAME))
    assert (tmp_path / "killed").exists()
    assert same(*weights)
    assert len(files_by_name(bucket.child("killed").child("stage-2"))) == 2
    assert not (tmp_path / "runs" / "killed" / "stage-2" / "checkpoints").exists()
