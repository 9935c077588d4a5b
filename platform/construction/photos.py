"""What travels through the steps: a picture with all that was found out about it, and the rows that carry it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pycocotools.mask as coco_mask
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from insightedit.platform.chat.asking import Spending
from insightedit.platform.construction.config import Aspect, StepName
from insightedit.platform.datasets.segmentation import rle_mask
from insightedit.platform.records import decode_image
from insightedit.platform.shards import Table

Picture = NDArray[np.uint8]
"""Pixels (H, W, 3), RGB."""
Mask = NDArray[np.bool_]
"""(H, W), true on a thing."""

SCHEMA: Final[pa.Schema] = pa.schema(
    [("block", pa.int64()), ("data", pa.binary()), ("state", pa.string()), ("painted", pa.list_(pa.binary()))]
)


@dataclass(frozen=True, slots=True)
class Rejected:
    """That a step gave nothing of use.

    Attributes:
        reason: one of few, to be counted.
        detail: what happened, in one sentence.
    """

    reason: str
    detail: str


class Rejection(BaseModel):
    """Something that a step turned down."""

    step: Literal["read", StepName, "filter"]
    what: str
    """The picture, the thing or the edit."""
    reason: str
    detail: str


class Rle(BaseModel):
    """A mask in COCO's compressed run lengths."""

    size: tuple[int, int]
    """Height and width."""
    counts: str

    @classmethod
    def of(cls, mask: Mask) -> Rle:
        """Encode a mask (H, W)."""
        rle: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        return cls(size=(mask.shape[0], mask.shape[1]), counts=rle["counts"].decode())

    def mask(self) -> Mask:
        """The mask (H, W)."""
        return rle_mask({"size": list(self.size), "counts": self.counts}, self.size)


class Thing(BaseModel):
    """An object in a picture.

    Attributes:
        name: what an instruction calls it: "dark jeans".
        category: its kind: "clothing".
        caption: one sentence about it.
        box: x, y, width, height in pixels, where a detector found it.
        mask: which pixels are its.
        score: how sure of the mask its maker is, 0 to 1.
    """

    name: str
    category: str = ""
    caption: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Rle | None = None
    score: float | None = None


class Advanced(BaseModel):
    """An instruction that needs reasoning, and about what: location, colour, quantity, function, ..."""

    text: str
    about: str


class Words(BaseModel):
    """The instructions of one direction of an edit."""

    simple: list[str]
    advanced: list[Advanced]


class Graded(BaseModel):
    """One score of a judge, 0 to 5, with its explanation."""

    value: int
    explanation: str


class Change(BaseModel):
    """An edit of a picture, which is two pairs: there and back again.

    Attributes:
        task: what it does; a removal back again is an addition, a replacement another one.
        thing: what is edited.
        new_name: what comes in its place.
        new_caption: one sentence about that.
        painted: the edited picture as a file.
        there: instructions from the picture to what was painted.
        back: from what was painted to the picture.
        scores: what the judge says.
        kept: whether it passed every step.
    """

    task: Literal["remove", "replace"]
    thing: Thing
    new_name: str = ""
    new_caption: str = ""
    painted: bytes = Field(default=b"", exclude=True)
    there: Words | None = None
    back: Words | None = None
    scores: dict[Aspect, Graded] | None = None
    kept: bool = True

    @property
    def named(self) -> str:
        """The edit in words, for lists."""
        return f"{self.task} {self.thing.name}" + (f" by {self.new_name}" if self.new_name else "")


class Spent(BaseModel):
    """What a step took."""

    seconds: float = 0.0
    """Of a process."""
    requests: int = 0
    retries: int = 0
    repairs: int = 0
    """Requests that asked a model to put an answer right."""
    cached: int = 0
    """Answers that were there already."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, asked: Spending) -> Spent:
        """What asking a model took, but for the time."""
        return cls(**{name: getattr(asked, name) for name in cls.model_fields if name != "seconds"})

    def plus(self, other: Spent, sign: int = 1) -> Spent:
        """The sum, or with the sign -1 the difference."""
        return Spent(**{name: value + sign * getattr(other, name) for name, value in self})


class Photo(BaseModel):
    """A picture on its way through the steps."""

    name: str
    """Of its files."""
    key: str
    """Where it comes from: a file's name or a record's key."""
    data: bytes = Field(default=b"", exclude=True)
    """The picture's file."""
    suffix: str = "png"
    """Of its file's name."""
    truth: dict[str, Any] | None = None
    """The scene, in the world of shapes."""
    caption: str = ""
    things: list[Thing] = []
    changes: list[Change] = []
    rejections: list[Rejection] = []
    spent: dict[StepName, Spent] = {}
    out: bool = False
    """Whether no step has anything to do with it any more."""

    @functools.cached_property
    def pixels(self) -> Picture:
        """The picture, decoded."""
        return decode_image(self.data)

    @property
    def kept(self) -> list[Change]:
        """The edits that passed every step so far."""
        return [change for change in self.changes if change.kept]

    def reject(self, step: Literal["read", StepName, "filter"], what: str, why: Rejected) -> None:
        """Write down that something of it was turned down."""
        self.rejections.append(Rejection(step=step, what=what, reason=why.reason, detail=why.detail))

    def drop(self, step: Literal["read", StepName], why: Rejected) -> None:
        """Turn the whole picture down."""
        self.reject(step, self.key, why)
        self.out = True

    def drop_change(self, step: Literal[StepName, "filter"], change: Change, why: Rejected) -> None:
        """Turn an edit down."""
        self.reject(step, change.named, why)
        change.kept = False


def to_rows(block: int, photos: Sequence[Photo]) -> Table:
    """The photos of a block as a table of `SCHEMA`."""
    columns: dict[str, list[Any]] = {
        "block": [block] * len(photos),
        "data": [photo.data for photo in photos],
        "state": [photo.model_dump_json() for photo in photos],
        "painted": [[change.painted for change in photo.changes] for photo in photos],
    }
    return pa.table(columns, schema=SCHEMA)


def from_rows(table: Table) -> tuple[int, list[Photo]]:
    """Number and photos of a block."""
    photos: list[Photo] = []
    for row in table.to_pylist():
        photo = Photo.model_validate_json(row["state"])
        photo.data = row["data"]
        for change, painted in zip(photo.changes, row["painted"], strict=True):
            change.painted = painted
        photos.append(photo)
    (block,) = set(table.column("block").to_pylist())
    return block, photos
