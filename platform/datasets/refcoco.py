"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO: objects of COCO pictures, painted where a phrase refers to them."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Never, cast

from pydantic import Field

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

_VERSION: Final = 1
_NO_TARGET: Final = [-1]


class RefcocoOptions(SegmentationOptions):
    """Options of RefCOCO, RefCOCO+ and gRefCOCO."""

    split: str = "train"
    """Which refs, as the refs file names them."""
    split_by: str = Field(default="unc", pattern=r"^\w+$")
    """Who split the dataset; part of the refs file's name."""
    sentences: Literal["one", "all"] = "one"
    """Whether a ref gives one record with a random one of its sentences, or a record for each."""
    images: str = "train2014"
    """Name of the folder with the pictures."""
    images_root: Path | None = None
    """Where that folder is, if neither in the dataset's folder nor beside it."""


class RefcocogOptions(RefcocoOptions):
    """Options of RefCOCOg."""

    split_by: str = Field(default="umd", pattern=r"^\w+$")
    """Who split the dataset; part of the refs file's name."""


@dataclass(frozen=True, slots=True)
class _Ref:
    """What phrases refer to; without segmentations, nothing in the picture."""

    key: str
    picture: str
    size: tuple[int, int]
    segmentations: tuple[Any, ...]
    category: str
    sentences: tuple[str, ...]
    meta: dict[str, object]


@dataclass(frozen=True, slots=True)
class _Instances:
    """The index of annotated objects, by their ids."""

    images: Mapping[str, Any]
    annotations: Mapping[str, Any]
    categories: Mapping[str, Any]


class RefcocoReader:
    """Reader of RefCOCO; see `insightedit.platform.datasets.Reader`. An entry is one record."""

    name: ClassVar[str] = "refcoco"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("segment",)
    needs: ClassVar[str] = "refs(unc).p, instances.json and COCO's train2014/*.jpg"
    _options: ClassVar[type[RefcocoOptions]] = RefcocoOptions
    _refs_file: ClassVar[str] = "refs({}).p"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """The refs of a split in the order of their file."""
        parsed = parse_options(self._options, self.name, options)
        _pictures(parsed)
        path = self._refs_path(parsed)
        refs = by_id(_load_refs(path), "ref_id")
        chosen = {key: row for key, row in refs.items() if _split_of(row) in {parsed.split, None}}
        if not chosen:
            splits = sorted({str(_split_of(row)) for row in refs.values()})
            raise UsageError(f"{path} has no split {parsed.split!r}; name one of {', '.join(splits)}.")
        instances = _load_instances(parsed.root / "instances.json")
        return [entry for key, row in chosen.items() for entry in _entries(key, row, instances, parsed)]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Paint what one ref refers to."""
        parsed = parse_options(self._options, self.name, options)
        place: _Ref | BadRow = entry.place
        yield place if isinstance(place, BadRow) else attempt(place.key, self._record, parsed, place)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        parsed = parse_options(self._options, self.name, options)
        indexes = [self._refs_path(parsed), parsed.root / "instances.json"]
        for path in indexes:
            if not path.is_file():
                raise _missing(path)
        files = [*indexes, *_pictures(parsed).glob("*.jpg")]
        return fingerprint_of(self.name, _VERSION, parsed.model_copy(update={"images_root": None}), files)

    def _refs_path(self, options: RefcocoOptions) -> Path:
        return options.root / self._refs_file.format(options.split_by)

    def _record(self, options: RefcocoOptions, ref: _Ref) -> Record:
        source = read_file(_pictures(options), ref.picture)
        rng = random.Random(f"{options.seed}:{ref.key}")
        sentence = rng.choice(ref.sentences)
        wish = make_wish(sentence, rng, options.wording)
        target = paint_instances(source, ref.segmentations, ref.size, wish.colour) if ref.segmentations else None
        meta = ref.meta | {"sentence": sentence}
        return segment_record(self.name, ref.key, source, wish, target=target, category=ref.category, meta=meta)


class RefcocoPlusReader(RefcocoReader):
    """Reader of RefCOCO+, whose phrases say nothing of where an object is."""

    name: ClassVar[str] = "refcoco+"


class RefcocogReader(RefcocoReader):
    """Reader of RefCOCOg, whose phrases are longer."""

    name: ClassVar[str] = "refcocog"
    needs: ClassVar[str] = "refs(umd).p, instances.json and COCO's train2014/*.jpg"
    _options: ClassVar[type[RefcocoOptions]] = RefcocogOptions


class GrefcocoReader(RefcocoReader):
    """Reader of gRefCOCO, whose phrases refer to one object, to several, or to none."""

    name: ClassVar[str] = "grefcoco"
    needs: ClassVar[str] = "grefs(unc).json, instances.json and COCO's train2014/*.jpg"
    _refs_file: ClassVar[str] = "grefs({}).json"


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of nothing but numbers, texts, lists and dictionaries: what could run code is refused by name."""

    def find_class(self, module: str, name: str, /) -> Never:
        raise pickle.UnpicklingError(f"it wants {module}.{name}, and may hold data only")

    def persistent_load(self, pid: object, /) -> Never:
        raise pickle.UnpicklingError("it refers to something outside of it")


def _load_refs(path: Path) -> list[Any]:
    """Read a refs file.

    Raises:
        NotFoundError: it is missing.
        UsageError: it is broken, or holds more than data.
    """
    refs = load_json(path) if path.suffix == ".json" else _load_pickle(path)
    if not isinstance(refs, list):
        raise UsageError(f"{path} is not a list of refs; download it again.")
    return cast(list[Any], refs)


def _load_pickle(path: Path) -> object:
    if not path.is_file():
        raise _missing(path)
    try:
        with path.open("rb") as file:
            # Python 2 wrote bytes without their encoding; Latin-1 keeps each of them for `_readable`.
            return _PlainUnpickler(file, encoding="latin-1").load()
    except _BROKEN_PICKLE as error:
        raise UsageError(f"{path} cannot be read as refs: {error}; download it again from its authors.") from None


_BROKEN_PICKLE: Final = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def _readable(text: str) -> str:
    """Undo a reading as Latin-1 where it was UTF-8."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _missing(path: Path) -> NotFoundError:
    return NotFoundError(f"There is no file {path}; put it there, or name another split_by.")


def _load_instances(path: Path) -> _Instances:
    index = load_json(path)
    return _Instances(*(by_id(rows_of(index, field, path)) for field in ("images", "annotations", "categories")))


def _pictures(options: RefcocoOptions) -> Path:
    """The folder of pictures: where the option says, or in one of the layouts that are in use."""
    root, beside = options.root, options.root.absolute().parent
    bases = (
        root,
        root / "images",
        beside,
        beside / "images",
        beside / "images/mscoco",
        beside / "images/mscoco/images",
    )
    if options.images_root is not None:
        bases = (options.images_root,)
    return find_folder((base / options.images for base in bases), "pictures")


def _split_of(row: object) -> str | None:
    """The split of a ref; None where it has none, and is set aside whatever split is read."""
    split = cast(dict[str, Any], row).get("split") if isinstance(row, dict) else None
    return split if isinstance(split, str) else None


def _entries(key: str, row: object, instances: _Instances, options: RefcocoOptions) -> Iterator[Entry]:
    ref = attempt(key, _ref, key, row, instances)
    if isinstance(ref, BadRow) or options.sentences == "one":
        yield Entry(ref)
        return
    for number, sentence in enumerate(ref.sentences):
        yield Entry(replace(ref, key=f"{key}-{number}", sentences=(sentence,)))


def _ref(key: str, ref: object, instances: _Instances) -> _Ref:
    row = as_mapping(ref)
    split = text_field(row, "split")
    # The file name of a ref ends in the number of its annotation; the picture's own name is the image's.
    image = listed(instances.images, row.get("image_id"), "image")
    identities = row["ann_id"] if isinstance(row.get("ann_id"), list) else [row.get("ann_id")]
    wanted = [] if identities == _NO_TARGET else identities
    annotations = [listed(instances.annotations, identity, "annotation") for identity in wanted]
    categories = [listed(instances.categories, a.get("category_id"), "category") for a in annotations]
    return _Ref(
        key=key,
        picture=text_field(image, "file_name"),
        size=size_of(image),
        segmentations=tuple(annotation.get("segmentation") for annotation in annotations),
        category=", ".join(sorted({tidy(text_field(category, "name")) for category in categories})),
        sentences=_sentences(row),
        meta={"split": split, "ref_id": key, "image_id": row.get("image_id"), "ann_id": identities},
    )


def _sentences(row: Mapping[str, Any]) -> tuple[str, ...]:
    sentences = row.get("sentences")
    if not isinstance(sentences, list):
        raise BadRowError("missing_field", "The field sentences is missing or no list.")
    texts = [as_mapping(sentence).get("sent") for sentence in cast(list[Any], sentences)]
    found = tuple(tidy(_readable(text)) for text in texts if isinstance(text, str) and text.strip())
    if not found:
        raise BadRowError("empty_instruction", "The ref has no sentence.")
    return found
