"""The ways to denoise that an edit may choose by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

SCHEDULERS: Mapping[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


def make_scheduler(own: Any, name: str | None = None) -> Any:
    """A scheduler for one edit: it counts its steps, so that no two edits may share one.

    Args:
        own: the model's own, which knows how the model was trained: its noise and what it predicts.
        name: one of `SCHEDULERS`; None for the model's own way.

    Raises:
        ValueError: there is no such scheduler.
    """
    if name is None:
        return type(own).from_config(own.config)
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler is {name!r}; use one of {', '.join(SCHEDULERS)}.")
    # Some schedulers clip unless they are told not to; that is for pixels, and latents are larger.
    return SCHEDULERS[name].from_config({"clip_sample": False, **own.config})
