"""What lies in deploy/: an image without root that has the tested versions, and examples that the code has made."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_schemas import check_manifest
from packaging.specifiers import SpecifierSet
from test_layout import FOLDERS, constraints

from insightedit.cli import run
from insightedit.platform.config import RunConfig, load_preset
from insightedit.platform.kube import WORK_FOLDER

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
RUN = DEPLOY / "kuberay" / "run.yaml"


# -- the image ------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Every instruction of the Dockerfile, with its lines joined."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def values(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def copied() -> list[str]:
    return [source for rest in values("COPY") for source in shlex.split(rest)[1:-1]]


def test_the_image_runs_without_root() -> None:
    assert values("USER"), "without USER the base decides"
    names = [name for name, _ in instructions()]
    for user in values("USER"):
        assert int(user) > 0
    assert names.index("USER") < names.index("RUN")


def test_the_image_has_the_tested_ray_and_a_python_that_the_code_is_written_for() -> None:
    (base,) = values("ARG")
    match = re.fullmatch(r"BASE=rayproject/ray:([\d.]+)-py3(\d+)-gpu", base)
    assert match, base
    assert match[1] == version("ray") == constraints()["ray"]
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.search(r'requires-python = "(.+)"', project)
    assert wanted
    assert SpecifierSet(wanted[1]).contains(f"3.{match[2]}")
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert base == f"BASE={cluster['docker']['image']}"


def test_the_image_installs_the_tested_versions() -> None:
    installs = [rest for rest in values("RUN") if "pip install" in rest]
    assert installs
    assert all("--constraint constraints.txt" in rest for rest in installs)


def test_image_and_cluster_have_what_settings_may_ask_for() -> None:
    """As `state.url`, which gateways on several machines need, wants the package for Redis."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"dev"}
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for command in (values("RUN")[-1], cluster["setup_commands"][-1]):
        found = re.search(r"'\.\[(.+)\]'", command)
        assert found, command
        assert set(found[1].split(",")) == extras


def test_the_image_gets_what_a_wheel_is_built_from() -> None:
    sources = copied()
    assert all((ROOT / source).exists() for source in sources)
    assert {*FOLDERS, "src", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= set(sources)
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(sources)


def test_the_images_work_folder_is_where_the_pods_have_it() -> None:
    assert any(f"INSIGHTEDIT_WORKDIR={WORK_FOLDER}" in rest for rest in values("ENV"))


# -- the examples ---------------------------------------------------------------------------------------------------


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text()))


def test_the_serving_example_is_what_the_command_writes(tmp_path: Path) -> None:
    out = tmp_path / "serve.yaml"
    assert run(["serve", "up", "--kube", "--config", str(RUN), "--model", "1", "--out", str(out)]) == 0
    assert out.read_text() == (DEPLOY / "kuberay" / "serve.yaml").read_text(), "make kube-examples"


def test_the_training_example_is_what_the_command_writes(tmp_path: Path) -> None:
    out = tmp_path / "train.yaml"
    assert run(["submit", str(RUN), "--kube", "--name", "nano", "--out", str(out)]) == 0
    configs: list[RunConfig] = []
    objects: list[Any] = []
    for file in (out, DEPLOY / "kuberay" / "train.yaml"):
        config_map, job = yaml.safe_load_all(file.read_text())
        # As it is read, so that a field that gets a default does not count as a change.
        written = tmp_path / "run.yaml"
        written.write_text(config_map.pop("data")["run.yaml"])
        configs.append(load_preset(written))
        objects.append([config_map, job])
    assert objects[0] == objects[1], "make kube-examples"
    assert configs[0] == configs[1], "make kube-examples"


@pytest.mark.parametrize("name", ["train.yaml", "serve.yaml"])
def test_the_examples_are_valid(name: str) -> None:
    check_manifest(documents(name)[-1])


def test_the_claim_is_the_one_that_pods_mount() -> None:
    (claim,) = documents("storage.yaml")
    assert claim["metadata"]["name"] == load_preset(RUN).kube.work_claim
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_monitor_finds_every_pod() -> None:
    (monitor,) = documents("monitor.yaml")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,), (_, job) = documents("serve.yaml"), documents("train.yaml")
    clusters = [service["spec"]["rayClusterConfig"], job["spec"]["rayClusterSpec"]]
    groups = [group for one in clusters for group in (one["headGroupSpec"], *one["workerGroupSpecs"])]
    for group in groups:
        assert wanted <= group["template"]["metadata"]["labels"].items()


# -- the command ----------------------------------------------------------------------------------------------------


def test_settings_of_pods_and_of_the_server_are_told_apart(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "7", "--name", "online", "--set", "kube.image=mine:1", "--set", "editor.max_replicas=5"]
    assert run(["serve", "up", "--kube", *arguments]) == 0
    service = yaml.safe_load(capfd.readouterr().out)
    assert service["metadata"]["name"] == "online"
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"] == "mine:1"
    _, gateway = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert gateway["args"]["settings"]["editor"]["max_replicas"] == 5
    assert gateway["args"]["table"]["default"] == "7"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve", "up", "--kube"], 4, "There is no champion yet"),
        (["serve", "up", "--kube", "--model", "1", "--port", "9000"], 2, "--port is for a server on this machine"),
        (["serve", "up", "--kube", "--model", "1", "--name", "My Editor"], 2, "cannot be a name in Kubernetes"),
        (["serve", "up", "--kube", "--model", "1", "--set", "kube.imag=x"], 2, "did you mean image"),
        (["serve", "up", "--out", "x.yaml"], 2, "--out is for a RayService; add --kube or leave it out"),
        (["submit", "nano", "--kube", "--name", "my_run"], 2, "cannot be a name in Kubernetes"),
        (["submit", "nano", "--kube", "--supervise"], 2, "KubeRay sees a run through"),
        (["submit", "nano", "--out", "x.yaml"], 2, "--out is for a RayJob; add --kube or leave it out"),
    ],
)
def test_wrong_uses_are_told(
    arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(arguments) == code
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_run_is_printed_where_no_file_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "nano", "--kube", "--set", "kube.queue=team-a"]) == 0
    config_map, job = yaml.safe_load_all(capfd.readouterr().out)
    assert config_map["metadata"]["name"] == job["metadata"]["name"]
    assert job["metadata"]["name"].startswith("nano-")
    assert job["spec"]["suspend"] is True


def test_a_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serve.yaml"
    assert run(["serve", "up", "--kube", "--model", "1", "--out", str(out), "--dry-run"]) == 0
    assert "would write RayService insightedit" in capfd.readouterr().out
    assert not out.exists()
