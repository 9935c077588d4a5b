"""Files of one JSON object a line, which a run that resumes takes back to where its checkpoint was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def append_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; empty where there is none. A line that was cut off by its writer's death is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def keep_entries(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop the lines that are not wanted: what is done again is written again."""
    entries = [entry for entry in read_entries(path) if wanted(entry)]
    if path.is_file():
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        temporary.replace(path)
