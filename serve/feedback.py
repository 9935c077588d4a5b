"""What users say of their edits, kept where the server's people have their consent, and used for training.

While consent is switched on, each edit waits in the gateways' store for some time for a verdict. A verdict takes it out
of there into a folder of the work folder: source, edit, instruction, version and seed. Nothing else is kept, and
nobody's name. Accepted edits come out as a `pairs` dataset.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError

from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.answers import CompletedEvent
from insightedit.serve.backend import EditJob
from insightedit.serve.logs import LOGGER
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import FeedbackSettings
from insightedit.serve.state_store import Entry, StateStore, StoreFullError, StoreUnreachableError
from insightedit.serve.uploads import Mask, Pixels, encode_image, finish_image

logger = logging.getLogger(LOGGER)

Verdict = Literal["accept", "reject"]
FOLDER = "feedback"
"""In the work folder."""
PART = 0.25
"""Of the store that edits which wait for a verdict may fill."""
_STORE_ERRORS = (StoreFullError, StoreUnreachableError)


class FeedbackRequest(BaseModel):
    """What is said of one edit."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    request_id: str
    """Of the answer with the edit."""
    image_index: int = 0
    """Which image of the answer, from 0."""
    verdict: Verdict


class FeedbackAnswer(BaseModel):
    """What came of it."""

    kept: bool = True


class _Waiting(BaseModel):
    """An edit that has had no verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    version: str
    seed: int
    source: Base64Bytes
    edit: Base64Bytes
    """Both PNG, of one size."""


class FeedbackRow(BaseModel):
    """An edit with its verdict, as it is kept beside its two images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    instruction: str
    version: str
    seed: int
    when: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class OfferedEdit:
    """An edit that somebody may say something of."""

    job: EditJob
    pixels: Pixels
    """As the model gave it."""
    mask: Mask | None

    def files(self) -> tuple[bytes, bytes]:
        """Source and edit as PNG in base64, of one size, with what the mask keeps."""
        finished = finish_image(self.pixels, self.job.pixels, self.mask, None)
        source, made = (base64.b64encode(encode_image(one, "png")) for one in (self.job.pixels, finished))
        return source, made


class Feedback:
    """A gateway's part of it."""

    def __init__(self, settings: FeedbackSettings, store: StateStore, folder: Path) -> None:
        """Begin; nothing is kept without consent.

        Args:
            settings: whether and how long.
            store: where edits wait, shared with the other gateways.
            folder: where edits with a verdict go, likewise.
        """
        self.settings = settings
        self._store = store
        self._folder = folder
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, caller: str, made: CompletedEvent, edit: OfferedEdit) -> None:
        """Let an edit wait for a verdict; its answer does not wait for that.

        Args:
            caller: the name of the API key.
            made: what is answered.
            edit: what it was made of.
        """
        if not self.settings.consent:
            return
        name = _name(caller, made.request_id, made.image_index)
        task = asyncio.ensure_future(self._keep(name, made.model_version, edit))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, name: str, version: str, edit: OfferedEdit) -> None:
        source, made = await asyncio.to_thread(edit.files)
        row = _Waiting(prompt=edit.job.prompt, version=version, seed=edit.job.seed, source=source, edit=made)
        entry = Entry(row.model_dump_json().encode(), time.time() + self.settings.wait_seconds)
        try:
            await self._store.change({}, {name: entry}, PART)
        except _STORE_ERRORS as error:
            logger.warning("an edit cannot wait for its verdict: %s", error)

    async def take(self, caller: str, said: FeedbackRequest) -> str:
        """Keep an edit with its verdict.

        Args:
            caller: the name of the API key, the one that asked for the edit.
            said: the verdict.

        Returns:
            The version that made the edit.

        Raises:
            ApiError: 403 without consent, 404 for an edit that does not wait, 503 where it cannot be kept.
        """
        if not self.settings.consent:
            message = "This server keeps no feedback; whoever runs it can switch feedback.consent on."
            raise ApiError(403, "feedback_off", message)
        name = _name(caller, said.request_id, said.image_index)
        try:
            found = await self._store.get(name)
            if found is None:
                message = "There is no such edit waiting for a verdict; it had one, was never yours, or is too old."
                raise ApiError(404, "edit_not_found", message, "request_id")
            row = _Waiting.model_validate_json(found)
            await asyncio.to_thread(self._write, row, said.verdict)
            # Afterwards: who is cut off in between asks again, and at worst has the edit kept twice.
            await self._store.change({}, {name: None})
        except (*_STORE_ERRORS, OSError) as error:
            logger.warning("a verdict cannot be kept: %s", error)
            raise ApiError(503, "unavailable", "The verdict cannot be kept at present; send it again.") from None
        return row.version

    def _write(self, row: _Waiting, verdict: Verdict) -> None:
        """Both images first, and then the row that makes them count."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stem = self._folder / uuid.uuid4().hex
        for ending, data in (("source.png", row.source), ("edit.png", row.edit)):
            _write_whole(stem.with_suffix(f".{ending}"), data)
        said = FeedbackRow(
            verdict=verdict, instruction=row.prompt, version=row.version, seed=row.seed, when=time.time()
        )
        _write_whole(stem.with_suffix(".json"), said.model_dump_json().encode())


def _name(caller: str, request: str, index: int) -> str:
    """In the store. Nobody judges what another one's key was answered with."""
    return f"feedback/{hashlib.sha256(f'{caller}/{request}'.encode()).hexdigest()}/{index}"


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# -- out of the folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exported:
    """What came out."""

    folder: Path
    pairs: int
    """Accepted edits, each a pair."""
    rejected: int
    """Edits that users rejected: counted, not exported."""


def kept_feedback(folder: Path) -> Iterator[tuple[Path, FeedbackRow]]:
    """What a folder holds, the oldest first; the path is that of a row."""
    rows: list[tuple[Path, FeedbackRow]] = []
    for path in folder.glob("*.json"):
        try:
            rows.append((path, FeedbackRow.model_validate_json(path.read_bytes())))
        except ValidationError:
            logger.warning("%s is no feedback and is left out", path)
    yield from sorted(rows, key=lambda row: (row[1].when, row[0].name))


def export_feedback(workdir: Workdir, out: Path) -> Exported:
    """Write accepted edits as a `pairs` dataset: `train.jsonl` and its images.

    Args:
        workdir: whose feedback.
        out: a folder that is not there yet, or is empty.

    Raises:
        NotFoundError: no edit has been accepted.
        UsageError: `out` has something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already and not empty; name a new folder.")
    rows = list(kept_feedback(workdir.root / FOLDER))
    accepted = [(path, row) for path, row in rows if row.verdict == "accept"]
    if not accepted:
        raise NotFoundError(
            f"No edit in {workdir.root / FOLDER} has been accepted; serve with --set feedback.consent=true for that."
        )
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number, (path, row) in enumerate(accepted):
        names = {"source_image": f"images/{number:06}-source.png", "target_image": f"images/{number:06}-target.png"}
        for name, ending in zip(names.values(), ("source.png", "edit.png"), strict=True):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path.with_suffix(f".{ending}"), out / name)
        notes = {"instruction": row.instruction, "model_version": row.version, "seed": row.seed}
        lines.append(json.dumps({**names, **notes}, ensure_ascii=False))
    (out / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Exported(out, len(accepted), len(rows) - len(accepted))
