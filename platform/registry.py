"""Model versions: pipeline folders in MLflow's registry, with manifest, lineage and aliases.

A version is a copy of a pipeline folder among the artifacts of the run that made it. The registry knows three aliases:
`challenger` (the newest version), `champion` (the one that is served) and `previous` (what a rollback goes back to).
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote, urlparse

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.manifests import Manifest, verify_manifest, write_manifest
from insightedit.platform.workdir import Workdir

MODEL_NAME = "insightedit"
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
_MOVE_TAG = "promotion."
_LOCK_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """One version of the registered model, as it was when it was looked up."""

    name: str
    version: str
    """MLflow's number as a string: it is a name, never compared as a number."""
    folder: Path
    """The pipeline folder; `Registry.fetch` verifies it."""
    run_id: str | None
    created: datetime
    aliases: tuple[str, ...]
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        """MLflow's reference to exactly this version."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One change of the champion: who moved it, when, between which versions, on what evidence."""

    number: int
    action: Literal["promote", "rollback"]
    source: str | None
    """The champion before."""
    target: str
    """The champion after."""
    previous: str | None
    """The alias `previous` after."""
    who: str
    when: str
    """UTC, ISO 8601."""
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])
    done: bool = False
    """False while the aliases are being moved: a move that was interrupted is finished by the next one."""


class Registry:
    """The versions of one registered model in a work folder's MLflow database."""

    def __init__(self, workdir: Workdir, name: str = MODEL_NAME) -> None:
        self.name = name
        self.client = MlflowClient(tracking_uri=workdir.tracking_uri, registry_uri=workdir.tracking_uri)
        self._lock = FileLock(workdir.root / "registry.lock", timeout=_LOCK_SECONDS)

    def register(self, folder: Path, run_id: str, tags: Mapping[str, str] | None = None) -> ModelVersion:
        """Copy a pipeline folder into a run's artifacts and make it the newest version and `challenger`.

        Args:
            folder: what `InsightEditPipeline.save_pretrained` wrote.
            run_id: the MLflow run that made it.
            tags: lineage: stage runs, dataset fingerprints, config hash, git commit, evaluation figures.

        Raises:
            NotFoundError: no pipeline folder, or no such run.
            InsightEditError: a file in the folder is of a refused format.
        """
        if not (folder / "model_index.json").is_file():
            raise NotFoundError(f"{folder} is not a pipeline folder (it has no model_index.json): name one that is.")
        artifacts = self._run_artifacts(run_id)
        target = artifacts / f"pipeline-{uuid.uuid4().hex[:12]}"
        manifest = _copy_whole(folder, target)
        lineage = {**(tags or {}), "run": run_id, "manifest": manifest.digest, "bytes": str(manifest.size)}
        self._ensure_model()
        made = self.client.create_model_version(self.name, source=target.as_uri(), run_id=run_id, tags=lineage)
        version = str(made.version)
        self.client.set_registered_model_alias(self.name, CHALLENGER, version)
        return self.resolve(version)

    def resolve(self, reference: str) -> ModelVersion:
        """Look a version up once; what it returns no longer follows the alias.

        Args:
            reference: `champion`, `3`, `models:/insightedit@champion` or `models:/insightedit/3`.

        Raises:
            UsageError: the reference has none of these forms.
            NotFoundError: there is no such version or alias.
        """
        selector = _parse_reference(reference, self.name)
        try:
            if selector.isdecimal():
                found = self.client.get_model_version(self.name, selector)
            else:
                found = self.client.get_model_version_by_alias(self.name, selector)
        except MlflowException as error:
            # An alias that does not exist is INVALID_PARAMETER_VALUE for MLflow, a version RESOURCE_DOES_NOT_EXIST.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise NotFoundError(self._not_found(selector)) from None
        return self._entity(found)

    def find(self, reference: str) -> ModelVersion | None:
        """Like `resolve`, but None where there is no such version."""
        try:
            return self.resolve(reference)
        except NotFoundError:
            return None

    def versions(self) -> list[ModelVersion]:
        """All versions, newest first."""
        entities = [self._entity(found) for found in self.client.search_model_versions(f"name='{self.name}'")]
        if not entities:
            return []
        # The search leaves aliases out.
        aliases = cast(dict[str, Any], self._registered_model().aliases)
        for i, entity in enumerate(entities):
            names = tuple(sorted(alias for alias, version in aliases.items() if str(version) == entity.version))
            entities[i] = replace(entity, aliases=names)
        return sorted(entities, key=lambda entity: int(entity.version), reverse=True)

    def fetch(self, reference: str | ModelVersion) -> Path:
        """The local folder of a version, every file of it verified against its manifest.

        Raises:
            NotFoundError: there is no such version, or its folder is gone.
            InsightEditError: the folder is damaged, or holds a format that could run code.
        """
        version = self.resolve(reference) if isinstance(reference, str) else reference
        manifest = verify_manifest(version.folder)
        if version.tags.get("manifest", manifest.digest) != manifest.digest:
            raise InsightEditError(
                f"{version.folder} is not what version {version.version} was registered with: register the model again."
            )
        return version.folder

    def set_tags(self, version: str, tags: Mapping[str, str]) -> None:
        """Add tags to a version, or replace them."""
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version, key, value)

    # Moves of the champion. MLflow has no compare-and-set on aliases, so they happen under a lock, and because two
    # aliases cannot be moved at once, the move is written down first and marked as done last.

    @contextmanager
    def moving(self) -> Generator[None]:
        """Hold the champion still: whoever decides about it and moves it does both inside.

        Raises:
            InsightEditError: somebody else is moving it and does not end.
        """
        try:
            with self._lock:
                self._finish_interrupted_move()
                yield
        except Timeout:
            raise InsightEditError(
                f"Another promotion has held {self._lock.lock_file} for {_LOCK_SECONDS:.0f} s: end it and try again."
            ) from None

    def moves(self) -> list[Move]:
        """Every change of the champion, oldest first."""
        try:
            tags = cast(dict[str, str], self._registered_model().tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return []
        moves = [Move(**json.loads(value)) for key, value in tags.items() if key.startswith(_MOVE_TAG)]
        return sorted(moves, key=lambda move: move.number)

    def promote(self, version: str, evidence: Mapping[str, Any]) -> Move:
        """Make a version the champion; the champion until now becomes `previous`. Call it inside `moving()`."""
        champion = self.find(CHAMPION)
        source = champion.version if champion else None
        return self._move("promote", source, version, previous=source, evidence=evidence)

    def rollback(self, evidence: Mapping[str, Any]) -> Move:
        """Make `previous` the champion again. Call it inside `moving()`.

        Raises:
            NotFoundError: there is no champion, or none before it.
        """
        champion, target = self.resolve(CHAMPION), self.resolve(PREVIOUS)
        # A second rollback goes one further back, to who was champion before the one that returns now.
        line = _line_of_champions(self.moves())
        before = line[-3] if len(line) >= 3 and line[-2] == target.version else None
        return self._move("rollback", champion.version, target.version, previous=before, evidence=evidence)

    def _move(
        self,
        action: Literal["promote", "rollback"],
        source: str | None,
        target: str,
        *,
        previous: str | None,
        evidence: Mapping[str, Any],
    ) -> Move:
        moves = self.moves()
        move = Move(
            number=moves[-1].number + 1 if moves else 1,
            action=action,
            source=source,
            target=target,
            previous=previous,
            who=_who(),
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            evidence=dict(evidence),
        )
        return self._carry_out(move)

    def _carry_out(self, move: Move) -> Move:
        """Write the move down, move the aliases, mark it as done. Doing it twice is the same as once."""
        self._write_move(move)
        for alias, version in ((PREVIOUS, move.previous), (CHAMPION, move.target)):
            if version is None:
                self.client.delete_registered_model_alias(self.name, alias)
            else:
                self.client.set_registered_model_alias(self.name, alias, version)
        challenger = self.find(CHALLENGER)
        if challenger is not None and challenger.version == move.target:
            self.client.delete_registered_model_alias(self.name, CHALLENGER)
        done = replace(move, done=True)
        tag = {f"{_MOVE_TAG}{move.number:06d}": json.dumps(asdict(done))}
        for version in {move.source, move.target} - {None}:
            self.set_tags(str(version), tag)
        self._write_move(done)
        return done

    def _write_move(self, move: Move) -> None:
        client: Any = self.client  # MLflow leaves this method's arguments untyped
        client.set_registered_model_tag(self.name, f"{_MOVE_TAG}{move.number:06d}", json.dumps(asdict(move)))

    def _registered_model(self) -> Any:
        """MLflow's object, whose aliases and tags it leaves untyped."""
        return self.client.get_registered_model(self.name)

    def _finish_interrupted_move(self) -> None:
        moves = self.moves()
        if moves and not moves[-1].done:
            self._carry_out(moves[-1])

    def _run_artifacts(self, run_id: str) -> Path:
        try:
            uri = self.client.get_run(run_id).info.artifact_uri
        except MlflowException:
            raise NotFoundError(f"There is no run {run_id}: see `insightedit status` for the runs there are.") from None
        return _local_path(str(uri))

    def _ensure_model(self) -> None:
        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _entity(self, found: Any) -> ModelVersion:
        """Take over MLflow's object, whose version is an int here and a string there."""
        return ModelVersion(
            name=self.name,
            version=str(found.version),
            folder=_local_path(str(found.source)),
            run_id=found.run_id,
            created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
            aliases=tuple(sorted(found.aliases)),
            tags=dict(found.tags),
        )

    def _not_found(self, selector: str) -> str:
        numbers = [int(version.version) for version in self.client.search_model_versions(f"name='{self.name}'")]
        if not numbers:
            return f"There is no {_described(selector)} yet: no model is registered, run `insightedit quickstart`."
        newest = max(numbers)
        if selector == CHAMPION:
            return f"There is no champion yet: {newest} is the newest version, run `insightedit promote {newest}`."
        if selector == PREVIOUS:
            return "There is no champion before this one to go back to: promote another version instead."
        return f"There is no {_described(selector)} of {self.name}: see `insightedit models list` for those there are."


def _described(selector: str) -> str:
    return f"version {selector}" if selector.isdecimal() else selector


def _parse_reference(reference: str, name: str) -> str:
    """The alias or the number that a reference names."""
    match = re.fullmatch(r"(?:models:/(?P<name>[^/@]+)[/@])?(?P<selector>[A-Za-z0-9_-]+)", reference.strip())
    if match is None:
        raise UsageError(
            f"{reference!r} names no model version: write an alias (champion), a number (3) or models:/{name}@champion."
        )
    if match["name"] not in (None, name):
        raise NotFoundError(f"There is no model {match['name']}: the registered model is called {name}.")
    return match["selector"]


def _local_path(uri: str) -> Path:
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        raise InsightEditError(
            f"The artifacts at {uri} are not in a folder that this machine sees: keep --workdir on a shared folder."
        )
    return Path(unquote(parsed.path))


def _copy_whole(folder: Path, target: Path) -> Manifest:
    """Copy a folder under a temporary name, write its manifest, and only then give it its name."""
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        shutil.copytree(folder, temporary)
        manifest = write_manifest(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _line_of_champions(moves: list[Move]) -> list[str]:
    """Who was champion before whom: a promotion adds to the line, a rollback takes its end away."""
    line: list[str] = []
    for move in moves:
        line = [*line, move.target] if move.action == "promote" else line[:-1]
    return line


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that no user has
        return f"uid {os.getuid()}"
