"""Retention: old versions are deleted, and never one that somebody needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from insightedit.platform.audit import line_of_champions
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.registry import ModelVersion, Registry

HOLD = "hold."
"""A version with a tag of this beginning is kept: `hold.NAME = why` (`models hold`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What was deleted, or would be, and what is kept for which reason."""

    deleted: tuple[str, ...]
    bytes: int
    kept: Mapping[str, str]
    dry_run: bool


def prune(
    registry: Registry,
    deployed: Collection[str],
    *,
    keep: int,
    days: float = 0.0,
    line: int = 3,
    dry_run: bool = False,
) -> Pruned:
    """Delete the versions that nothing holds.

    Args:
        registry: whose.
        deployed: versions that a server or a batch uses.
        keep: so many of the newest versions stay whatever they are.
        days: as do those younger than this.
        line: and so many champions before the present one, so that rollbacks can go back that far.
        dry_run: say what would go, delete nothing.

    Raises:
        InsightEditError: a version could not be deleted; those before it are gone.
    """
    kept: dict[str, str] = {}
    deleted: list[ModelVersion] = []
    for rank, version in enumerate(registry.versions()):
        young = datetime.now(UTC) - version.created < timedelta(days=days)
        why = f"one of the newest {keep}" if rank < keep else f"younger than {days:g} days" if young else ""
        # Asked anew for each: somebody may promote while this goes on.
        why = held_by(registry, version.version, deployed, line) or why
        if why:
            kept[version.version] = why
            continue
        if not dry_run:
            registry.delete(version)
        deleted.append(version)
    return Pruned(
        deleted=tuple(one.version for one in deleted),
        bytes=sum(int(one.tags.get("bytes", 0)) for one in deleted),
        kept=kept,
        dry_run=dry_run,
    )


def hold(registry: Registry, version: str, name: str, why: str) -> None:
    """Keep a version for somebody, such as a server on a cluster that the work folder does not know of.

    Raises:
        UsageError: the name cannot be that of a tag.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name):
        raise UsageError(f"{name!r} cannot hold a version: write letters, digits, '_' and '-', 63 at most.")
    registry.set_tags(version, {f"{HOLD}{name}": why or "no reason given"})


def release(registry: Registry, version: ModelVersion, name: str) -> None:
    """Take a hold away.

    Raises:
        NotFoundError: there is no such hold.
    """
    if f"{HOLD}{name}" not in version.tags:
        raise NotFoundError(f"{name} holds no version {version.version}: see `insightedit models show`.")
    registry.client.delete_model_version_tag(registry.name, version.version, f"{HOLD}{name}")


def held_by(registry: Registry, version: str, deployed: Collection[str] = (), line: int = 3) -> str:
    """Why a version must stay: an alias, a deployment, the way back, or a hold; empty if nothing holds it."""
    found = registry.find(version)
    if found is None:
        return ""
    if found.aliases:
        return f"it is {' and '.join(found.aliases)}"
    if version in deployed:
        return "it is deployed"
    if version in line_of_champions(registry.audit.entries())[-line - 1 :]:
        return "a rollback may go back to it"
    holds = {name.removeprefix(HOLD): why for name, why in found.tags.items() if name.startswith(HOLD)}
    return "; ".join(f"{name} holds it ({why})" for name, why in sorted(holds.items()))
