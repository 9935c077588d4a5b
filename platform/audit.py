"""The audit log: who made which version the champion, when, and why. MLflow's aliases follow it.

MLflow can move an alias, but not "only if nobody else has moved it meanwhile". What it does have is numbers that the
registry gives out one at a time: the versions of a registered model. So every change is first a version of the
registered model `insightedit-audit`, and which version is the champion follows from those entries in the order of
their numbers. Aliases are moved afterwards, and can be put right from the log at any time.

A writer says which entry it has seen last. Of those who have seen the same one, the entry with the lowest number
counts and the others are void. That follows from the log alone, never from what happened after an entry was written,
so that every reader comes to the same, also when the writer died in between.
"""

from __future__ import annotations

import getpass
import json
import os
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, cast

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from insightedit.platform.errors import InsightEditError, NotFoundError

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"

Action = Literal["promote", "forced", "rollback"]
"""`forced` is a promotion that a gate had refused."""

_PAGE = 1000
_ATTEMPTS = 20
"""Writers that meet in one SQLite database, or take the same number, send each other away."""
_VOID = "void"
"""Tag of an entry that lost: it stays void even if somebody deletes the entry that it lost to."""
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for what is not there; a missing alias has the second."""


class ConflictError(InsightEditError):
    """Another change came first."""


def whoever() -> str:
    """The name of the user that this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that no user has
        return f"uid {os.getuid()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What somebody wants to do to an alias."""

    action: Action
    to_version: str
    """What the alias points to afterwards."""
    from_version: str | None
    """What it points to until then; None where it does not exist yet."""
    reason: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The figures that the change rests on, as JSON has them."""
    alias: str = CHAMPION
    who: str = field(default_factory=whoever)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry(Change):
    """A change that counts."""

    number: int
    """Given out by the registry, growing; an entry that was void or deleted leaves a gap."""
    when: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class _Written:
    """An entry as it stands in the registry, whether it counts or not."""

    entry: AuditEntry
    expected: int
    token: str
    """Names the writer's attempt: a client that lost the answer asks again and is in the log twice."""
    void: bool


class AuditLog:
    """The changes of one registered model's aliases."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        """Open a log, which is made with its first entry.

        Args:
            client: of the registry.
            model: the registered model whose aliases the log is about.
        """
        self._client = client
        self._model = model
        self.name = f"{model}-audit"

    def entries(self, after: int = 0) -> list[AuditEntry]:
        """The changes that count, in their order.

        Args:
            after: only later ones than this number of an entry that counts; 0 for all.
        """
        return [written.entry for written in _counting(self._read(after), after)]

    def last(self) -> int:
        """The number of the last entry that counts; 0 for an empty log."""
        return _last(self.entries())

    def append(self, change: Change, expected: int) -> AuditEntry:
        """Write a change down if the entry that its writer has seen last is still the last. No alias is moved.

        Args:
            change: what to do.
            expected: number of the last entry that the writer has seen; 0 for an empty log.

        Raises:
            ConflictError: another change came first.
            NotFoundError: there is no such version.
            InsightEditError: the registry takes no entry.
        """
        self._check_last(change, expected)
        token = uuid.uuid4().hex
        written = self._write(change, expected, token)
        counting = _counting(written, expected)
        for one in counting:
            if one.token == token:
                return one.entry
        for one in written:
            if one.token == token:
                self._client.set_model_version_tag(self.name, str(one.entry.number), _VOID, "true")
        raise _lost(change, counting[0].entry)

    def reconcile(self) -> list[str]:
        """Move `champion` and `previous` to where the log has them, and take `challenger` away from a champion.

        Returns:
            One sentence for each alias that was somewhere else. An empty log says nothing about aliases.
        """
        told: list[str] = []
        while True:
            entries, aliases = self.entries(), self._aliases()
            told += _astray(entries, aliases)
            self._put_right(wanted_aliases(entries), aliases)
            # Whoever added an entry meanwhile may have moved the aliases before they were moved here.
            if not self.entries(_last(entries)):
                return told

    def astray(self) -> list[str]:
        """What `reconcile` would say; nothing is moved."""
        return _astray(self.entries(), self._aliases())

    def aliases(self) -> dict[str, str]:
        """The version of each alias: `champion` and `previous` by the log, unless it is empty; others by MLflow."""
        known = {**self._aliases(), **wanted_aliases(self.entries())}
        return {alias: version for alias, version in known.items() if version is not None}

    def _check_last(self, change: Change, expected: int) -> None:
        written = self._read(max(expected - 1, 0))
        if expected:
            if not written or written[0].entry.number != expected:
                raise ConflictError(f"Entry {expected} is gone from {self.name}: see `insightedit models log`.")
            written = written[1:]
        if newer := _counting(written, expected):
            raise _lost(change, newer[0].entry)

    def _write(self, change: Change, expected: int, token: str) -> list[_Written]:
        """Create an entry, and return what is in the log after the one that its writer had seen last."""
        tags = {
            "action": change.action,
            "alias": change.alias,
            "from": change.from_version,
            "to": change.to_version,
            "who": change.who,
            "reason": change.reason,
            "evidence": json.dumps(dict(change.evidence)),
            "expected": str(expected),
            "token": token,
        }
        tags = {key: value for key, value in tags.items() if value}
        self._ensure()
        failure: MlflowException | None = None
        for _ in range(_ATTEMPTS):
            failure = self._create(change.to_version, tags)
            written = self._read(expected)
            if any(one.token == token for one in written):
                return written
            _wait()
        raise InsightEditError(f"{self.name} takes no entry ({failure}): see whether the registry is well.")

    def _create(self, version: str, tags: Mapping[str, str]) -> MlflowException | None:
        """Create an entry. A failure is no proof that it is not there, so it is returned, and the log looked at."""
        try:
            self._client.create_model_version(self.name, source=f"models:/{self._model}/{version}", tags=dict(tags))
        except MlflowException as error:
            if not self._exists(version):
                raise NotFoundError(
                    f"There is no version {version} of {self._model}: see `insightedit models list`."
                ) from None
            return error
        return None

    def _exists(self, version: str) -> bool:
        try:
            self._client.get_model_version(self._model, version)
        except MlflowException as error:
            if error.error_code not in _MISSING:
                raise
            return False
        return True

    def _read(self, after: int) -> list[_Written]:
        """All entries with a higher number, in order. Pages begin after a number: an offset may skip a row."""
        found: list[_Written] = []
        last, more = after, True
        while more:
            rows: Sequence[Any] = self._client.search_model_versions(
                f"name = '{self.name}' and version_number > {last}",
                max_results=_PAGE,
                order_by=["version_number ASC"],
            )
            found += [written for row in rows if (written := _parsed(row)) is not None]
            last, more = (int(rows[-1].version), len(rows) == _PAGE) if rows else (last, False)
        return found

    def _aliases(self) -> dict[str, str]:
        try:
            # MLflow leaves the type of aliases open.
            aliases = cast(Any, self._client.get_registered_model(self._model)).aliases
        except MlflowException as error:
            if error.error_code not in _MISSING:
                raise
            return {}
        return {str(alias): str(version) for alias, version in aliases.items()}

    def _put_right(self, wanted: Mapping[str, str | None], aliases: Mapping[str, str]) -> None:
        for alias, version in wanted.items():
            # A version that was deleted took its aliases with it; only a rollback or a promotion helps.
            if aliases.get(alias) != version and (version is None or self._exists(version)):
                self._move(alias, version)
        # Looked up anew: a training may have ended meanwhile, whose version is the challenger now.
        if wanted and self._aliases().get(CHALLENGER) == wanted[CHAMPION]:
            self._move(CHALLENGER, None)

    def _move(self, alias: str, version: str | None) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                if version is None:
                    self._client.delete_registered_model_alias(self._model, alias)
                else:
                    self._client.set_registered_model_alias(self._model, alias, version)
            except MlflowException:
                if attempt == _ATTEMPTS - 1:
                    raise
                _wait()
            else:
                return

    def _ensure(self) -> None:
        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def line_of_champions(entries: Sequence[AuditEntry]) -> list[str]:
    """Who was champion before whom, the champion last: a promotion adds to the line, a rollback goes back along it."""
    line: list[str] = []
    for entry in entries:
        # The first entry of a registry that had a champion before it had a log, or one whose own entry is gone.
        if entry.from_version is not None and line[-1:] != [entry.from_version]:
            line.append(entry.from_version)
        if entry.action == "rollback" and entry.to_version in line:
            line = line[: len(line) - line[::-1].index(entry.to_version)]
        else:
            line.append(entry.to_version)
    return line


def wanted_aliases(entries: Sequence[AuditEntry]) -> dict[str, str | None]:
    """Where a log has `champion` and `previous`; None for an alias that must not be. Nothing for an empty log."""
    line = line_of_champions([entry for entry in entries if entry.alias == CHAMPION])
    if not line:
        return {}
    return {CHAMPION: line[-1], PREVIOUS: line[-2] if len(line) > 1 else None}


def _counting(written: Sequence[_Written], last: int) -> list[_Written]:
    """Those that count among the entries after `last`: whose writers had seen the last one that counts before them."""
    counting: list[_Written] = []
    for one in written:
        # Not `==`: whoever deletes an entry must not make all later ones void.
        if one.expected >= last and not one.void:
            counting.append(one)
            last = one.entry.number
    return counting


def _parsed(row: Any) -> _Written | None:
    """An entry from MLflow's object, or None if something else was registered under the log's name."""
    tags: Mapping[str, str] = row.tags
    try:
        entry = AuditEntry(
            number=int(row.version),
            action=cast(Action, tags["action"]),
            alias=tags["alias"],
            from_version=tags.get("from"),
            to_version=tags["to"],
            who=tags["who"],
            when=datetime.fromtimestamp(row.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
            reason=tags.get("reason", ""),
            evidence=json.loads(tags["evidence"]),
        )
        return _Written(entry, int(tags["expected"]), tags["token"], _VOID in tags)
    except (KeyError, ValueError):
        return None


def _last(entries: Sequence[AuditEntry]) -> int:
    return entries[-1].number if entries else 0


def _astray(entries: Sequence[AuditEntry], aliases: Mapping[str, str]) -> list[str]:
    told: list[str] = []
    for alias, version in wanted_aliases(entries).items():
        if aliases.get(alias) != version:
            told.append(
                f"The alias {alias} is {_at(aliases.get(alias))}, but {_at(version)} by entry {_last(entries)} of the"
                " audit log, which counts."
            )
    return told


def _at(version: str | None) -> str:
    return "nowhere" if version is None else f"at version {version}"


def _lost(change: Change, winner: AuditEntry) -> ConflictError:
    return ConflictError(
        f"Version {change.to_version} did not become {change.alias}: {winner.who} came first, at {winner.when}, with"
        f" {winner.action} to version {winner.to_version} (entry {winner.number}); look at it and try again."
    )


def _wait() -> None:
    """A moment, never the same one twice, so that those who met do not meet again."""
    time.sleep(random.uniform(0.01, 0.2))
