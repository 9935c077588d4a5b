"""The shapes world: coloured shapes on textured grounds whose truth is known to the pixel.

A scene is a ground and two to four shapes, each in a cell of its own on a 3 by 3 grid, exactly at the cell's centre.
Nothing is jittered, so a scene description determines every pixel, and an edit of the description determines the
edited picture. Shapes are drawn from coverage masks (the share of a pixel a shape covers, by supersampling).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final, Literal, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["circle", "ring", "square", "triangle", "star", "cross", "diamond", "heart"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "white"]
Size = Literal["small", "large"]
Texture = Literal["plain", "rows", "columns", "checker", "gradient"]
Split = Literal["train", "validation", "test"]
Rgb = tuple[int, int, int]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
COLOURS: Final[tuple[Colour, ...]] = get_args(Colour)
SIZES: Final[tuple[Size, ...]] = get_args(Size)
TEXTURES: Final[tuple[Texture, ...]] = get_args(Texture)
SPLITS: Final[tuple[Split, ...]] = get_args(Split)

CANVAS: Final = 32
"""Side of the picture in pixels."""
CENTRES: Final = (6, 16, 26)
"""Centres of the three rows and of the three columns of cells, in pixels from the top left edge."""
CORNER_CELLS: Final = (0, 2, 6, 8)
"""Cells count from the top left, row by row: cell = 3 * row + column."""
MIDDLE_CELL: Final = 4
RADIUS: Final[dict[Size, float]] = {"small": 3.3, "large": 4.9}
"""Half the width of a shape in pixels; cells are ten pixels apart, so shapes never touch."""
RGB: Final[dict[Colour, Rgb]] = {
    "red": (225, 30, 40),
    "orange": (250, 130, 10),
    "yellow": (250, 230, 40),
    "green": (40, 185, 60),
    "blue": (40, 90, 250),
    "purple": (140, 40, 200),
    "pink": (255, 140, 200),
    "white": (250, 250, 250),
}
TONES: Final[tuple[tuple[Rgb, Rgb], ...]] = (
    ((58, 58, 62), (80, 80, 84)),
    ((96, 96, 96), (118, 118, 118)),
    ((44, 56, 72), (62, 76, 94)),
    ((82, 70, 58), (104, 90, 76)),
    ((58, 74, 62), (76, 94, 80)),
    ((72, 58, 76), (92, 76, 98)),
    ((40, 72, 76), (58, 92, 96)),
    ((98, 84, 84), (120, 104, 104)),
)
"""Two muted tones for a ground: dark enough for every colour of shape to stand out."""
HELD_OUT_COMBINATIONS: Final[frozenset[tuple[Colour, Kind]]] = frozenset(
    {("red", "star"), ("green", "circle"), ("blue", "heart"), ("yellow", "square")}
)
"""Pairs of colour and kind that no train or validation scene holds."""
HELD_OUT_SHARE: Final = 0.2
"""Share of the test scenes that hold one of them."""

_BAND = 4  # width of a stripe and of a checker's field: one latent pixel of a factor-4 autoencoder
_SUPERSAMPLING = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape; `cell` is 0 to 8, row by row from the top left."""

    kind: Kind
    colour: Colour
    size: Size
    cell: int

    @property
    def row(self) -> int:
        """Row of the cell, 0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Column of the cell, 0 at the left."""
        return self.cell % 3


@dataclass(frozen=True, slots=True)
class Ground:
    """What lies behind the shapes: a texture of two tones (a plain ground shows the first)."""

    texture: Texture
    colours: tuple[Rgb, Rgb]


@dataclass(frozen=True, slots=True)
class Scene:
    """A ground and shapes in cells of their own. Shapes are kept in the order of their cells."""

    ground: Ground
    shapes: tuple[Shape, ...]

    def __post_init__(self) -> None:
        """Order the shapes.

        Raises:
            ValueError: Two shapes share a cell, or a cell does not exist.
        """
        cells = [shape.cell for shape in self.shapes]
        if len(set(cells)) != len(cells) or not all(0 <= cell <= 8 for cell in cells):
            raise ValueError(f"shapes must lie in different cells 0 to 8, not in {cells}")
        object.__setattr__(self, "shapes", tuple(sorted(self.shapes, key=_cell_of)))

    def fingerprint(self) -> str:
        """Return the sha256 of the scene's canonical description."""
        shapes = ";".join(f"{s.cell},{s.kind},{s.colour},{s.size}" for s in self.shapes)
        text = f"{self.ground.texture}|{self.ground.colours}|{shapes}"
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, object]:
        """Return the scene as plain JSON values."""
        shapes = [{"kind": s.kind, "colour": s.colour, "size": s.size, "cell": s.cell} for s in self.shapes]
        return {
            "ground": {"texture": self.ground.texture, "colours": [list(tone) for tone in self.ground.colours]},
            "shapes": shapes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Scene:
        """Build the scene that `to_json` described."""
        ground = cast(dict[str, object], value["ground"])
        first, second = cast(list[list[int]], ground["colours"])
        shapes = cast(list[dict[str, object]], value["shapes"])
        return cls(
            Ground(cast(Texture, ground["texture"]), (_rgb(first), _rgb(second))),
            tuple(
                Shape(
                    cast(Kind, s["kind"]), cast(Colour, s["colour"]), cast(Size, s["size"]), int(cast(int, s["cell"]))
                )
                for s in shapes
            ),
        )


def _cell_of(shape: Shape) -> int:
    return shape.cell


def _rgb(values: list[int]) -> Rgb:
    red, green, blue = values
    return red, green, blue


# Drawing ------------------------------------------------------------------------------------------------------------


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene.

    Returns:
        Pixels (32, 32, 3), uint8 RGB.
    """
    picture = _ground_pixels(scene.ground).copy()
    for shape in scene.shapes:
        rows, columns, share = _patch(shape.kind, shape.size, shape.cell)
        under = picture[rows, columns]
        picture[rows, columns] = under + share * (np.asarray(RGB[shape.colour], np.float32) - under)
    return np.rint(picture).astype(np.uint8)


def shape_masks(scene: Scene) -> list[NDArray[np.bool_]]:
    """Return for each shape, in order, the pixels that it covers at least in part: bool (32, 32)."""
    return [coverage(shape.kind, shape.size, shape.cell) > 0 for shape in scene.shapes]


@cache
def coverage(kind: Kind, size: Size, cell: int) -> NDArray[np.float32]:
    """Return the share of each pixel that a shape covers: float32 (32, 32) in [0, 1]."""
    ticks = (np.arange(CANVAS * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    x = (ticks[None, :] - CENTRES[cell % 3]) / RADIUS[size]
    y = (ticks[:, None] - CENTRES[cell // 3]) / RADIUS[size]
    inside = np.broadcast_to(_INSIDE[kind](x, y), (ticks.size, ticks.size))
    blocks = inside.reshape(CANVAS, _SUPERSAMPLING, CANVAS, _SUPERSAMPLING)
    share = blocks.mean(axis=(1, 3), dtype=np.float32)
    share.setflags(write=False)
    return share


@cache
def _patch(kind: Kind, size: Size, cell: int) -> tuple[slice, slice, NDArray[np.float32]]:
    """Cut the part of a coverage mask that is not empty: rows, columns, (h, w, 1)."""
    share = coverage(kind, size, cell)
    rows, columns = np.flatnonzero(share.any(axis=1)), np.flatnonzero(share.any(axis=0))
    down, right = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return down, right, share[down, right, None]


@lru_cache(maxsize=256)
def _ground_pixels(ground: Ground) -> NDArray[np.float32]:
    """Draw a ground: float32 (32, 32, 3) in 0 to 255."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS]
    mix = {
        "plain": np.zeros((CANVAS, CANVAS)),
        "rows": y // _BAND % 2,
        "columns": x // _BAND % 2,
        "checker": (x // _BAND + y // _BAND) % 2,
        "gradient": y / (CANVAS - 1),
    }[ground.texture][..., None]
    first, second = (np.asarray(tone, np.float32) for tone in ground.colours)
    pixels = (first + mix * (second - first)).astype(np.float32)
    pixels.setflags(write=False)
    return pixels


_Inside = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]


def _circle(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    return x**2 + y**2 <= 1


def _ring(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    square = x**2 + y**2
    return (square <= 1) & (square >= 0.5**2)


def _square(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.maximum(np.abs(x), np.abs(y)) <= 0.86


def _triangle(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (y <= 0.85) & (np.abs(x) <= (y + 1) / 1.85)


def _star(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Five points, one upwards: inside when at most one of the pentagram's five lines is crossed."""
    distance = math.cos(2 * math.pi / 5)  # of each line from the centre, for points on the unit circle
    crossed = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.int64)
    for line in range(5):
        angle = -math.pi / 2 + line * 2 * math.pi / 5
        crossed += x * math.cos(angle) + y * math.sin(angle) > distance
    return crossed <= 1


def _cross(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return (across <= 0.34) & (along <= 1)


def _diamond(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.abs(x) + np.abs(y) <= 1.02


def _heart(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Two round lobes over a triangle."""
    lobes = (np.abs(x) - 0.48) ** 2 + (y + 0.38) ** 2 <= 0.52**2
    tip = (y >= -0.38) & (np.abs(x) <= 0.98 * (0.98 - y) / 1.25)
    return lobes | (tip & (np.abs(x) <= 1))


_INSIDE: Final[dict[Kind, _Inside]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
}
"""Whether a point lies in a shape of radius 1 around the origin; y grows downwards."""


# Sampling -----------------------------------------------------------------------------------------------------------


def split_of(scene: Scene) -> Split:
    """Return the only split that may hold a scene: three fifths of all scenes train, a fifth each for the others.

    A scene with a held-out combination of colour and kind belongs to the test.
    """
    if has_held_out_combination(scene):
        return "test"
    draw = int(scene.fingerprint()[:8], 16) % 5
    return "train" if draw < 3 else "validation" if draw == 3 else "test"


def has_held_out_combination(scene: Scene) -> bool:
    """Tell whether a shape has one of `HELD_OUT_COMBINATIONS`."""
    return any((shape.colour, shape.kind) in HELD_OUT_COMBINATIONS for shape in scene.shapes)


def is_regular(scene: Scene) -> bool:
    """Tell whether a scene is one that the world shows: two to four shapes, not all four corners taken at once.

    The latter keeps every caption within a text encoder's 24 tokens.
    """
    corners = sum(shape.cell in CORNER_CELLS for shape in scene.shapes)
    return 2 <= len(scene.shapes) <= 4 and corners < 4


def sample_scene(rng: random.Random, split: Split) -> Scene:
    """Draw a scene of a split."""
    held_out = split == "test" and rng.random() < HELD_OUT_SHARE
    while True:
        scene = draw_scene(rng, held_out=held_out)
        if split_of(scene) == split:
            return scene


def draw_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draw a regular scene of any split, with or without a held-out combination."""
    while True:
        cells = rng.sample(range(9), rng.choices((2, 3, 4), (2, 5, 3))[0])
        colours: list[Colour] = _draw_alike(rng, COLOURS, len(cells))
        kinds: list[Kind] = _draw_alike(rng, KINDS, len(cells))
        if held_out:
            colours[0], kinds[0] = rng.choice(sorted(HELD_OUT_COMBINATIONS))
        shapes = tuple(
            Shape(kind, colour, "small" if rng.random() < 0.4 else "large", cell)
            for kind, colour, cell in zip(kinds, colours, cells, strict=True)
        )
        scene = Scene(draw_ground(rng), shapes)
        if is_regular(scene) and has_held_out_combination(scene) == held_out:
            return scene


def draw_ground(rng: random.Random) -> Ground:
    """Draw a ground."""
    texture, (first, second) = rng.choice(TEXTURES), rng.choice(TONES)
    return Ground(texture, (first, first if texture == "plain" else second))


_Value = TypeVar("_Value")


def _draw_alike(rng: random.Random, values: tuple[_Value, ...], count: int) -> list[_Value]:
    """Draw values, each with a chance of one in five the same as the first: likeness is worth talking about."""
    first = rng.choice(values)
    return [first] + [first if rng.random() < 0.2 else rng.choice(values) for _ in range(count - 1)]
