"""A stand-in endpoint that recognises scenes of shapes, and answers about them as a good model would.

To each question, before it answers, it misbehaves once as real ones do.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from stand_in_endpoint import Asked, Drop, Reaction, Say, Status

from insightedit.platform.datasets.shapes import Scene, description, render
from insightedit.platform.datasets.shapes_language import PLACES, describe, name

MISBEHAVIOUR: tuple[Reaction, ...] = (
    Status(429, {"retry-after-ms": "20"}),
    Drop(b'{"choices": [{"mess'),
    Status(503, {"retry-after": "0", "content-type": "text/html"}, b"<html><h1>Bad gateway</h1></html>"),
    Say("I am sorry, here is something else: [not JSON"),
    Say(None, finish_reason="length"),
    Status(500, {"retry-after-ms": "10"}),
)


class Knowing:
    """Answers about scenes."""

    def __init__(self, scenes: Sequence[Scene], refused: Scene | None = None, *, behaves: bool = False) -> None:
        self._scenes = {render(scene).tobytes(): scene for scene in scenes}
        self._refused = refused
        self._behaves = behaves
        self._tries = Counter[str]()
        self._lock = threading.Lock()
        self.kinds = Counter[str]()

    def __call__(self, asked: Asked) -> Reaction:
        with self._lock:
            tries = self._tries[asked.question]
            self._tries[asked.question] += 1
        if tries == 0 and not self._behaves:
            return MISBEHAVIOUR[int(asked.question[:8], 16) % len(MISBEHAVIOUR)]
        return self._answer(asked)

    def _answer(self, asked: Asked) -> Reaction:
        text, scene = asked.texts[0], self._shown(asked.pictures[0])
        kind = next((kind for mark, kind in _KINDS.items() if mark in text), "judge")
        self.kinds[kind] += 1
        if kind == "judge":
            return Say(
                json.dumps({aspect: {"explanation": f"Seen: {aspect}.", "score": 5} for aspect in _aspects(text)})
            )
        if kind == "instructions":
            return Say(f"```json\n{_instructions(text)}\n```")
        if scene is None or scene is self._refused:
            return Say(None, refusal="I do not look at such pictures.")
        if kind == "caption":
            return Say(f"The picture shows {description(scene)}.")
        if kind == "objects":
            return Say(_objects(scene), parts=True)
        return Say(_replacements(text))

    def _shown(self, picture: NDArray[np.uint8]) -> Scene | None:
        """The scene of a picture, which endpoints are shown enlarged."""
        side = picture.shape[0] // 32
        return self._scenes.get(np.ascontiguousarray(picture[side // 2 :: side, side // 2 :: side]).tobytes())


_KINDS = {
    "Answer with the description": "caption",
    '"objects":': "objects",
    '"replacements":': "replacements",
    '"instructions":': "instructions",
}


def _aspects(text: str) -> list[str]:
    return re.findall(r'^  "(\w+)": \{"explanation"', text, re.MULTILINE)


def _objects(scene: Scene) -> str:
    """With what models add: an article, a thing that is not there, a comma too many, and their thoughts."""
    rows = [
        {"name": f"the {name(shape, scene)}", "category": "Shape", "caption": f"It is the {describe(shape)}."}
        for shape in scene.shapes
    ]
    rows.append({"name": "yellow submarine", "category": "vehicle", "caption": "It floats by."})
    listed = json.dumps({"objects": rows})[:-2]
    return f'<think>{{"objects": []}} no, there are more</think> Here you are: {listed},]}}'


def _replacements(text: str) -> str:
    things = re.findall(r"^- ([^:]+):", text, re.MULTILINE)
    rows = [{"name": thing, "new_name": "golden bell", "new_caption": "A golden bell."} for thing in things]
    return json.dumps({"replacements": rows})


def _instructions(text: str) -> str:
    simple = text.partition("plain instruction for it is: ")[2].partition("\n")[0]
    verb = simple.split()[0]
    said = [
        {"about": "color", "text": f"{verb} what has the colour of its neighbours at the {PLACES[4]}"},
        {"about": "function", "text": f"{verb} what could serve as a toy"},
        {"about": "location", "text": simple},
    ]
    return json.dumps({"instructions": said[::-1]})
