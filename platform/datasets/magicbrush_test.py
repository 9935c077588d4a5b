"""MagicBrush's test set, which comes as a folder of pictures beside JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, cast

from insightedit.platform.datasets.masks import mask_rle, read_mask
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
from insightedit.platform.errors import UsageError
from insightedit.platform.records import BadRow, Record, RecordTask

_VERSION: Final = 1
_TURNS: Final = "edit_turns.json"
_CAPTIONS: Final = "local_descriptions.json"
"""What the edited part of each output shows; it need not be there."""


class MagicBrushTestOptions(FolderOptions):
    """Where the test set is."""


class MagicBrushTestReader:
    """Reader of MagicBrush's test set; see `insightedit.platform.datasets.Reader`. An entry is a turn.

    The folder, or `test` in it, has `edit_turns.json`, a list of turns with the names of `input`, `mask` and `output`
    and the `instruction`, and the pictures in `images/IMAGE/`, IMAGE being what names begin with.
    """

    name: ClassVar[str] = "magicbrush-test"
    tasks: ClassVar[tuple[RecordTask, ...]] = ("edit",)
    needs: ClassVar[str] = "edit_turns.json and images/, as the test set's archive has them"

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """The turns, as they are in the list."""
        parsed = parse_options(MagicBrushTestOptions, self.name, options)
        folder = _folder(parsed.root)
        turns = load_json(folder / _TURNS)
        if not isinstance(turns, list):
            raise UsageError(f"{folder / _TURNS} is no list of turns; take the file of MagicBrush's test set.")
        captions = _captions(folder)
        rows = [as_mapping(turn) if isinstance(turn, dict) else {} for turn in cast(list[Any], turns)]
        return [Entry((number, row, captions.get(str(row.get("output")), ""))) for number, row in enumerate(rows)]

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read a turn."""
        parsed = parse_options(MagicBrushTestOptions, self.name, options)
        number, row, caption = entry.place
        yield attempt(f"turn-{number}", _record, _folder(parsed.root), row, caption)

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do; pictures are known by name and size."""
        parsed = parse_options(MagicBrushTestOptions, self.name, options)
        folder = _folder(parsed.root)
        return fingerprint_of(self.name, _VERSION, parsed, [*folder.glob("*.json"), *folder.glob("images/*/*")])


def _folder(root: Path) -> Path:
    return root / "test" if (root / "test" / _TURNS).is_file() else root


def _captions(folder: Path) -> dict[str, str]:
    """The captions by the name of the output."""
    if not (folder / _CAPTIONS).is_file():
        return {}
    content: Any = load_json(folder / _CAPTIONS)
    images = cast(dict[str, Any], content).values() if isinstance(content, dict) else []
    return {name: text for one in images if isinstance(one, dict) for name, text in cast(dict[str, Any], one).items()}


def _record(folder: Path, row: Mapping[str, Any], caption: str) -> Record:
    source_name, output = text_field(row, "input"), text_field(row, "output")
    image = source_name.partition("-")[0]
    source, target = (read_file(folder, f"images/{image}/{name}") for name in (source_name, output))
    mask = read_mask(read_file(folder, f"images/{image}/{text_field(row, 'mask')}"), source)
    return Record(
        key=output.partition(".")[0],
        dataset=MagicBrushTestReader.name,
        task="edit",
        source=source,
        target=target,
        instruction=text_field(row, "instruction", "empty_instruction"),
        meta=json.dumps({"caption": caption, "mask": mask_rle(mask), "img_id": image}),
    )
