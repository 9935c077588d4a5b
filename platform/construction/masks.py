"""Steps 3 and 4: where each thing is, and which pixels are its."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.construction.photos import Mask, Photo, Rejected, Rle, Thing
from insightedit.platform.datasets.reading import load_json
from insightedit.platform.datasets.segmentation import by_id, instance_mask, rows_of, tidy
from insightedit.platform.records import BadRowError


class Masked(NamedTuple):
    """The mask of a thing (H, W), and how sure its maker is, 0 to 1."""

    mask: Mask
    score: float


class Boxed(NamedTuple):
    """Where a thing is: x, y, width and height in pixels; and how sure its finder is, 0 to 1."""

    box: tuple[float, float, float, float]
    score: float


class Detector(Protocol):
    """Finds things by their names."""

    def boxes(self, photos: Sequence[Photo]) -> list[list[Boxed | Rejected]]:
        """For each thing of each picture the one box where it is.

        Raises:
            UsageError: the model cannot be loaded.
        """
        ...


class Masker(Protocol):
    """Outlines things."""

    def masks(self, photos: Sequence[Photo]) -> list[list[Masked | Rejected]]:
        """For each thing of each picture its mask.

        Raises:
            UsageError: the model cannot be loaded, or the annotations are not there.
        """
        ...


def run_boxes(detector: Detector, photos: Sequence[Photo]) -> None:
    """Find things; those that are not found, or more than once, fall out."""
    for photo, found in zip(photos, detector.boxes(photos), strict=True):
        for thing, box in zip(list(photo.things), found, strict=True):
            if isinstance(box, Rejected):
                photo.reject("detect", thing.name, box)
                photo.things.remove(thing)
            else:
                thing.box, thing.score = box
        if not photo.things:
            photo.drop("detect", Rejected("no_things", "None of its things was found."))


def run_masks(masker: Masker, config: ConstructionConfig, photos: Sequence[Photo]) -> None:
    """Outline things; those without a mask, or of a wrong size, fall out, and so do those beyond `objects_each`."""
    for photo, found in zip(photos, masker.masks(photos), strict=True):
        good = list(photo.things)
        for thing, masked in zip(photo.things, found, strict=True):
            why = masked if isinstance(masked, Rejected) else _wrong_size(masked.mask, config)
            if why is not None:
                photo.reject("masks", thing.name, why)
                good.remove(thing)
            elif isinstance(masked, Masked):
                thing.mask, thing.score = Rle.of(masked.mask), masked.score
        chosen = _chosen(len(good), config, photo.key)
        for place, thing in enumerate(good):
            if place not in chosen:
                why = Rejected("enough", f"Only {config.objects_each} things of a picture are edited (objects_each).")
                photo.reject("masks", thing.name, why)
        photo.things = [good[place] for place in chosen]
        if not photo.things:
            photo.drop("masks", Rejected("no_things", "None of its things has a mask that can be used."))


def _wrong_size(mask: Mask, config: ConstructionConfig) -> Rejected | None:
    share = float(mask.mean())
    if share < config.min_area:
        return Rejected("too_small", f"It covers {share:.2%} of the picture, less than min_area {config.min_area:.2%}.")
    if share > config.max_area:
        return Rejected("too_large", f"It covers {share:.0%} of the picture, more than max_area {config.max_area:.0%}.")
    return None


def _chosen(count: int, config: ConstructionConfig, key: str) -> list[int]:
    """Places of the things that are edited, in their order."""
    rng = random.Random(f"{config.seed}:things:{key}")
    return sorted(rng.sample(range(count), min(count, config.objects_each)))


class CocoMasker:
    """Masks of COCO's annotations: in a picture, known by its file's name, the one instance of the thing's class.

    A thing is of the class whose name stands in its own: "brown dog" is a dog.
    """

    def __init__(self, path: str) -> None:
        """Read the annotations.

        Raises:
            NotFoundError: the file is missing.
            UsageError: it is no index of COCO's.
        """
        place = Path(path).expanduser()
        index = load_json(place)
        images, categories = (by_id(rows_of(index, field, place)) for field in ("images", "categories"))
        self._classes = {identity: tidy(str(row.get("name", ""))) for identity, row in categories.items()}
        self._images = {PurePosixPath(str(row.get("file_name"))).name: identity for identity, row in images.items()}
        self._instances: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows_of(index, "annotations", place):
            self._instances.setdefault(str(row.get("image_id")), []).append(row)

    def masks(self, photos: Sequence[Photo]) -> list[list[Masked | Rejected]]:
        """See `Masker`."""
        return [[self._mask(photo, thing) for thing in photo.things] for photo in photos]

    def _mask(self, photo: Photo, thing: Thing) -> Masked | Rejected:
        image = self._images.get(PurePosixPath(photo.key).name)
        if image is None:
            return Rejected("not_annotated", f"The annotations do not have the picture {photo.key}.")
        words = set(tidy(thing.name).split())
        rows = [
            row for row in self._instances.get(image, ()) if (own := self._class_of(row)) and words >= set(own.split())
        ]
        if len(rows) != 1:
            reason = "several" if rows else "not_found"
            return Rejected(reason, f"The annotations have {len(rows)} instances that {thing.name} may be.")
        try:
            mask = instance_mask(rows[0].get("segmentation"), photo.pixels.shape[:2])
        except BadRowError as error:
            return Rejected(error.reason, str(error))
        return Masked(mask, 1.0)

    def _class_of(self, row: Mapping[str, Any]) -> str:
        """The class of an instance; none where it is unknown, or a crowd."""
        return "" if row.get("iscrowd") else self._classes.get(str(row.get("category_id")), "")
