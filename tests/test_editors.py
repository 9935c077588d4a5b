"""What makes the edits of an evaluation: replicas that may die, edits that are kept, pipelines that are not ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from empty_registry import make_workdir
from PIL import Image
from tiny_models import build_sources, tiny_config, write_tiny_preset

from insightedit.jobs import latency
from insightedit.jobs.evaluate import EditorPool, editor_pool, evaluate_quickly
from insightedit.jobs.latency import measure_latency
from insightedit.model.editors import Picture, load_editor_of
from insightedit.model.insightedit import build_pipeline
from insightedit.model.pipeline import InsightEditPipeline
from insightedit.platform.cases import EditCase, Unmade
from insightedit.platform.config import EvaluationConfig, RunConfig, load_preset
from insightedit.platform.edit_cache import EditCache
from insightedit.platform.errors import InsightEditError
from insightedit.platform.evaluation import evaluation_cases, figures, judge
from insightedit.platform.workdir import Workdir

BATCH = 3


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_preset("nano").model_copy(update={"evaluation": EvaluationConfig(scenes=4, batch=BATCH, replicas=2)})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    return Workdir.open(tmp_path_factory.mktemp("editors") / "work")


@pytest.fixture(scope="module")
def pool(config: RunConfig, workdir: Workdir) -> Iterator[EditorPool]:
    with editor_pool(config, workdir) as opened:
        yield opened


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    build_sources(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    model = replace(tiny_config(build_sources(sources)), prompt_length=256)
    build_pipeline(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cases(config: RunConfig) -> list[EditCase]:
    return evaluation_cases(config.evaluation)


def _alone(folder: Path, cases: Sequence[EditCase], batch: int = BATCH) -> list[Picture]:
    """The same edits in this process, without Ray and without anything kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    editor = load_editor_of(folder)
    edits: list[Picture] = []
    for start in range(0, len(cases), batch):
        some = cases[start : start + batch]
        edits += editor.edit(
            [one.instruction for one in some], [one.source for one in some], [one.seed for one in some]
        )
    torch.set_num_threads(threads)
    return edits


class _Stopped(Exception):  # noqa: N818 - as a killed process
    pass


def pictures(edits: Sequence[Picture | Unmade]) -> list[Picture]:
    """Edits that were made, all of them."""
    made = [edit for edit in edits if not isinstance(edit, Unmade)]
    assert len(made) == len(edits)
    return made


def test_an_evaluation_that_was_stopped_makes_only_what_is_missing(
    pool: EditorPool, pipeline: Path, cases: list[EditCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    put = EditCache.put

    def counted(cache: EditCache, batch: Sequence[EditCase], edits: Sequence[Picture]) -> None:
        put(cache, batch, edits)
        made.append(len(batch))

    def stop(done: int, total: int) -> None:
        assert total == len(cases)
        raise _Stopped

    monkeypatch.setattr(EditCache, "put", counted)
    with pytest.raises(_Stopped):
        pool.edit(pipeline, cases, stop)
    assert sum(made) in {2, 3}
    told: list[int] = []
    edits = pool.edit(pipeline, cases, lambda done, total: told.append(done))
    assert sum(made) == len(cases), "nothing was made twice"
    assert told == sorted(told)
    assert told[-1] == len(cases)
    expected = _alone(pipeline, cases)
    assert all(np.array_equal(np.asarray(one), other) for one, other in zip(edits, expected, strict=True))
    assert np.array_equal(pictures(pool.edit(pipeline, cases)), pictures(edits))
    assert sum(made) == len(cases)
    changed = next(pipeline.glob("unet/*.safetensors"))
    os.utime(changed, ns=(1, 1))
    assert np.array_equal(pictures(pool.edit(pipeline, cases)), pictures(edits))
    assert sum(made) == 2 * len(cases), "files that changed are another pipeline"


def test_what_is_kept_and_damaged_is_made_again(
    pool: EditorPool, pipeline: Path, cases: list[EditCase], workdir: Workdir
) -> None:
    first = pool.edit(pipeline, cases[:2])
    for path in workdir.edited.glob("*/*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(pictures(pool.edit(pipeline, cases[:2])), pictures(first))


def test_a_replica_that_is_killed_is_started_again(pool: EditorPool, pipeline: Path, cases: list[EditCase]) -> None:
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if killed:
            return
        for one in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # others of Ray's come and go
                if "PipelineActor" in " ".join(one.cmdline()):
                    one.send_signal(signal.SIGKILL)
                    killed.append(one.pid)
                    return

    other = [replace(case, seed=case.seed + 100) for case in cases]
    edits = pool.edit(pipeline, other, kill)
    assert killed
    assert all(
        np.array_equal(np.asarray(one), expected) for one, expected in zip(edits, _alone(pipeline, other), strict=True)
    )


def test_pictures_of_several_sizes(pool: EditorPool, pipeline: Path, cases: list[EditCase]) -> None:
    mixed: list[EditCase] = []
    for number, case in enumerate(cases):
        size = (48, 32) if number % 2 else (32, 32)
        mixed.append(replace(case, source=np.asarray(Image.fromarray(case.source).resize(size))))
    edits = pool.edit(pipeline, mixed)
    assert [edit.shape for edit in pictures(edits)] == [case.source.shape for case in mixed]
    for start in (0, 1):
        expected = _alone(pipeline, mixed[start::2])
        assert all(np.array_equal(np.asarray(one), other) for one, other in zip(edits[start::2], expected, strict=True))


def test_only_what_cannot_be_made_is_lost(pool: EditorPool, pipeline: Path, cases: list[EditCase]) -> None:
    hard = [replace(case, seed=case.seed + 200) for case in cases[:4]]
    hard[1] = replace(hard[1], instruction="remove it " * 400)
    edits = pool.edit(pipeline, hard)
    assert isinstance(edits[1], Unmade)
    assert "tokens; this model reads" in edits[1].why
    for place in (0, 2, 3):
        assert np.array_equal(np.asarray(edits[place]), _alone(pipeline, [hard[place]])[0]), "made by itself"
    with pytest.raises(InsightEditError, match=r"The edits of .* failed: .*tokens; this model reads"):
        pool.edit(pipeline, [hard[1]])


def test_an_edit_of_no_numbers_is_not_made(pipeline: Path, cases: list[EditCase], tmp_path: Path) -> None:
    broken: Any = InsightEditPipeline.from_pretrained(pipeline)
    torch.nn.init.constant_(broken.unet.conv_out.weight, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    case = cases[0]
    with pytest.raises(ValueError, match="values that are not numbers; look at the model's weights"):
        load_editor_of(tmp_path / "broken").edit([case.instruction], [np.asarray(case.source)], [case.seed])


def test_the_figures_are_those_of_the_edits(
    pool: EditorPool, pipeline: Path, cases: list[EditCase], config: RunConfig, tmp_path: Path
) -> None:
    found = evaluate_quickly(pipeline, config, make_workdir(tmp_path / "work"), 4, pool)
    assert found == figures(judge(cases, _alone(pipeline, cases)))
    assert found.viescore < 0.6, "nobody has trained it"


def test_how_long_edits_take_is_measured_in_turn(pool: EditorPool, pipeline: Path, config: RunConfig) -> None:
    assert min(measure_latency([pipeline, pipeline], config, edits=1, rounds=1)) > 0
    with pytest.raises(InsightEditError, match=r"An edit of .*nowhere failed"):
        measure_latency([pipeline.parent / "nowhere"], config, edits=1, rounds=1)


def test_latencies_are_medians_in_turn_without_first_edits(
    pool: EditorPool, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    seconds = iter([90.0, 1.0, 2.0, 90.0, 4.0, 5.0, 90.0, 3.0, 9.0, 90.0, 6.0, 7.0])

    def timed(actor: Any, folder: Path, case: EditCase) -> float:
        asked.append(folder.name)
        return next(seconds)

    monkeypatch.setattr(latency, "_seconds", timed)
    assert measure_latency([Path("a"), Path("b")], config, edits=2, rounds=2) == [2.5, 5.5]
    assert "".join(asked) == "aaabbbaaabbb"


# -- pipelines that are not ours --------------------------------------------------------------------------------------


def _parts(sources: Path, channels: int) -> dict[str, Any]:
    """Of a Stable Diffusion pipeline."""
    diffusion = sources / "diffusion"
    parts = StableDiffusionPipeline.from_pretrained(diffusion, safety_checker=None).components
    if channels != 4:
        torch.manual_seed(0)
        config = dict(UNet2DConditionModel.from_pretrained(diffusion, subfolder="unet").config)
        parts["unet"] = UNet2DConditionModel.from_config({**config, "in_channels": channels})
    kept = ("vae", "text_encoder", "tokenizer", "scheduler", "unet", "feature_extractor", "safety_checker")
    return {**{name: parts[name] for name in kept}, "requires_safety_checker": False}


def test_an_instruct_pix2pix_folder(pool: EditorPool, sources: Path, cases: list[EditCase], tmp_path: Path) -> None:
    theirs: Any = StableDiffusionInstructPix2PixPipeline(**_parts(sources, 8))
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    case = cases[0]
    (edit,) = pool.edit(tmp_path, [case])
    assert isinstance(edit, np.ndarray)
    assert edit.dtype == np.uint8
    generator = torch.Generator().manual_seed(case.seed)
    expected = theirs(case.instruction, Image.fromarray(case.source), generator=generator).images[0]
    assert np.abs(edit.astype(int) - np.asarray(expected)).max() <= 2


def test_any_pipeline_that_takes_image_and_prompt(
    pool: EditorPool, sources: Path, cases: list[EditCase], tmp_path: Path
) -> None:
    theirs: Any = StableDiffusionImg2ImgPipeline(**_parts(sources, 4))
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    edits = pool.edit(tmp_path, cases[:2])
    for edit, case in zip(edits, cases, strict=False):
        assert isinstance(edit, np.ndarray)
        generator = torch.Generator().manual_seed(case.seed)
        expected = theirs(prompt=case.instruction, image=Image.fromarray(case.source), generator=generator).images[0]
        assert np.abs(edit.astype(int) - np.asarray(expected)).max() <= 2


def test_what_cannot_edit_is_told(pool: EditorPool, sources: Path, cases: list[EditCase], tmp_path: Path) -> None:
    with pytest.raises(
        InsightEditError, match=r"it is a StableDiffusionPipeline, which takes no image: name a pipeline"
    ):
        pool.edit(sources / "diffusion", cases[:1])
    with pytest.raises(InsightEditError, match=r"The edits of .*nowhere failed: .*model_index\.json is missing"):
        pool.edit(tmp_path / "nowhere", cases[:1])


# -- the whole command ------------------------------------------------------------------------------------------------


def _evaluate(folder: Path, preset: Path, workdir: Workdir) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "insightedit", "evaluate", str(folder), "--config", str(preset), "--json"]
    environment = {**os.environ, "INSIGHTEDIT_WORKDIR": str(workdir.root)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_evaluation_goes_on_to_the_same_figures(pipeline: Path, tmp_path: Path) -> None:
    preset = write_tiny_preset(tmp_path, steps=1, evaluation={"scenes": 20, "batch": 2})
    found: list[dict[str, Any]] = []
    kept: dict[Path, int] = {}
    for name, kill in (("killed", True), ("whole", False)):
        workdir = make_workdir(tmp_path / name)
        if kill:
            process = _evaluate(pipeline, preset, workdir)
            while process.poll() is None and len(list(workdir.edited.glob("*/*.parquet"))) < 2:
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kept = {path: path.stat().st_mtime_ns for path in workdir.edited.glob("*/*.parquet")}
            assert 2 <= len(kept) < 40, "it was killed in the middle"
        process = _evaluate(pipeline, preset, workdir)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found.append({key: value for key, value in json.loads(output).items() if key not in {"run", "report"}})
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items()), "what was made is not made again"
    assert found[0] == found[1]
