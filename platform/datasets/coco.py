"""COCO: captions, instances to paint, and LLaVA's conversations about its pictures."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, cast

from insightedit.platform.datasets.reading import (
    Entry,
    as_mapping,
    attempt,
    fingerprint_of,
    load_json,
    parse_options,
    read_file,
    text_field,
)
from insightedit.platform.datasets.segmentation import (
    SegmentationOptions,
    by_id,
    find_folder,
    listed,
    make_wish,
    paint_instances,
    rows_of,
    segment_record,
    size_of,
    tidy,
)
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask

Kind = Literal["captions", "instances", "conversations"]

CONVERSATIONS_SPLIT: Final = "train2017"
"""The pictures that LLaVA's conversations are about."""
_VERSION: Final = 1
_INDEXES: Final[dict[Kind, tuple[str, ...]]] = {
    "captions": ("annotations/captions_{split}.json",),
    "instances": ("annotations/instances_{split}.json",),
    "conversations": ("llava_instruct_150k.json", "annotations/llava_instruct_150k.json"),
}


class CocoOptions(SegmentationOptions):
    """Options of COCO."""

    split: str = "train2017"
    """Which pictures: the name of their folder."""
    kinds: tuple[Kind, ...] | None = None
    """Which annotations; all whose file is there by default, conversations only for `train2017`."""
    turns: Literal["first", "all"] = "first"
    """Which questions of a conversation; each is a record of its own, without the turns before it."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A caption, or a question and its answer."""

    key: str
    picture: str
    instruction: str
    meta: dict[str, object]
    reply: str | None = None


@dataclass(frozen=True, slots=True)
class _Objects:
    """All objects of one class in a picture; their segmentations are JSON, a sixth of the memory of lists of floats."""

    key: str
    picture: str
    size: tuple[int, int]
    category: str
    segmentations: str
    meta: dict[str, object]


class CocoReader:
    """Reader of COCO; see `insightedit.platform.datasets.Reader`. An entry is one record."""

    name: ClassVar[str] = "coco"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("caption", "segment", "chat")
    needs: ClassVar[str] = (
        "train2017/*.jpg and any of annotations/captions_train2017.json, annotations/instances_train2017.json,"
        " llava_instruct_150k.json"
    )

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """All captions, then all pictures with objects, then all conversations."""
        parsed = parse_options(CocoOptions, self.name, options)
        _pictures(parsed)
        listers: dict[Kind, Callable[[Path, CocoOptions], Iterator[Entry]]] = {
            "captions": _captions,
            "instances": _instances,
            "conversations": _conversations,
        }
        return [entry for kind, path in _indexes(parsed).items() for entry in listers[kind](path, parsed)]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read one picture."""
        parsed = parse_options(CocoOptions, self.name, options)
        place: _Text | _Objects | BadRow = entry.place
        if isinstance(place, BadRow):
            yield place
        elif isinstance(place, _Text):
            yield attempt(place.key, self._text, parsed, place)
        else:
            yield attempt(place.key, self._objects, parsed, place)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        parsed = parse_options(CocoOptions, self.name, options)
        files = [*_indexes(parsed).values(), *_pictures(parsed).glob("*.jpg")]
        return fingerprint_of(self.name, _VERSION, parsed, files)

    def _text(self, options: CocoOptions, place: _Text) -> Record:
        return Record(
            key=place.key,
            dataset=self.name,
            task="caption" if place.reply is None else "chat",
            source=read_file(_pictures(options), place.picture),
            instruction=place.instruction,
            reply=place.reply or "",
            meta=json.dumps(place.meta),
        )

    def _objects(self, options: CocoOptions, place: _Objects) -> Record:
        source = read_file(_pictures(options), place.picture)
        wish = make_wish(place.category, random.Random(f"{options.seed}:{place.key}"), options.wording)
        target = paint_instances(source, json.loads(place.segmentations), place.size, wish.colour)
        return segment_record(
            self.name, place.key, source, wish, target=target, category=place.category, meta=place.meta
        )


def _indexes(options: CocoOptions) -> dict[Kind, Path]:
    """The files that annotations are read from."""
    found: dict[Kind, Path] = {}
    for kind, names in _INDEXES.items():
        paths = [options.root / name.format(split=options.split) for name in names]
        path = next((path for path in paths if path.is_file()), None)
        asked = kind in (options.kinds or ())
        default = options.kinds is None and (kind != "conversations" or options.split == CONVERSATIONS_SPLIT)
        if asked and path is None:
            raise NotFoundError(f"There is no file {paths[0]}; put it there, or leave {kind} out of kinds.")
        if path is not None and (asked or default):
            found[kind] = path
    if not found:
        raise NotFoundError(
            f"{options.root} has no annotations of {options.split}; put captions_{options.split}.json or"
            f" instances_{options.split}.json in its folder annotations."
        )
    return found


def _pictures(options: CocoOptions) -> Path:
    root, split = options.root, options.split
    return find_folder((root / split, root / "images" / split), f"pictures of {split}")


def _captions(path: Path, options: CocoOptions) -> Iterator[Entry]:
    index = load_json(path)
    images = by_id(rows_of(index, "images", path))
    for identity, annotation in by_id(rows_of(index, "annotations", path)).items():
        key = f"caption-{identity}"
        yield Entry(attempt(key, _caption, key, annotation, images, options.split))


def _caption(key: str, annotation: object, images: Mapping[str, Any], split: str) -> _Text:
    row = as_mapping(annotation)
    picture = text_field(listed(images, row.get("image_id"), "image"), "file_name")
    caption = text_field(row, "caption", "empty_instruction")
    return _Text(key, picture, caption, {"split": split, "image_id": row.get("image_id")})


def _instances(path: Path, options: CocoOptions) -> Iterator[Entry]:
    index = load_json(path)
    images, categories = (by_id(rows_of(index, field, path)) for field in ("images", "categories"))
    found: dict[str, dict[str, list[Any]]] = {}
    for identity, annotation in by_id(rows_of(index, "annotations", path)).items():
        place = attempt(f"annotation-{identity}", _instance, annotation, categories)
        if isinstance(place, BadRow):
            yield Entry(place)
        elif place is not None:
            image, name, segmentation = place
            found.setdefault(image, {}).setdefault(name, []).append(segmentation)
    for image, classes in sorted(found.items()):
        key = f"segment-{image}"
        yield Entry(attempt(key, _objects, key, image, images, classes, options))


def _instance(annotation: object, categories: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """Image, class and segmentation of an annotation; None where it is a crowd."""
    row = as_mapping(annotation)
    if row.get("iscrowd"):
        return None
    if "image_id" not in row or "segmentation" not in row:
        raise BadRowError("missing_field", "The fields image_id and segmentation of an annotation are needed.")
    name = text_field(listed(categories, row.get("category_id"), "category"), "name")
    return str(row["image_id"]), tidy(name), row["segmentation"]


def _objects(
    key: str, image: str, images: Mapping[str, Any], classes: Mapping[str, list[Any]], options: CocoOptions
) -> _Objects:
    row = listed(images, image, "image")
    # Not the generator that words the instruction: the class would decide how it is worded.
    name = random.Random(f"{options.seed}:{key}:class").choice(sorted(classes))
    return _Objects(
        key,
        text_field(row, "file_name"),
        size_of(row),
        name,
        json.dumps(classes[name]),
        {"split": options.split, "image_id": row.get("id"), "instances": len(classes[name])},
    )


def _conversations(path: Path, options: CocoOptions) -> Iterator[Entry]:
    rows = load_json(path)
    if not isinstance(rows, list):
        raise UsageError(f"{path} is not a list of conversations; download it again.")
    # LLaVA's ids are those of pictures, and up to three conversations are about one picture.
    for number, row in enumerate(cast(list[Any], rows)):
        key = f"chat-{number:06d}"
        places = attempt(key, _questions, key, row, options)
        yield from map(Entry, [places] if isinstance(places, BadRow) else places)


def _questions(key: str, conversation: object, options: CocoOptions) -> list[_Text]:
    row = as_mapping(conversation)
    picture, lines = text_field(row, "image"), row.get("conversations")
    if not isinstance(lines, list):
        raise BadRowError("missing_field", "The field conversations is missing or no list.")
    turns = [as_mapping(line) for line in cast(list[Any], lines)]
    pairs = [pair for pair in itertools.pairwise(turns) if [x.get("from") for x in pair] == ["human", "gpt"]]
    if not pairs:
        raise BadRowError("missing_field", "No question of the conversation has an answer.")
    meta: dict[str, object] = {"split": options.split, "id": row.get("id")}
    if options.turns == "first":
        return [_question(key, picture, *pairs[0], meta)]
    return [_question(f"{key}-{n}", picture, *pair, {**meta, "turn": n}) for n, pair in enumerate(pairs)]


def _question(
    key: str, picture: str, human: Mapping[str, Any], gpt: Mapping[str, Any], meta: dict[str, object]
) -> _Text:
    question = " ".join(text_field(human, "value", "empty_instruction").replace("<image>", " ").split())
    return _Text(key, picture, question, meta, text_field(gpt, "value"))
