"""Parts of the server by themselves: settings, version names, a stuck lane, the state file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from insightedit.platform.processes import began
from insightedit.platform.workdir import Workdir
from insightedit.serve.applications import gateway_application, single_version_table, version_application
from insightedit.serve.backend import VersionEntry, VersionTable
from insightedit.serve.kube import serve_config
from insightedit.serve.replicas import Lane
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Limits, ServeSettings
from insightedit.serve.state import ServeState, read_state, write_state


def test_the_deployer_and_the_gateway_need_no_torch() -> None:
    code = "import sys, insightedit.serve.server, insightedit.serve.gateway; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="body_byte"):
        Limits.model_validate({"body_byte": 5})
    with pytest.raises(ValidationError, match="side"):
        Limits(side=20_000)
    assert ServeSettings().host == "127.0.0.1"


def test_whoever_is_stopped_has_longer_than_the_longest_edit() -> None:
    settings = ServeSettings(limits=Limits(edit_seconds=600))
    gateway: Any = gateway_application(single_version_table("1", ()), settings)
    version: Any = version_application(Path("nowhere"), settings)
    for deployment in (gateway, version, version._bound_deployment.init_args[-1]):
        config = deployment._bound_deployment._deployment_config
        assert 600 < config.graceful_shutdown_timeout_s < settings.stop_seconds
    assert serve_config("1", (), settings)["http_options"]["request_timeout_s"] > 600


def test_version_names() -> None:
    entries = {version: VersionEntry(application=f"a{version}") for version in ("3", "4")}
    entries["4"] = VersionEntry(application="a4", aliases=("champion",))
    table = VersionTable(default="3", versions=entries)
    assert [table.resolve(name) for name in (None, "", "insightedit", "4", "insightedit@champion")] == [
        "3", "3", "3", "4", "4",
    ]  # fmt: skip
    for name in ("5", "latest", "../3", "insightedit@challenger"):
        with pytest.raises(ApiError, match="served are 3, 4"):
            table.resolve(name)


def test_a_stuck_lane_says_so() -> None:
    release = threading.Event()

    async def story() -> None:
        lane = Lane(0.05, lambda: None)
        lane.check()
        work = asyncio.wrap_future(lane.submit(lambda: release.wait(10)))
        await asyncio.sleep(0.15)
        with pytest.raises(RuntimeError, match=r"more than 0\.05 seconds"):
            lane.check()
        release.set()
        assert await work
        lane.check()

    asyncio.run(story())


def test_state_of_a_dead_process_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = Workdir.open(tmp_path)
    assert read_state(workdir) is None
    alive = ServeState(
        state="up",
        url="http://127.0.0.1:1",
        model_version="1",
        aliases=(),
        pid=os.getpid(),
        began=began(os.getpid()),
        log=tmp_path / "log",
    )
    write_state(workdir, alive)
    assert read_state(workdir) == alive
    # A clock that is set moves the time of day at which everything seems to have begun.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1e9)
    assert read_state(workdir) == alive
    write_state(workdir, alive.model_copy(update={"began": alive.began - 100}))
    assert read_state(workdir) is None
    workdir.serve_state.write_text("{broken")
    assert read_state(workdir) is None
