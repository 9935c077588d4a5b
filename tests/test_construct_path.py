"""Construction from the command line: killed with all its processes and started again, and then trained on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_models import write_tiny_preset

COUNT, EACH = 48, 4


def start(config: Path, folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """A command of the program, in a process of its own."""
    program = [sys.executable, "-m", "insightedit", "--workdir", str(folder / "work"), *command, str(config), "--json"]
    with (folder / "log").open("ab") as log, (folder / f"{command[0]}.json").open("wb") as out:
        return subprocess.Popen(program, stdout=out, stderr=log, start_new_session=True)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started, as when a machine loses its power."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(tree, timeout=30)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in ("pairs", "edits", "images")
        for path in (folder / kind).iterdir()
    }


@pytest.mark.slow
def test_killed_twice_it_makes_what_it_would_have_made_and_stage_2_trains_on_it(tmp_path: Path) -> None:
    images = {"reader": "shapes", "options": {"kind": "caption", "split": "train", "count": COUNT, "seed": 5}}
    construction: dict[str, Any] = {"images": images, "images_per_block": EACH, "sample": 2}
    config = write_tiny_preset(tmp_path, steps=3, construction=construction)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert start(config, tmp_path / "whole", "data", "construct").wait(300) == 0, (tmp_path / "whole/log").read_text()
    killed = tmp_path / "killed"
    blocks = killed / "work/constructed/tiny/blocks"
    times: dict[Path, int] = {}
    for kill in range(2):
        process = start(config, killed, "data", "construct")
        deadline = time.monotonic() + 200
        while len(list(blocks.glob("*.jsonl"))) < 3 * (kill + 1) and time.monotonic() < deadline:
            assert process.poll() is None, (killed / "log").read_text()
            time.sleep(0.05)
        kill_tree(process)
        times |= {path: path.stat().st_mtime_ns for path in blocks.glob("*.jsonl") if path not in times}
    assert 6 <= len(times) < COUNT // EACH
    assert start(config, killed, "data", "construct").wait(300) == 0, (killed / "log").read_text()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    made, again = (tmp_path / name / "work/constructed/tiny" for name in ("whole", "killed"))
    assert contents(again) == contents(made)
    reports = [json.loads((folder / "report/report.json").read_text()) for folder in (made, again)]
    assert reports[0]["pairs"] == reports[1]["pairs"]
    assert reports[1]["photos"] == COUNT
    assert not (again / "work").exists()
    # The config that is written beside the pairs trains on them.
    train = [sys.executable, "-m", "insightedit", "--workdir", str(killed / "work"), "train", str(again / "train.yaml")]
    done = subprocess.run([*train, "--stage", "1", "--stage", "2", "--json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(done.stdout)
    assert set(result["stages"]) == {"1", "2"}
    assert set(result["stages"]["2"]["result"]["last"]) == {"L_MLLM", "L_IAA", "L_diff1"}
