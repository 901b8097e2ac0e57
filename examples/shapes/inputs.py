"""The input pictures of the demo, and what its examples should show.

`python -m examples.shapes.inputs` draws the pictures into the package.
"""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from omnigen_fast.page.demo import INPUTS

from .scenes import PLACES, Scene, Thing, render
from .tasks import mask_of

TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = range(len(PLACES))
_CIRCLE = Thing("circle", "pink", "small", TOP_RIGHT)
_TRIANGLE = Thing("triangle", "green", "large", BOTTOM_LEFT)
_STAR = Thing("star", "red", "large", BOTTOM_RIGHT)
_SQUARE = Thing("square", "pink", "large", TOP_LEFT)
SCENES = {
    "circle-triangle": Scene((_CIRCLE, _TRIANGLE), "gray"),
    "star": Scene((_STAR,), "black"),
    "yellow-star": Scene((replace(_STAR, colour="yellow"),), "black"),
    "square": Scene((_SQUARE,), "meadow"),
    "checkered": Scene((replace(_TRIANGLE, colour="blue"),), "checkered"),
}
# What the right answer to each of `demo.EXAMPLES` shows, in their order.
TARGETS = (
    Scene(
        (
            Thing("triangle", "blue", "large", TOP_LEFT),
            Thing("star", "red", "small", BOTTOM_RIGHT),
        ),
        "meadow",
    ),
    # without a place, it takes the first: tasks.places_of
    Scene((Thing("star", "red", "large", TOP_LEFT),), "black"),
    Scene((_CIRCLE, replace(_TRIANGLE, colour="purple")), "gray"),
    Scene((_TRIANGLE,), "gray"),
    Scene((_STAR, Thing("square", "blue", "small", TOP_LEFT)), "black"),
    Scene((replace(_STAR, place=TOP_RIGHT),), "black"),
    Scene((_SQUARE,), "striped"),
    Scene(
        (replace(_STAR, place=TOP_LEFT), Thing("circle", "green", "small", BOTTOM_RIGHT)), "meadow"
    ),
    Scene((_STAR,), "checkered"),
    mask_of(_TRIANGLE),
    Scene((replace(_SQUARE, colour="yellow"),), "meadow"),
)


def main() -> None:
    INPUTS.mkdir(parents=True, exist_ok=True)
    for name, scene in SCENES.items():
        Image.fromarray(render(scene)).save(INPUTS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
