"""The command line: names, exit codes, one sentence for each error, and results that a program can read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import dataset_folders
import pytest
import yaml
from empty_registry import make_workdir
from judged_versions import empty_pipeline, even_table, keep_evaluation
from PIL import Image
from tiny_models import build_sources, tiny_config, write_tiny_preset

from insightedit import cli
from insightedit.model.insightedit import build_pipeline
from insightedit.platform import doctor
from insightedit.platform.errors import ClusterError, GateRefusedError, NotFoundError, UsageError
from insightedit.platform.registry import Registry
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir


class Outcome:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.out, self.err
        return json.loads(self.out)

    def assert_fails_with(self, code: int, *words: str) -> None:
        """The last line on stderr is the error and says these words, and nothing is on stdout."""
        last = self.err.strip().splitlines()[-1]
        assert (self.code, self.out, last.startswith("Error: ")) == (code, "", True), self.err
        for word in words:
            assert word in last
        assert "Traceback" not in self.err

    def assert_one_sentence(self, code: int, *words: str) -> None:
        """The error is one line on stderr that says these words, and nothing is on stdout."""
        self.assert_fails_with(code, *words)
        assert len(self.err.strip().splitlines()) == 1, self.err


@pytest.fixture
def insightedit(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process."""

    def run(*arguments: str | Path) -> Outcome:
        # DeepSpeed looks for a compiler's libraries when it is imported; the linker then says what is not there.
        import insightedit.platform.engine  # noqa: F401  # pyright: ignore[reportUnusedImport]

        capfd.readouterr()  # What that and making the fixtures printed.
        code = cli.run([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture
def no_model(own_work_folder: Path) -> Path:
    """A work folder with an empty registry."""
    return make_workdir(own_work_folder).root


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "teal").save(file)
    return file


def commands(group: click.Command = cli.cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(group, click.Group):
        return [path]
    return [found for name, command in group.commands.items() for found in commands(command, (*path, name))]


def command_at(path: tuple[str, ...]) -> click.Command:
    command: click.Command = cli.cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


def options(path: tuple[str, ...]) -> set[str]:
    return {option for parameter in command_at(path).params for option in parameter.opts}


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_explains_itself_and_knows_the_work_folder(path: tuple[str, ...], insightedit: Any) -> None:
    shown = insightedit(*path, "--help")
    assert shown.code == 0
    assert "Usage: insightedit" in shown.out
    assert {"--workdir", "--json"} <= options(path)
    assert command_at(path).help


def test_help_is_quick() -> None:
    """None of the heavy packages is imported before a command needs it."""
    command = (
        "import sys; from insightedit.cli import run; run(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    for heavy in ("torch", "ray", "mlflow", "transformers", "diffusers", "numpy", "pydantic", "fastapi"):
        assert f"'{heavy}'" not in done.stderr
    assert seconds < 3, "0.1 s on an idle machine"


def test_a_saved_model_prints_nothing_among_the_results() -> None:
    """DeepSpeed, which is loaded whenever a model is saved, says on stdout that there is no GPU."""
    command = (
        "import sys, tempfile, torch; from insightedit.cli import run; run(['--version']);"
        "from transformers import CLIPTextConfig, CLIPTextModel;"
        "small = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1);"
        "CLIPTextModel(small).save_pretrained(tempfile.mkdtemp()); assert 'deepspeed' in sys.modules"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "insightedit, version 0.1.0\n"


def test_installed_command_says_its_version() -> None:
    command = Path(sys.executable).with_name("insightedit")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "insightedit, version 0.1.0\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (GateRefusedError, 3), (NotFoundError, 4), (ClusterError, 5)],
)
def test_errors_have_their_exit_codes(
    error: type[Exception], code: int, insightedit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_workdir: object) -> None:
        raise error("It is so; do this.")

    monkeypatch.setattr(doctor, "examine", fail)
    insightedit("doctor").assert_one_sentence(code, "It is so; do this.")


def test_interruption_is_130(insightedit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_workdir: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    outcome = insightedit("doctor")
    assert outcome.code == 130
    assert outcome.err.strip() == "Error: Interrupted."


def test_a_fault_of_ours_is_one_sentence_and_a_file(
    insightedit: Any, monkeypatch: pytest.MonkeyPatch, own_work_folder: Path
) -> None:
    def fail(_workdir: object) -> None:
        raise RuntimeError("a wheel\ncame off")

    monkeypatch.setattr(doctor, "examine", fail)
    insightedit("doctor").assert_one_sentence(1, "RuntimeError: a wheel came off.", str(own_work_folder / "logs"))
    (log,) = (own_work_folder / "logs").glob("error-*.log")
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["models", "bogus"], ["models", "list", "--bogus"], ["edit", "a.png"]]
)
def test_wrong_use_is_2(arguments: list[str], insightedit: Any) -> None:
    insightedit(*arguments).assert_one_sentence(2)


def test_work_folder_may_stand_before_or_after_the_command(insightedit: Any, tmp_path: Path) -> None:
    for place in ("before", "after"):
        folder = tmp_path / place
        option = ["--workdir", folder]
        arguments = ["serve", "status", "--json"]
        assert insightedit(*(option + arguments if place == "before" else arguments + option)).json["state"] == "down"
        assert folder.is_dir()


def test_work_folder_that_is_a_file(insightedit: Any, picture: Path) -> None:
    insightedit("models", "list", "--workdir", picture).assert_one_sentence(2, "--workdir", str(picture))


# -- doctor ---------------------------------------------------------------------------------------------------------


def findings(insightedit: Any) -> tuple[int, dict[str, Any]]:
    outcome = insightedit("doctor", "--json")
    return outcome.code, {finding["name"]: finding for finding in outcome.json}


def test_doctor_is_content_here(insightedit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, found = findings(insightedit)
    assert code == 0
    assert {"python", "torch", "ray", "deepspeed", "mlflow", "cores", "memory", "disk", "workdir", "ray token"} <= set(
        found
    )
    assert all(finding["verdict"] != "failed" for finding in found.values())


def test_doctor_finds_a_version_out_of_range(insightedit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(name: str) -> str:
        return "2.59.0" if name == "ray" else real(name)

    real = doctor.version
    monkeypatch.setattr(doctor, "version", older)
    code, found = findings(insightedit)
    assert code == 1
    assert found["ray"]["verdict"] == "failed"
    assert found["torch"]["verdict"] == "ok"
    assert ">=2.60" in found["ray"]["advice"]


@pytest.mark.parametrize(
    ("environment", "verdict"),
    [
        ({}, "failed"),
        ({"RAY_AUTH_MODE": "token"}, "failed"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, "ok"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"}, "failed"),
    ],
)
def test_doctor_wants_a_token_for_a_remote_cluster(
    environment: dict[str, str], verdict: str, insightedit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, found = findings(insightedit)
    assert found["ray token"]["verdict"] == verdict
    assert "secret" not in json.dumps(found)
    assert code == (1 if verdict == "failed" else 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_doctor_finds_a_folder_that_cannot_be_written(insightedit: Any, own_work_folder: Path) -> None:
    own_work_folder.mkdir()
    own_work_folder.chmod(0o500)
    code, found = findings(insightedit)
    assert (code, found["workdir"]["verdict"]) == (1, "failed")


# -- data, models, serve, edit before there is a model ----------------------------------------------------------------


def test_data_list(insightedit: Any) -> None:
    readers = {reader["name"]: reader["needs"] for reader in insightedit("data", "list", "--json").json}
    assert set(readers) == set(dataset_folders.FOLDERS)
    assert all(readers.values())
    assert "shapes" in insightedit("data", "list").out


def test_data_check(insightedit: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    dataset_folders.FOLDERS["pairs"](root)
    found = insightedit("data", "check", "pairs", root, "--json").json
    counts = {name: found[name] for name in ("records", "quarantined", "reasons", "tasks")}
    reasons = {"empty_instruction": 1, "missing_file": 1}
    assert counts == {"records": 4, "quarantined": 2, "reasons": reasons, "tasks": {"edit": 4}}
    assert Path(found["sheet"]).parent.name == "pairs"
    insightedit("data", "check", "pears", root).assert_fails_with(2, "no reader 'pears'", "pairs")
    insightedit("data", "check", "pairs", tmp_path / "lost").assert_fails_with(4, "no folder", "lost")
    insightedit("data", "check", "pairs", root, "--set", "sourc=x").assert_fails_with(2, "'sourc'", "source")
    insightedit("data", "check", "coco", root).assert_fails_with(4, "train2017")


@pytest.mark.usefixtures("no_model")
def test_models_before_there_is_one(insightedit: Any) -> None:
    listed = insightedit("models", "list")
    assert (listed.code, listed.out) == (0, "")
    assert "quickstart" in listed.err
    insightedit("models", "show").assert_one_sentence(4, "no champion yet", "insightedit quickstart")
    insightedit("models", "show", "7").assert_one_sentence(4, "version 7")
    insightedit("models", "show", "models:/a/b/c").assert_one_sentence(2, "models:/a/b/c")


@pytest.mark.usefixtures("no_model")
def test_serve_before_there_is_a_model(insightedit: Any) -> None:
    assert insightedit("serve", "status", "--json").json["state"] == "down"
    insightedit("serve", "up", "--dry-run").assert_one_sentence(4, "no champion yet")
    assert insightedit("serve", "down", "--json").json["state"] == "down"


def test_train_refuses_what_it_cannot_do(insightedit: Any, tmp_path: Path) -> None:
    insightedit("train").assert_one_sentence(2, "CONFIG")
    insightedit("train", "nanu").assert_one_sentence(4, "nanu", "nano")
    insightedit("train", tmp_path / "my.yaml").assert_one_sentence(4, "my.yaml")
    insightedit("train", "nano", "--stage", "4").assert_one_sentence(2, "--stage", "4")
    insightedit("train", "nano", "--set", "stages.2.step=1").assert_one_sentence(2, "stages.2.step", "steps")
    insightedit("train", "nano", "--set", "stages.2").assert_one_sentence(2, "--set stages.2")
    missing = f"model.sources.diffusion={tmp_path}/no-unet"
    planned = insightedit("train", "nano", "--dry-run", "--set", missing)
    planned.assert_one_sentence(4, "model.sources.diffusion", "no-unet")


def test_a_config_file_with_a_wrong_field_is_named(insightedit: Any, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("extends: nano\nstages: {2: {steps: many}}\n")
    insightedit("train", file).assert_one_sentence(2, "my.yaml", "stages.2.steps", "many")
    file.write_text("{")
    insightedit("train", file).assert_one_sentence(2, "my.yaml", "YAML")


def test_train_says_what_it_would_do(insightedit: Any, own_work_folder: Path, tmp_path: Path) -> None:
    parts = ("diffusion", "image_encoder", "mllm")
    sources = [f"--set=model.sources.{part}={tmp_path}" for part in parts]
    planned = insightedit("train", "nano", "--dry-run", "--set", "stages.2.steps=77", "--stage", "2")
    assert planned.code == 0
    assert yaml.safe_load(planned.out)["stages"][2]["steps"] == 77
    refused = insightedit("train", "nano", "--dry-run", "--json", "--stage", "3", "--set", "workers.memory_gib=0.05")
    keys = ["stages", "trainable", "memory", "flops", "resources", "config"]
    assert (refused.code, list(json.loads(refused.out))) == (2, keys)
    assert "workers.memory_gib" in refused.err
    assert insightedit("data", "prepare", "nano", "--dry-run", "--json", *sources).json["datasets"]
    assert not own_work_folder.exists()


def test_foundation_says_what_it_would_do(insightedit: Any, tmp_path: Path) -> None:
    planned = insightedit("foundation", "--out", tmp_path / "f", "--seed", "3", "--share", "0.5", "--dry-run", "--json")
    assert planned.json["seed"] == 3
    assert not (tmp_path / "f").exists()


@pytest.mark.usefixtures("no_model")
def test_judging_and_deciding_before_there_is_a_model(insightedit: Any) -> None:
    for command in ("evaluate", "rollback"):
        insightedit(command).assert_one_sentence(4, "no champion yet")
    insightedit("promote").assert_one_sentence(4, "no challenger yet")
    insightedit("promote", "--config", "nanu").assert_one_sentence(4, "nanu", "nano")
    insightedit("evaluate", "--set", "evaluation.scene=3").assert_one_sentence(2, "evaluation.scene", "scenes")


def test_evaluate_says_on_how_many_scenes_it_would_judge(insightedit: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    benchmark = "evaluation.benchmark={reader: reason-edit, options: {root: /data}}"
    for scenes, settings in {
        "200 scenes of shapes": [],
        "7 scenes of shapes": ["evaluation.scenes=7"],
        "all scenes of reason-edit": [benchmark],
        "9 scenes of reason-edit": [benchmark, "evaluation.scenes=9"],
    }.items():
        sets = [word for setting in settings for word in ("--set", setting)]
        assert scenes in insightedit("evaluate", tmp_path, "--dry-run", *sets).out


@pytest.mark.parametrize("override", ["host", "=1", "bogus=1", "editor.bogus=1", "limits.steps=0", "editor=3"])
def test_serve_refuses_wrong_settings(override: str, insightedit: Any) -> None:
    name = override.partition("=")[0] or override
    insightedit("serve", "up", "--set", override).assert_one_sentence(2, "--set", name)


@pytest.mark.usefixtures("no_model")
def test_edit_with_wrong_input(insightedit: Any, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    insightedit("edit", picture, "make it red").assert_one_sentence(2, "--out")
    insightedit("edit", picture, "make it red", "--out", out).assert_one_sentence(4, "no champion yet")
    insightedit("edit", tmp_path / "no.png", "make it red", "--out", out).assert_one_sentence(4, "no.png")
    insightedit("edit", tmp_path, "make it red", "--out", out).assert_one_sentence(2, str(tmp_path))
    insightedit("edit", picture, "make it red", "--out", "out.gif").assert_one_sentence(2, "out.gif", ".png")
    nowhere = "http://127.0.0.1:9"
    insightedit("edit", picture, "red", "--out", out, "--server", nowhere).assert_one_sentence(5, nowhere)
    insightedit("edit-job", "submit", picture, "red", "--server", nowhere).assert_one_sentence(5, nowhere)
    insightedit("edit-job", "show", "x").assert_one_sentence(5, "serve up")
    insightedit("edit-job", "fetch", "x", "--out", out.with_suffix(".gif"), "--server", nowhere).assert_one_sentence(2)
    assert not out.exists()
    insightedit("edit", picture, "  ", "--out", tmp_path / "out.png").assert_one_sentence(2, "instruction is empty")


# -- with a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work_with_a_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose champion is a pipeline with random weights."""
    folder = tmp_path_factory.mktemp("model")
    build_pipeline(tiny_config(build_sources(folder / "sources"))).save_pretrained(folder / "pipeline")
    workdir = make_workdir(folder / "work")
    registry = Registry(workdir)
    run_id = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id
    version = registry.register(folder / "pipeline", run_id, {"viescore": "0.5"})
    registry.promote(version.version)
    return workdir.root


def test_models_are_shown(insightedit: Any, work_with_a_model: Path) -> None:
    (listed,) = insightedit("models", "list", "--json", "--workdir", work_with_a_model).json
    shown = insightedit("models", "show", "champion", "--json", "--workdir", work_with_a_model).json
    assert listed["version"] == shown["version"] == "1"
    assert listed["aliases"] == shown["aliases"] == ["champion"]
    table = insightedit("models", "list", "--workdir", work_with_a_model).out.splitlines()
    assert table[0].split() == ["VERSION", "ALIASES", "VIESCORE", "CREATED"]
    assert table[1].split()[:3] == ["1", "champion", "0.500"]


def test_models_go_in_and_out_and_are_followed_back(
    insightedit: Any, work_with_a_model: Path, no_model: Path, tmp_path: Path
) -> None:
    theirs = ["--workdir", work_with_a_model]
    shown = insightedit("models", "show", "champion", *theirs, "--json").json
    assert shown["lineage"]["manifest"] == shown["tags"]["manifest"]
    assert [entry["action"] for entry in shown["lineage"]["decisions"]] == ["promote"]
    (entry,) = insightedit("models", "log", *theirs, "--json").json
    assert (entry["to_version"], entry["from_version"]) == ("1", None)
    out = tmp_path / "out"
    assert insightedit("models", "export", "1", out, *theirs, "--dry-run").out.startswith("Would copy version 1 to")
    assert not out.exists()
    exported = insightedit("models", "export", "1", out, *theirs, "--json").json
    assert exported["load"].startswith("from insightedit.model.pipeline import InsightEditPipeline")
    insightedit("models", "export", "1", out, *theirs).assert_one_sentence(2, "exists already")

    planned = insightedit("models", "import", out, "--dry-run", "--json").json
    assert (planned["kind"], planned["left_out"]) == ("InsightEditPipeline", ["README.md"]), "the card is made anew"
    assert insightedit("models", "list", "--json").json == []
    made = insightedit("models", "import", out, "--reason", "a friend's", "--json").json
    assert made["tags"]["manifest"] == shown["tags"]["manifest"]
    insightedit("models", "import", tmp_path).assert_one_sentence(4, "not a pipeline folder")
    assert "version 2" in insightedit("models", "import", out).out
    difference = insightedit("models", "diff", "1", "2").out
    assert "tag      imported_reason: a friend's -> -" in difference
    assert "file" not in difference
    assert insightedit("models", "hold", "1", "me", "--reason", "mine").out == "version 1: me holds it (mine)\n"
    assert insightedit("models", "prune", "--keep", "0", "--json").json["deleted"] == []
    assert insightedit("models", "hold", "1", "me", "--release").out == "version 1: not held\n"
    assert insightedit("models", "prune", "--keep", "0", "--dry-run").out.startswith("Would delete 1 versions")
    assert insightedit("models", "prune", "--keep", "0", "--json").json["deleted"] == ["1"]
    assert [one["version"] for one in insightedit("models", "list", "--json").json] == ["2"]


def test_edit_gives_the_same_file_for_the_same_seed(
    insightedit: Any, work_with_a_model: Path, picture: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "new" / name for name in ("a.png", "b.png", "c.png")]
    answers = [
        insightedit(
            "edit", picture, "remove the red circle", "--out", file, "--seed", seed, "--json",
            "--workdir", work_with_a_model,
        ).json
        for file, seed in zip(files, ("7", "7", "8"), strict=True)
    ]  # fmt: skip
    assert [answer["seed"] for answer in answers] == [7, 7, 8]
    assert {answer["model_version"] for answer in answers} == {"1"}
    assert answers[0]["sha256"] == hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert Image.open(files[0]).size == (32, 32)


def test_edit_names_the_seed_it_drew(insightedit: Any, work_with_a_model: Path, picture: Path, tmp_path: Path) -> None:
    arguments = ["edit", picture, "remove it", "--workdir", work_with_a_model, "--steps", "1", "--json"]
    first = insightedit(*arguments, "--out", tmp_path / "a.png").json
    again = insightedit(*arguments, "--out", tmp_path / "b.png", "--seed", str(first["seed"])).json
    assert first["sha256"] == again["sha256"]


def test_edit_refuses_broken_images_and_endless_instructions(
    insightedit: Any, work_with_a_model: Path, picture: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:60])
    rest = ["--out", tmp_path / "out.png", "--workdir", work_with_a_model]
    insightedit("edit", broken, "remove it", *rest).assert_one_sentence(2, "image is damaged")
    broken.write_text("no picture")
    insightedit("edit", broken, "remove it", *rest).assert_one_sentence(2, "PNG, JPEG or WebP")
    insightedit("edit", picture, "remove it " * 200, *rest).assert_one_sentence(2, "The edit is not possible")
    insightedit("edit", picture, "remove it", *rest, "--model", "9").assert_one_sentence(4, "version 9")


def test_promote_and_rollback_say_what_they_did(insightedit: Any, no_model: Path, tmp_path: Path) -> None:
    workdir = Workdir.open(no_model)
    registry = Registry(workdir)
    run_id = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id
    for score in (0.6, 0.8, 0.7):
        tags = keep_evaluation(registry, workdir, even_table(score), "the same")
        registry.register(empty_pipeline(tmp_path / "pipeline"), run_id, tags)
    quick = ["--set", "promotion.max_latency_ratio=0", "--set", "evaluation.scenes=40"]
    assert insightedit("promote", "1", *quick).out.splitlines() == [
        "champion - -> 1, VIEScore 0.600",
        "  passed  minimum: its VIEScore is 0.600 on 80 cases, and a champion needs more than 0.500",
    ]
    dry = insightedit("promote", "2", "--dry-run", *quick)
    planned = dry.out.splitlines()
    assert planned, dry.err
    assert planned[0] == "Would move champion 1 -> 2, VIEScore 0.800"
    assert "passed  better: its VIEScore differs from the champion's by +0.200" in planned[3]
    moved = insightedit("promote", "2", "--json", *quick).json
    assert (moved["before"], moved["champion"], moved["dry_run"], moved["entry"]) == ("1", "2", False, 2)
    assert insightedit("promote", "2", *quick).out == "Version 2 is the champion already.\n"
    refused = ("Version 3 is not promoted in place of version 2", "[better]", "-0.100", "test-000-simple (-0.10)")
    insightedit("promote", *quick).assert_one_sentence(3, *refused)
    told = insightedit("promote", "--json", *quick)
    assert (told.code, json.loads(told.out)["evidence"]["viescore"]) == (3, 0.7)
    insightedit("promote", "3", "--force").assert_one_sentence(2, "--force needs --reason")
    forced = insightedit("promote", "3", "--force", "--reason", "2 is ugly", *quick).out
    assert "REFUSED better" in forced
    assert insightedit("rollback", "--dry-run").out == "Would move champion 3 -> 2\n"
    assert insightedit("rollback", "--reason", "it paints", "--json").json["champion"] == "2"
    assert insightedit("models", "show").out.splitlines()[0] == "insightedit 2"


def test_the_first_champion_cannot_be_rolled_back(insightedit: Any, work_with_a_model: Path) -> None:
    insightedit("rollback", "--workdir", work_with_a_model).assert_one_sentence(4, "no champion before this one")


def test_serve_says_what_it_would_do(insightedit: Any, work_with_a_model: Path) -> None:
    arguments = ["serve", "up", "--dry-run", "--json", "--workdir", work_with_a_model, "--port", "0"]
    planned = insightedit(*arguments, "--set", "editor.max_replicas=3").json
    assert (planned["state"], planned["model_version"]) == ("planned", "1")


@pytest.fixture
def tiny_preset(tmp_path: Path) -> Path:
    """Tiny parts and three steps of each stage."""
    return write_tiny_preset(tmp_path, steps=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("no_model")
def test_from_data_to_a_refused_challenger(insightedit: Any, tiny_preset: Path, picture: Path, tmp_path: Path) -> None:
    prepared = insightedit("data", "prepare", tiny_preset, "--json").json
    assert {name: one["rows"] for name, one in prepared.items()} == {"captions": 32, "questions": 32, "edits": 64}
    first = insightedit("train", tiny_preset, "--name", "mine", "--stage", "1", "--json").json
    assert (list(first["stages"]), first["model_version"]) == (["1"], None)
    trained = insightedit("train", tiny_preset, "--name", "mine", "--json").json
    assert (list(trained["stages"]), trained["model_version"]) == (["1", "2", "3"], "1")
    again = insightedit("train", tiny_preset, "--name", "mine", "--json").json
    assert again["model_version"] == "1", "the same training is not registered twice"
    other = insightedit("train", tiny_preset, "--name", "mine", "--set", "stages.3.steps=4")
    other.assert_fails_with(2, "another config")

    judged = insightedit("evaluate", "challenger", "--config", tiny_preset, "--json").json
    assert judged["scenes"] == 4
    refused = insightedit("promote", "--config", tiny_preset, "--set", "promotion.min_viescore=1.0")
    refused.assert_fails_with(3, "Version 1 is not promoted")
    assert insightedit("models", "show", "champion").code == 4
    edit = ["edit", picture, "remove it", "--out", tmp_path / "out.png", "--json"]
    assert insightedit(*edit, "--model", "challenger").json["model_version"] == "1"
