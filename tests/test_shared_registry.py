"""A registry that a team shares: a tracking server with an object store behind it, which dies, and comes back."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from judged_versions import empty_pipeline, even_table, keep_evaluation
from mlflow.exceptions import MlflowException
from moto.server import ThreadedMotoServer
from tracking_servers import Breaking, PostgreSQL, TrackingServer, free_port

from insightedit import cli
from insightedit.jobs.promote import promote
from insightedit.platform.audit import ConflictError
from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.retention import prune
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import TRACKING_VARIABLE, Workdir

GATE = PromotionConfig(max_latency_ratio=0)
BUCKET = "insightedit-versions"


@pytest.fixture(scope="module", autouse=True)
def impatient() -> Iterator[None]:
    """A request that fails is not sent again: the tests say themselves when the server is back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of an S3 server with a bucket."""
    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = {**keys, "MLFLOW_S3_ENDPOINT_URL": url}
    bucket(environment).create_bucket(Bucket=BUCKET)
    yield environment
    server.stop()


def bucket(s3: dict[str, str]) -> Any:
    """A client with the keys that only the tracking server has."""
    return boto3.client(
        "s3",
        endpoint_url=s3["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"],
        region_name=s3["AWS_DEFAULT_REGION"],
    )


@pytest.mark.slow
@pytest.mark.skipif(not PostgreSQL.is_here(), reason="no initdb and postgres on the path")
def test_a_registry_on_postgresql_and_s3(s3: dict[str, str], tmp_path: Path) -> None:
    """What a team runs: two who promote at once through a server on PostgreSQL, versions in S3."""
    with PostgreSQL() as database:
        server = TrackingServer(tmp_path, database.url, f"s3://{BUCKET}/postgres", s3)
        server.start()
        try:
            ann, bob = (member(server.url, tmp_path / name) for name in ("ann", "bob"))
            versions = [add(ann, tmp_path / "pipeline", viescore) for viescore in (0.6, 0.8, 0.9)]
            promote(ann, versions[0].version, GATE, never, no_time)
            _race(ann, [version.version for version in versions[1:]])
            registry = Registry(bob)
            champion = registry.resolve("champion")
            assert registry.fetch(champion).is_relative_to(bob.versions)
            assert registry.rollback().to_version == versions[0].version
        finally:
            server.kill()


@pytest.fixture(scope="module")
def server(s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    folder = tmp_path_factory.mktemp("server")
    server = TrackingServer(folder, f"sqlite:///{folder}/mlflow.db", f"s3://{BUCKET}/versions", s3)
    server.start()
    yield server
    server.kill()


def member(server: str, folder: Path) -> Workdir:
    """The work folder of somebody who shares the registry."""
    workdir = Workdir.open(folder)
    (folder / "registry.yaml").write_text(f"tracking_uri: {server}\n")
    return workdir


def add(workdir: Workdir, folder: Path, viescore: float) -> ModelVersion:
    registry = Registry(workdir)
    run_id = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id
    tags = keep_evaluation(registry, workdir, even_table(viescore), "cases")
    return registry.register(empty_pipeline(folder), run_id, tags)


def never(version: ModelVersion) -> None:
    raise AssertionError(f"version {version.version} was judged again")


def no_time(folders: Sequence[Path]) -> Sequence[float]:
    raise AssertionError(f"{folders} were measured")


@pytest.fixture
def team(server: TrackingServer, tmp_path: Path) -> Iterator[tuple[Workdir, Workdir]]:
    """Two members with a work folder each, whose registry has one champion of 0.6 and a challenger of 0.8."""
    ann, bob = (member(server.url, tmp_path / name) for name in ("ann", "bob"))
    for viescore in (0.6, 0.8):
        add(ann, tmp_path / "pipeline", viescore)
    registry = Registry(ann)
    registry.promote(registry.versions()[1].version)
    yield ann, bob
    for name in ("insightedit", "insightedit-audit"):
        registry.client.delete_registered_model(name)


def test_what_one_member_registers_another_one_loads(team: tuple[Workdir, Workdir], s3: dict[str, str]) -> None:
    ann, bob = team
    theirs = Registry(bob)
    version = theirs.resolve("challenger")
    assert version.source.startswith("mlflow-artifacts:/")
    assert not version.folder.exists()
    folder = theirs.fetch(version)
    assert folder.is_relative_to(bob.versions)
    assert (folder / "model_index.json").read_text() == "{}"
    (folder / "model_index.json").write_text("{ }")
    assert (theirs.fetch(version) / "model_index.json").read_text() == "{}", "a damaged copy is fetched again"
    done = promote(bob, "challenger", GATE, never, no_time)
    assert Registry(ann).resolve("champion").version == done.champion == version.version

    client = bucket(s3)
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    (stored,) = (key for key in keys if f"{version.folder.name}/model_index.json" in key)
    client.put_object(Bucket=BUCKET, Key=stored, Body=b"{  }")
    shutil.rmtree(folder)
    with pytest.raises(InsightEditError, match=r"model_index\.json in .* has 4 bytes, not the 2"):
        theirs.fetch(version)
    third = add(ann, ann.root / "pipeline", 0.9)
    shutil.rmtree(third.folder)
    old = theirs.resolve("previous")
    theirs.rollback()
    assert prune(theirs, (), keep=0, line=0).deleted == (version.version,)
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert not [key for key in keys if version.folder.name in key]
    assert [key for key in keys if old.folder.name in key]


@pytest.mark.parametrize("storm", [False, pytest.param(True, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)])])
def test_a_registry_that_dies_anywhere_in_a_promotion_is_consistent_afterwards(
    server: TrackingServer, team: tuple[Workdir, Workdir], tmp_path: Path, storm: bool
) -> None:
    """The last request that it answers is one in the middle of writing; in a storm, each one there is.

    The next one may still reach the server, whose answer is then lost.
    """
    with Breaking(server.url) as proxy:
        cat = member(proxy.url, tmp_path / "cat")
        with proxy.dying_at(10_000, delivered=True):
            done = promote(cat, "challenger", GATE, never, no_time)
            whole = proxy.requests
        before, after = done.before, done.champion
        deaths = [(whole - 8, True), (whole - 3, False)]
        if storm:
            deaths = [(fatal, delivered) for fatal in range(1, whole + 1) for delivered in (True, False)]
        for fatal, delivered in deaths:
            _back_to(team[0], before)
            with proxy.dying_at(fatal, delivered=delivered), suppress(MlflowException, InsightEditError):
                promote(cat, after, GATE, never, no_time)
                assert proxy.requests < fatal, "it went on without a registry"
            registry = Registry(team[1])
            entries = registry.audit.entries()
            champion = registry.resolve("champion").version
            assert champion == entries[-1].to_version in (before, after)
            registry.audit.reconcile()
            assert registry.audit.astray() == []
            again = promote(cat, after, GATE, never, no_time)
            assert again.champion == after
            assert len(registry.audit.entries(entries[-1].number)) == (champion != after), "promoted twice"


def _back_to(workdir: Workdir, version: str | None) -> None:
    registry = Registry(workdir)
    while registry.resolve("champion").version != version:
        registry.rollback()


def test_a_registry_that_is_killed_is_told_in_one_sentence_and_goes_on(
    server: TrackingServer, team: tuple[Workdir, Workdir], capfd: pytest.CaptureFixture[str]
) -> None:
    ann, _ = team
    workdir = ["--workdir", str(ann.root)]
    quick = ["--set", "promotion.max_latency_ratio=0", "--set", "evaluation.scenes=40"]
    server.kill()
    for command in (["promote", *quick], ["rollback"], ["models", "list"]):
        capfd.readouterr()
        assert cli.run([*command, *workdir]) == 1
        said = capfd.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"Error: The registry at {server.url} does not answer")
    server.start()
    assert cli.run(["promote", *quick, *workdir]) == 0
    assert Registry(ann).audit.entries()[-1].action == "promote"


PROMOTE = """
import sys, time
from pathlib import Path
from insightedit.jobs.promote import promote
from insightedit.platform.config import PromotionConfig
from insightedit.platform.errors import InsightEditError
from insightedit.platform.workdir import Workdir

workdir, version = Workdir.open(sys.argv[1]), sys.argv[2]

def measure(folders):
    (workdir.root / f"decided-{version}").touch()
    while not (workdir.root / "go").exists():
        time.sleep(0.001)
    return [0.1 for _ in folders]

try:
    done = promote(workdir, version, PromotionConfig(), None, measure)
except InsightEditError as error:
    print(type(error).__name__, error)
else:
    print("promoted", done.champion)
"""


def test_of_two_who_promote_at_once_one_wins_and_the_other_is_told(
    team: tuple[Workdir, Workdir], tmp_path: Path
) -> None:
    """Two processes, both past all gates before either of them moves anything."""
    ann, _ = team
    third = add(ann, tmp_path / "pipeline", 0.9)
    second = str(int(third.version) - 1)
    _race(ann, [second, third.version])


def _race(workdir: Workdir, versions: Sequence[str]) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", PROMOTE, str(workdir.root), version], stdout=subprocess.PIPE, text=True)
        for version in versions
    ]
    while len(list(workdir.root.glob("decided-*"))) < len(versions):
        assert all(process.poll() is None for process in running)
        time.sleep(0.01)
    (workdir.root / "go").touch()
    said = sorted(process.communicate(timeout=120)[0].strip() for process in running)
    assert said[0].startswith("ConflictError Version ")
    assert "came first" in said[0]
    registry = Registry(workdir)
    champion = registry.resolve("champion").version
    assert said[1] == f"promoted {champion}"
    assert champion in versions
    assert [entry.to_version for entry in registry.audit.entries()][1:] == [champion]
    assert registry.audit.astray() == []


def test_whoever_decided_on_an_older_champion_is_told(team: tuple[Workdir, Workdir], tmp_path: Path) -> None:
    ann, bob = team
    third = add(ann, tmp_path / "pipeline", 0.9)

    def overtaken(folders: Sequence[Path]) -> list[float]:
        Registry(bob).promote(third.version)
        return [0.1 for _ in folders]

    second = str(int(third.version) - 1)
    with pytest.raises(ConflictError, match=rf"Version {second} did not become champion: .* came first"):
        promote(ann, second, PromotionConfig(), never, overtaken)
    assert Registry(ann).resolve("champion").version == third.version


def test_an_alias_that_somebody_moved_is_told_and_put_back(team: tuple[Workdir, Workdir]) -> None:
    ann, _ = team
    registry = Registry(ann)
    challenger = registry.resolve("challenger").version
    registry.client.set_registered_model_alias("insightedit", "champion", challenger)
    done = promote(ann, challenger, GATE, never, no_time)
    assert done.before != challenger, "the alias, not the log, was believed"
    (said,) = done.told
    assert said.startswith(f"The alias champion is at version {challenger}, but at version {done.before} by entry 1 of")
    assert registry.audit.astray() == []


def test_the_file_that_names_the_registry_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = Workdir.open(tmp_path / "work")
    assert workdir.tracking_uri == f"sqlite:///{workdir.root}/mlflow.db"
    assert workdir.artifact_root == workdir.artifacts.as_uri()
    file = workdir.root / "registry.yaml"
    file.write_text("tracking_uri: postgresql://db/mlflow\nartifacts: s3://bucket/x\n")
    assert (workdir.tracking_uri, workdir.artifact_root) == ("postgresql://db/mlflow", "s3://bucket/x")
    monkeypatch.setenv(TRACKING_VARIABLE, "http://other:5000")
    assert workdir.tracking_uri == "http://other:5000"
    monkeypatch.delenv(TRACKING_VARIABLE)
    for text, sentence in (
        ("tracking: x", "must have tracking_uri"),
        ("- x", "must have tracking_uri"),
        ("tracking_uri: [", "must have tracking_uri"),
        ("tracking_uri: postgresql://me:hidden@db/mlflow", "holds a password"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=sentence) as raised:
            _ = workdir.tracking_uri
        assert "hidden" not in str(raised.value)
        assert "\n" not in str(raised.value)
