"""The engine: edits share batches, come and go at any step, by priority, and each has the pipeline's image."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from tiny_models import build_sources, tiny_config

from insightedit.model.denoiser import Denoiser, Denoising
from insightedit.model.insightedit import build_pipeline
from insightedit.model.pipeline import InsightEditPipeline, load_pipeline
from insightedit.serve.backend import Conditions, Edited, EditJob, Partial
from insightedit.serve.caches import ByteCache
from insightedit.serve.engine import ConditionEngine, EditEngine, partial_steps
from insightedit.serve.replicas import Conditioner, Editor
from insightedit.serve.settings import EngineSettings, ServeSettings

pytestmark = pytest.mark.timeout(300)
SETTINGS = EngineSettings(max_batch=4)
CLOSE = 2  # of 255, by which edits in free batches may differ


def picture(size: tuple[int, int] = (16, 16), seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


# Edits of different settings, two of them of another size.
JOBS = {
    "plain": EditJob(prompt="remove the red circle", pixels=picture(), seed=1),
    "long": EditJob(prompt="remove it", pixels=picture(seed=4), seed=2, num_inference_steps=9, guidance_scale=4.0),
    "one branch": EditJob(
        prompt="add a star", pixels=picture(), seed=3, guidance_scale=1.0, image_guidance_scale=1.0, scheduler="euler"
    ),
    "ancestral": EditJob(
        prompt="red", pixels=picture(seed=5), seed=4, num_inference_steps=5, scheduler="euler_a", negative_prompt="blue"
    ),
    "wide": EditJob(prompt="make it blue", pixels=picture((40, 28)), seed=5, scheduler="dpm++", image_branch_scale=0.3),
    "wide too": EditJob(prompt="remove it", pixels=picture((40, 28), 6), seed=6, num_inference_steps=7),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose zero-initialised parts are random: every part has a say in the image."""
    result = tmp_path_factory.mktemp("engine")
    torch.manual_seed(0)
    pipeline: Any = build_pipeline(tiny_config(build_sources(result / "sources")))
    pipeline.register_to_config(image_branch=True)
    with torch.no_grad():
        for part in (pipeline.bim.text_out, pipeline.bim.spatial_out, pipeline.adapter.projection.norm):
            part.weight.normal_(std=0.5)
    pipeline.save_pretrained(result / "pipeline")
    return result / "pipeline"


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> InsightEditPipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def conditions(folder: Path) -> dict[str, Conditions]:
    answers = ConditionEngine(str(folder), True, SETTINGS).condition(list(JOBS.values()))
    return {name: given(answer) for name, answer in zip(JOBS, answers, strict=True)}


def given(answer: object) -> Conditions:
    assert isinstance(answer, Conditions)
    return answer


def alone(pipeline: Any, job: EditJob) -> np.ndarray:
    """The job's image by the pipeline in exact mode."""
    settings = {
        name: getattr(job, name)
        for name in ("num_inference_steps", "guidance_scale", "image_guidance_scale", "negative_prompt", "scheduler")
    }
    scale = 1.0 if job.image_branch_scale is None else job.image_branch_scale
    generator = torch.Generator().manual_seed(job.seed)
    image = Image.fromarray(job.pixels)
    images = pipeline(job.prompt, image, generator=generator, image_branch_scale=scale, exact=True, **settings).images
    return np.asarray(images[0])


@pytest.fixture
def engine_of(folder: Path) -> Iterator[Callable[..., EditEngine]]:
    engines: list[EditEngine] = []

    def build(exact: bool = True, where: Path = folder, **settings: Any) -> EditEngine:
        engines.append(EditEngine(str(where), exact, SETTINGS.model_copy(update=settings)))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


class Conductor:
    """Lets an engine's steps through one by one, and keeps who took each of them, as seeds' noise tells them apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[Denoising]] = []
        self.failing: Callable[[Denoising], bool] = lambda _: False
        self._allowed = threading.Semaphore(0)
        self._taken = threading.Semaphore(0)
        step = Denoiser.step

        def conducted(denoiser: Denoiser, edits: Any) -> None:
            self._allowed.acquire()
            self.groups.append(list(edits))
            try:
                if any(map(self.failing, edits)):
                    raise RuntimeError("this edit cannot be done")
                step(denoiser, edits)
            finally:
                self._taken.release()

        monkeypatch.setattr(Denoiser, "step", conducted)

    def let(self, steps: int) -> None:
        """Let the engine take some steps, and wait until it has."""
        for _ in range(steps):
            self._allowed.release()
            assert self._taken.acquire(timeout=20)

    def open(self) -> None:
        """Let the engine go on by itself."""
        self._allowed.release(10_000)


@pytest.fixture
def conductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Conductor]:
    result = Conductor(monkeypatch)
    yield result
    result.open()


def image_of(future: Future[Edited]) -> np.ndarray:
    return future.result(timeout=60).pixels


def wait_until_prepared(engine: EditEngine, conditions: dict[str, Conditions]) -> None:
    """Edits are prepared one after the other: where one is refused, those before it are ready."""
    wrong: Any = "none"
    with pytest.raises(ValueError, match="scheduler is 'none'"):
        image_of(engine.submit(dataclasses.replace(JOBS["plain"], scheduler=wrong), conditions["plain"]))


@pytest.mark.parametrize("exact", [True, False])
def test_whoever_shares_the_batch_gets_the_pipelines_image(
    pipeline: Any, conditions: dict[str, Conditions], engine_of: Any, conductor: Conductor, exact: bool
) -> None:
    engine = engine_of(exact)
    futures: dict[str, Future[Edited]] = {}
    for name, job in JOBS.items():  # Each joins while those before it are on their way.
        futures[name] = engine.submit(job, conditions[name])
        conductor.let(1)
    conductor.open()
    for name, job in JOBS.items():
        difference = np.abs(image_of(futures[name]).astype(int) - alone(pipeline, job)).max()
        assert difference == 0 if exact else difference <= CLOSE, name
    together = max(len(group) for group in conductor.groups)
    assert together == 1 if exact else together > 1
    assert [futures[name].result().steps for name in ("plain", "long", "wide too")] == [3, 9, 7]


def test_the_conditioner_gives_the_pipelines_conditions(folder: Path, pipeline: Any) -> None:
    jobs = list(JOBS.values())
    for exact in (True, False):
        engine = ConditionEngine(str(folder), exact, SETTINGS)
        for job, answer in zip(jobs, engine.condition(jobs), strict=True):
            expected = pipeline.condition(job.prompt, Image.fromarray(job.pixels), job.negative_prompt).tensors()
            assert set(given(answer).arrays) == set(expected)
            for name, array in given(answer).arrays.items():
                tolerance = 0 if exact else 1e-4
                np.testing.assert_allclose(array, expected[name].numpy(), rtol=0, atol=tolerance)


def test_a_cancelled_edit_takes_no_further_step(
    conditions: dict[str, Conditions], engine_of: Any, conductor: Conductor
) -> None:
    engine = engine_of()
    leaving = engine.submit(JOBS["long"], conditions["long"])
    conductor.let(2)
    staying = engine.submit(JOBS["plain"], conditions["plain"])
    leaving.cancel()
    conductor.open()
    image_of(staying)
    edit = conductor.groups[0][0]
    # A step may have been on its way when it was cancelled.
    assert edit.index in (2, 3)
    assert not edit.done


def test_a_higher_priority_goes_first(conditions: dict[str, Conditions], engine_of: Any, conductor: Conductor) -> None:
    engine = engine_of(max_batch=2)
    ended: list[str] = []
    futures: list[Future[Edited]] = []
    for name, priority in (("low", 0), ("lower", -1), ("high", 5)):
        future = engine.submit(dataclasses.replace(JOBS["plain"], priority=priority), conditions["plain"])
        future.add_done_callback(lambda _, name=name: ended.append(name))
        futures.append(future)
        if name == "low":
            conductor.let(1)
    wait_until_prepared(engine, conditions)
    conductor.open()
    for future in futures:
        image_of(future)
    assert ended == ["high", "low", "lower"]


def test_an_edit_that_fails_fails_alone(
    pipeline: Any, conditions: dict[str, Conditions], engine_of: Any, conductor: Conductor
) -> None:
    engine = engine_of(exact=False)
    futures = [engine.submit(JOBS[name], conditions[name]) for name in ("plain", "long", "one branch")]
    wait_until_prepared(engine, conditions)
    conductor.failing = lambda edit: len(edit.timesteps) == 9
    conductor.open()
    with pytest.raises(RuntimeError, match="this edit cannot be done"):
        futures[1].result(timeout=60)
    for future, name in ((futures[0], "plain"), (futures[2], "one branch")):
        assert np.abs(image_of(future).astype(int) - alone(pipeline, JOBS[name])).max() <= CLOSE
    engine.check()


def test_partial_images_come_in_order_and_before_the_last(
    pipeline: Any, conditions: dict[str, Conditions], engine_of: Any
) -> None:
    job = dataclasses.replace(JOBS["wide too"], partials=3)
    parts: list[tuple[int, np.ndarray]] = []
    finished = image_of(engine_of().submit(job, conditions["wide too"], lambda *part: parts.append(part)))
    assert [index for index, _ in parts] == [0, 1, 2]
    assert all(image.shape == job.pixels.shape for _, image in parts)
    assert np.array_equal(finished, alone(pipeline, job))
    assert [partial_steps(*counts) for counts in ((20, 3), (2, 3), (1, 3), (5, 0))] == [(5, 10, 15), (1,), (), ()]


@pytest.mark.parametrize("scheduler", [None, "euler", "euler_a", "dpm++"])
def test_the_last_prediction_is_the_edit(
    conditions: dict[str, Conditions], engine_of: Any, conductor: Conductor, scheduler: Any
) -> None:
    """What partial images are made of comes closer with each step, and at the last one is there."""
    job = dataclasses.replace(JOBS["long"], scheduler=scheduler, guidance_scale=1.0, image_guidance_scale=1.0)
    future = engine_of().submit(job, conditions["long"])
    conductor.let(1)
    edit = conductor.groups[0][0]
    predictions = [edit.predicted]
    for _ in range(8):
        conductor.let(1)
        predictions.append(edit.predicted)
    image_of(future)
    distances = [float((x - edit.latents).norm()) for x in predictions if x is not None]
    assert len(distances) == 9
    assert distances[0] > distances[-1]
    assert distances[-1] < 0.2 * distances[0]


def test_repeated_edits_of_an_image_are_not_encoded_again(
    folder: Path, conditions: dict[str, Conditions], engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("encode", "condition"):
        own = getattr(InsightEditPipeline, name)
        monkeypatch.setattr(
            InsightEditPipeline, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1]
        )
    engine = engine_of()
    first, second, other = (dataclasses.replace(JOBS["plain"], seed=seed) for seed in (1, 1, 2))
    images = [image_of(engine.submit(job, conditions["plain"])) for job in (first, second, other)]
    assert calls == ["encode"]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    conditioner = ConditionEngine(str(folder), True, SETTINGS)
    answers = [given(answer) for job in (first, other) for answer in conditioner.condition([job])]
    assert calls == ["encode", "condition"]
    assert all(np.array_equal(answers[0].arrays[name], array) for name, array in answers[1].arrays.items())
    assert answers[1].seconds == 0
    conditioner.condition([dataclasses.replace(first, negative_prompt="blue")])
    assert calls == ["encode", "condition", "condition"]


def test_a_cache_keeps_what_was_used_last() -> None:
    cache = ByteCache[bytes](10, len)
    for key in "abc":
        cache.put(key, key.encode() * 4)
        cache.get("a")
    assert [cache.get(key) is None for key in "abc"] == [False, True, False]
    cache.put("c", b"c")
    cache.put("large", b"x" * 11)
    assert cache.get("large") is None
    assert cache.bytes == 5


def test_a_plain_instruct_pix2pix_folder_is_edited_as_by_the_pipeline(
    folder: Path, tmp_path: Path, engine_of: Any
) -> None:
    parts = load_pipeline(folder).components
    config: Any = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
    torch.manual_seed(0)
    own: dict[str, Any] = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    own |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    unet: Any = UNet2DConditionModel.from_config({**config, "in_channels": 8})
    theirs: Any = StableDiffusionInstructPix2PixPipeline(unet=unet, **own)
    theirs.save_pretrained(tmp_path)
    jobs = [
        dataclasses.replace(
            JOBS["plain"], seed=seed, num_inference_steps=4, guidance_scale=5.0, image_guidance_scale=1.5
        )
        for seed in (1, 2)
    ]
    pictures = [image_of(future) for future in edited_by(engine_of(where=tmp_path), tmp_path, jobs)]
    for job, image in zip(jobs, pictures, strict=True):
        assert np.array_equal(image, alone(load_pipeline(tmp_path), job))
        theirs.set_progress_bar_config(disable=True)
        expected = theirs(
            job.prompt, Image.fromarray(job.pixels), 4, 5.0, 1.5, generator=torch.Generator().manual_seed(job.seed)
        ).images[0]
        assert np.abs(np.asarray(expected).astype(int) - image).max() <= CLOSE


def edited_by(engine: EditEngine, folder: Path, jobs: list[EditJob]) -> list[Future[Edited]]:
    answers = ConditionEngine(str(folder), True, SETTINGS).condition(jobs)
    return [engine.submit(job, given(answer)) for job, answer in zip(jobs, answers, strict=True)]


def test_shortcuts_change_an_image_only_where_they_are_taken(
    pipeline: Any, conditions: dict[str, Conditions], engine_of: Any
) -> None:
    job = JOBS["long"]
    expected = alone(pipeline, job)
    off = image_of(engine_of(exact=False).submit(job, conditions["long"]))
    assert np.abs(off.astype(int) - expected).max() <= CLOSE
    for shortcut in ({"deep_every": 3}, {"guide_every": 3}, {"deep_every": 3, "guide_every": 2}):
        engine = engine_of(exact=False, **shortcut)
        longer, short = (
            image_of(engine.submit(dataclasses.replace(job, num_inference_steps=steps), conditions["long"]))
            for steps in (9, 1)
        )
        assert not np.array_equal(longer, expected)
        # One step leaves nothing to leave out.
        one = alone(pipeline, dataclasses.replace(job, num_inference_steps=1))
        assert np.abs(short.astype(int) - one).max() <= CLOSE


def test_exact_mode_takes_no_shortcut() -> None:
    for options in ({"deep_every": 2}, {"precision": "bfloat16"}, {"compile": True}, {"threads": 2}):
        engine = EngineSettings.model_validate(options)
        with pytest.raises(ValueError, match=f"engine.{next(iter(options))} changes an edit's bits"):
            ServeSettings(engine=engine)
        ServeSettings(engine=engine, exact=False)
    ServeSettings(engine=EngineSettings(max_batch=2, cache_bytes=0))


def complaint(engine: EditEngine) -> str:
    """What the engine's check says once it fails."""
    while True:
        try:
            engine.check()
        except RuntimeError as error:
            return str(error)
        time.sleep(0.02)


def test_a_stuck_engine_says_so(folder: Path, conditions: dict[str, Conditions], conductor: Conductor) -> None:
    engine = EditEngine(str(folder), True, SETTINGS, patience=0.05)
    engine.check()
    future = engine.submit(JOBS["plain"], conditions["plain"])
    assert "more than 0.05 seconds" in complaint(engine)
    conductor.open()
    image_of(future)
    engine.close()
    with pytest.raises(RuntimeError, match="has ended"):
        engine.check()


def test_replicas_work_on_several_edits_at_once(folder: Path, pipeline: Any) -> None:
    async def story() -> None:
        conditioner = Conditioner(str(folder), True, 60, SETTINGS, 0.0)
        editor = Editor(str(folder), True, 60, SETTINGS, 0.0, None)
        jobs = [dataclasses.replace(job, partials=2) for job in JOBS.values()]
        answers = [given(answer) for answer in await asyncio.gather(*map(conditioner.condition, jobs))]
        gone = asyncio.ensure_future(editor.edit(jobs[1], answers[1]))
        await asyncio.sleep(0)
        gone.cancel()
        outcomes = await asyncio.gather(*(editor.edit(*pair) for pair in zip(jobs, answers, strict=True)))
        parts = [part async for part in editor.edit_in_parts(jobs[1], answers[1])]
        assert [part.index for part in parts if isinstance(part, Partial)] == [0, 1]
        for job, outcome in zip([*jobs, jobs[1]], [*outcomes, parts[-1]], strict=True):
            assert np.array_equal(outcome.pixels, alone(pipeline, job))
        assert gone.cancelled()
        editor.check_health()
        conditioner.check_health()

    asyncio.run(story())
