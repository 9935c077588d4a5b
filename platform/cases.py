"""A case of an evaluation: what is asked of an editor, with which noise, and what is known of how it should be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from insightedit.platform.judges import Truth


@dataclass(frozen=True, kw_only=True, slots=True)
class EditCase:
    """One edit to be judged: what is asked for, with which noise, and what would be right."""

    key: str
    scene: str
    """The source picture's; all instructions of a scene have the same."""
    task: str
    form: str = ""
    """The form of reasoning that the advanced instruction of this scene needs, where that is known."""
    wording: str = ""
    """`simple` or `advanced`; empty where the benchmark does not say."""
    held_out: tuple[str, ...] = ()
    """What of it no training scene has shown: `combination`, `wording`."""
    instruction: str
    seed: int
    """The noise's. All instructions of a scene have the same."""
    source: NDArray[np.uint8]
    target: NDArray[np.uint8] | None = None
    """None where the benchmark has none."""
    truth: Truth | None = None
    """What the exact judge needs to know; None where only a language model can judge."""
    region: NDArray[np.bool_] | None = None
    """(H, W), true where the edit belongs; None where nobody knows."""
    caption: str = ""
    """What the edited region should show; empty where nothing should, or nobody knows."""
