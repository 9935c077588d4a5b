"""Benchmarks that lie on disk, read by the readers of datasets, as the cases of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from insightedit.platform.cases import EditCase
from insightedit.platform.config import EvaluationConfig
from insightedit.platform.datasets import READERS, Reader
from insightedit.platform.datasets.magicbrush_test import MagicBrushTestReader
from insightedit.platform.datasets.masks import mask_of
from insightedit.platform.datasets.reading import records_of
from insightedit.platform.datasets.reasonedit import ReasonEditReader
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.judges import picture_hash
from insightedit.platform.records import BadRow, BadRowError, Record, decode_image

BENCHMARKS: Final[dict[str, Reader]] = {
    **{name: reader for name, reader in READERS.items() if "edit" in reader.tasks},
    **{reader.name: reader for reader in (ReasonEditReader(), MagicBrushTestReader())},
}
"""What can be evaluated on, by name: every dataset of edits, and benchmarks that nobody trains on."""
_MASKS: Final = frozenset({"advancededit", "pairs"})
"""Readers that give masks if they are asked to."""
_WORDINGS: Final = frozenset({"simple", "advanced"})
_STRIDE: Final = 0x9E3779B1
"""Odd, so that no two seeds below 2**32 begin at one number, and far from small multiples of itself modulo 2**32."""


def benchmark_cases(config: EvaluationConfig, scenes: int | None = None) -> list[EditCase]:
    """The cases of a benchmark, in its own order.

    Args:
        config: which one, and where.
        scenes: only the cases of the first source pictures; all of them without it.

    Raises:
        UsageError: there is no such benchmark, or an option is wrong.
        NotFoundError: its folder, or a file that it needs, is missing.
        InsightEditError: a row cannot be read, or there is none: figures on part of a benchmark would look like it.
    """
    numbers: dict[str, int] = {}
    cases: list[EditCase] = []
    for record in _records(config):
        case = _case(record, numbers, config.seed)
        if len(numbers) > (scenes or len(numbers)):
            break
        cases.append(case)
    if not cases:
        raise InsightEditError(f"The benchmark {config.benchmark.reader} holds no edit: look at evaluation.benchmark.")
    return cases


def _records(config: EvaluationConfig) -> Iterator[Record]:
    """The records of a benchmark, every row of which must be whole."""
    name, options = config.benchmark.reader, config.benchmark.options
    if name not in BENCHMARKS:
        raise UsageError(f"evaluation.benchmark is {name!r}; benchmarks are {', '.join(sorted(BENCHMARKS))}.")
    if name in _MASKS:
        options = {"masks": True, **options}
    for row in records_of(BENCHMARKS[name], options):
        if isinstance(row, BadRow):
            raise InsightEditError(
                f"The benchmark {name} cannot be evaluated on as a whole: of {row.key}, {row.detail.rstrip('.')};"
                " repair the row, or take it out of the benchmark's files."
            )
        if row.task == "edit":
            yield row


def _case(record: Record, numbers: dict[str, int], seed: int) -> EditCase:
    """The case of a record.

    Args:
        record: of an edit.
        numbers: of the source pictures so far, to which its own is added.
        seed: of the evaluation; another one gives all cases other noise.
    """
    try:
        source = decode_image(record.source or b"")
        target = None if record.target is None else decode_image(record.target)
        details = record.details()
        region = None if details.get("mask") is None else mask_of(details["mask"], source.shape[:2])
    except BadRowError as error:
        raise InsightEditError(f"The case {record.key} cannot be read: {error}") from None
    scene = picture_hash(source)[:16]
    return EditCase(
        key=record.key,
        scene=scene,
        task=record.category,
        wording=_text(details, "wording") if details.get("wording") in _WORDINGS else "",
        instruction=record.instruction,
        seed=noise_seed(seed, numbers.setdefault(scene, len(numbers))),
        source=source,
        target=target,
        region=region,
        # AdvancedEdit names what comes into the region.
        caption=_text(details, "caption") or _text(details, "class_target").replace("_", " "),
    )


def noise_seed(seed: int, number: int) -> int:
    """The seed of a scene's noise, of 32 bits: of more, torch's generator on a CPU takes no notice.

    Args:
        seed: of the evaluation.
        number: of the scene.
    """
    return (seed * _STRIDE + number) % 2**32


def _text(details: dict[str, object], name: str) -> str:
    value = details.get(name)
    return value if isinstance(value, str) else ""
