"""The registry: versions, references, aliases, and folders that are refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from empty_registry import make_workdir
from safetensors.numpy import save

from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.manifests import MANIFEST_NAME, Manifest, verify_manifest
from insightedit.platform.registry import Registry


def make_pipeline(folder: Path, value: float = 0.0) -> Path:
    """A folder with the form of a pipeline, of a few hundred bytes."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.safetensors").write_bytes(save({"weight": np.full(64, value, np.float32)}))
    (folder / "model_index.json").write_text('{"_class_name": "InsightEditPipeline"}')
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(make_workdir(tmp_path / "work"))


@pytest.fixture
def run_id(registry: Registry, tmp_path: Path) -> str:
    # A folder with a space: its artifacts' URI is quoted.
    location = (tmp_path / "work" / "the artifacts").as_uri()
    experiment = registry.client.create_experiment("runs", artifact_location=location)
    return registry.client.create_run(experiment).info.run_id


def test_a_version_is_a_whole_copy_with_lineage(registry: Registry, run_id: str, tmp_path: Path) -> None:
    source = make_pipeline(tmp_path / "pipeline")
    version = registry.register(source, run_id, {"git_commit": "abc", "dataset.shapes": "f00d"})
    (source / "unet" / "model.safetensors").write_bytes(b"overwritten later")
    assert version.version == "1"
    assert version.aliases == ("challenger",)
    assert version.uri == "models:/insightedit/1"
    assert version.folder != source
    assert "the artifacts" in str(version.folder)
    assert registry.fetch("1") == version.folder
    assert version.tags["git_commit"] == "abc"
    assert version.tags["run"] == run_id
    assert version.tags["manifest"] == Manifest.read(version.folder).digest
    assert not list(version.folder.parent.glob("*.tmp"))


def test_every_form_of_reference_finds_the_version(registry: Registry, run_id: str, tmp_path: Path) -> None:
    for i in range(11):
        registry.register(make_pipeline(tmp_path / f"p{i}", i), run_id)
    for reference in ("10", "models:/insightedit/10"):
        assert registry.resolve(reference).version == "10"
    registry.promote("2")
    for reference in ("champion", "models:/insightedit@champion"):
        assert registry.resolve(reference).version == "2"
    # Newest first by number, not by spelling: "10" comes before "9".
    assert [version.version for version in registry.versions()][:3] == ["11", "10", "9"]
    aliases = {version.version: version.aliases for version in registry.versions() if version.aliases}
    assert aliases == {"11": ("challenger",), "2": ("champion",)}


def test_what_is_not_there_is_said_with_the_way_out(registry: Registry, run_id: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no champion yet: no model is registered, run `insightedit quickstart`"):
        registry.resolve("champion")
    assert registry.versions() == []
    assert registry.audit.entries() == []
    registry.register(make_pipeline(tmp_path / "p"), run_id)
    with pytest.raises(NotFoundError, match=r"There is no champion yet: .*`insightedit promote 1`"):
        registry.resolve("models:/insightedit@champion")
    registry.promote("1")
    with pytest.raises(NotFoundError, match="There is no challenger: train or import one, or name a version"):
        registry.resolve("challenger")
    with pytest.raises(NotFoundError, match="There is no version 7 of insightedit"):
        registry.resolve("7")
    with pytest.raises(NotFoundError, match="no model other"):
        registry.resolve("models:/other/1")
    for nonsense in ("", "models:/insightedit", "../1", "models:/insightedit/1/2"):
        with pytest.raises(UsageError, match="names no model version"):
            registry.resolve(nonsense)
    with pytest.raises(NotFoundError, match="is not a pipeline folder"):
        registry.register(tmp_path, run_id)
    with pytest.raises(NotFoundError, match="There is no run nope"):
        registry.register(tmp_path / "p", "nope")


def _truncate(folder: Path) -> None:
    path = folder / "unet" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    path = folder / "unet" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _remove(folder: Path) -> None:
    (folder / "unet" / "model.safetensors").unlink()


def _add(folder: Path) -> None:
    (folder / "unet" / "more.safetensors").write_bytes(b"")


def _add_pickle(folder: Path) -> None:
    (folder / "unet" / "weights.bin").write_bytes(pickle.dumps({"weight": 1}))


def _link(folder: Path) -> None:
    (folder / "unet" / "linked.json").symlink_to("/etc/hostname")


def _forget_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


def _break_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text('{"files": [1]}')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_truncate, "model.safetensors in .* has .* bytes, not the"),
        (_flip, r"model.safetensors in .* differs .* \(sha256\)"),
        (_remove, "model.safetensors is missing"),
        (_add, "more.safetensors in .* is not in its MANIFEST.json"),
        (_add_pickle, "weights.bin in .* is refused: .* safetensors"),
        (_link, "linked.json in .* is a link"),
        (_forget_manifest, "has no MANIFEST.json"),
        (_break_manifest, "is not a readable manifest"),
    ],
)
def test_a_damaged_version_is_refused_in_one_sentence(
    registry: Registry, run_id: str, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    version = registry.register(make_pipeline(tmp_path / "p"), run_id)
    damage(version.folder)
    with pytest.raises(InsightEditError, match=sentence) as caught:
        registry.fetch(version)
    assert "\n" not in str(caught.value)


def test_another_whole_folder_in_its_place_is_refused(registry: Registry, run_id: str, tmp_path: Path) -> None:
    first = registry.register(make_pipeline(tmp_path / "p0", 0.0), run_id)
    second = registry.register(make_pipeline(tmp_path / "p1", 1.0), run_id)
    first.folder.rename(tmp_path / "away")
    second.folder.rename(first.folder)
    verify_manifest(first.folder)
    with pytest.raises(InsightEditError, match="is not what version 1 was registered with"):
        registry.fetch("1")
    with pytest.raises(NotFoundError, match="There is no model folder"):
        registry.fetch("2")


def test_a_pickle_is_never_registered(registry: Registry, run_id: str, tmp_path: Path) -> None:
    folder = make_pipeline(tmp_path / "p")
    _add_pickle(folder)
    with pytest.raises(InsightEditError, match=r"weights\.bin"):
        registry.register(folder, run_id)
    assert registry.versions() == []
    artifacts = tmp_path / "work" / "the artifacts"
    assert not [path for path in artifacts.rglob("*") if path.is_file()], "a refused copy was left behind"
