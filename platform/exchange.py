"""Model versions in and out: a version from weights that somebody else has made, and a folder that others can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from insightedit.model.pipeline import load_pipeline
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.manifests import (
    ALLOWED_SUFFIXES,
    MANIFEST_NAME,
    check_classes,
    verify_manifest,
    write_manifest,
)
from insightedit.platform.model_cards import CARD_NAME, is_own_card, keep_card, stated_licence, write_card
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.tracking import ensure_experiment, environment_tags, git_commit
from insightedit.platform.workdir import Workdir

INDEX: Final = "model_index.json"
_PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".pb")
_VARIANTS: Final = (".fp16", ".non_ema", ".bf16")
_DIFFUSERS_CLASS: Final = "StableDiffusionInstructPix2PixPipeline"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What of a folder becomes a version."""

    kind: str
    """The class that its index names."""
    files: tuple[str, ...]
    """Paths below the folder."""
    left_out: tuple[str, ...]
    """Pickles, second copies of the weights, and what no part of the index needs."""
    size: int
    """Bytes of the files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A version that was made out of a folder."""

    version: ModelVersion
    contents: Contents


def examine(folder: Path) -> Contents:
    """Look at a pipeline folder without loading it.

    Args:
        folder: of InsightEdit, or of plain InstructPix2Pix as diffusers saves it.

    Raises:
        NotFoundError: it is no pipeline folder.
        InsightEditError: it names foreign code, a part has pickled weights only, or the model edits no images.
    """
    check_classes(folder)
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in found]
    # A card of ours speaks of the version that was exported: the new version gets its own.
    own = {CARD_NAME} if is_own_card(folder / CARD_NAME) else set[str]()
    wanted = [name for name in names if _belongs(name, parts) and name not in own]
    files = tuple(name for name in wanted if not _second_copy(name, wanted))
    for part in parts:
        _check_part(folder, part, names)
    _check_edits(folder)
    return Contents(
        kind=str(index.get("_class_name", "")),
        files=files,
        left_out=tuple(name for name in names if name not in files and name != MANIFEST_NAME),
        size=sum((folder / name).stat().st_size for name in files),
    )


def import_folder(workdir: Workdir, folder: Path, reason: str = "") -> Imported:
    """Make a version out of a pipeline folder. It becomes the challenger, like one that was trained here.

    Args:
        workdir: where the registry is.
        folder: of InsightEdit, or of plain InstructPix2Pix as diffusers saves it. It is left as it is.
        reason: where it comes from, in words; kept as a tag.

    Raises:
        NotFoundError: it is no pipeline folder.
        InsightEditError: it is refused by `examine`, or does not open.
    """
    contents = examine(folder)
    try:
        load_pipeline(folder)
    except Exception as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise InsightEditError(f"{folder} does not open as an editing pipeline: {said}.") from error
    registry = Registry(workdir)
    experiment = ensure_experiment(registry.client, workdir)
    origin = {"imported_from": str(folder), "imported_class": contents.kind, "imported_reason": reason}
    origin["licence"] = stated_licence(folder / CARD_NAME) or ""
    origin = {key: value for key, value in origin.items() if value}
    run = registry.client.create_run(experiment, tags=environment_tags() | origin, run_name=f"import/{folder.name}")
    try:
        version = registry.register(
            folder, run.info.run_id, origin | {"git_commit": git_commit()}, only=frozenset(contents.files)
        )
    except BaseException:
        registry.client.set_terminated(run.info.run_id, "FAILED")
        raise
    registry.client.set_terminated(run.info.run_id)
    keep_card(registry, version)
    return Imported(version=version, contents=contents)


def export_version(registry: Registry, version: ModelVersion, target: Path) -> Path:
    """Copy a version's folder, verified before and after, to where others can load it, with its card beside.

    Raises:
        UsageError: the target is there already.
        InsightEditError: the version is damaged.
    """
    if target.exists():
        raise UsageError(f"{target} exists already: name a folder that does not.")
    folder = registry.fetch(version)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(folder, temporary)
        verify_manifest(temporary)
        write_card(registry, version, temporary)
        write_manifest(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def how_to_load(version: ModelVersion, folder: Path) -> str:
    """The lines of Python that open a version's copy."""
    index: Mapping[str, Any] = json.loads((version.folder / INDEX).read_text(encoding="utf-8"))
    name = str(index.get("_class_name", ""))
    where = "insightedit.model.pipeline" if name == "InsightEditPipeline" else "diffusers"
    return f"from {where} import {name}\npipeline = {name}.from_pretrained({str(folder)!r})"


def _belongs(name: str, parts: list[str]) -> bool:
    """Whether a file is of the index, of one of its parts, or says what the model is."""
    path = Path(name)
    if path.suffix not in ALLOWED_SUFFIXES or any(one.startswith(".") for one in path.parts):
        return False
    if len(path.parts) == 1:
        return name == INDEX or path.suffix in (".md", ".txt")
    return path.parts[0] in parts


def _second_copy(name: str, names: list[str]) -> bool:
    """Whether it is of a variant (half precision, without moving average) that lies beside the weights themselves."""
    folder = Path(name).parent
    whole = [other for other in names if Path(other).parent == folder and other.endswith(".safetensors")]
    return _is_variant(name) and not all(_is_variant(other) for other in whole)


def _is_variant(name: str) -> bool:
    return any(variant in Path(name).name for variant in _VARIANTS)


def _check_part(folder: Path, part: str, names: list[str]) -> None:
    own = [Path(name) for name in names if name.startswith(f"{part}/")]
    if not own:
        raise InsightEditError(f"{folder} has no folder {part}, which its {INDEX} names: save the pipeline again.")
    pickles = [path for path in own if path.suffix in _PICKLES]
    if pickles and not any(path.suffix == ".safetensors" for path in own):
        raise InsightEditError(
            f"{folder / pickles[0]} is a pickle, which could run code, and {part} has no safetensors: load the pipeline"
            " where you trust it and save it with safe_serialization=True."
        )


def _check_edits(folder: Path) -> None:
    """An editor's UNet reads the source's latents beside the noise: twice as many channels as it gives back."""
    path = folder / "unet" / "config.json"
    if not path.is_file():
        raise InsightEditError(f"{folder} has no unet/config.json: only pipelines with a UNet can be imported.")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        read, given = int(config["in_channels"]), int(config["out_channels"])
    except (ValueError, KeyError, TypeError) as error:
        raise InsightEditError(f"{path} is no UNet's config ({error}): save the pipeline again.") from None
    if read != 2 * given:
        raise InsightEditError(
            f"The UNet of {folder} reads {read} channels and an editor's reads {2 * given}: it draws from text and"
            f" edits nothing, so import a {_DIFFUSERS_CLASS} or an InsightEditPipeline."
        )
