"""How every benchmark keeps its figures: a table for people, and `out/NAME.json` beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from insightedit.platform.tracking import git_commit

OUT = Path("out")
_PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "mlflow", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that was measured."""

    name: str
    value: float
    """The median of its runs."""
    unit: str
    n: int
    """Runs."""
    min: float
    max: float


def row(name: str, unit: str, values: Sequence[float]) -> Row:
    """The row of a thing that was measured several times."""
    return Row(name=name, value=statistics.median(values), unit=unit, n=len(values), min=min(values), max=max(values))


def report(name: str, rows: Sequence[Row], ratios: Mapping[str, float]) -> Path:
    """Print the figures as a table and write them to `out/NAME.json`.

    Args:
        name: of the benchmark.
        rows: what was measured.
        ratios: of two things that were run side by side, by name.

    Returns:
        The file.
    """
    width = max(len(one) for one in (*(one.name for one in rows), *ratios))
    for one in rows:
        print(f"{one.name:<{width}}  {one.value:>12.5g} {one.unit}  ({one.n} runs, {one.min:.5g} to {one.max:.5g})")
    for key, value in ratios.items():
        print(f"{key:<{width}}  {value:>12.4g}")
    content = {**environment(), "rows": [asdict(one) for one in rows], "ratios": dict(ratios)}
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def report_part(name: str, part: str, counts: Mapping[str, int]) -> Path:
    """Print one part's counts as a table and put them into `out/NAME.json`, beside the other parts that are there.

    Args:
        name: of the file.
        part: whose counts they are.
        counts: by name.

    Returns:
        The file.
    """
    for key, value in counts.items():
        print(f"{part:<12}  {key:<12}  {value:>8}")
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    parts = json.loads(path.read_text(encoding="utf-8")).get("parts", {}) if path.is_file() else {}
    content = {**environment(), "parts": {**parts, part: dict(counts)}}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def environment() -> dict[str, object]:
    """What figures depend on besides the code: `machine`, `versions` and `commit`."""
    return {
        "machine": {"processor": _processor(), "cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": git_commit(),
    }


def _processor() -> str:
    """The processor's name, where the system says it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
