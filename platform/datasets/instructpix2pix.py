"""InstructPix2Pix: generated pairs of pictures with a generated instruction, as parquet files or as folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, cast

from insightedit.platform.datasets.parquet import Row, RowGroup, hub_files, image_bytes, read_rows, row_groups
from insightedit.platform.datasets.reading import (
    Entry,
    FolderOptions,
    as_mapping,
    attempt,
    fingerprint_of,
    load_json,
    parse_options,
    read_file,
    text_field,
)
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask

_VERSION: Final = 1
_SEEDS: Final = "seeds.json"
_PROMPT: Final = "prompt.json"
_COLUMNS: Final = ("original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image")
_PICTURE: Final = re.compile(r"([\w-]+)_[01]\.jpg")
_NAME: Final = re.compile(r"\w[\w.-]*")


class Pair(NamedTuple):
    """The place of an entry: the pictures `SEED_0.jpg` and `SEED_1.jpg` of a folder."""

    folder: str
    seed: str


class InstructPix2PixOptions(FolderOptions):
    """Where InstructPix2Pix is; which of its two forms the folder has is found out."""


class InstructPix2PixReader:
    """Reader of InstructPix2Pix in either of its two forms, the first of these that the root holds.

    1. The authors': folders with `prompt.json` and pairs `SEED_0.jpg`, `SEED_1.jpg`; which pairs count is said by
       `seeds.json` in the root where there is one, and else every pair does. The key is `FOLDER/SEED`.
    2. The hub's (timbrooks/instructpix2pix-clip-filtered): `data/train-*.parquet`, or the files in the root. The key
       is the file's name and the number of the row.
    """

    name: ClassVar[str] = "instructpix2pix"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("edit",)
    needs: ClassVar[str] = "folders of prompt.json and pictures, or the hub's data/train-*.parquet"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """Pairs of pictures, or the row groups of the parquet files."""
        root = parse_options(InstructPix2PixOptions, self.name, options).root
        pairs = _listed_pairs(root) if (root / _SEEDS).exists() else _found_pairs(root)
        return [Entry(pair) for pair in pairs] or row_groups(root, _parquet_files(root), _COLUMNS)

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read a pair or a row group."""
        root = parse_options(InstructPix2PixOptions, self.name, options).root
        if isinstance(entry.place, RowGroup):
            for row in read_rows(root, entry.place, _COLUMNS):
                yield row if isinstance(row, BadRow) else attempt(row.key, _row_record, row, root)
        else:
            key = f"{entry.place.folder}/{entry.place.seed}"
            yield attempt(key, _pair_record, key, entry.place.folder, root)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do; pictures and parquet files are known by name and size."""
        parsed = parse_options(InstructPix2PixOptions, self.name, options)
        places = [entry.place for entry in self.entries(options)]
        folders = {place.folder for place in places if isinstance(place, Pair)}
        files = _files_of_folders(parsed.root, folders) if folders else _parquet_files(parsed.root)
        return fingerprint_of(self.name, _VERSION, parsed, files)


def _listed_pairs(root: Path) -> list[Pair]:
    """The pairs that `seeds.json` names, `[[folder, [seed, ...]], ...]`, each once."""
    path, pairs = root / _SEEDS, dict[Pair, None]()
    content = load_json(path)
    if not isinstance(content, list):
        raise UsageError(f"{path} is not a list of [folder, [seed, ...]]; make it again.")
    for item in cast(list[object], content):
        match item:
            case [str(folder), [*seeds]]:
                pairs.update({Pair(folder, str(seed)): None for seed in seeds})
            case _:
                raise UsageError(f"{path} holds {item!r}, not [folder, [seed, ...]]; make it again.")
    for pair in pairs:
        if not all(_NAME.fullmatch(part) for part in pair):
            raise UsageError(f"{path} names the pair {'/'.join(pair)!r}, which is no name; make it again.")
    return list(pairs)


def _found_pairs(root: Path) -> list[Pair]:
    """The pairs in the folders below the root, sorted; one picture is enough, so that a lost half is noticed."""
    matches = ((path.parent.name, _PICTURE.fullmatch(path.name)) for path in root.glob("*/*_[01].jpg"))
    return sorted({Pair(folder, match[1]) for folder, match in matches if match})


def _parquet_files(root: Path) -> list[Path]:
    """The hub's files, sorted."""
    try:
        return hub_files(root, "train")
    except NotFoundError:
        raise NotFoundError(
            f"{root} holds neither folders with {_PROMPT} and pictures nor data/train-*.parquet; download"
            " InstructPix2Pix in one of these forms."
        ) from None


def _files_of_folders(root: Path, folders: set[str]) -> list[Path]:
    """The files that records come from; a folder that is missing has none."""
    files = [root / _SEEDS] if (root / _SEEDS).exists() else []
    for folder in folders:
        files += [path for path in (root / folder).glob("*") if path.name == _PROMPT or _PICTURE.fullmatch(path.name)]
    return files


def _row_record(row: Row, root: Path) -> Record:
    """The record of a parquet file's row."""
    return Record(
        key=row.key,
        dataset=InstructPix2PixReader.name,
        task="edit",
        source=image_bytes(row.values["original_image"], root),
        target=image_bytes(row.values["edited_image"], root),
        instruction=text_field(row.values, "edit_prompt", "empty_instruction"),
        meta=_captions(row.values["original_prompt"], row.values["edited_prompt"]),
    )


def _pair_record(key: str, folder: str, root: Path) -> Record:
    """The record of a pair of pictures."""
    prompt = _prompt(root, folder)
    return Record(
        key=key,
        dataset=InstructPix2PixReader.name,
        task="edit",
        source=read_file(root, f"{key}_0.jpg"),
        target=read_file(root, f"{key}_1.jpg"),
        instruction=text_field(prompt, "edit", "empty_instruction"),
        meta=_captions(prompt.get("input", prompt.get("caption")), prompt.get("output")),
    )


def _prompt(root: Path, folder: str) -> Mapping[str, Any]:
    """What a folder's `prompt.json` says."""
    name = f"{folder}/{_PROMPT}"
    content = read_file(root, name)
    try:
        return as_mapping(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise BadRowError("invalid_json", f"{name} cannot be read as a JSON object: {error}") from None


def _captions(source: object, target: object) -> str:
    """`meta` of a record: the captions from which its pictures were generated, where they are known."""
    named = {"original_prompt": source, "edited_prompt": target}
    return json.dumps({name: text for name, text in named.items() if isinstance(text, str)})
