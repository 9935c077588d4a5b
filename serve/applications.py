"""The Serve applications: one for each model version, and one for the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve import Application

from insightedit.platform.registry import Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import VersionEntry, VersionTable
from insightedit.serve.replicas import Conditioner, Editor
from insightedit.serve.routing import CONDITIONER, EDITOR, Gateway
from insightedit.serve.settings import Scaling, ServeSettings

serve: Any = ray_serve  # Its types are incomplete.

GATEWAY_APPLICATION = "insightedit-gateway"


def version_application_name(version: str) -> str:
    """The name of a model version's application."""
    return f"insightedit-v{version}"


def _options(name: str, scaling: Scaling, settings: ServeSettings) -> dict[str, Any]:
    limits = settings.limits
    place = {"label_selector": scaling.place} if scaling.place else {}
    return {
        "name": name,
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.gpus, **place},
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        },
        "max_ongoing_requests": scaling.max_ongoing,
        "max_queued_requests": scaling.max_queued,
        "backpressure_config": {"status_code": 429, "retry_after_s": limits.retry_after},
        # Longer than the longest edit: a replica that is taken away finishes what it has begun.
        "graceful_shutdown_timeout_s": limits.edit_seconds + 10,
        "health_check_period_s": 5,
        "health_check_timeout_s": 15,
        # A new version's replicas start before the old ones stop, even where there is only one.
        "max_surge_percent": 100,
    }


def version_application(folder: Path, settings: ServeSettings) -> Application:
    """Conditioner and editor of one model version, from its verified local folder."""
    patience = 2 * settings.limits.edit_seconds
    arguments = (str(folder), settings.exact, patience, settings.engine)
    conditioner = serve.deployment(Conditioner, **_options(CONDITIONER, settings.conditioner, settings))
    editor = serve.deployment(Editor, **_options(EDITOR, settings.editor, settings))
    return editor.bind(*arguments, conditioner.bind(*arguments))


def gateway_application(table: VersionTable, settings: ServeSettings) -> Application:
    """The gateway over some versions."""
    options = _options("Gateway", settings.gateway, settings)
    rows = table.model_dump(mode="json")
    gateway = serve.deployment(Gateway, **options, user_config=rows)
    return gateway.bind(settings.model_dump(mode="json"), rows)


def single_version_table(version: str, aliases: tuple[str, ...]) -> VersionTable:
    """A table of one version, which every edit gets."""
    entry = VersionEntry(application=version_application_name(version), aliases=aliases)
    return VersionTable(default=version, versions={version: entry})


# -- for Serve's config files, which name a function and give it plain data ------------------------------------------


def build_version(arguments: dict[str, Any]) -> Application:
    """A `version` of the work folder's registry, verified, with `settings`."""
    folder = Registry(Workdir.open()).fetch(str(arguments["version"]))
    return version_application(folder, ServeSettings.model_validate(arguments["settings"]))


def build_gateway(arguments: dict[str, Any]) -> Application:
    """The gateway over a `table`, with `settings`."""
    settings = ServeSettings.model_validate(arguments["settings"])
    return gateway_application(VersionTable.model_validate(arguments["table"]), settings)
