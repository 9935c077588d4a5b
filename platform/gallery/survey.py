"""What is looked at of a dataset's records: small facts of each, and the pictures of a few."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from insightedit.platform.config import DatasetConfig, MetricsConfig, PictureConfig
from insightedit.platform.datasets.segmentation import rle_mask
from insightedit.platform.gallery.wording import Kind, kind_of
from insightedit.platform.ingest import Chunk, read_chunk
from insightedit.platform.judges.shapes import edit_region
from insightedit.platform.metrics import Comparison, Meter
from insightedit.platform.records import Record, decode_image, encode_png, picture_size
from insightedit.platform.shards import Table

COMPARED_SIDE: Final = 512
"""Pixels of the shorter side at which source and target are compared; smaller ones are as they are."""
SHOWN_SIDE: Final = 640
"""Pixels of the longer side of pictures that are shown."""
_WORDINGS: Final = ("simple", "advanced")
_KEPT: Final = ("scores", "explanations", "scene", "target_scene")
"""What of a record's `meta` is taken along with its pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of one record."""

    key: str
    """Of its pair: the wordings of one pair have the same."""
    task: str
    kind: Kind
    wording: str
    """`simple` or `advanced` as the dataset calls it; empty where it does not."""
    instruction: str
    size: tuple[int, int]
    """(width, height) of the source in pixels."""
    whole: Mapping[str, float] = field(default_factory=dict[str, float])
    """`psnr` and `ssim` of target and source over the whole picture; empty where they were not compared."""
    outside: Mapping[str, float] = field(default_factory=dict[str, float])
    """The same outside the mask; empty also where there is no mask."""
    source: bytes | None = None
    """The picture, made small; only of a few."""
    target: bytes | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Scores and truths out of `meta`; only where the pictures are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """How much of one chunk is taken."""

    rows: int
    compared: int
    """Pairs whose pictures are compared."""
    shown: int
    """Pairs of each kind whose pictures are taken along."""


_SCHEMA: Final = pa.schema(
    [("facts", pa.string()), ("source", pa.binary()), ("target", pa.binary()), ("bad", pa.int64())]
)


def survey(chunk: Chunk, *, dataset: DatasetConfig, quota: Quota, seed: int) -> Table:
    """Look at a chunk: a row for each record, and one that counts the rows that cannot be used."""
    rows = read_chunk(dataset, PictureConfig(), chunk, seed=seed)
    facts = look_at([record for _, record in rows.good][: quota.rows], quota)
    columns = [_row(one) for one in facts] + [{"facts": None, "source": None, "target": None, "bad": len(rows.bad)}]
    return pa.Table.from_pylist(columns, schema=_SCHEMA)


def facts_of(row: Mapping[str, Any]) -> Facts:
    """The facts in a row of `survey`."""
    content: dict[str, Any] = json.loads(row["facts"])
    content |= {"size": tuple(content["size"]), "source": row["source"], "target": row["target"]}
    return Facts(**content)


def look_at(records: Sequence[Record], quota: Quota) -> list[Facts]:
    """The facts of records, in their order."""
    keys = [_pair_key(record) for record in records]
    pairs: dict[str, list[Record]] = {}
    for key, record in zip(keys, records, strict=True):
        pairs.setdefault(key, []).append(record)
    edits = {key: pair for key, pair in pairs.items() if pair[0].task == "edit" and pair[0].target is not None}
    meter = Meter(MetricsConfig())
    compared = {key: _compare(edits[key][0], meter) for key in list(edits)[: quota.compared]}
    shown = _chosen(edits, quota.shown)
    pictures = {key: (_small(edits[key][0].source), _small(edits[key][0].target)) for key in shown}
    return [
        _facts(key, record, compared.get(key, ({}, {})), pictures.get(key))
        for key, record in zip(keys, records, strict=True)
    ]


def region_of(record: Record, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Where a record's edit belongs, (H, W) of its mask; None where the dataset does not say.

    Scenes of the shapes world are drawn anew, so that what differs is the edit and nothing else.
    """
    details = record.details()
    mask = details.get("mask")
    if isinstance(mask, dict):
        rle = cast(dict[str, Any], mask)
        return rle_mask(rle, cast(tuple[int, int], tuple(rle["size"])))
    if "target_scene" in details:
        return edit_region(source / 255, target / 255)
    return None


def _pair_key(record: Record) -> str:
    """The key without its wording, where it ends so."""
    return next((record.key.removesuffix(f"-{one}") for one in _WORDINGS if record.key.endswith(f"-{one}")), record.key)


def _chosen(pairs: Mapping[str, Sequence[Record]], each: int) -> list[str]:
    """Pairs of every kind, those with scores and with both wordings first."""

    def worth(key: str) -> tuple[bool, int]:
        return "scores" not in pairs[key][0].details(), -len(pairs[key])

    found: dict[Kind, list[str]] = {}
    for key in sorted(pairs, key=worth):
        kind = _kind(pairs[key][0])
        if len(found.setdefault(kind, [])) < each:
            found[kind].append(key)
    return [key for keys in found.values() for key in keys]


def _kind(record: Record) -> Kind:
    return kind_of(record.category, record.instruction) if record.task == "edit" else "other"


def _facts(
    key: str,
    record: Record,
    compared: tuple[Mapping[str, float], Mapping[str, float]],
    pictures: tuple[bytes, bytes] | None,
) -> Facts:
    details, source = record.details(), record.source
    return Facts(
        key=key,
        task=record.task,
        kind=_kind(record),
        wording=str(details.get("wording", "")),
        instruction=record.instruction,
        size=picture_size(source) if source is not None else (0, 0),
        whole=compared[0],
        outside=compared[1],
        source=pictures[0] if pictures else None,
        target=pictures[1] if pictures else None,
        details={name: details[name] for name in _KEPT if name in details} if pictures else {},
    )


def _row(facts: Facts) -> dict[str, Any]:
    content = asdict(facts)
    source, target = content.pop("source"), content.pop("target")
    return {"facts": json.dumps(content), "source": source, "target": target, "bad": 0}


def _compare(record: Record, meter: Meter) -> tuple[dict[str, float], dict[str, float]]:
    """PSNR and SSIM of target and source: over the whole picture, and outside the mask."""
    source, target = (decode_image(data or b"") for data in (record.source, record.target))
    region = region_of(record, source, target)
    source, target = (_at_most(picture) for picture in (source, target))
    nowhere = np.zeros(source.shape[:2], np.bool_)
    regions: Iterable[NDArray[np.bool_]] = [nowhere] if region is None else [nowhere, _fitted(region, source.shape)]
    measured = meter.measure(Comparison(source=source, edit=target, region=one) for one in regions)
    rows = [{name: row[name] for name in ("psnr", "ssim") if name in row} for row in measured]
    return rows[0], rows[1] if len(rows) > 1 else {}


def _at_most(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture whose shorter side has `COMPARED_SIDE` pixels at most."""
    scale = COMPARED_SIDE / min(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _fitted(region: NDArray[np.bool_], shape: Sequence[int]) -> NDArray[np.bool_]:
    """A mask of a picture's size: a pixel is on it as soon as a part of it is."""
    if region.shape == tuple(shape[:2]):
        return region
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(region.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 0


def _small(data: bytes | None) -> bytes:
    """A picture to be shown: as PNG where it is small anyway, else as JPEG."""
    image = Image.fromarray(decode_image(data or b""))
    if max(image.size) <= SHOWN_SIDE // 4:
        return encode_png(np.asarray(image))
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
