"""The server process: a local Ray with Serve in it, from start to SIGTERM.

Run by `insightedit serve up` as `python -m insightedit.serve.server PLAN`, with a log file for its output.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray as untyped_ray
from ray import serve as untyped_serve

from insightedit.platform.workdir import ENVIRONMENT_VARIABLE, Workdir
from insightedit.serve.applications import (
    GATEWAY_APPLICATION,
    gateway_application,
    single_version_table,
    version_application,
    version_application_name,
)
from insightedit.serve.ingress import remove_haproxy_files
from insightedit.serve.meters import FOLDER_VARIABLE
from insightedit.serve.state import ServePlan, ServeState, clear_state, write_state

ray: Any = untyped_ray
serve: Any = untyped_serve

LOGICAL_CPUS = 8
"""Ray's count. What its actors take of it is a share, not a limit, so it may exceed the machine's."""


@contextmanager
def local_cluster(workdir: Workdir, folder: Path) -> Generator[None]:
    """A Ray of our own on this machine, gone at the end.

    Args:
        workdir: where the processes find what the work folder holds, such as API keys.
        folder: where they keep their figures.
    """
    variables = {
        ENVIRONMENT_VARIABLE: str(workdir.root),
        FOLDER_VARIABLE: str(folder),
        "HF_HUB_OFFLINE": "1",  # Weights come from the version's folder alone.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    cpus = max(LOGICAL_CPUS, os.cpu_count() or 1)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, runtime_env={"env_vars": variables})
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(plan: ServePlan) -> None:
    """Start Serve with the plan's version and the gateway; return when both run."""
    settings = plan.settings
    # The gateway gives an edit up first, and says so properly.
    options = {"host": settings.host, "port": plan.port, "request_timeout_s": settings.limits.edit_seconds + 15}
    serve.start(proxy_location="HeadOnly", http_options=options)
    table = single_version_table(plan.version, plan.aliases, settings.sleeps)
    serve.run_many(
        [
            serve.RunTarget(
                version_application(plan.folder, settings),
                name=version_application_name(plan.version),
                route_prefix=None,
            ),
            serve.RunTarget(gateway_application(table, settings), name=GATEWAY_APPLICATION, route_prefix="/"),
        ]
    )


def main(plan_file: str) -> None:
    """Serve until told to stop."""
    plan = ServePlan.model_validate_json(Path(plan_file).read_text())
    workdir = Workdir.open(plan.workdir)
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            return  # Already on the way.
        stopped.set()
        raise SystemExit(0)

    state = ServeState(
        state="starting",
        url=plan.url,
        model_version=plan.version,
        aliases=plan.aliases,
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        log=Path(plan_file).with_suffix(".log"),
    )
    write_state(workdir, state)
    try:
        with tempfile.TemporaryDirectory(prefix="insightedit-serve-") as folder, local_cluster(workdir, Path(folder)):
            # Not before: Ray puts handlers of its own in place.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            deploy(plan)
            write_state(workdir, state.model_copy(update={"state": "up"}))
            stopped.wait()
    finally:
        clear_state(workdir)
        remove_haproxy_files()


if __name__ == "__main__":
    main(sys.argv[1])
