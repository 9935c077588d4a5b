"""Denoising one step at a time, so that edits with settings of their own come and go between the steps of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from insightedit.model.guidance import EditConditions, Guidance
from insightedit.model.inference import Rows, UNetRunner
from insightedit.model.schedulers import make_scheduler
from insightedit.model.unet import InsightEditUNet


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortcuts:
    """Work that is left out for speed, at a cost in likeness. The defaults leave out nothing."""

    deep_every: int = 1
    """Every how many steps the UNet runs whole. In between its last layer runs alone, on the deep features of the last
    whole run, which change little from step to step (DeepCache)."""
    guide_every: int = 1
    """Every how many steps the guidance branches without the instruction run. In between the guidance adds what it
    added last."""


@dataclass(kw_only=True, slots=True)
class Denoising:
    """An edit in progress. `Denoiser.begin` makes it and `Denoiser.step` takes it further."""

    guidance: Guidance
    scheduler: Any
    """Of this edit alone."""
    extra: dict[str, Any]
    """Arguments that the scheduler's step takes."""
    rows: Rows
    first_row: Rows
    """Of `rows`: the instruction's, where the guidance has it."""
    latents: Tensor
    """(1, 4, h, w), after `index` steps; float32 whatever the UNet is in, as many steps add up in them."""
    index: int = 0
    predicted: Tensor | None = None
    """What the last step took the finished latents to be; None before the first."""
    deep: Tensor | None = None
    """The deep features of the last whole run, where shortcuts use them."""
    added: Tensor | None = None
    """What the guidance added to the instruction's branch when it last ran, where shortcuts use it."""

    @property
    def timesteps(self) -> Tensor:
        """The scheduler's."""
        return self.scheduler.timesteps

    @property
    def done(self) -> bool:
        """Whether every step is taken."""
        return self.index == len(self.timesteps)


class Denoiser:
    """Takes edits further, each by one step at a call."""

    def __init__(
        self, unet: InsightEditUNet, scheduler: Any, shortcuts: Shortcuts | None = None, *, compiled: bool = False
    ) -> None:
        """Make ready.

        Args:
            unet: may not change while edits are in progress.
            scheduler: the model's own, of which every edit gets one like it.
            shortcuts: what to leave out.
            compiled: run the UNet's blocks through torch.compile.
        """
        self._scheduler = scheduler
        self._shortcuts = shortcuts or Shortcuts()
        self._runner = UNetRunner(unet, compiled=compiled)
        self._joined: tuple[list[Rows], Rows] | None = None

    @property
    def unet(self) -> InsightEditUNet:
        """The UNet with its weights in the order that steps want."""
        return self._runner.unet

    @torch.no_grad()
    def begin(
        self,
        conditions: EditConditions,
        source: Tensor,
        *,
        num_inference_steps: int,
        guidance: Guidance,
        generator: torch.Generator | None,
        eta: float = 0.0,
        image_branch_scale: float = 1.0,
        scheduler: str | None = None,
        latents: Tensor | None = None,
    ) -> Denoising:
        """An edit before its first step.

        Args:
            conditions: of one edit.
            source: its source latents (1, 4, h, w).
            generator: of the edit's noise.
            scheduler: one of `schedulers.SCHEDULERS` in place of the model's own.
            latents: starting noise (1, 4, h, w) in place of the generator's.
        """
        own = make_scheduler(self._scheduler, scheduler)
        own.set_timesteps(num_inference_steps, device=source.device)
        noise = _noise(source, generator) if latents is None else latents.to(source.device, torch.float32)
        rows = self._runner.rows(conditions, source, guidance.branches, image_branch_scale)
        return Denoising(
            guidance=guidance,
            scheduler=own,
            extra=_step_arguments(own, eta, generator),
            rows=rows,
            first_row=rows.first(),
            latents=noise * own.init_noise_sigma,
        )

    @torch.no_grad()
    def step(self, edits: Sequence[Denoising]) -> None:
        """Take edits of one size one step further. None of them may be done.

        The edits share a run of the UNet as far as they need the same of it. An edit that is given alone gets the same
        bits at every call; shared runs differ from that by rounding.
        """
        runs: dict[bool, list[Denoising]] = {}
        for edit in edits:
            runs.setdefault(self._is_whole(edit), []).append(edit)
        outputs = [(edit, output) for whole, some in runs.items() for edit, output in self._run(some, whole=whole)]
        for edit, output in outputs:
            _advance(edit, output)

    def _is_whole(self, edit: Denoising) -> bool:
        return edit.deep is None or edit.index % self._shortcuts.deep_every == 0

    def _is_guided(self, edit: Denoising) -> bool:
        return edit.added is None or edit.index % self._shortcuts.guide_every == 0

    def _run(self, edits: Sequence[Denoising], *, whole: bool) -> list[tuple[Denoising, Tensor]]:
        """Guided outputs (1, 4, h, w) of edits that run whole, or of those that do not."""
        rows = [edit.rows if self._is_guided(edit) else edit.first_row for edit in edits]
        counts = [len(one.trunk_of_row) for one in rows]
        times = [edit.timesteps[edit.index] for edit in edits]
        scaled = [edit.scheduler.scale_model_input(edit.latents, time) for edit, time in zip(edits, times, strict=True)]
        deep = None if whole else torch.cat([_kept(edit)[:count] for edit, count in zip(edits, counts, strict=True)])
        shifts = torch.cat([self._runner.shifts(time) for time in times])
        joined = self._join(rows)
        output, deep = self._runner(torch.cat(scaled).to(joined.static.dtype), shifts, joined, deep)
        results: list[tuple[Denoising, Tensor]] = []
        for edit, own, features in zip(edits, output.split(counts), deep.split(counts), strict=True):
            if whole and self._shortcuts.deep_every > 1:
                edit.deep = features if len(features) == len(edit.rows.trunk_of_row) else _refreshed(edit, features)
            results.append((edit, self._guided(edit, own)))
        return results

    def _guided(self, edit: Denoising, output: Tensor) -> Tensor:
        """The guidance's sum in float32, of branches that have just run or have run before."""
        if edit.added is not None and not self._is_guided(edit):
            return output + edit.added
        total = edit.guidance.combine(output)
        if self._shortcuts.guide_every > 1 and edit.guidance.branches[0] == "text" and len(output) > 1:
            edit.added = total - output[:1]
        return total

    def _join(self, rows: list[Rows]) -> Rows:
        """Rows one below the other; those of the last step again while nobody joins or leaves."""
        if self._joined is None or len(self._joined[0]) != len(rows) or any(map(is_not, self._joined[0], rows)):
            self._joined = (rows, Rows.joined(rows))
        return self._joined[1]


def _kept(edit: Denoising) -> Tensor:
    assert edit.deep is not None  # noqa: S101  (a step that is not whole follows one that was)
    return edit.deep


def _refreshed(edit: Denoising, features: Tensor) -> Tensor:
    """The edit's deep features, with those of the rows that have run in their place."""
    return torch.cat([features, _kept(edit)[len(features) :]])


def _advance(edit: Denoising, output: Tensor) -> None:
    time = edit.timesteps[edit.index]
    result = edit.scheduler.step(output, time, edit.latents, **edit.extra)
    edit.latents = result.prev_sample
    edit.predicted = _predicted(edit.scheduler, result)
    edit.index += 1


def _predicted(scheduler: Any, result: Any) -> Tensor:
    """What a step takes the finished latents to be, or the step's result where the scheduler does not say."""
    for name in ("pred_original_sample", "denoised"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    # Multistep solvers work on such predictions, and keep their last ones.
    kept = getattr(scheduler, "model_outputs", None)
    predicts = scheduler.config.get("algorithm_type") == "dpmsolver++"
    return kept[-1] if kept and predicts else result.prev_sample


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise (1, 4, h, w), drawn in float32 on the generator's device so that a seed means the same everywhere."""
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def _step_arguments(scheduler: Any, eta: float, generator: torch.Generator | None) -> dict[str, Any]:
    """The arguments that this scheduler's step takes: eta for DDIM, a generator for ancestral ones."""
    names = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {}
    if "eta" in names:
        arguments["eta"] = eta
    if "generator" in names and generator is not None:
        arguments["generator"] = generator
    return arguments
