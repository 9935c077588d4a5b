"""The Serve applications: one for each model version, and one for the gateway."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve import Application

from insightedit.platform.registry import Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import VersionEntry, VersionTable
from insightedit.serve.follower import Loading
from insightedit.serve.logs import logging_config
from insightedit.serve.replicas import Conditioner, Editor
from insightedit.serve.routing import CONDITIONER, EDITOR, Gateway
from insightedit.serve.settings import Scaling, ServeSettings

serve: Any = ray_serve  # Its types are incomplete.

GATEWAY_APPLICATION = "insightedit-gateway"
GATEWAY = "Gateway"
"""The deployment in it."""
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY", "DELETING")
METRICS_SECONDS = 0.5
"""How often callers tell Serve's controller what they have in hand. Serve's own 10 seconds are most of a scale-up."""


def version_application_name(version: str) -> str:
    """The name of a model version's application."""
    return f"insightedit-v{version}"


def _options(name: str, scaling: Scaling, settings: ServeSettings, replicas: int = 1) -> dict[str, Any]:
    limits = settings.limits
    place = {"label_selector": scaling.place} if scaling.place else {}
    return {
        "name": name,
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.gpus, **place},
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            # Also where it may be 0 later: `serve up` ends when an edit has worked.
            "initial_replicas": min(max(scaling.min_replicas, replicas, 1), scaling.max_replicas),
            "target_ongoing_requests": scaling.target_ongoing,
            "metrics_interval_s": METRICS_SECONDS,
            "look_back_period_s": scaling.look_back_seconds,
            "upscale_delay_s": scaling.upscale_seconds,
            "downscale_delay_s": scaling.downscale_seconds,
            "downscale_to_zero_delay_s": scaling.sleep_seconds,
        },
        "max_ongoing_requests": scaling.max_ongoing,
        "max_queued_requests": scaling.max_queued,
        "backpressure_config": {"status_code": 429, "retry_after_s": limits.retry_after},
        "graceful_shutdown_timeout_s": settings.grace_seconds,
        # How often it looks whether it has; Serve's own two seconds are most of a stop.
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": logging_config(settings),
        "health_check_period_s": 5,
        "health_check_timeout_s": 15,
        # A new version's replicas start before the old ones stop, even where there is only one.
        "max_surge_percent": 100,
    }


def version_application(
    folder: Path, settings: ServeSettings, replicas: Mapping[str, int] | None = None, gentle_until: float = 0.0
) -> Application:
    """Conditioner and editor of one model version.

    Args:
        folder: its verified local one.
        settings: limits and scaling.
        replicas: how many to begin with, by deployment; the least without it.
        gentle_until: until when, in seconds since the epoch, replicas load behind everybody else's work.
    """
    patience = 2 * settings.limits.edit_seconds
    arguments = (str(folder), settings.exact, patience, settings.engine, gentle_until)
    counts = replicas or {}
    conditioner, editor = (
        serve.deployment(half, **_options(name, scaling, settings, counts.get(name, 1)))
        for half, name, scaling in (
            (Conditioner, CONDITIONER, settings.conditioner),
            (Editor, EDITOR, settings.editor),
        )
    )
    return editor.bind(*arguments, conditioner.bind(*arguments))


def gateway_application(table: VersionTable, settings: ServeSettings, channel: str | None = None) -> Application:
    """The gateway over some versions.

    Args:
        table: of the versions.
        settings: limits and scaling.
        channel: where newer tables come, in the gateways' shared store; None where none will.
    """
    options = _options(GATEWAY, settings.gateway, settings)
    rows = table.model_dump(mode="json")
    gateway = serve.deployment(Gateway, **options, user_config=rows)
    return gateway.bind(settings.model_dump(mode="json"), rows, channel)


def single_version_table(version: str, aliases: tuple[str, ...], sleeps: bool = False) -> VersionTable:
    """A table of one version, which every edit gets."""
    entry = VersionEntry(application=version_application_name(version), aliases=aliases, sleeps=sleeps)
    return VersionTable(default=version, versions={version: entry})


class ServeFleet:
    """Versions' applications in the Serve of this process; see `follower.Fleet`."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings

    def deploy(self, version: str, entry: int, folder: Path, like: str) -> VersionEntry:
        """See `follower.Fleet`. Each loading has a name of its own: an application that is going keeps its own."""
        name = f"{version_application_name(version)}-{entry}"
        gentle_until = time.time() + self._settings.rollout.gentle_seconds
        application = version_application(folder, self._settings, _running(like), gentle_until)
        target = serve.RunTarget(application, name=name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        return VersionEntry(application=name)

    def loading(self, application: str) -> tuple[Loading, str]:
        """See `follower.Fleet`."""
        found = serve.status().applications.get(application)
        if found is None:
            return "failed", "its application is gone"
        reasons = [one.message for one in found.deployments.values() if one.message] or [found.message]
        if found.status == "RUNNING":
            return "running", ""
        return ("failed" if found.status in _FAILED else "loading"), _last_line(reasons[0])

    def remove(self, application: str) -> None:
        """See `follower.Fleet`."""
        serve.delete(application, _blocking=False)


def _running(application: str) -> dict[str, int]:
    """How many replicas of an application run, by deployment."""
    found = serve.status().applications.get(application)
    deployments = {} if found is None else found.deployments
    return {name: one.replica_states.get("RUNNING", 0) for name, one in deployments.items()}


def _last_line(message: str) -> str:
    """What an error says, out of the traceback that Serve tells."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


# -- for Serve's config files, which name a function and give it plain data ------------------------------------------


def build_version(arguments: dict[str, Any]) -> Application:
    """A `version` of the work folder's registry, verified, with `settings`."""
    folder = Registry(Workdir.open()).fetch(str(arguments["version"]))
    return version_application(folder, ServeSettings.model_validate(arguments["settings"]))


def build_gateway(arguments: dict[str, Any]) -> Application:
    """The gateway over a `table`, with `settings`."""
    settings = ServeSettings.model_validate(arguments["settings"])
    return gateway_application(VersionTable.model_validate(arguments["table"]), settings)
