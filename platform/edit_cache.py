"""Edits that were made, on disk: an evaluation that was killed makes only those that are missing.

What is kept is whole batches, under a hash of everything that they depend on: the pipeline's files, the code that runs
it, and pictures, instructions and seeds of the batch. An edit may differ by rounding in another batch, so a batch is
used again as a whole or not at all, and the figures are those of an evaluation that was never interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import insightedit.model.pipeline
from insightedit.platform.cases import EditCase
from insightedit.platform.judges import picture_hash
from insightedit.platform.records import BadRowError, decode_image, encode_png

_PACKAGES: Final = ("torch", "diffusers", "transformers", "peft", "pillow")

Picture = NDArray[np.uint8]


class EditCache:
    """The batches of edits that one pipeline made."""

    def __init__(self, folder: Path, pipeline: Path, device: str) -> None:
        """Open the cache.

        Args:
            folder: where all pipelines' edits are kept; it need not be there yet.
            pipeline: the folder of the one that edits.
            device: what it runs on, which rounds in its own way.
        """
        self._folder = folder
        self._pipeline = json.dumps([_identity(pipeline), _code(), device])

    def get(self, batch: Sequence[EditCase]) -> list[Picture] | None:
        """The edits of a batch; None where they are not there, or damaged."""
        try:
            rows = pq.read_table(self._path(batch)).column("edit").to_pylist()
            edits = [decode_image(row) for row in rows]
        except (OSError, pa.ArrowException, KeyError, BadRowError):
            return None
        return edits if len(edits) == len(batch) else None

    def put(self, batch: Sequence[EditCase], edits: Sequence[Picture]) -> None:
        """Keep the edits of a batch, put in place whole."""
        path = self._path(batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        pq.write_table(pa.table({"edit": pa.array([encode_png(edit) for edit in edits], pa.binary())}), temporary)
        temporary.replace(path)

    def _path(self, batch: Sequence[EditCase]) -> Path:
        asked = [(picture_hash(case.source), case.instruction, case.seed) for case in batch]
        key = hashlib.sha256(json.dumps([self._pipeline, asked]).encode()).hexdigest()
        return self._folder / key[:2] / f"{key}.parquet"


def _identity(folder: Path) -> list[tuple[str, int, int]]:
    """The files of a folder by name, size and time of change: a large model's content takes minutes to read."""
    files = [(path.relative_to(folder).as_posix(), path.stat()) for path in folder.rglob("*") if path.is_file()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def _code() -> list[str]:
    """What edits depend on beside the weights: our model's code, and the libraries below it."""
    own = sorted(Path(insightedit.model.pipeline.__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in own)).hexdigest()
    return [digest, *(importlib.metadata.version(name) for name in _PACKAGES)]
