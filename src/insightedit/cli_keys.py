"""The commands about API keys: `insightedit serve keys create | list | revoke`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from insightedit.console import Group, columns, dry_run_option, emit, json_option, open_workdir

if TYPE_CHECKING:
    from insightedit.serve.keys import ApiKey


@click.group(cls=Group)
def keys() -> None:
    """API keys of the server. A running server notices every change within a second."""


@keys.command()
@click.argument("name")
@click.option("--days", type=click.FloatRange(0, 36500, min_open=True), help="How long it counts; for good without it.")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="Edit requests in a minute.")
@click.option("--budget-per-minute", type=click.IntRange(min=1), help="Pixels x steps x images in a minute.")
@click.option("--at-once", type=click.IntRange(min=1), help="Edit requests at a time, waiting ones included.")
@click.option("--priority", type=click.IntRange(-100, 100), default=0, show_default=True, help="Higher goes first.")
@dry_run_option
@json_option
def create(
    name: str,
    days: float | None,
    requests_per_minute: int | None,
    budget_per_minute: int | None,
    at_once: int | None,
    priority: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a key for NAME and print it. It is shown this once: only its hash is kept."""
    from insightedit.serve.keys import Allowance, KeyStore

    allowance = Allowance(
        requests_per_minute=requests_per_minute,
        budget_per_minute=budget_per_minute,
        at_once=at_once,
        priority=priority,
    )
    lifetime = None if days is None else timedelta(days=days)
    store = KeyStore(open_workdir())
    if dry_run:
        store.check_new(name)
        emit({"name": name, **allowance.model_dump()}, as_json, lambda: [f"would make a key of {name}"])
        return
    key, kept = store.create(name, allowance, lifetime)
    if not as_json:
        click.echo(f"Key of {name}; keep it, it is not shown again:", err=True)
    emit({"key": key, **_shown(kept)}, as_json, lambda: [key])


@keys.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """Show the keys' names and what each may have."""
    from insightedit.serve.keys import KeyStore

    found = KeyStore(open_workdir()).all()
    if not found and not as_json:
        click.echo("No key yet: `insightedit serve keys create NAME` makes one.", err=True)
        return
    emit([_shown(key) for key in found], as_json, lambda: _table(found))


@keys.command()
@click.argument("name")
@dry_run_option
@json_option
def revoke(name: str, dry_run: bool, as_json: bool) -> None:
    """Make the key of NAME worth nothing."""
    from insightedit.serve.keys import KeyStore

    store = KeyStore(open_workdir())
    if dry_run:
        store.find(name)
    else:
        store.revoke(name)
    said = f"{'would revoke' if dry_run else 'revoked'} the key of {name}"
    emit({"name": name, "revoked": not dry_run}, as_json, lambda: [said])


def _shown(key: ApiKey) -> dict[str, object]:
    """A key without its hash, which is nobody's business."""
    return {"name": key.name, "created": key.created, "expires": key.expires, **key.allowance.model_dump()}


def _table(found: Iterable[ApiKey]) -> Iterable[str]:
    yield from columns(
        [("NAME", "CREATED", "EXPIRES", "REQUESTS/MIN", "BUDGET/MIN", "AT ONCE", "PRIORITY"), *map(_row, found)]
    )


def _row(key: ApiKey) -> tuple[str, ...]:
    limits = key.allowance
    expired = " (over)" if key.is_expired(datetime.now(UTC)) else ""
    numbers = (limits.requests_per_minute, limits.budget_per_minute, limits.at_once, limits.priority)
    return (
        key.name,
        f"{key.created.astimezone():%Y-%m-%d %H:%M}",
        f"{key.expires.astimezone():%Y-%m-%d %H:%M}{expired}" if key.expires else "-",
        *("-" if number is None else str(number) for number in numbers),
    )
