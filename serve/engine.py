"""The two halves of an edit in one process: threads and torch, no Ray. What the replicas run."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from insightedit.model.denoiser import Denoiser, Denoising, Shortcuts
from insightedit.model.encoders import to_pixels
from insightedit.model.guidance import EditConditions, Guidance
from insightedit.model.pipeline import InsightEditPipeline, as_images, load_conditioner, load_editor
from insightedit.serve.backend import Conditions, Edited, EditJob, Refusal, VersionInfo
from insightedit.serve.caches import ByteCache, content_key
from insightedit.serve.gentle import gently
from insightedit.serve.settings import EngineSettings
from insightedit.serve.uploads import Pixels

Value = TypeVar("Value")
OnPartial = Callable[[int, Pixels], None]
"""Takes a partial image by its index, on the engine's side thread."""


def use_threads(count: int) -> None:
    """Let this thread's torch use some of the CPU's cores: replicas share a machine, and exact mode needs one."""
    torch.set_num_threads(count)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ConditionEngine:
    """Language model, Q-Former, BIM and adapter: one pass an edit, or one for several."""

    def __init__(self, folder: str, exact: bool, settings: EngineSettings, gentle_until: float = 0.0) -> None:
        """Load what this half needs from a verified local folder, until some time behind everybody else's work."""
        dtype = getattr(torch, settings.precision)
        self._pipeline: InsightEditPipeline = gently(
            gentle_until, lambda: load_conditioner(folder, dtype).to(_device())
        )
        self._exact = exact
        self._known = ByteCache[Conditions](settings.cache_bytes, _size_of_conditions)

    def condition(self, jobs: Sequence[EditJob]) -> list[Conditions | Refusal]:
        """What the editor needs to know beside the images.

        In exact mode every edit has a pass of its own: rows of one shape, the same bits. A prompt that is longer than
        the model reads is refused.
        """
        answers: dict[str, Conditions | Refusal] = {}
        asked: dict[str, EditJob] = {}
        keys = [content_key(job.pixels, job.prompt, job.negative_prompt or "") for job in jobs]
        for key, job in zip(keys, jobs, strict=True):
            known = self._known.get(key)
            found = self._refusal(job) if known is None else replace(known, seconds=0.0)
            if found is None:
                asked[key] = job
            else:
                answers[key] = found
        groups = [[key] for key in asked] if self._exact else [list(asked)] * bool(asked)
        for group in groups:
            for key, conditions in zip(group, self._pass([asked[key] for key in group]), strict=True):
                answers[key] = conditions
                self._known.put(key, conditions)
        return [answers[key] for key in keys]

    def _refusal(self, job: EditJob) -> Refusal | None:
        try:
            _count_tokens(self._pipeline, job.prompt)
        except ValueError as error:
            return Refusal(f"prompt: {error}", "prompt")
        return None

    def _pass(self, jobs: Sequence[EditJob]) -> list[Conditions]:
        begun = time.perf_counter()
        made = self._pipeline.condition(
            [job.prompt for job in jobs],
            [Image.fromarray(job.pixels) for job in jobs],
            [job.negative_prompt or "" for job in jobs],
            together=not self._exact,
        )
        # NumPy has no bfloat16; every bfloat16 is a float32, so nothing is lost on the way.
        rows = [
            {name: x.float().cpu().numpy() for name, x in made.row(at).tensors().items()} for at in range(len(jobs))
        ]
        seconds = time.perf_counter() - begun
        counts = [_count_tokens(self._pipeline, job.prompt) for job in jobs]
        return [
            Conditions(arrays=arrays, seconds=seconds, text_tokens=text, image_tokens=image)
            for arrays, (text, image) in zip(rows, counts, strict=True)
        ]


@dataclass(eq=False, kw_only=True, slots=True)
class _Flight:
    """An edit in the engine."""

    job: EditJob
    conditions: Conditions
    on_partial: OnPartial | None
    order: int
    """Of arrival."""
    future: Future[Edited] = field(default_factory=Future)
    """Never marked as running before it ends: so it can be cancelled at any time."""
    edit: Denoising | None = None
    """None until it is prepared."""
    partial_steps: tuple[int, ...] = ()
    """Numbers of the steps behind which a partial image is due."""
    turn: int = 0
    """When it took its last step."""
    preparing: float = 0.0
    """Seconds that its preparation took."""
    begun: float | None = None
    """When it took its first step, by the performance counter."""

    @property
    def ready(self) -> bool:
        """Whether it can take a step now."""
        return self.edit is not None and not self.edit.done and not self.future.done()


class EditEngine:
    """The UNet's steps between the VAE's encoder and decoder, for several edits at once.

    One thread does nothing but steps. Before each it looks who is there: whoever has come takes part, whoever was
    cancelled does not. A second thread encodes source images, decodes partial and finished ones.
    """

    def __init__(
        self,
        folder: str,
        exact: bool,
        settings: EngineSettings,
        patience: float = float("inf"),
        gentle_until: float = 0.0,
    ) -> None:
        """Load what this half needs from a verified local folder, and start the threads.

        Args:
            folder: the pipeline's.
            exact: every edit takes its steps alone, on one CPU thread, as `InsightEditPipeline(..., exact=True)` does.
            settings: of the engine.
            patience: seconds after which a step, or an image's way through the VAE, counts as stuck.
            gentle_until: until when, in seconds since the epoch, it loads behind everybody else's work.
        """
        dtype = getattr(torch, settings.precision)
        pipeline = gently(gentle_until, lambda: load_editor(folder, dtype).to(_device()))
        if settings.channels_last:
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        shortcuts = Shortcuts(deep_every=settings.deep_every, guide_every=settings.guide_every)
        self._pipeline: InsightEditPipeline = pipeline
        self._denoiser = Denoiser(pipeline.unet, pipeline.scheduler, shortcuts, compiled=settings.compile)
        pipeline.unet = self._denoiser.unet  # so that no weights are there twice
        self._exact = exact
        self._settings = settings
        self._patience = patience
        self._sources = ByteCache[Tensor](settings.cache_bytes, lambda x: x.nbytes)
        self._flights: list[_Flight] = []
        self._changed = threading.Condition()
        self._count = itertools.count()
        self._closed = False
        self._busy: dict[str, float] = {}
        self._side = ThreadPoolExecutor(1, "images", initializer=use_threads, initargs=(settings.threads,))
        self._steps = threading.Thread(target=self._take_steps, name="steps", daemon=True)
        self._steps.start()

    def submit(self, job: EditJob, conditions: Conditions, on_partial: OnPartial | None = None) -> Future[Edited]:
        """Begin an edit. Cancelling what is returned takes it out before its next step.

        Args:
            job: the edit.
            conditions: what the other half made of it.
            on_partial: takes up to `job.partials` images of the edit in progress, in order, before the result is there.
        """
        flight = _Flight(job=job, conditions=conditions, on_partial=on_partial, order=next(self._count))
        with self._changed:
            self._flights.append(flight)
        self._aside(flight, self._prepare)
        return flight.future

    def describe(self) -> VersionInfo:
        """What this version does where a request says nothing."""
        own = self._pipeline.defaults
        return VersionInfo(
            resolution=self._pipeline.config["resolution"],
            num_inference_steps=own.num_inference_steps,
            guidance_scale=own.guidance_scale,
            image_guidance_scale=own.image_guidance_scale,
        )

    def check(self) -> None:
        """Raise if the engine is stuck: its thread has ended, or takes longer than anybody waits for it."""
        if not self._steps.is_alive():
            raise RuntimeError("the thread that takes the edits' steps has ended")
        begun = min(self._busy.copy().values(), default=None)
        if begun is not None and time.monotonic() - begun > self._patience:
            raise RuntimeError(f"an edit has been at one step for more than {self._patience:g} seconds")

    def close(self) -> None:
        """End the threads. Edits in progress are cancelled."""
        with self._changed:
            self._closed = True
            for flight in self._flights:
                flight.future.cancel()
            self._changed.notify()
        self._steps.join()
        self._side.shutdown()

    # -- on the thread of the steps -----------------------------------------------------------------------------

    def _take_steps(self) -> None:
        use_threads(self._settings.threads)
        while (group := self._next_group()) is not None:
            with self._watched("steps"):
                self._step(group)

    def _next_group(self) -> list[_Flight] | None:
        """Who takes the next step together, once there is somebody; None when the engine closes."""
        with self._changed:
            while not self._closed:
                self._flights = [flight for flight in self._flights if not flight.future.done()]
                ready = [flight for flight in self._flights if flight.ready]
                if ready:
                    return self._grouped(ready)
                self._changed.wait()
        return None

    def _grouped(self, ready: Sequence[_Flight]) -> list[_Flight]:
        """The next group: a high priority goes before a low one, and equals take turns."""
        foremost = sorted(ready, key=lambda flight: (-flight.job.priority, flight.order))[: self._settings.max_batch]
        leader = min(foremost, key=lambda flight: (-flight.job.priority, flight.turn, flight.order))
        if self._exact:
            return [leader]
        return [flight for flight in foremost if _size(flight) == _size(leader)]

    def _step(self, group: Sequence[_Flight]) -> None:
        edits = [flight.edit for flight in group if flight.edit is not None]
        before = [edit.index for edit in edits]
        now = time.perf_counter()
        for flight in group:
            flight.begun = now if flight.begun is None else flight.begun
            flight.turn = next(self._count)
        try:
            self._denoiser.step(edits)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the edit's)
            self._separate(group, before, error)
        for flight, edit, index in zip(group, edits, before, strict=True):
            if edit.index > index:
                self._after_step(flight, edit)

    def _separate(self, group: Sequence[_Flight], before: Sequence[int], error: Exception) -> None:
        """A step has failed: the neighbours of the edit that is to blame do theirs alone."""
        if len(group) == 1:
            _fail(group[0], error)
            return
        for flight, index in zip(group, before, strict=True):
            if flight.edit is not None and flight.edit.index == index:
                self._step([flight])

    def _after_step(self, flight: _Flight, edit: Denoising) -> None:
        if edit.done:
            self._aside(flight, self._finish)
        elif edit.index in flight.partial_steps and edit.predicted is not None:
            number, predicted = flight.partial_steps.index(edit.index), edit.predicted
            self._aside(flight, lambda flight: self._hand_out(flight, number, predicted))

    # -- on the side thread ---------------------------------------------------------------------------------------

    def _aside(self, flight: _Flight, work: Callable[[_Flight], None]) -> None:
        """Have the side thread do something for an edit, one thing after the other."""
        self._side.submit(self._do_aside, flight, work)

    def _do_aside(self, flight: _Flight, work: Callable[[_Flight], None]) -> None:
        if flight.future.done():
            return
        try:
            with self._watched("images"):
                work(flight)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the edit's)
            _fail(flight, error)

    def _prepare(self, flight: _Flight) -> None:
        begun = time.perf_counter()
        job, own = flight.job, self._pipeline.defaults
        place = {"device": self._pipeline.unet.device, "dtype": self._pipeline.unet.dtype}
        tensors = {name: torch.tensor(x).to(**place) for name, x in flight.conditions.arrays.items()}
        steps = _given(job.num_inference_steps, own.num_inference_steps)
        text = _given(job.guidance_scale, own.guidance_scale)
        image = _given(job.image_guidance_scale, own.image_guidance_scale)
        edit = self._denoiser.begin(
            EditConditions(**tensors),
            self._source(job),
            num_inference_steps=steps,
            guidance=Guidance(text, image),
            generator=torch.Generator().manual_seed(job.seed),
            image_branch_scale=_given(job.image_branch_scale, 1.0),
            scheduler=job.scheduler,
        )
        if flight.on_partial is not None:
            flight.partial_steps = partial_steps(len(edit.timesteps), job.partials)
        flight.preparing = time.perf_counter() - begun
        with self._changed:
            flight.edit = edit
            self._changed.notify()

    def _source(self, job: EditJob) -> Tensor:
        """The source image's latents (1, 4, h, w)."""
        key = content_key(job.pixels)
        known = self._sources.get(key)
        if known is None:
            image = Image.fromarray(job.pixels)
            resized = image.resize(self._pipeline.model_size(image), Image.Resampling.BICUBIC)
            known = self._pipeline.encode(to_pixels([resized]))
            self._sources.put(key, known)
        return known

    def _hand_out(self, flight: _Flight, number: int, latents: Tensor) -> None:
        if flight.on_partial is not None:
            flight.on_partial(number, self._image(flight, latents))

    def _finish(self, flight: _Flight) -> None:
        edit = flight.edit
        if edit is None or flight.begun is None or not flight.future.set_running_or_notify_cancel():
            return
        pixels = self._image(flight, edit.latents)
        result = Edited(
            pixels=pixels,
            seconds=flight.preparing + time.perf_counter() - flight.begun,
            steps=len(edit.timesteps),
            output_tokens=edit.latents.shape[-2] * edit.latents.shape[-1],
        )
        flight.future.set_result(result)

    def _image(self, flight: _Flight, latents: Tensor) -> Pixels:
        """Latents (1, 4, h, w) as an image of the source's size."""
        height, width = flight.job.pixels.shape[:2]
        decoded = self._pipeline.decode(latents).cpu()
        if not torch.isfinite(decoded).all():
            # As bytes, what is no number is black, and nobody would be told.
            raise ArithmeticError("the edit came to values that are not numbers; look at the version's weights")
        return np.asarray(as_images(decoded, [(width, height)])[0])

    # -- on either -------------------------------------------------------------------------------------------------

    @contextmanager
    def _watched(self, thread: str) -> Generator[None]:
        self._busy[thread] = time.monotonic()
        try:
            yield
        finally:
            self._busy.pop(thread)


def partial_steps(steps: int, partials: int) -> tuple[int, ...]:
    """The numbers of steps, from 1, behind which a partial image is due: spread evenly, none behind the last."""
    return tuple(sorted({(index + 1) * steps // (partials + 1) for index in range(partials)} - {0}))


def _fail(flight: _Flight, error: Exception) -> None:
    with suppress(InvalidStateError):  # It may be cancelled at this very moment.
        flight.future.set_exception(error)


def _size(flight: _Flight) -> torch.Size | None:
    return None if flight.edit is None else flight.edit.latents.shape


def _given(value: Value | None, otherwise: Value) -> Value:
    return otherwise if value is None else value


def _size_of_conditions(conditions: Conditions) -> int:
    return sum(array.nbytes for array in conditions.arrays.values())


def _count_tokens(pipeline: InsightEditPipeline, prompt: str) -> tuple[int, int]:
    """Positions of text and of image that the model reads for a prompt.

    Raises:
        ValueError: the prompt does not fit.
    """
    if pipeline.mllm is None:
        return len(pipeline.tokenizer(prompt).input_ids), 0
    row = pipeline.prompts.encode_text([prompt])
    ids = row["input_ids"][0, : int(row["mm_start"][0])]
    image_tokens = int((ids == getattr(pipeline.mllm.config, "image_token_id", -1)).sum())
    return len(ids) - image_tokens, image_tokens
