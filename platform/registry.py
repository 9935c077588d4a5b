"""Model versions: pipeline folders in MLflow's registry, with manifest, lineage and aliases.

A version is a copy of a pipeline folder among the artifacts of the run that made it. The registry knows three aliases:
`challenger` (the newest version), `champion` (the one that is served) and `previous` (what a rollback goes back to).
The last two are what the audit log says (`insightedit.platform.audit`), wherever MLflow has them.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from insightedit.platform.artifacts import copy_whole, download, seen_folder
from insightedit.platform.artifacts import delete as delete_files
from insightedit.platform.audit import CHALLENGER, CHAMPION, PREVIOUS, AuditEntry, AuditLog, Change
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.manifests import verify_manifest
from insightedit.platform.workdir import Workdir

MODEL_NAME = "insightedit"
_OWN_FOLDER = "pipeline-"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """One version of the registered model, as it was when it was looked up."""

    name: str
    version: str
    """MLflow's number as a string: it is a name, never compared as a number."""
    source: str
    """URI of its files."""
    folder: Path
    """The pipeline folder; `Registry.fetch` verifies it, and fetches it first if its files are in a store."""
    run_id: str | None
    created: datetime
    aliases: tuple[str, ...]
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        """MLflow's reference to exactly this version."""
        return f"models:/{self.name}/{self.version}"


class Registry:
    """The versions of one registered model in a work folder's MLflow: its own database, or a server that many share."""

    def __init__(self, workdir: Workdir, name: str = MODEL_NAME) -> None:
        self.name = name
        self.uri = workdir.tracking_uri
        self._copies = workdir.versions
        self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        self.audit = AuditLog(self.client, name)

    def register(
        self,
        folder: Path,
        run_id: str,
        tags: Mapping[str, str] | None = None,
        *,
        only: frozenset[str] | None = None,
    ) -> ModelVersion:
        """Copy a pipeline folder into a run's artifacts and make it the newest version and `challenger`.

        Args:
            folder: what `InsightEditPipeline.save_pretrained` wrote.
            run_id: the MLflow run that made it.
            tags: lineage: stage runs, dataset fingerprints, config hash, git commit, evaluation figures.
            only: the files to copy, as paths below the folder; all of them without it.

        Raises:
            NotFoundError: no pipeline folder, or no such run.
            InsightEditError: a file in the folder is of a refused format.
        """
        if not (folder / "model_index.json").is_file():
            raise NotFoundError(f"{folder} is not a pipeline folder (it has no model_index.json): name one that is.")
        artifacts = self._run_artifacts(run_id)
        name = f"{_OWN_FOLDER}{uuid.uuid4().hex[:12]}"
        place = seen_folder(artifacts)
        target = (place or self._copies) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest = copy_whole(folder, target, only)
        if place is None:
            self.client.log_artifacts(run_id, str(target), name)
        source = target.as_uri() if place else f"{artifacts.rstrip('/')}/{name}"
        lineage = {**(tags or {}), "run": run_id, "manifest": manifest.digest, "bytes": str(manifest.size)}
        self._ensure_model()
        made = self.client.create_model_version(self.name, source=source, run_id=run_id, tags=lineage)
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
        aliases = self.audit.aliases()
        number = selector if selector.isdecimal() else aliases.get(selector)
        if number is None:
            raise NotFoundError(self._not_found(selector))
        try:
            found = self.client.get_model_version(self.name, number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            if number != selector:
                raise NotFoundError(
                    f"The {selector} is version {number}, which was deleted: `insightedit rollback` or promote another."
                ) from None
            raise NotFoundError(self._not_found(selector)) from None
        return self._entity(found, aliases)

    def find(self, reference: str) -> ModelVersion | None:
        """Like `resolve`, but None where there is no such version."""
        try:
            return self.resolve(reference)
        except NotFoundError:
            return None

    def versions(self) -> list[ModelVersion]:
        """All versions, newest first."""
        aliases = self.audit.aliases()
        entities = [self._entity(found, aliases) for found in self.client.search_model_versions(f"name='{self.name}'")]
        return sorted(entities, key=lambda entity: int(entity.version), reverse=True)

    def fetch(self, reference: str | ModelVersion) -> Path:
        """The local folder of a version, every file of it verified against its manifest.

        Raises:
            NotFoundError: there is no such version, or its folder is gone.
            InsightEditError: the folder is damaged, or holds a format that could run code.
        """
        version = self.resolve(reference) if isinstance(reference, str) else reference
        if seen_folder(version.source) is not None:
            return _verified(version)
        if version.folder.is_dir():
            try:
                return _verified(version)
            except InsightEditError:
                shutil.rmtree(version.folder)
        download(version.source, version.folder, self.uri)
        return _verified(version)

    def delete(self, version: ModelVersion) -> None:
        """Delete a version for good: its entry first, since a version without files is worse than files without one.

        Raises:
            InsightEditError: the registry refuses, or the files stay.
        """
        try:
            self.client.delete_model_version(self.name, version.version)
        except MlflowException as error:
            raise InsightEditError(f"Version {version.version} cannot be deleted: {error.message}") from error
        # A folder that `register` has made belongs to one version and nobody else.
        if version.folder.name.startswith(_OWN_FOLDER):
            shutil.rmtree(self._copies / version.folder.name, ignore_errors=True)
            delete_files(version.source, self.uri)

    def set_tags(self, version: str, tags: Mapping[str, str]) -> None:
        """Add tags to a version, or replace them."""
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version, key, value)

    def promote(
        self,
        version: str,
        evidence: Mapping[str, Any] | None = None,
        *,
        reason: str = "",
        forced: bool = False,
        expected: int | None = None,
    ) -> AuditEntry:
        """Make a version the champion; the champion until now becomes `previous`.

        Args:
            version: its number.
            evidence: the figures that speak for it.
            reason: why, in words.
            forced: a gate had refused it.
            expected: number of the last audit entry when it was decided; what it is now without it.

        Raises:
            ConflictError: another change came first.
        """
        last = self.audit.last()
        change = Change(
            action="forced" if forced else "promote",
            to_version=version,
            from_version=self.audit.aliases().get(CHAMPION),
            reason=reason,
            evidence=evidence or {},
        )
        return self._change(change, last if expected is None else expected)

    def rollback(
        self,
        *,
        version: str = PREVIOUS,
        reason: str = "",
        evidence: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> AuditEntry:
        """Make `previous` the champion again; a second rollback goes one further back.

        Args:
            version: another one, that was the champion before.
            reason: why, in words.
            evidence: the figures that speak against the champion.
            expected: number of the last audit entry when it was decided; what it is now without it.

        Raises:
            NotFoundError: there is no champion, or none before it.
            ConflictError: another change came first.
        """
        last = self.audit.last()
        champion, target = self.resolve(CHAMPION), self.resolve(version)
        change = Change(
            action="rollback",
            to_version=target.version,
            from_version=champion.version,
            reason=reason,
            evidence=evidence or {},
        )
        return self._change(change, last if expected is None else expected)

    def _change(self, change: Change, expected: int) -> AuditEntry:
        entry = self.audit.append(change, expected)
        self.audit.reconcile()
        return entry

    def _run_artifacts(self, run_id: str) -> str:
        try:
            return str(self.client.get_run(run_id).info.artifact_uri)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise NotFoundError(f"There is no run {run_id}: see `insightedit status` for the runs there are.") from None

    def _ensure_model(self) -> None:
        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _entity(self, found: Any, aliases: Mapping[str, str]) -> ModelVersion:
        """Take over MLflow's object, whose version is an int here and a string there."""
        version, source = str(found.version), str(found.source)
        return ModelVersion(
            name=self.name,
            version=version,
            source=source,
            folder=seen_folder(source) or self._copies / source.rstrip("/").rpartition("/")[2],
            run_id=found.run_id,
            created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
            aliases=tuple(sorted(alias for alias, number in aliases.items() if number == version)),
            tags=dict(found.tags),
        )

    def _not_found(self, selector: str) -> str:
        numbers = [int(version.version) for version in self.client.search_model_versions(f"name='{self.name}'")]
        if not numbers:
            return f"There is no {_described(selector)} yet: no model is registered, run `insightedit quickstart`."
        newest = max(numbers)
        if selector == CHAMPION:
            return f"There is no champion yet: {newest} is the newest version, run `insightedit promote {newest}`."
        if selector == CHALLENGER:
            return "There is no challenger: train or import one, or name a version of `insightedit models list`."
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


def _verified(version: ModelVersion) -> Path:
    """A version's folder, if every file in it is what was registered."""
    manifest = verify_manifest(version.folder)
    if version.tags.get("manifest", manifest.digest) != manifest.digest:
        raise InsightEditError(
            f"{version.folder} is not what version {version.version} was registered with: register the model again."
        )
    return version.folder
