"""Scenes: what stands in a picture, and the picture of it."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

SIDE = 128  # pixels of a picture
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (215, 25, 30),
    "yellow": (245, 225, 30),
    "green": (20, 145, 50),
    "blue": (25, 70, 220),
    "purple": (125, 35, 165),
    "pink": (250, 125, 190),
}
MASK_COLOUR = "white"  # of a shape in a mask
SIZES = {"small": 18, "large": 27}  # half the height of a shape, in pixels
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "gray", "black", "striped", "checkered", "meadow")
# Pixels between neighbouring places: two large shapes leave a gap, and a whole number of the
# transformer's patches, so that a shape's tokens are the same wherever it stands.
_SPACING = 64

# Combinations that no picture of the training shows, one for each shape.
HELD_OUT = frozenset(
    [
        ("circle", "purple"),
        ("square", "red"),
        ("triangle", "yellow"),
        ("star", "blue"),
    ]
)
TRAINED = frozenset((s, c) for s in SHAPES for c in COLOURS) - HELD_OUT
ALL = TRAINED | HELD_OUT


@dataclass(frozen=True)
class Thing:
    """A shape with its attributes."""

    shape: str
    colour: str
    size: str
    place: int  # index in PLACES


@dataclass(frozen=True)
class Scene:
    """A background with up to two things."""

    things: tuple[Thing, ...]
    background: str


def place_centre(place: int) -> tuple[float, float]:
    """(x, y) of a place in pixels."""
    row, column = divmod(place, 2)
    return SIDE / 2 + (column - 0.5) * _SPACING, SIDE / 2 + (row - 0.5) * _SPACING


def random_thing(
    rng: random.Random,
    pairs: Collection[tuple[str, str]] = TRAINED,
    besides: Collection[Thing] = (),
) -> Thing:
    """A thing of one of the (shape, colour) `pairs`.

    It differs in shape, colour and place from those `besides`, so that either names it alone.
    """
    shapes = {thing.shape for thing in besides}
    colours = {thing.colour for thing in besides}
    places = {thing.place for thing in besides}
    shape, colour = rng.choice(
        sorted(pair for pair in pairs if pair[0] not in shapes and pair[1] not in colours)
    )
    return Thing(
        shape,
        colour,
        rng.choice(list(SIZES)),
        rng.choice([place for place in range(len(PLACES)) if place not in places]),
    )


def random_scene(
    rng: random.Random, count: int, pairs: Collection[tuple[str, str]] = TRAINED
) -> Scene:
    """A scene of `count` things of the given (shape, colour) pairs."""
    things: list[Thing] = []
    for _ in range(count):
        things.append(random_thing(rng, pairs, things))
    return Scene(tuple(things), rng.choice(BACKGROUNDS))


def render(scene: Scene) -> np.ndarray:  # [SIDE, SIDE, 3], uint8
    """Draws a scene with smooth edges."""
    pixels = background(scene.background).copy()
    for thing in scene.things:
        colour = (250, 250, 250) if thing.colour == MASK_COLOUR else COLOURS[thing.colour]
        alpha = coverage(thing.shape, *place_centre(thing.place), SIZES[thing.size])[..., None]
        pixels += alpha * (np.array(colour, np.float32) - pixels)
    return np.rint(pixels).astype(np.uint8)


def background(name: str) -> np.ndarray:  # [SIDE, SIDE, 3], float32
    """The picture of an empty scene."""
    return _BACKGROUNDS[name]


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:  # [SIDE, SIDE], float32
    """How much of each pixel a shape at (x, y) covers, 0 to 1."""
    across = np.arange(SIDE, dtype=np.float32) + 0.5
    distance = _distance(shape, across[None, :] - x, across[:, None] - y, radius)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to a shape's edge, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * radius
    if shape == "triangle":  # its tip at the top; sides lean by 1 : 2
        sides = (abs(x) * 2 - (y + radius)) / 5**0.5
        return np.maximum(sides, y - 0.9 * radius)
    # star: the five points fold onto one half of one of them
    sector = np.pi / 5
    angle = np.arctan2(x, -y)
    folded = abs((angle + sector) % (2 * sector) - sector)
    distance = np.hypot(x, y)
    along, aside = distance * np.cos(folded), distance * np.sin(folded)
    tip = np.array([radius * 1.1, 0.0])
    notch = radius * 0.48 * np.array([np.cos(sector), np.sin(sector)])
    edge = (notch - tip) / np.hypot(*(notch - tip))
    return (along - tip[0]) * edge[1] - (aside - tip[1]) * edge[0]


def _draw_backgrounds() -> dict[str, np.ndarray]:
    rows, columns = np.mgrid[:SIDE, :SIDE]

    def two(where: np.ndarray, first: tuple[int, ...], second: tuple[int, ...]) -> np.ndarray:
        return np.where(where[..., None], np.float32(first), np.float32(second))

    everywhere = np.ones((SIDE, SIDE), bool)
    return {
        "white": two(everywhere, (248, 248, 248), (0, 0, 0)),
        "gray": two(everywhere, (140, 140, 140), (0, 0, 0)),
        "black": two(everywhere, (15, 15, 15), (0, 0, 0)),
        "striped": two(rows // 16 % 2 == 0, (225, 215, 190), (185, 195, 215)),
        "checkered": two((rows // 16 + columns // 16) % 2 == 0, (235, 235, 235), (185, 185, 185)),
        "meadow": two(rows < SIDE // 2, (175, 215, 245), (180, 215, 150)),
    }


_BACKGROUNDS = _draw_backgrounds()
