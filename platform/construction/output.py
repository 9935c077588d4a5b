"""What a block leaves: pictures, AdvancedEdit's own JSON, and a line for each picture with all that is known of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import pycocotools.mask as coco_mask

from insightedit.platform.construction.config import Aspect
from insightedit.platform.construction.instructions import Direction
from insightedit.platform.construction.photos import Change, Photo, Words
from insightedit.platform.errors import NotFoundError
from insightedit.platform.storage import Store

PAIRS, IMAGES, EDITS, BLOCKS = "pairs", "images", "edits", "blocks"
"""Folders of the output."""
SAMPLE: Final = "report/pictures"
"""Folder of the pictures of some photos, with the edits that were turned down."""
PATTERN: Final = f"{PAIRS}/*.json"
"""What the reader of AdvancedEdit is told to read."""
_SCORES: Final[dict[Aspect, tuple[str, str]]] = {
    "instruction_adherence": ("qwen_VIE_SC", "instruction_follow"),
    "non_overediting": ("qwen_VIE_SC", "non-overedit"),
    "naturalness": ("qwen_VIE_PQ", "naturalness"),
    "no_artifacts": ("qwen_VIE_PQ", "no_artifacts"),
}
"""What AdvancedEdit calls each score, and the object that holds it."""


def block_file(number: int) -> str:
    """The file that says a block is done."""
    return f"{BLOCKS}/{number:06d}.jsonl"


def blocks_done(store: Store) -> set[int]:
    """The blocks that are done."""
    return {int(name.removesuffix(".jsonl")) for name in store.child(BLOCKS).sizes() if name.endswith(".jsonl")}


def write_block(store: Store, number: int, photos: Sequence[Photo], sampled: int = 0) -> None:
    """Put a block down; the file that says so comes last, and whoever does it twice writes the same.

    Args:
        store: the folder of the dataset.
        number: of the block.
        photos: of the block.
        sampled: photos, from the first on, of which all pictures are kept to be looked at.
    """
    for photo in photos[:sampled]:
        store.write(f"{SAMPLE}/{photo.name}.{photo.suffix}", photo.data)
        for place, change in enumerate(photo.changes):
            if change.painted:
                store.write(f"{SAMPLE}/{photo.name}-{place}.png", change.painted)
    for photo in photos:
        if photo.kept:
            store.write(image_file(photo), photo.data)
            for place, change in enumerate(photo.changes):
                if change.kept:
                    store.write(edit_file(photo, place), change.painted)
            store.write(f"{PAIRS}/{photo.name}.json", json.dumps(pairs_of(photo), indent=1).encode())
    lines = "".join(f"{photo.model_dump_json()}\n" for photo in photos)
    store.write(block_file(number), lines.encode())


def read_photos(store: Store) -> Iterator[Photo]:
    """All photos of the blocks that are done, in order, without their pictures.

    Raises:
        NotFoundError: there are none.
    """
    names = sorted(store.child(BLOCKS).sizes())
    if not names:
        raise NotFoundError(f"There is no constructed dataset in {store}; run `insightedit data construct`.")
    for name in names:
        for line in store.child(BLOCKS).read(name).decode().splitlines():
            yield Photo.model_validate_json(line)


def read_sample(store: Store, photos: Sequence[Photo], count: int) -> Iterator[Photo]:
    """The photos of which all pictures were kept, with these."""
    folder = store.child(SAMPLE)
    there = folder.sizes()
    for photo in photos[:count]:
        if there.get(f"{photo.name}.{photo.suffix}"):
            photo.data = folder.read(f"{photo.name}.{photo.suffix}")
            for place, change in enumerate(photo.changes):
                name = f"{photo.name}-{place}.png"
                change.painted = folder.read(name) if name in there else b""
            yield photo


def count_pairs(photos: Sequence[Photo]) -> Counter[str]:
    """Pairs by task."""
    return Counter(pair.task for photo in photos for change in photo.kept for pair in _directions(photo, change))


def image_file(photo: Photo) -> str:
    """The picture's file in the output."""
    return f"{IMAGES}/{photo.name}.{photo.suffix}"


def edit_file(photo: Photo, place: int) -> str:
    """The file of an edited picture, by the edit's place."""
    return f"{EDITS}/{photo.name}-{place}-{photo.changes[place].task}.png"


def pairs_of(photo: Photo) -> dict[str, Any]:
    """A photo's pairs as AdvancedEdit has them, each edit in both directions."""
    pairs = [
        _pair(photo, place, pair)
        for place, change in enumerate(photo.changes)
        if change.kept
        for pair in _directions(photo, change)
    ]
    return {str(number): pair for number, pair in enumerate(pairs)}


def _directions(photo: Photo, change: Change) -> tuple[Direction, Direction]:
    return Direction(photo, change, "there"), Direction(photo, change, "back")


def _pair(photo: Photo, place: int, pair: Direction) -> dict[str, Any]:
    change, files = pair.change, (image_file(photo), edit_file(photo, place))
    words: Words | None = getattr(change, pair.way)
    if words is None or change.thing.mask is None:
        raise ValueError(f"{change.named} of {photo.key} is kept without instructions or mask.")
    origin, target = files if pair.way == "there" else files[::-1]
    rle = change.thing.mask
    box: Any = coco_mask.toBbox({"size": list(rle.size), "counts": rle.counts.encode()})
    return {
        "origin_img_path": origin,
        "target_img_path": target,
        "instruction": words.simple,
        "task_type": pair.task,
        "class_origin": pair.before,
        "class_target": pair.after,
        "detailed_caption": change.thing.caption,
        **(_replaced(change, pair.way) if change.task == "replace" else {}),
        "img_caption": photo.caption,
        "bbox": [round(float(value)) for value in box],
        "segmentation": {"size": list(rle.size), "counts": rle.counts},
        **{f"reasoning_instruction{number}": one.text for number, one in enumerate(words.advanced, 1)},
        **{f"reasoning_about{number}": one.about for number, one in enumerate(words.advanced, 1)},
        **(_scores(change) if pair.way == "there" else {}),
        "source_key": photo.key,
    }


def _replaced(change: Change, way: Literal["there", "back"]) -> dict[str, str]:
    captions = (change.thing.caption, change.new_caption)
    origin, target = captions if way == "there" else captions[::-1]
    return {"detailed_caption_origin": origin, "detailed_caption_target": target}


def _scores(change: Change) -> dict[str, Any]:
    """The four scores in AdvancedEdit's two objects; its one reasoning is ours of both, and each stands beside it."""
    found: dict[str, dict[str, Any]] = {}
    for aspect, (holder, score) in _SCORES.items():
        if change.scores is not None and aspect in change.scores:
            graded, held = change.scores[aspect], found.setdefault(holder, {"reasonings": {}})
            held[score] = graded.value
            held["reasonings"][score] = graded.explanation
    for held in found.values():
        held["reasoning"] = " ".join(text for text in held["reasonings"].values() if text)
    return found
