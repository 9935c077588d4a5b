"""The process of `batch-edit` that edits: some rows at a time through the server's engine, each written when made."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from insightedit.platform.errors import NotFoundError
from insightedit.platform.shards import Table
from insightedit.platform.storage import Store, retried
from insightedit.serve.backend import Edited, EditJob, Refusal
from insightedit.serve.batch_rows import BadEdit, Cell, WantedEdit
from insightedit.serve.schema import SEED_LIMIT, ApiError, OutputFormat
from insightedit.serve.settings import EngineSettings, Limits
from insightedit.serve.uploads import decode_upload, encode_image

NOTES = ".batch/notes"
"""Folder of the notes on what is done, below the output's."""
_STORAGE_SECONDS = 60.0
"""How long a failing storage is waited for."""
_ENDINGS: dict[OutputFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSettings:
    """What the bytes of an edit depend on beside model version, picture, instruction and key."""

    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    negative_prompt: str | None = None
    output_format: OutputFormat = "png"

    def job(self, wanted: WantedEdit, picture: bytes) -> EditJob:
        """The edit as an engine takes it.

        Raises:
            ApiError: the picture cannot be edited.
        """
        return EditJob(
            prompt=wanted.instruction,
            pixels=decode_upload(picture, Limits()),
            seed=row_seed(self.seed, wanted.key),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            negative_prompt=self.negative_prompt,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneEdit:
    """A row of the table of results."""

    key: str
    file: str
    """From the output's folder."""
    seed: int
    model_version: str
    instruction_sha256: str
    seconds: float
    """From decoding the picture to having the edit encoded."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""
    request: str
    """Digest of what was asked for."""

    def row(self) -> dict[str, Any]:
        """As it is listed."""
        return asdict(self)


def row_seed(seed: int, key: str) -> int:
    """The seed of one row: the same whatever else is in the batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8]) % SEED_LIMIT


def wanted_from(fields: dict[str, Any]) -> WantedEdit:
    """An edit that went through JSON."""
    image: Any = fields["image"]
    image = image if isinstance(image, str) else Cell(*image)
    return WantedEdit(key=fields["key"], instruction=fields["instruction"], image=image)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """A row whose edit is in the engine."""

    wanted: WantedEdit
    seed: int
    edit: Future[Edited]
    began: float
    """By the performance counter."""


class BatchEditor:
    """Edits, in a process of its own, and writes what it has edited."""

    def __init__(self, folder: str, version: str, settings: BatchSettings, out: Store) -> None:
        # Imported here: whoever starts the job needs neither torch nor its memory.
        from insightedit.serve.engine import ConditionEngine, EditEngine, use_threads  # noqa: PLC0415

        engine = EngineSettings()
        use_threads(engine.threads)
        self._conditioner = ConditionEngine(folder, exact=True, settings=engine)
        self._editor = EditEngine(folder, exact=True, settings=engine)
        self._version = version
        self._settings = settings
        self._out = out

    def __call__(self, rows: Table) -> Table:
        """What becomes of some rows: JSON of a `DoneEdit` or a `BadEdit`.

        All of them are given to the engine before the first is waited for: it takes their steps in turn, and decodes,
        encodes and writes meanwhile.
        """
        # On this thread, whose torch has the engine's number of threads: exact bits depend on it.
        begun = [self._begin(row) for row in rows.to_pylist()]
        with ThreadPoolExecutor(max(len(begun), 1)) as writers:
            outcomes = list(writers.map(self._end, begun))
        return pa.table({"outcome": [json.dumps(outcome.row()) for outcome in outcomes]})

    def _begin(self, row: Mapping[str, Any]) -> _Begun | DoneEdit | BadEdit:
        """Give a row's edit to the engine, unless it is done or cannot be."""
        wanted = wanted_from(json.loads(row["wanted"]))
        if row["picture"] is None:
            return BadEdit(key=wanted.key, reason=row["reason"], detail=row["detail"])
        before = self._done(wanted)
        if before is not None:
            return before  # A worker that died over a later row had done it.
        began = time.perf_counter()
        try:
            job = self._settings.job(wanted, row["picture"])
        except ApiError as error:
            return BadEdit(key=wanted.key, reason=error.code, detail=error.message)
        (conditions,) = self._conditioner.condition([job])
        if isinstance(conditions, Refusal):
            return BadEdit(key=wanted.key, reason="refused", detail=conditions.message)
        edit = self._editor.submit(job, conditions)
        return _Begun(wanted=wanted, seed=job.seed, edit=edit, began=began)

    def _end(self, begun: _Begun | DoneEdit | BadEdit) -> DoneEdit | BadEdit:
        if not isinstance(begun, _Begun):
            return begun
        data = encode_image(begun.edit.result().pixels, self._settings.output_format)
        return self._write(begun.wanted, begun.seed, data, time.perf_counter() - begun.began)

    def _done(self, wanted: WantedEdit) -> DoneEdit | None:
        """The note on an edit that is there; None where note or file is missing, or is of another edit."""
        note = self._note(wanted)
        if note is None or note.request != wanted.request:
            return None
        try:
            data = retried(lambda: self._out.read(note.file), _STORAGE_SECONDS)
        except NotFoundError:
            return None
        return note if hashlib.sha256(data).hexdigest() == note.sha256 else None

    def _note(self, wanted: WantedEdit) -> DoneEdit | None:
        """The note on a row's file; None where there is none."""
        try:
            text = retried(lambda: self._out.read(_note_name(wanted)), _STORAGE_SECONDS)
        except NotFoundError:
            return None
        return DoneEdit(**json.loads(text))

    def _write(self, wanted: WantedEdit, seed: int, data: bytes, seconds: float) -> DoneEdit:
        """Write an edit, and then the note on it."""
        done = DoneEdit(
            key=wanted.key,
            file=wanted.stem + _ENDINGS[self._settings.output_format],
            seed=seed,
            model_version=self._version,
            instruction_sha256=hashlib.sha256(wanted.instruction.encode()).hexdigest(),
            seconds=round(seconds, 4),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            request=wanted.request,
        )
        for name, content in ((done.file, data), (_note_name(wanted), json.dumps(done.row()).encode())):
            retried(lambda name=name, content=content: self._out.write(name, content), _STORAGE_SECONDS)
        return done


def _note_name(wanted: WantedEdit) -> str:
    """The note on a row's file, whatever was asked for when it was written."""
    return f"{NOTES}/{hashlib.sha256(wanted.stem.encode()).hexdigest()[:32]}.json"
