"""A run over every dataset at once: killed in the middle of an epoch, it ends as if it was not."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dataset_folders
import psutil
import pytest
import yaml

from insightedit.platform.manifests import sha256_file

STEPS = 24


def write_config(folder: Path) -> Path:
    """Nano on all datasets, in few steps."""
    datasets: dict[str, Any] = {}
    for name, make in dataset_folders.FOLDERS.items():
        made = make(folder / name)
        root = {} if name == "shapes" else {"root": str(folder / name)}
        datasets[name.replace("+", "-plus")] = {"reader": name, "options": {**root, **made.options}}
    nothing = dict.fromkeys(("captions", "questions", "edits"))
    short = {"global_batch": 8, "micro_batch": 4, "checkpoint_every": 4, "log_every": 1, "validate_every": 0}
    config = {
        "extends": "nano",
        "name": "everything",
        "data": {
            "datasets": nothing | datasets,
            "encode": "while_training",
            "encoder_workers": 1,
            "rows_per_shard": 4,
            "quarantine_limit": 0.5,
            "pictures": {"shorter_side": 32},
        },
        "stages": {
            1: {**short, "steps": 2, "datasets": nothing | {"cc12m": 1, "coco": 1}},
            2: {**short, "steps": STEPS, "datasets": nothing | dict.fromkeys(datasets, 1)},
            3: {"datasets": nothing | {"shapes": 1}},
        },
        "workers": {"steps_per_block": 2},
    }
    path = folder / "everything.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(config: Path, workdir: Path) -> subprocess.Popen[bytes]:
    program = str(Path(sys.executable).with_name("insightedit"))
    command = [program, "--workdir", str(workdir), "train", str(config), "--name", "run"]
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    return subprocess.Popen([*command, "--stage", "1", "--stage", "2"], stdout=log, stderr=log, start_new_session=True)


def kill_at(process: subprocess.Popen[bytes], progress: Path, step: int) -> int:
    """Kill a run with all its processes once stage 2 has come so far; the step at which it was."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it was killed"
        at = json.loads(progress.read_text(encoding="utf-8") or "{}") if progress.is_file() else {}
        if at.get("stage") == 2 and at["step"] >= step:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(tree, timeout=30)
            return int(at["step"])
        time.sleep(0.1)
    raise AssertionError("the run did not come so far")


@pytest.mark.slow
def test_a_killed_run_over_all_datasets_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(config, whole).wait(600) == 0, (tmp_path / "whole.log").read_text()
    stopped = kill_at(start(config, killed), killed / "runs/run/progress.json", 10)
    assert stopped < STEPS
    assert start(config, killed).wait(600) == 0, (tmp_path / "killed.log").read_text()
    weights = [sha256_file(workdir / "runs/run/stage-2/weights.safetensors") for workdir in (whole, killed)]
    assert weights[0] == weights[1]
