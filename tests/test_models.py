"""Versions in and out, where one comes from, in what two differ, and which are deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from empty_registry import make_workdir
from huggingface_hub import ModelCard
from judged_versions import empty_pipeline, even_table, keep_evaluation
from PIL import Image
from tiny_models import build_sources, tiny_config

from insightedit.model.insightedit import build_pipeline
from insightedit.model.pipeline import InsightEditPipeline, load_pipeline
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.exchange import examine, export_version, how_to_load, import_folder
from insightedit.platform.lineage import difference, lineage
from insightedit.platform.manifests import MANIFEST_NAME, verify_manifest
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.retention import hold, prune, release
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InstructPix2Pix as it lies in a hub's repository: safetensors, pickles, half precision and a single file."""
    folder = tmp_path_factory.mktemp("plain")
    sources = build_sources(folder / "sources")
    parts = StableDiffusionPipeline.from_pretrained(sources.diffusion, safety_checker=None).components
    config = dict(UNet2DConditionModel.from_pretrained(sources.diffusion, subfolder="unet").config)
    unet: Any = UNet2DConditionModel.from_config({**config, "in_channels": 8})
    own: dict[str, Any] = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    own |= {"unet": unet, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: Any = StableDiffusionInstructPix2PixPipeline(**own)
    pipeline.save_pretrained(folder / "theirs")
    weights = folder / "theirs" / "unet" / "diffusion_pytorch_model.safetensors"
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "all.safetensors",
    ):
        shutil.copy(weights, folder / "theirs" / name)
    (folder / "theirs" / "README.md").write_text("# A model\n")
    (folder / "theirs" / ".gitattributes").write_text("* binary\n")
    return folder / "theirs"


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return make_workdir(tmp_path / "work")


def edit(pipeline: Any) -> Any:
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "image_guidance_scale": 1.5, "output_type": "np"}
    return pipeline("remove it", PICTURE, generator=torch.Generator().manual_seed(0), **settings).images


def test_a_plain_folder_becomes_a_version_and_comes_out_for_diffusers(
    plain: Path, workdir: Workdir, tmp_path: Path
) -> None:
    made = import_folder(workdir, plain, "from a friend")
    registry = Registry(workdir)
    assert (made.version.version, made.version.aliases) == ("1", ("challenger",))
    assert made.contents.kind == "StableDiffusionInstructPix2PixPipeline"
    assert set(made.contents.left_out) == {
        ".gitattributes",
        "all.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    folder = registry.fetch("1")
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept == {*made.contents.files, MANIFEST_NAME}
    assert "README.md" in kept
    run = registry.client.get_run(made.version.run_id or "")
    assert (run.info.status, run.data.tags["imported_from"]) == ("FINISHED", str(plain))

    out = export_version(registry, made.version, tmp_path / "out")
    assert how_to_load(made.version, out).startswith("from diffusers import StableDiffusionInstructPix2PixPipeline\n")
    theirs: Any = StableDiffusionInstructPix2PixPipeline.from_pretrained(str(out), safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(edit(load_pipeline(folder)), edit(theirs), atol=2 / 255)
    with pytest.raises(UsageError, match="exists already"):
        export_version(registry, made.version, out)


def test_our_own_folder_goes_round(workdir: Workdir, tmp_path: Path) -> None:
    build_pipeline(tiny_config(build_sources(tmp_path / "sources"))).save_pretrained(tmp_path / "ours")
    made = import_folder(workdir, tmp_path / "ours")
    out = export_version(Registry(workdir), made.version, tmp_path / "out")
    assert "insightedit.model.pipeline import InsightEditPipeline" in how_to_load(made.version, out)
    verify_manifest(out)
    card = ModelCard((out / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
    assert (card.data.to_dict()["library_name"], card.data.to_dict()["license"]) == ("diffusers", "unknown")
    again = import_folder(workdir, out)
    assert again.contents.left_out == ("README.md",)
    assert again.version.tags["manifest"] == made.version.tags["manifest"]
    assert made.contents.left_out == ()
    pipeline = InsightEditPipeline.from_pretrained(str(out))
    assert np.array_equal(edit(pipeline), edit(load_pipeline(tmp_path / "ours")))


def _no_safetensors(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()


def _no_editor(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(path.read_text().replace('"in_channels": 8', '"in_channels": 4'))


def _no_part(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _torn(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _foreign(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace('"transformers"', '"subprocess"'))


def _no_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1]")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_no_safetensors, r"unet/diffusion_pytorch_model\.bin is a pickle, .* safe_serialization=True"),
        (_no_editor, "reads 4 channels and an editor's reads 8"),
        (_no_part, "has no folder vae"),
        (_torn, "does not open as an editing pipeline"),
        (_foreign, "from 'subprocess', and only diffusers, transformers and insightedit"),
        (_no_index, "is no index of a pipeline"),
    ],
)
def test_what_cannot_be_a_version_is_refused_in_one_sentence(
    plain: Path, workdir: Workdir, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(plain, folder)
    damage(folder)
    with pytest.raises(InsightEditError, match=sentence) as raised:
        import_folder(workdir, folder)
    assert "\n" not in str(raised.value)
    assert Registry(workdir).versions() == []
    with pytest.raises(NotFoundError, match="is not a pipeline folder"):
        examine(tmp_path / "nowhere")


@pytest.fixture
def add(workdir: Workdir, tmp_path: Path) -> Callable[..., ModelVersion]:
    registry = Registry(workdir)

    def register(**tags: str) -> ModelVersion:
        run = registry.client.create_run(ensure_experiment(registry.client, workdir), run_name="mine")
        for name, value in {"seed": "3", "steps": tags.get("steps", "1")}.items():
            registry.client.log_param(run.info.run_id, name, value)
        folder = empty_pipeline(tmp_path / "pipeline")
        (folder / "README.md").write_text(tags.get("steps", "1"))
        named = {name.replace("__", "."): value for name, value in tags.items()}
        return registry.register(folder, run.info.run_id, named)

    return register


def test_a_version_is_followed_back(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    registry = Registry(workdir)
    stage = registry.client.create_run(ensure_experiment(registry.client, workdir), tags={"fingerprint": "f00d"})
    (workdir.runs / "mine" / "stage-2").mkdir(parents=True)
    tags = keep_evaluation(registry, workdir, even_table(0.7), "cases")
    version = add(stage_run__2=stage.info.run_id, stage_run__3="gone", dataset__edits="5ca1ab1e", git_commit="abc")
    registry.set_tags(version.version, tags)
    registry.promote("1", reason="first")
    back = lineage(registry, registry.resolve("1"), workdir.runs)
    assert back.run is not None
    assert (back.run.name, back.run.params["seed"], back.git_commit) == ("mine", "3", "abc")
    second, third = back.stages
    assert (second.number, second.fingerprint) == (2, "f00d")
    assert second.checkpoints == str(workdir.runs / "mine" / "stage-2")
    assert (third.run.run_id, third.run.status, third.checkpoints) == ("gone", "GONE", "")
    assert back.datasets == {"edits": "5ca1ab1e"}
    assert back.evaluation is not None
    assert back.evaluation.run_id == tags["evaluation.run"]
    assert back.figures == {"viescore": 0.7}
    assert [(entry.action, entry.reason) for entry in back.decisions] == [("promote", "first")]


def test_two_versions_differ_in_what_differs(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    registry = Registry(workdir)
    for score, steps in ((0.6, "1"), (0.7, "2")):
        version = add(git_commit="abc", steps=steps)
        registry.set_tags(version.version, keep_evaluation(registry, workdir, even_table(score), "cases"))
    found = difference(registry, registry.resolve("1"), registry.resolve("2"))
    assert found.files == {"README.md": "changed"}
    assert found.params == {"steps": ("1", "2")}
    assert found.lineage["steps"] == ("1", "2")
    assert "git_commit" not in found.lineage
    assert found.figures == {"viescore": (0.6, 0.7)}
    assert found.gain is not None
    assert (round(found.gain.gain, 9), found.gain.scenes) == (0.1, 40)
    add()
    assert difference(registry, registry.resolve("1"), registry.resolve("3")).gain is None


def test_nothing_that_is_needed_is_deleted(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    registry = Registry(workdir)
    versions = {version.version: version for version in (add() for _ in range(9))}
    for number in ("1", "2", "3", "5"):
        registry.promote(number)
    registry.rollback()  # 3 is the champion, 2 before it, 1 before that; 5 was rolled back
    hold(registry, "6", "paper", "its figures are in print")
    hold(registry, "8", "cluster", "")
    release(registry, registry.resolve("8"), "cluster")
    with pytest.raises(NotFoundError, match="cluster holds no version 8"):
        release(registry, registry.resolve("8"), "cluster")
    with pytest.raises(UsageError, match="'a b' cannot hold"):
        hold(registry, "8", "a b", "")
    planned = prune(registry, {"7"}, keep=0, line=1, dry_run=True)
    assert all(version.folder.is_dir() for version in versions.values())
    done = prune(registry, {"7"}, keep=0, line=1)
    assert planned.deleted == done.deleted == ("8", "5", "4", "1")
    assert done.bytes == sum(int(versions[number].tags["bytes"]) for number in done.deleted)
    assert done.kept == {
        "9": "it is challenger",
        "7": "it is deployed",
        "6": "paper holds it (its figures are in print)",
        "3": "it is champion",
        "2": "it is previous",
    }
    for number, version in versions.items():
        assert version.folder.is_dir() == (number in done.kept)
    assert {one.version for one in registry.versions()} == set(done.kept)
    assert prune(registry, (), keep=5).deleted == ()
    assert prune(registry, (), keep=0, days=1).deleted == ()
    assert registry.fetch("champion") == versions["3"].folder


def test_the_way_back_stays(workdir: Workdir, add: Callable[..., ModelVersion]) -> None:
    registry = Registry(workdir)
    for _ in range(5):
        registry.promote(add().version)
    assert prune(registry, (), keep=0, line=2).deleted == ("2", "1")
    assert registry.rollback().to_version == "4"
    assert registry.rollback().to_version == "3"
