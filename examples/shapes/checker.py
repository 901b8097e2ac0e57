"""Reads a picture: which shapes, in which colours and sizes, where, on which background.

It knows how scenes are drawn, and nothing of what was asked. Of a picture that shows something
else it says what comes nearest, so it is to be trusted only with pictures of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from operator import attrgetter

import numpy as np

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    MASK_COLOUR,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    Thing,
    background,
    coverage,
    place_centre,
)
from .tasks import Stated

_DIFFERENT = 60.0  # distance in RGB from which a pixel does not belong to the background
_SPECK = 30  # pixels; smaller spots are no shapes
_PALETTE = {**COLOURS, MASK_COLOUR: (250, 250, 250)}


@dataclass(frozen=True)
class Seen:
    """A shape that was found."""

    shape: str
    colour: str
    size: str
    place: int


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    things: tuple[Seen, ...]
    background: str


@dataclass(frozen=True)
class Score:
    """Attributes that were asked for, and of them those that the picture has.

    Of every thing shape, colour, place and, where it was stated, size; the background; and the
    number of things. A thing that is missing loses all of its attributes.
    """

    right: int
    asked: int

    @property
    def all_right(self) -> bool:
        return self.right == self.asked

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.asked + other.asked)


def read(pixels: np.ndarray) -> Reading:
    """Reads a picture, [SIDE, SIDE, 3] uint8."""
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"pictures are {SIDE} x {SIDE} x 3, got {pixels.shape}")
    picture = pixels.astype(np.float32)
    distances = {name: np.linalg.norm(picture - background(name), axis=2) for name in BACKGROUNDS}
    # things cover less than half of a picture, so the background is what most pixels are near to
    ground = min(BACKGROUNDS, key=lambda name: np.minimum(distances[name], _DIFFERENT).mean())
    spots = _spots(distances[ground] > _DIFFERENT)
    things = tuple(_read_thing(picture, spot) for spot in spots)
    return Reading(things, ground)


def score(
    reading: Reading,
    target: Scene,
    sizes: bool = True,
    *,
    stated: Sequence[Stated] | None = None,
    background: bool = True,
) -> Score:
    """Compares with what was asked for.

    Things are matched with those seen in the way that agrees best.

    Args:
        reading: what the picture shows.
        target: what was asked for.
        sizes: whether sizes were stated.
        stated: of each thing of `target`, what was stated; None is all (but see `sizes`).
        background: whether one was stated.
    """
    wanted, seen = target.things, reading.things
    attributes = [_attributes(one) for one in stated or [Stated(size=sizes)] * len(wanted)]
    best = 0
    for order in permutations(range(max(len(seen), len(wanted))), len(wanted)):
        right = sum(
            value(thing) == value(seen[index])
            for thing, index, asked in zip(wanted, order, attributes)
            if index < len(seen)
            for value in asked
        )
        best = max(best, right)
    best += background and reading.background == target.background
    best += len(seen) == len(wanted)
    return Score(best, sum(map(len, attributes)) + background + 1)


def _attributes(stated: Stated) -> list[Callable[[Thing | Seen], object]]:
    """What reads the attributes that are stated."""
    found: list[Callable[[Thing | Seen], object]] = [attrgetter("shape")]
    if stated.colour:
        found.append(attrgetter("colour"))
    if stated.size:
        found.append(attrgetter("size"))
    if stated.place:
        found.append(_PARTS[stated.place])
    return found


_PARTS: dict[str, Callable[[Thing | Seen], object]] = {
    "both": attrgetter("place"),
    "row": lambda thing: thing.place // 2,
    "column": lambda thing: thing.place % 2,
}


def _read_thing(picture: np.ndarray, spot: np.ndarray) -> Seen:
    rows, columns = np.nonzero(spot)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    x, y = (left + right) / 2, (top + bottom) / 2
    colour = np.median(picture[_inside(spot)], axis=0)
    centres = [np.array(place_centre(place)) for place in range(len(PLACES))]
    size, shape = max(
        ((size, shape) for size in SIZES for shape in SHAPES),
        key=lambda one: _agreement(spot, one[1], x, y, SIZES[one[0]]),
    )
    return Seen(
        shape=shape,
        colour=min(_PALETTE, key=lambda name: np.linalg.norm(colour - _PALETTE[name])),
        size=size,
        place=int(np.argmin([np.linalg.norm(centre - (x, y)) for centre in centres])),
    )


def _agreement(spot: np.ndarray, shape: str, x: float, y: float, radius: int) -> float:
    """Intersection over union with a shape drawn where the spot is; the best of nearby places."""
    best = 0.0
    for down in (-2, -1, 0, 1, 2):
        drawn = coverage(shape, x, y + down, radius) > 0.5
        best = max(best, (drawn & spot).sum() / (drawn | spot).sum())
    return best


def _inside(spot: np.ndarray) -> np.ndarray:
    """The spot without its edge, where colours mix; all of it if nothing would be left."""
    inner = spot.copy()
    inner[1:] &= spot[:-1]
    inner[:-1] &= spot[1:]
    inner[:, 1:] &= spot[:, :-1]
    inner[:, :-1] &= spot[:, 1:]
    return inner if inner.sum() >= 10 else spot


def _spots(mask: np.ndarray, most: int = 4) -> list[np.ndarray]:
    """Connected regions, neighbours along rows and columns, the largest `most` of them."""
    left = mask.copy()
    found = []
    while left.any():
        start = np.unravel_index(np.argmax(left), left.shape)
        left[start] = False
        stack, members = [start], []
        while stack:
            row, column = stack.pop()
            members.append((row, column))
            for near in (
                (row - 1, column),
                (row + 1, column),
                (row, column - 1),
                (row, column + 1),
            ):
                if 0 <= near[0] < SIDE and 0 <= near[1] < SIDE and left[near]:
                    left[near] = False
                    stack.append(near)
        if len(members) >= _SPECK:
            spot = np.zeros_like(mask)
            spot[tuple(np.array(members).T)] = True
            found.append(spot)
    return sorted(found, key=np.sum, reverse=True)[:most]
