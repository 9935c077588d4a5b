"""What readers have in common: entries, options, and files of a dataset's folder."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, ParamSpec, Protocol, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.records import BadRow, BadRowError, Reason, Record, RecordTask


@dataclass(frozen=True, slots=True)
class Entry:
    """What is read in one go: one example, or a file or a part of a file that holds many.

    Attributes:
        place: what its reader needs to find it; small, and picklable.
        rows: about how many records it gives.
    """

    place: Any
    rows: int = 1


class Reader(Protocol):
    """Turns one dataset from its original form into records.

    Readers keep nothing between calls: what they need of a dataset's index travels in its entries, so that any process
    can read any entry. Options come from a config; wrong ones raise `UsageError`.
    """

    name: ClassVar[str]
    """What configs call it."""
    tasks: ClassVar[tuple[RecordTask, ...]]
    """What its records can teach."""
    needs: ClassVar[str]
    """What must be there before it can read, for people."""

    def entries(self, options: Mapping[str, object]) -> Sequence[Entry]:
        """List what there is to read, in an order that never changes; pictures are not opened.

        Raises:
            UsageError: an option is wrong, or a file of the dataset's index is.
            NotFoundError: the folder, or a file that the whole dataset needs, is missing.
        """
        ...

    def read(self, options: Mapping[str, object], entry: Entry) -> Iterator[Record | BadRow]:
        """Read an entry's rows; what cannot become a record is a `BadRow` in its place, and never an exception."""
        ...

    def fingerprint(self, options: Mapping[str, object]) -> str:
        """Return a sha256 that changes when the records do."""
        ...


class Options(BaseModel):
    """Options of a reader; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FolderOptions(Options):
    """Options of a dataset in a folder."""

    root: Annotated[Path, AfterValidator(Path.expanduser)]
    """The dataset's folder."""


_P = ParamSpec("_P")
_T = TypeVar("_T")
OptionsT = TypeVar("OptionsT", bound=Options)


def parse_options(kind: type[OptionsT], reader: str, options: Mapping[str, object]) -> OptionsT:
    """Check a reader's options.

    Raises:
        UsageError: one is unknown, missing or wrong.
        NotFoundError: `root` is not a folder.
    """
    try:
        parsed = kind.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        known = ", ".join(kind.model_fields)
        raise UsageError(f"Option {field!r} of a {reader} dataset: {first['msg']}; options are {known}.") from error
    if isinstance(parsed, FolderOptions) and not parsed.root.is_dir():
        raise NotFoundError(f"There is no folder {parsed.root}; give the root of the {reader} dataset.")
    return parsed


def records_of(reader: Reader, options: Mapping[str, object]) -> Iterator[Record | BadRow]:
    """Read a whole dataset, entry by entry."""
    for entry in reader.entries(options):
        yield from reader.read(options, entry)


def attempt(key: str, make: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | BadRow:
    """Call a function; what it raises as `BadRowError` becomes a bad row."""
    try:
        return make(*args, **kwargs)
    except BadRowError as error:
        return BadRow(key, error.reason, str(error))


def read_file(root: Path, name: str) -> bytes:
    """Read a file of a dataset that an index names.

    Raises:
        BadRowError: `missing_file`; also where the name leads out of the folder.
        OSError: the file is there and cannot be read: the storage fails, which is no fault of the row.
    """
    path = root / name
    if "\0" in name:
        raise BadRowError("missing_file", "A file's name holds a zero byte; repair it.")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadRowError("missing_file", f"{name} leads out of {root}; keep the dataset's files in one folder.")
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        raise BadRowError("missing_file", f"There is no file {path}.") from None


_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def text_field(row: Mapping[str, Any], field: str, reason: Reason = "missing_field") -> str:
    """A text of a row of an index, without blanks around it.

    Raises:
        BadRowError: it is missing or no text (`missing_field`), blank (`reason`), or cannot be written as UTF-8
            (`invalid_json`, whose escapes can say half of a character).
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise BadRowError("missing_field", f"The field {field} is missing or no text.")
    if "\0" in value or value.encode("utf-8", "ignore").decode() != value:
        raise BadRowError("invalid_json", f"The field {field} holds a zero byte or half of a character; repair it.")
    if not value.strip():
        raise BadRowError(reason, f"The field {field} is empty.")
    return value.strip()


def load_json(path: Path) -> Any:
    """Read a JSON file that a whole dataset needs: UTF-8, with or without a byte order mark.

    Raises:
        NotFoundError: it is missing.
        UsageError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise NotFoundError(f"There is no file {path}; the dataset needs it.") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}; download it again.") from None


def fingerprint_of(reader: str, version: int, options: Options, files: Iterable[Path]) -> str:
    """A sha256 over a reader's version, its options but for where the folder is, and names and sizes of files.

    Args:
        reader: its name.
        version: raised whenever the same files give other records.
        options: as they were parsed.
        files: what the records come from. JSON, TSV and other index files are hashed whole, pictures and archives are
            known by name and size.
    """
    content = options.model_dump(mode="json", exclude={"root"})
    root = options.root if isinstance(options, FolderOptions) else Path()
    digest = hashlib.sha256(json.dumps([reader, version, content], sort_keys=True).encode())
    for path in sorted(files):
        name = str(path.relative_to(root) if path.is_relative_to(root) else path.name)
        digest.update(json.dumps([name, path.stat().st_size]).encode())
        if path.suffix.lower() in _INDEX_SUFFIXES:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


_INDEX_SUFFIXES = {".json", ".jsonl", ".tsv", ".csv", ".txt", ".p", ".pkl"}


def as_mapping(value: object) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        BadRowError: it is something else.
    """
    if not isinstance(value, dict):
        raise BadRowError("invalid_json", "It is not a JSON object.")
    return cast(Mapping[str, Any], value)
