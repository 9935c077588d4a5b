"""Reason-Edit, SmartEdit's benchmark: photos with a mask, an instruction that needs understanding, and no target."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from insightedit.platform.datasets.masks import mask_rle, read_mask
from insightedit.platform.datasets.reading import (
    Entry,
    FolderOptions,
    attempt,
    fingerprint_of,
    parse_options,
    read_file,
)
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Record, RecordTask

_VERSION: Final = 1
_CAPTION: Final = "CLIP:"
"""Comes before what the edited region should show, at the end of a line."""
_MASKS: Final = ("_mask.jpg", "_mask.png")


class ReasonEditOptions(FolderOptions):
    """Where Reason-Edit is."""


class ReasonEditReader:
    """Reader of Reason-Edit; see `insightedit.platform.datasets.Reader`. An entry is one of its folders.

    Each (`1-Left-Right` to `6-Reasoning`) has photos `*.png`, masks `*_mask.jpg` and one text file, whose lines belong
    to the photos in the order of their names: `INSTRUCTION CLIP: WHAT THE REGION SHOWS AFTERWARDS`. Records have no
    target; caption and mask are in `meta`.
    """

    name: ClassVar[str] = "reason-edit"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("edit",)
    needs: ClassVar[str] = "folders such as 1-Left-Right with *.png, *_mask.jpg and one text file"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """The folders that hold a text file and photos."""
        parsed = parse_options(ReasonEditOptions, self.name, options)
        folders = [folder for folder in sorted(parsed.root.iterdir()) if folder.is_dir() and _texts(folder)]
        if not folders:
            raise NotFoundError(
                f"No folder in {parsed.root} holds a text file; give the folder of 1-Left-Right and so on."
            )
        return [Entry(folder.name, len(_photos(folder))) for folder in folders if _lines(folder)]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read a folder."""
        parsed = parse_options(ReasonEditOptions, self.name, options)
        folder = parsed.root / str(entry.place)
        for photo, line in zip(_photos(folder), _lines(folder), strict=True):
            yield attempt(f"{folder.name}/{photo.stem}", _record, parsed.root, photo, line)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        parsed = parse_options(ReasonEditOptions, self.name, options)
        folders = [parsed.root / str(entry.place) for entry in self.entries(options)]
        files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
        return fingerprint_of(self.name, _VERSION, parsed, files)


def _texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.txt"))


def _photos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if not path.name.endswith(_MASKS))


def _lines(folder: Path) -> list[str]:
    """The lines of a folder's text file, one for each photo.

    Raises:
        UsageError: there are several files, or other numbers of lines and photos.
    """
    texts, photos = _texts(folder), _photos(folder)
    if len(texts) != 1:
        names = " and ".join(path.name for path in texts)
        raise UsageError(f"{folder} holds {names}; keep the one whose lines belong to the photos.")
    lines = [line.strip() for line in texts[0].read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if len(lines) != len(photos):
        raise UsageError(
            f"{texts[0]} has {len(lines)} lines and there are {len(photos)} photos beside it: one for each."
        )
    return lines


def _record(root: Path, photo: Path, line: str) -> Record:
    folder, key = photo.parent.name, f"{photo.parent.name}/{photo.stem}"
    instruction, _, caption = (part.strip() for part in line.partition(_CAPTION))
    if not instruction:
        raise BadRowError("empty_instruction", f"The line of {key} has no instruction.")
    source = read_file(root, f"{folder}/{photo.name}")
    masks = [name for ending in _MASKS if (root / folder / (name := photo.stem + ending)).is_file()]
    mask = read_mask(read_file(root, f"{folder}/{masks[0] if masks else photo.stem + _MASKS[0]}"), source)
    return Record(
        key=key,
        dataset=ReasonEditReader.name,
        task="edit",
        source=source,
        instruction=instruction,
        category=folder.partition("-")[2].lower() or folder,
        meta=json.dumps({"caption": caption, "mask": mask_rle(mask)}),
    )
