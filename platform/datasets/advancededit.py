"""AdvancedEdit, as InsightEdit's data pipeline writes it: a JSON file of pairs for each photo."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final, Literal, cast

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from insightedit.platform.datasets.pairs import picture_files
from insightedit.platform.datasets.reading import (
    Entry,
    FolderOptions,
    as_mapping,
    fingerprint_of,
    parse_options,
    read_file,
    text_field,
)
from insightedit.platform.datasets.segmentation import rle_mask
from insightedit.platform.errors import NotFoundError
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask, encode_png, open_image, picture_size

Wording = Literal["simple", "advanced"]
Score = Literal["instruction_follow", "non-overedit", "naturalness", "no_artifacts"]

VERSION: Final = 2
"""Raised whenever the same files give other records."""
PAIRS_EACH: Final = 10
"""Pairs of one photo, about."""

_SCORES: Final[dict[Score, str]] = {
    "instruction_follow": "qwen_VIE_SC",
    "non-overedit": "qwen_VIE_SC",
    "naturalness": "qwen_VIE_PQ",
    "no_artifacts": "qwen_VIE_PQ",
}
"""Each score and the object that holds it; both may be null or missing."""
_IDENTITY: Final = ("origin_img_path", "target_img_path", "task_type", "instruction")
"""Fields that say which pair it is, the same in the files of every step."""
_NOTES: Final = (
    "class_origin",
    "class_target",
    "bbox",
    "img_caption",
    "detailed_caption",
    "detailed_caption_origin",
    "detailed_caption_target",
)
"""Fields that go into a record's `meta` as they are."""
_STEP: Final = re.compile(r"[1-5]_")
"""How the folder of a step of the pipeline begins."""
_ASPECT_SLACK: Final = 0.02
"""By how much the shapes of source and target may differ: the pipeline rounds sides of 640 pixels down to eights."""
_STRING_OR_COMMA: Final = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|,(?=\s*[}\]])', re.DOTALL)
"""A whole string, or a comma before a closing bracket: a comma inside of a string is never taken for the second."""


class AdvancedEditOptions(FolderOptions):
    """Where AdvancedEdit is, and which of it is read."""

    pattern: str = "**/*.json"
    """Which files are read, as a glob below `root`."""
    images: str | tuple[str, ...] = "."
    """The folder, or folders, below which the pictures are looked up, relative to `root`: by the path in the JSON file,
    which is the authors' own, then by ever shorter ends of it, and last by the file's name."""
    wording: Wording | Literal["both"] = "both"
    """Which instructions; with both, a pair gives one record for each wording that it has."""
    min_scores: dict[Score, float] = Field(default_factory=dict)
    """The least that a pair needs of each score, from 0 to 5. Pairs below, or without the score, are left out without a
    trace: they are no bad rows. Only one of the two directions of an edit is scored; the other one counts as equal."""
    seed: int = 0
    """Which of several instructions of one wording is taken."""
    masks: bool = Field(default=False, exclude=True)
    """Whether `meta` has each pair's mask, in COCO's run lengths of the photo's size; training needs none. Prepared
    datasets have none, so they do not depend on it."""

    @field_validator("pattern")
    @classmethod
    def _stays_inside(cls, pattern: str) -> str:
        if not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
            raise ValueError("It must be a glob below root, such as **/*.json")
        return pattern

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where pictures are looked up."""
        names = (self.images,) if isinstance(self.images, str) else self.images
        return tuple(self.root / name for name in names)


class AdvancedEditReader:
    """Reader of AdvancedEdit; see `insightedit.platform.datasets.Reader`. An entry is a photo with its pairs.

    Files of every step of the authors' pipeline are read. Those of a photo that lie in folders of several steps
    (`3_editing_pair_construction`, `4_instruction_recaption`, ...) are read together: a pair is one pair, with what
    each step found out about it. Files of steps without pairs give nothing.

    The pipeline paints edited pictures with a shorter side of 640 pixels and leaves the photo as it was: the larger of
    the two is shrunk to the smaller one's size.
    """

    name: ClassVar[str] = "advancededit"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("edit",)
    needs: ClassVar[str] = "the pipeline's JSON files, one a photo, and the pictures that they name"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """List photos by the names of their JSON files, which are not opened; each gives about `PAIRS_EACH` pairs."""
        parsed = parse_options(AdvancedEditOptions, self.name, options)
        photos: dict[str, list[str]] = {}
        for name in _json_files(parsed):
            in_steps = any(map(_STEP.match, PurePosixPath(name).parts[:-1]))
            photos.setdefault(PurePosixPath(name).name if in_steps else name, []).append(name)
        rows = PAIRS_EACH * (2 if parsed.wording == "both" else 1)
        return [Entry(tuple(names), rows) for names in photos.values()]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read the pairs of a photo; one that cannot be read is one bad row, whatever wordings it has."""
        parsed = parse_options(AdvancedEditOptions, self.name, options)
        pictures = _Pictures(parsed.folders)
        pairs = _read_pairs(parsed.root, entry.place)
        scores = {pair.ends: pair.scores for pair in pairs if isinstance(pair, _Pair)}
        for pair in pairs:
            if isinstance(pair, BadRow):
                yield pair
            elif _is_good(pair.scores or scores.get((pair.ends[1], pair.ends[0]), {}), parsed.min_scores):
                yield from _records(parsed, pair, pictures)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        parsed = parse_options(AdvancedEditOptions, self.name, options)
        files = {parsed.root / name for name in _json_files(parsed)}
        files.update(path for folder in parsed.folders for path in picture_files(folder))
        return fingerprint_of(self.name, VERSION, parsed, files)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair, as the JSON files have it."""

    key: str
    values: dict[str, Any]

    @property
    def ends(self) -> tuple[str, str]:
        """The paths of origin and target; the same edit the other way round has them swapped."""
        return str(self.values.get("origin_img_path")), str(self.values.get("target_img_path"))

    @property
    def scores(self) -> dict[Score, float]:
        """The scores that it has."""
        found: dict[Score, float] = {}
        for score, holder in _SCORES.items():
            held = self.values.get(holder)
            value = cast(dict[str, object], held).get(score) if isinstance(held, dict) else None
            if isinstance(value, int | float):
                found[score] = value
        return found

    @property
    def explanations(self) -> dict[Score, str]:
        """What the judge says about each score; the authors' files have one reasoning for two of them."""
        found: dict[Score, str] = {}
        for score in self.scores:
            held: dict[str, Any] = self.values[_SCORES[score]]
            own = held.get("reasonings")
            text = cast(dict[str, object], own).get(score) if isinstance(own, dict) else held.get("reasoning")
            if isinstance(text, str) and text.strip():
                found[score] = text
        return found

    def about(self, text: str) -> str | None:
        """What the reasoning of an advanced instruction is about, where the files say it."""
        for number in (1, 2):
            about = self.values.get(f"reasoning_about{number}")
            if self.values.get(f"reasoning_instruction{number}") == text and isinstance(about, str):
                return about
        return None

    @property
    def wordings(self) -> dict[Wording, list[str]]:
        """The instructions that it has, by wording.

        Raises:
            BadRowError: there are none.
        """
        simple = self.values.get("instruction")
        advanced = [self.values.get(f"reasoning_instruction{number}") for number in (1, 2)]
        found: dict[Wording, list[str]] = {
            "simple": _texts(simple if isinstance(simple, list) else [simple]),
            "advanced": _texts(advanced),
        }
        if not any(found.values()):
            reason = "missing_field" if simple is None else "empty_instruction"
            raise BadRowError(reason, "The field instruction holds no text, and there is no reasoning_instruction.")
        return found


class _Pictures:
    """Pictures of a photo's pairs, each of which has the photo itself on one side."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._find = functools.lru_cache(4)(functools.partial(_find, folders))
        self._shrink = functools.lru_cache(4)(_shrink)

    def of(self, values: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """The encoded source and target of a pair, of one size where their shapes allow.

        Raises:
            BadRowError: one cannot be read, or the mask fits neither.
        """
        source = self._find(text_field(values, "origin_img_path", "missing_file"))
        target = self._find(text_field(values, "target_img_path", "missing_file"))
        sizes = picture_size(source), picture_size(target)
        _check_mask(values.get("segmentation"), sizes)
        aspects = [width / height for width, height in sizes]
        if sizes[0] == sizes[1] or abs(aspects[0] / aspects[1] - 1) > _ASPECT_SLACK:
            return source, target
        if sizes[0] > sizes[1]:
            return self._shrink(source, sizes[1]), target
        return source, self._shrink(target, sizes[0])


def _json_files(options: AdvancedEditOptions) -> list[str]:
    """The files of the pattern, relative to the root, sorted.

    Raises:
        NotFoundError: there are none.
    """
    names = sorted(path.relative_to(options.root).as_posix() for path in options.root.glob(options.pattern))
    if not names:
        raise NotFoundError(f"There is no {options.pattern} in {options.root}; give the folder of the JSON files.")
    return names


def _read_pairs(root: Path, names: Sequence[str]) -> list[_Pair | BadRow]:
    """The pairs in a photo's files; where later files have a pair again, what they add is added to it."""
    rows: list[_Pair | BadRow] = []
    known: dict[str, _Pair] = {}
    for name in names:
        try:
            pairs = _load(read_file(root, name))
        except BadRowError as error:
            rows.append(BadRow(name, error.reason, f"The file {name} cannot be read: {error}"))
            continue
        for index in sorted(pairs, key=lambda index: (len(index), index)):
            key = f"{PurePosixPath(name).with_suffix('')}-{index}"
            pair = _pair(key, pairs[index])
            if isinstance(pair, _Pair):
                identity = json.dumps([pair.values.get(field) for field in _IDENTITY])
                if identity in known:
                    known[identity].values.update(pair.values)
                    continue
                known[identity] = pair
            rows.append(pair)
    return rows


def _pair(key: str, values: object) -> _Pair | BadRow:
    """A pair of a file, without what is null."""
    try:
        return _Pair(key, {name: value for name, value in as_mapping(values).items() if value is not None})
    except BadRowError as error:
        return BadRow(key, error.reason, f"The pair {key} cannot be read: {error}")


def _load(data: bytes) -> dict[str, object]:
    """The numbered values of a JSON file, which are its pairs; trailing commas and a byte order mark are forgiven.

    NaN, which Python's JSON knows, counts as null.

    Raises:
        BadRowError: it is no JSON.
    """
    try:
        text = data.decode("utf-8-sig")
        try:
            content = json.loads(text, parse_constant=_nothing)
        except json.JSONDecodeError:
            strict = _STRING_OR_COMMA.sub(lambda found: found[1] or "", text)
            content = json.loads(strict, parse_constant=_nothing)
    except (ValueError, RecursionError) as error:
        raise BadRowError("invalid_json", f"it is no JSON in UTF-8: {error}.") from None
    if not isinstance(content, dict):
        return {}
    values = cast(dict[str, object], content)
    return {index: value for index, value in values.items() if index.isascii() and index.isdecimal()}


def _nothing(_: str) -> None:
    """What NaN and infinity are read as."""


def _records(options: AdvancedEditOptions, pair: _Pair, pictures: _Pictures) -> Iterator[Record | BadRow]:
    """The records of a pair, one for each wording that is wanted and there."""
    try:
        wanted: dict[Wording, list[str]] = {
            name: texts for name, texts in pair.wordings.items() if texts and options.wording in {name, "both"}
        }
        if wanted:
            source, target = pictures.of(pair.values)
            for wording, texts in wanted.items():
                yield _record(options, pair, wording, texts, source, target)
    except BadRowError as error:
        yield BadRow(pair.key, error.reason, str(error))


def _record(
    options: AdvancedEditOptions, pair: _Pair, wording: Wording, texts: Sequence[str], source: bytes, target: bytes
) -> Record:
    """The record of a pair with one of the instructions of a wording."""
    key = f"{pair.key}-{wording}"
    text = random.Random(f"{options.seed}:{key}").choice(texts)
    notes = {field: pair.values[field] for field in _NOTES if pair.values.get(field)}
    if isinstance(pair.values.get("segmentation"), dict):
        notes["mask_size"] = pair.values["segmentation"].get("size")
        if options.masks:
            notes["mask"] = pair.values["segmentation"]
    if pair.scores:
        notes |= {"scores": pair.scores, "explanations": pair.explanations}
    if wording == "advanced" and (about := pair.about(text)):
        notes["about"] = about
    return Record(
        key=key,
        dataset=AdvancedEditReader.name,
        task="edit",
        source=source,
        target=target,
        instruction=text_field({"instruction": text}, "instruction"),
        category=text_field(pair.values, "task_type"),
        meta=json.dumps(notes | {"wording": wording}),
    )


def _texts(values: Sequence[object]) -> list[str]:
    """Those values that are texts and not blank."""
    return [value for value in values if isinstance(value, str) and value.strip()]


def _is_good(scores: Mapping[Score, float], least: Mapping[Score, float]) -> bool:
    """Whether a pair has every score that is asked for, and high enough."""
    return all(score in scores and scores[score] >= limit for score, limit in least.items())


def _find(folders: Sequence[Path], path: str) -> bytes:
    """Read a picture by a path of the authors' machine: whole, then by ever shorter ends, the file's name last.

    Raises:
        BadRowError: none of them is there.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in {"/", "."}]
    while ".." in parts:
        parts = parts[parts.index("..") + 1 :]
    for start in range(len(parts)):
        for folder in folders:
            with suppress(BadRowError):
                return read_file(folder, "/".join(parts[start:]))
    below = " or ".join(map(str, folders))
    detail = f"Neither {path} nor an end of it is below {below}; set the option images to the pictures' folder."
    raise BadRowError("missing_file", detail)


def _shrink(data: bytes, size: tuple[int, int]) -> bytes:
    """A picture made as small as (width, height) pixels, as PNG."""
    image, _ = open_image(data, at_least=min(size))
    return encode_png(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))


def _check_mask(mask: object, sizes: Sequence[tuple[int, int]]) -> None:
    """Check a mask in COCO's run lengths, if there is one; it belongs to the photo, which may be source or target.

    Args:
        mask: {"size": [height, width], "counts": ...}, or None.
        sizes: (width, height) of source and target.

    Raises:
        BadRowError: it does not decode (`invalid_mask`), or has the size of neither (`mask_size`).
    """
    if mask is None:
        return
    if not isinstance(mask, dict):
        raise BadRowError("invalid_mask", "The field segmentation is no object with size and counts.")
    rle = cast(dict[str, Any], mask)
    shapes = [(height, width) for width, height in sizes]
    rle_mask(rle, next((shape for shape in shapes if rle.get("size") == list(shape)), shapes[0]))
