"""Model cards: what the hub's own library reads in them, and what people do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from empty_registry import make_workdir
from huggingface_hub import ModelCard, ModelCardData
from mlflow.entities import Metric, Param

from insightedit.cli import cli
from insightedit.platform.model_cards import is_own_card, keep_card, model_card, stated_licence, write_card
from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir

SCORES = {
    "all.viescore": 0.67,
    "all.instruction": 2.41,
    "all.non_overedit": 4.29,
    "advanced.viescore": 0.565,
    "copy_baseline.viescore": 0.5,
    "copy_baseline.instruction": 0.0,
    "copy_baseline.non_overedit": 5.0,
    "task.remove.viescore": 0.791,
    "metric.psnr": 34.0053,
}
OURS = {
    "model.sources.diffusion": "package:nano-foundation/diffusion",
    "model.sources.mllm": "package:nano-foundation/mllm",
    "model.sources.vision_tower": "None",
    "model.resolution": "32",
    "data.datasets.edits.reader": "shapes",
    "stages.2.steps": "800",
    "stages.2.global_batch": "32",
}
PAPERS = {
    "model.sources.diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "model.sources.mllm": "llava-hf/llava-1.5-7b-hf",
    "data.datasets.brush.reader": "magicbrush",
    "data.datasets.stuff.reader": "cocostuff",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    return make_workdir(tmp_path_factory.mktemp("cards") / "work")


@pytest.fixture
def registry(workdir: Workdir) -> Registry:
    return Registry(workdir)


def _run(registry: Registry, workdir: Workdir, params: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    run = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id
    registry.client.log_batch(
        run,
        params=[Param(*one) for one in params.items()],
        metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()],
    )
    return run


def _register(
    registry: Registry,
    workdir: Workdir,
    folder: Path,
    params: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
    *,
    kind: str = "InsightEditPipeline",
) -> ModelVersion:
    folder.mkdir()
    (folder / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    return registry.register(folder, _run(registry, workdir, params, {}), tags)


def _judged(registry: Registry, workdir: Workdir, version: ModelVersion) -> ModelVersion:
    run = _run(registry, workdir, {}, SCORES)
    tags = {"run": run, "judge": "shapes", "scenes": "200", "benchmark": "magicbrush-test"}
    tags = {f"evaluation.{name}": value for name, value in tags.items()}
    registry.set_tags(version.version, tags)
    return registry.resolve(version.version)


def _read(card: str) -> tuple[ModelCardData, str]:
    """What the hub's library understands; it refuses a model index that it does not."""
    found = ModelCard(card, ignore_metadata_errors=False)
    assert isinstance(found.data, ModelCardData)
    return found.data, found.text


def test_the_hub_understands_the_metadata(registry: Registry, workdir: Workdir, tmp_path: Path) -> None:
    version = _register(registry, workdir, tmp_path / "model", OURS, {"preset": "nano", "stage_run.2": "abc"})
    data, text = _read(model_card(registry, _judged(registry, workdir, version)))
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "diffusers", "image-to-image")
    assert data.tags is not None
    assert "diffusers:InsightEditPipeline" in data.tags
    assert data.eval_results is not None
    results = {(one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert results["viescore", "VIEScore, all instructions"] == 0.67
    assert results["viescore", "VIEScore, advanced instructions"] == 0.565
    assert results["psnr", "PSNR outside the edit region, dB"] == 34.0053
    assert {one.dataset_name for one in data.eval_results} == {"magicbrush-test, 200 scenes"}
    assert "800 steps of 32, run `abc`" in text
    assert "no photographs" in text
    assert "| the source unchanged | 0.500 | 0.00 | 5.00 |" in text
    assert "| remove | 0.791 |" in text


def test_a_version_of_the_papers_parts_has_their_licence(registry: Registry, workdir: Workdir, tmp_path: Path) -> None:
    data, text = _read(model_card(registry, _register(registry, workdir, tmp_path / "model", PAPERS)))
    assert (data.license, data.to_dict()["license_name"]) == ("other", "of-the-base-models")
    assert data.base_model == ["llava-hf/llava-1.5-7b-hf", "stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert data.datasets == ["osunlp/MagicBrush"]
    assert not data.eval_results
    assert "It was not evaluated: `insightedit evaluate" in text


def test_an_imported_version_keeps_its_licence(registry: Registry, workdir: Workdir, tmp_path: Path) -> None:
    kind = "StableDiffusionInstructPix2PixPipeline"
    tags = {"imported_from": "/home/somebody/weights", "imported_reason": "published weights", "licence": "mit"}
    version = _register(registry, workdir, tmp_path / "model", {}, tags, kind=kind)
    data, text = _read(model_card(registry, version))
    assert data.license == "mit"
    assert f"from diffusers import {kind}" in text
    assert "imported, not trained here: published weights" in text
    assert "/home/somebody" not in text
    unknown = _register(registry, workdir, tmp_path / "other", {}, {"imported_from": "/x"}, kind=kind)
    assert _read(model_card(registry, unknown))[0].license == "unknown"


def test_cards_of_others_are_told_apart(registry: Registry, workdir: Workdir, tmp_path: Path) -> None:
    theirs = tmp_path / "README.md"
    assert (stated_licence(theirs), is_own_card(theirs)) == (None, False)
    theirs.write_text("---\nlicense: 'openrail++'\ntags:\n- art\n---\n- insightedit\n")
    assert (stated_licence(theirs), is_own_card(theirs)) == ("openrail++", False)
    theirs.write_text("# Only words\nlicense: mit\n")
    assert (stated_licence(theirs), is_own_card(theirs)) == (None, False)
    ours = write_card(registry, _register(registry, workdir, tmp_path / "model", OURS), tmp_path)
    assert (stated_licence(ours), is_own_card(ours)) == ("apache-2.0", True)


def test_the_command_prints_the_card(
    registry: Registry, workdir: Workdir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    version = _judged(registry, workdir, _register(registry, workdir, tmp_path / "model", OURS))
    cli.main(["--workdir", str(workdir.root), "models", "card", version.version], standalone_mode=False)
    assert capfd.readouterr().out.strip() == model_card(registry, version).strip()


def test_the_page_is_kept_with_the_version(registry: Registry, workdir: Workdir, tmp_path: Path) -> None:
    version = _register(registry, workdir, tmp_path / "model", OURS)
    keep_card(registry, version)

    def kept() -> str:
        return str(registry.client.get_model_version(version.name, version.version).description)

    assert "It was not evaluated" in kept()
    keep_card(registry, _judged(registry, workdir, version))
    assert "| all instructions | 0.670 | 2.41 | 4.29 |" in kept()
    registry.promote(version.version)
    keep_card(registry, version)
    decision = f"promote nothing to {version.version}"
    assert decision in model_card(registry, version)
    assert decision not in kept(), "it would grow stale there"
    registry.set_tags(version.version, {"imported_reason": "x" * 6000, "imported_from": "weights"})
    keep_card(registry, registry.resolve(version.version))
    assert len(kept()) == 5000, "as long as the registry allows"


def test_a_version_outlives_its_runs(registry: Registry, workdir: Workdir, tmp_path: Path) -> None:
    version = replace(_register(registry, workdir, tmp_path / "model", OURS), run_id="f" * 32)
    card = model_card(registry, replace(version, tags={**version.tags, "evaluation.run": "e" * 32}))
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "unknown", "what it is made of is not known any more"
    assert "It was not evaluated" in card
