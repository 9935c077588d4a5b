"""The command `edit`: one image, here or by a server."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from insightedit.console import Command, emit, json_option, open_workdir
from insightedit.platform.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from insightedit.serve.schema import OutputFormat

Wrapped = TypeVar("Wrapped", bound="Callable[..., Any]")
_FORMATS: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Edited:
    """What `edit` reports."""

    out: Path
    sha256: str
    """Of the file that was written."""
    model_version: str
    seed: int
    seconds: float
    """For all files together."""


_OPTIONS = (
    click.option("--mask", type=click.Path(path_type=Path), help="A PNG; the image changes where it is transparent."),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), help="Fixes the noise; without it one is drawn and named."
    ),
    click.option(
        "--n", type=click.IntRange(1, 10), help="Edits, of seeds that follow each other, as FILE-1, FILE-2, ...."
    ),
    click.option("--size", metavar="WxH", help="Of the edit in pixels, as in 640x480; the image's own without it."),
    click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; the model's own without it."),
    click.option("--guidance-scale", type=click.FloatRange(0, 100), help="Weight of the instruction."),
    click.option("--image-guidance-scale", type=click.FloatRange(0, 100), help="Weight of the source image."),
    click.option(
        "--image-branch-scale", type=click.FloatRange(0, 100), help="Weight of the image branch; 1 without it."
    ),
    click.option("--negative-prompt", help="What to keep away from."),
    click.option(
        "--scheduler",
        type=click.Choice(["ddim", "euler", "euler_a", "dpm++"]),
        help="The way to denoise; the model's own without it.",
    ),
    click.option("--compression", type=click.IntRange(0, 100), help="Quality of a .jpg or .webp; 100 without it."),
)


def edit_options(command: Wrapped) -> Wrapped:
    """What may be said of an edit, as options of a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asked(settings: dict[str, Any]) -> dict[str, Any]:
    """What `edit_options` gave, by the names of the HTTP interface, the mask read."""
    names = {"steps": "num_inference_steps", "compression": "output_compression"}
    mask = settings["mask"]
    return {
        **{names.get(name, name): value for name, value in settings.items()},
        "mask": None if mask is None else read_image(mask),
    }


@click.command(cls=Command)
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("instruction")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write: .png, .jpg or .webp.")
@click.option("--model", metavar="VERSION", help="A number or an alias; the champion, or the server's own, without it.")
@click.option("--server", metavar="URL", help="Let this server do it instead of this machine.")
@edit_options
@json_option
def edit(image: Path, instruction: str, out: Path, server: str | None, as_json: bool, **settings: Any) -> None:
    """Edit IMAGE by an INSTRUCTION."""
    if not instruction.strip():
        raise UsageError("The instruction is empty; say what to change in the image.")
    wanted: dict[str, Any] = {**asked(settings), "output_format": format_of(out)}
    contents = read_image(image)
    begun = time.perf_counter()
    if server:
        from insightedit.serve.client import edit_over_http

        answer = edit_over_http(server, contents, instruction, **wanted)
    else:
        from insightedit.serve.local import edit_here

        answer = edit_here(open_workdir(), contents, instruction, **wanted)
    files = write_all(out, answer.images)
    seconds = round(time.perf_counter() - begun, 3)
    results = [
        Edited(
            out=file,
            sha256=hashlib.sha256(encoded).hexdigest(),
            model_version=answer.model_version,
            seed=seed,
            seconds=seconds,
        )
        for file, encoded, seed in zip(files, answer.images, answer.seeds, strict=True)
    ]
    emit(results[0] if settings["n"] is None else results, as_json, lambda: _show(results))


def _show(results: Sequence[Edited]) -> Iterable[str]:
    for one in results:
        yield f"{one.out}: edited by version {one.model_version} with seed {one.seed} in {one.seconds:.1f} s"


def format_of(out: Path) -> OutputFormat:
    """What a file's name says it is.

    Raises:
        UsageError: nothing that an edit can be.
    """
    if out.suffix.lower() not in _FORMATS:
        raise UsageError(f"--out {out} must end in {', '.join(_FORMATS)}.")
    return _FORMATS[out.suffix.lower()]


def read_image(image: Path) -> bytes:
    """What is in a file.

    Raises:
        NotFoundError, UsageError: it is not to be had.
    """
    try:
        return image.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"There is no image {image}; name a PNG, JPEG or WebP file.") from None
    except OSError as error:
        raise UsageError(f"{image} cannot be read ({error.strerror}); name a PNG, JPEG or WebP file.") from None


def write_all(out: Path, images: Sequence[bytes]) -> list[Path]:
    """Write one image as the file that was asked for; several with numbers behind its name."""
    names = [out.name] if len(images) == 1 else [f"{out.stem}-{n}{out.suffix}" for n in range(1, len(images) + 1)]
    files = [out.with_name(name) for name in names]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for file, encoded in zip(files, images, strict=True):
            file.write_bytes(encoded)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}.") from None
    return files
