"""How near a construction comes to its slowest step: all steps at once beside each step alone, on the same pictures.

Words and scores come from an endpoint on loopback that takes its time over each answer, as a served model does; things
are removed by OpenCV. The endpoint knows the shapes world, whose pictures are taken, and always behaves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from figures import report, row

from insightedit.platform.cluster import connected
from insightedit.platform.config import load_preset
from insightedit.platform.construction.config import ConstructionConfig, StepName
from insightedit.platform.construction.pipeline import Construction, Progress, construct
from insightedit.platform.construction.sources import blocks_of, read_block
from insightedit.platform.construction.steps import make_step, step_names
from insightedit.platform.datasets.shapes import Scene

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from knowing_endpoint import Knowing
from stand_in_endpoint import Asked, Reaction, Say, Stall, StandIn

SKIPPED = 3
"""A third of the blocks is left out on both sides: while the last processes start, blocks pile up before them."""


def main() -> None:
    """Measure in turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=0.5, help="The endpoint takes for an answer.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    alone: list[dict[StepName, float]] = []
    together: list[float] = []
    hourly: list[float] = []
    starts: list[float] = []
    with StandIn(Slow(scenes(options.pictures), options.seconds)) as endpoint, connected():
        config = construction(endpoint.url, options.pictures)
        for _ in range(options.rounds):
            alone.append(each_alone(config))
            start, pace, pairs = all_at_once(config)
            starts.append(start)
            together.append(pace)
            hourly.append(pairs)
            print({"together": round(pace, 3), **{step: round(value, 3) for step, value in alone[-1].items()}})
    slowest = [max(one.values()) for one in alone]
    rows = [
        row("pairs an hour", "1/h", hourly),
        row("a picture, all steps at once", "s", together),
        row("a picture, its steps one after the other", "s", [sum(one.values()) for one in alone]),
        *(row(f"a picture, {step} alone", "s", [one[step] for one in alone]) for step in alone[0]),
        row("until the first block", "s", starts),
    ]
    # Of each round, whose two sides were measured one after the other.
    shares = row("", "", [bound / pace for bound, pace in zip(slowest, together, strict=True)])
    overlap = row("", "", [sum(one.values()) / pace for one, pace in zip(alone, together, strict=True)])
    report("construct", rows, {"vs_slowest_step": shares.value, "vs_sum_of_steps": overlap.value})


class Slow(Knowing):
    """An endpoint that behaves, and takes its time."""

    def __init__(self, known: list[Scene], seconds: float) -> None:
        super().__init__(known, behaves=True)
        self._seconds = seconds

    def __call__(self, asked: Asked) -> Reaction:
        began = time.perf_counter()
        answer = super().__call__(asked)
        assert isinstance(answer, Say)
        return Stall(max(self._seconds - (time.perf_counter() - began), 0), answer)


def construction(url: str, pictures: int) -> ConstructionConfig:
    """Shapes scenes with their masks; words and scores from an endpoint; removals only."""
    asked = f"{{endpoint: '{url}', model: slow, parallel: 8}}"
    options = f"{{kind: caption, split: train, count: {pictures}, seed: 0}}"
    settings = {
        "images": f"{{reader: shapes, options: {options}}}",
        "words": asked,
        "judge": asked,
        "removal": "{opencv: telea}",
        "replacement": "none",
        "sample": "1",
    }
    return load_preset("nano", [f"construction.{name}={value}" for name, value in settings.items()]).construction


def scenes(pictures: int) -> list[Scene]:
    """What the pictures show."""
    config = construction("http://127.0.0.1:1/v1", pictures)
    photos = [photo for block in blocks_of(config) for photo in read_block(config.images, block)]
    return [Scene.from_json(photo.truth) for photo in photos if photo.truth is not None]


def each_alone(config: ConstructionConfig) -> dict[StepName, float]:
    """Seconds a picture of each step, which does block after block while nothing else runs."""
    loads = [read_block(config.images, block) for block in blocks_of(config)]
    seconds: dict[StepName, float] = {}
    with tempfile.TemporaryDirectory() as answers:
        for name in step_names(config):
            step = make_step(name, config, Path(answers))
            before = len(loads) // SKIPPED
            for photos in loads[:before]:
                step.run([photo for photo in photos if not photo.out])
            began = time.perf_counter()
            for photos in loads[before:]:
                step.run([photo for photo in photos if not photo.out])
            seconds[name] = (time.perf_counter() - began) / sum(map(len, loads[before:]))
    return seconds


def all_at_once(config: ConstructionConfig) -> tuple[float, float, float]:
    """Seconds until the first block is through, seconds a picture after the start, and pairs an hour at that pace."""
    with tempfile.TemporaryDirectory() as folder:
        work = Construction(config, Path(folder) / "out", Path(folder) / "answers")
        began = time.perf_counter()
        times: list[tuple[float, Progress]] = [(time.perf_counter(), at) for at in construct(work)][1:]
    (first, before), (last, after) = times[len(times) // SKIPPED - 1], times[-1]
    pace = (last - first) / (after.photos - before.photos)
    return times[0][0] - began, pace, (after.pairs - before.pairs) / (last - first) * 3600


if __name__ == "__main__":
    main()
