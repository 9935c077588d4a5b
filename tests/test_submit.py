"""Runs as jobs of a real Ray cluster of three nodes: refused, submitted, seen, cancelled, and outliving a head."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray_cluster import RayCluster, ray_cluster
from tiny_models import write_tiny_preset

from insightedit import cli
from insightedit.platform.journals import read_entries
from insightedit.platform.leases import is_owned, owner_of
from insightedit.platform.registry import Registry
from insightedit.platform.trainer import StageResult
from insightedit.platform.workdir import Workdir

SOURCE = Path(__file__).parents[1] / "src"
PLACES = ("--set", "data.place.group=data", "--set", "workers.place.group=train")


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out, self.err
        return json.loads(self.out)

    def assert_fails_with(self, code: int, *words: str) -> None:
        """One sentence on stderr that says these words, and nothing on stdout."""
        lines = self.err.strip().splitlines()
        assert (self.code, self.out, len(lines)) == (code, "", 1), self.err
        assert lines[0].startswith("Error: ")
        for word in words:
            assert word in lines[0]


class Client:
    """The command line in processes of its own: Ray keeps the first token that a process uses."""

    def __init__(self, cluster: RayCluster, workdir: Path) -> None:
        self.workdir = workdir
        self.environment = cluster.environment | {
            "PYTHONPATH": str(SOURCE),
            "RAY_API_SERVER_ADDRESS": cluster.address,
            "INSIGHTEDIT_WORKDIR": str(workdir),
        }

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "insightedit", *map(str, arguments)]
        settings = {name: value for name, value in (self.environment | environment).items() if value}
        return subprocess.Popen(
            command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.workdir.parent
        )

    def run(self, *arguments: str | Path, **environment: str) -> Ended:
        return ended(self.start(*arguments, **environment))

    def state(self, run: str) -> str:
        return self.run("status", run, "--json").json["state"]


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate()
    return Ended(process.returncode, out, err)


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(data=3, train=5) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Client:
    folder = tmp_path_factory.mktemp("submit") / "work"
    folder.mkdir()
    return Client(cluster, folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_preset(tmp_path_factory.mktemp("tiny"), steps=4)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nano", "--set", "stages.1.stepz=1"), 2, "there is no field stages.1.stepz"),
        (("nanno",), 4, "There is no preset 'nanno'"),
        (("nano", "--set", "model.sources.mllm=./llava"), 2, "model.sources.mllm is ./llava: on a cluster"),
        (("nano", "--set", "data.store=shards"), 2, "data.store is shards: on a cluster"),
        (("nano", "--workdir", "s3://bucket/work"), 2, "--workdir s3:/bucket/work must be a folder"),
        (("nano", "--name", "../x"), 2, "--name ../x must be letters"),
        (("nano",), 2, "Name the cluster with --address http://HOST:8265"),
    ],
)
def test_what_is_wrong_by_itself_is_told_without_a_cluster(
    arguments: tuple[str, ...], code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["submit", *arguments]) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"Error: {'nano.yaml: ' if 'stepz' in said else ''}{said}")


def test_what_cannot_run_is_told_in_one_sentence_and_nothing_is_started(client: Client) -> None:
    nano = ("submit", "nano")
    before = client.run("status", "--json").json
    started = {
        (5, "There is no Ray cluster at http://127.0.0.1:1"): client.start(*nano, "--address", "http://127.0.0.1:1"),
        (5, "refuses us", "RAY_AUTH_TOKEN"): client.start(*nano, RAY_AUTH_TOKEN="0" * 32),
        (5, "refuses us", "RAY_AUTH_MODE=token"): client.start(*nano, RAY_AUTH_MODE="disabled"),
        (2, "workers.count asks for 8 x 1 CPUs on nodes with group=train, and 5 fit"): client.start(
            *nano, "--set", "workers.count=8", "--set", "workers.place.group=train"
        ),
        (2, "asks for 2 x 1 CPUs and 1 GPUs, and 0 fit"): client.start(*nano, "--set", "workers.gpus=1"),
        (4, "has no run nothing"): client.start("logs", "nothing"),
    }
    for (code, *words), process in started.items():
        ended(process).assert_fails_with(code, *words)
    assert client.run("status", "--json").json == before


def test_a_dry_run_says_what_it_would_do(client: Client) -> None:
    planned = client.run("submit", "nano", "--name", "planned", *PLACES, "--dry-run", "--json").json
    assert planned["job"] is None
    assert planned["entrypoint"] == "python -m insightedit train config.yaml --name planned"
    assert planned["config"]["workers"]["place"] == {"group": "train"}
    assert "planned" not in {one["run"] for one in client.run("status", "--json").json}


def test_a_run_that_fails_by_itself_is_not_submitted_again(client: Client) -> None:
    missing = ("--set", "model.sources.mllm=/no/such/folder")
    failed = client.run("submit", "nano", "--name", "failing", *missing, "--supervise")
    last = failed.err.strip().splitlines()[-1]
    assert (failed.code, failed.out) == (4, ""), failed.err
    assert last.startswith("Error: Run failing failed: model.sources.mllm is /no/such/folder")
    told = client.run("status", "failing", "--json").json
    assert (told["state"], told["tries"], told["job"]["exit_code"]) == ("FAILED", 1, 4)
    assert "Error: model.sources.mllm is /no/such/folder" in client.run("logs", "failing", "--follow").out
    client.run("submit", "nano", "--name", "failing").assert_fails_with(2, "failing is taken", "another config")


def test_a_name_is_one_run_s_until_it_is_cancelled(client: Client) -> None:
    command = ("submit", "nano", "--name", "mine", *PLACES)
    # Of two that come at once, one is first.
    rivals = [client.start(*command, "--json") for _ in range(2)]
    first, second = sorted(map(ended, rivals), key=lambda rival: rival.code)
    assert (first.code, first.json["job"]) == (0, "mine")
    second.assert_fails_with(2, "The name mine is taken")
    client.run(*command).assert_fails_with(2, "The name mine is taken: job mine is ")
    until(lambda: owner_of(client.workdir / "runs" / "mine") is not None)
    client.run("train", "nano", "--name", "mine").assert_fails_with(2, "is being trained by job mine on ")
    assert client.run("cancel", "mine", "--json").json == {"run": "mine", "job": "mine", "cancelled": True}
    until(lambda: client.state("mine") == "STOPPED")
    until(lambda: not is_owned(client.workdir / "runs" / "mine"))
    again = client.run(*command, "--json").json
    assert again["job"] == "mine.try2"
    assert client.run("cancel", "mine", "--json").json["job"] == "mine.try2"
    assert {one["run"]: one["tries"] for one in client.run("status", "--json").json}["mine"] == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nano_trains_all_stages_on_three_nodes_and_registers_its_version(client: Client) -> None:
    few = [f"stages.{number}.steps=4" for number in (1, 2, 3)]
    few += [f"data.datasets.{name}.options.count=64" for name in ("captions", "questions", "edits")]
    settings = [word for setting in few for word in ("--set", setting)]
    submitted = client.run("submit", "nano", "--name", "nano", *PLACES, *settings, "--json").json
    assert submitted["job"] == "nano"
    said = client.run("logs", "nano", "--follow").out
    told = client.run("status", "nano", "--json").json
    assert told["state"] == "SUCCEEDED", said
    assert told["stages"] == {"1": "finished", "2": "finished", "3": "finished"}
    workdir = Workdir.open(client.workdir)
    version = Registry(workdir).resolve("challenger")
    assert told["model_version"] == version.version
    for number in (1, 2, 3):
        result = StageResult.read(workdir.runs / "nano" / f"stage-{number}")
        assert result is not None
        assert result.steps == 4
    # What ran was the wheel that travelled.
    tags = MlflowClient(workdir.tracking_uri).get_run(version.tags["run"]).data.tags
    assert "+" in tags["version.insightedit"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_supervised_run_outlives_the_head(cluster: RayCluster, client: Client, tiny: Path) -> None:
    steps = [f"stages.{number}.{what}" for number in (1, 2, 3) for what in ("steps=60", "checkpoint_every=2")]
    # Nano's shards, beside which these have other settings, lie in the work folder.
    settings = [word for setting in (*steps, f"data.store={tiny.parent / 'shards'}") for word in ("--set", setting)]
    run = client.workdir / "runs" / "tough"
    supervisor = client.start("submit", tiny, "--name", "tough", *PLACES, *settings, "--supervise", "--json")
    until(lambda: supervisor.poll() is not None or any(run.glob("stage-1/checkpoints/*/COMMITTED")), 600)
    cluster.lose_head()
    cluster.start()
    done = ended(supervisor)
    assert done.code == 0, done.err
    assert (done.json["status"], done.json["restarts"]) == ("SUCCEEDED", 1), done.err
    for number in (1, 2, 3):
        every = [entry["step"] for entry in read_entries(run / f"stage-{number}" / "curve.jsonl")]
        assert every == sorted(set(every))
        assert every[-1] == 60
