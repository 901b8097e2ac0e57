"""Prompts as people write them, none of which training can have made, and what they state.

`evaluate` draws them, with several seeds each, and has the checker read what they state: what a
prompt leaves out may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from omnigen_fast import OmniGenPipeline

from . import checker
from .checker import Score
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, Scene, Thing, render
from .tasks import Stated

SEEDS = 5
RIGHT, WHOLE = 0.92, 0.80  # of stated attributes and of pictures: how many a model has to get right
_BATCH = 10
_PLACES = {"tl": 0, "tr": 1, "bl": 2, "br": 3}
_SIDES = {"top": ("row", 0), "bottom": ("row", 2), "left": ("column", 0), "right": ("column", 1)}
_TAG = "<img><|image_1|></img>"


@dataclass(frozen=True)
class Wording:
    """A prompt and what it states. Attributes of `target` that it leaves out are arbitrary."""

    prompt: str
    before: Scene | None
    target: Scene
    stated: tuple[Stated, ...]  # of each thing of the target
    background_stated: bool


def _thing(words: str) -> tuple[Thing, Stated]:
    """Of words such as "large red star tl"; a side stands for half of a place."""
    found = words.split()
    (shape,) = [word for word in found if word in SHAPES]
    colour = [word for word in found if word in COLOURS]
    size = [word for word in found if word in SIZES]
    corner = [_PLACES[word] for word in found if word in _PLACES]
    side = [_SIDES[word] for word in found if word in _SIDES]
    part, place = ("both", corner[0]) if corner else side[0] if side else ("", 0)
    assert len(colour + size + corner + side) + 1 == len(found), words
    stated = Stated(bool(size), bool(colour), part)
    return Thing(shape, (colour or ["red"])[0], (size or ["small"])[0], place), stated


def _scene(things: Sequence[str], background: str) -> Scene:
    found: list[Thing] = []
    for words in things:
        thing, stated = _thing(words)
        if not stated.place:  # any that is free
            taken = {one.place for one in found}
            thing = replace(thing, place=min({0, 1, 2, 3} - taken))
        found.append(thing)
    return Scene(tuple(found), background)


def _asked(prompt: str, *things: str, on: str = "") -> Wording:
    assert not on or on in BACKGROUNDS
    stated = tuple(_thing(words)[1] for words in things)
    return Wording(prompt, None, _scene(things, on or "white"), stated, bool(on))


def _edited(prompt: str, before: Sequence[str], on: str, *after: str, then: str = "") -> Wording:
    """Of a picture of things on a background; `then` is another one."""
    stated = tuple(_thing(words)[1] for words in after)
    target = _scene(after, then or on)
    return Wording(f"{_TAG} {prompt}", _scene(before, on), target, stated, True)


TEXT = (
    _asked("A blue triangle would be great.", "blue triangle"),
    _asked("A star please, yellow, and not small but large.", "large yellow star"),
    _asked("Could I see a tiny green circle on a white page?", "small green circle", on="white"),
    _asked("My son wants a huge red circle on grass", "large red circle", on="meadow"),
    _asked("Up in the top left goes a box in blue", "blue square tl"),
    _asked("Star. Red. Big. On white.", "large red star", on="white"),
    _asked("black, and in it one large yellow circle", "large yellow circle", on="black"),
    _asked("Let's have a violet triangle over grey", "purple triangle", on="gray"),
    _asked("I am thinking of a pink star on checks.", "pink star", on="checkered"),
    _asked("It is a large green square. Top right. Meadow.", "large green square tr", on="meadow"),
    _asked("Please, one small pink star, nothing more", "small pink star"),
    _asked("Large circle, coloured pink, upper left, meadow", "large pink circle tl", on="meadow"),
    _asked(
        "Show a green disc, make it small, and put it in the lower left.", "small green circle bl"
    ),
    _asked(
        "a background that is black, and on it a pink star of large size",
        "large pink star",
        on="black",
    ),
    _asked(
        "I would love a small pink triangle against checks", "small pink triangle", on="checkered"
    ),
    _asked(
        "Where it says background, use stripes; the shape is a big blue box",
        "large blue square",
        on="striped",
    ),
    _asked("a yellow square (large), bottom left please", "large yellow square bl"),
    _asked(
        "Paint stripes and then, over them, a large pink disc.", "large pink circle", on="striped"
    ),
    _asked("the star is green, it is at the bottom right, on black", "green star br", on="black"),
    _asked("something simple: a red triangle, white background", "red triangle", on="white"),
    _asked("we would like a purple box, and make it tiny", "small purple square"),
    _asked("Can there be a yellow star at the top?", "yellow star top"),
    _asked(
        "For my daughter: a pink circle on the left, on a lawn", "pink circle left", on="meadow"
    ),
    _asked("gray with a blue circle at the lower right", "blue circle br", on="gray"),
    _asked(
        "I am thinking of a big yellow star and a small pink square, all on black",
        *("large yellow star", "small pink square"),
        on="black",
    ),
    _asked(
        "big red star, small blue circle, gray", "large red star", "small blue circle", on="gray"
    ),
    _asked(
        "a circle and a star. The circle is green, the star is yellow.",
        "green circle",
        "yellow star",
    ),
    _asked(
        "Two shapes please: the first is a green square, the second is a pink triangle.",
        *("green square", "pink triangle"),
    ),
    _asked(
        "A picture where a small yellow circle is in the bottom right corner and a big purple star "
        "is in the top left one",
        *("small yellow circle br", "large purple star tl"),
    ),
    _asked(
        "Top right: small star, pink. Bottom left: large square, green. Striped.",
        *("small pink star tr", "large green square bl"),
        on="striped",
    ),
    _asked(
        "There are two things here: a big blue circle and a little red triangle, white behind them",
        *("large blue circle", "small red triangle"),
        on="white",
    ),
    _asked(
        "In the picture a big green box is at the left and a small yellow star at the right.",
        *("large green square left", "small yellow star right"),
    ),
    _asked("I need both a red star and a blue square!", "red star", "blue square"),
    _asked(
        "On stripes, please: a purple triangle in the upper right plus a green circle bottom left",
        *("purple triangle tr", "green circle bl"),
        on="striped",
    ),
    _asked(
        "meadow scene, pink star in the top left corner, blue box in the bottom right corner",
        *("pink star tl", "blue square br"),
        on="meadow",
    ),
    _asked(
        "Would you paint me one green triangle with one red circle?", "green triangle", "red circle"
    ),
    _asked(
        "A small square, it is purple, and a large circle, it is yellow, on gray",
        *("small purple square", "large yellow circle"),
        on="gray",
    ),
    _asked(
        "Can I get a checkered one with a yellow disc and a red star?",
        "yellow circle",
        "red star",
        on="checkered",
    ),
)

_ONE = ("large blue circle tl",)
_STAR = ("small yellow star br",)
_PAIR = ("small green circle tr", "large red triangle bl")
_BOXES = ("large pink square tl", "small blue triangle br")
EDITS = (
    _edited("Could the circle be green?", _ONE, "white", "large green circle tl"),
    _edited("I think the star would look better in pink.", _STAR, "black", "small pink star br"),
    _edited(
        "The triangle has to be blue, please.",
        _PAIR,
        "gray",
        "small green circle tr",
        "large blue triangle bl",
    ),
    _edited(
        "Please let the square turn green",
        _BOXES,
        "striped",
        "large green square tl",
        "small blue triangle br",
    ),
    _edited("its colour: red", _STAR, "white", "small red star br"),
    _edited(
        "Wouldn't the circle look nice in yellow?",
        _PAIR,
        "meadow",
        "small yellow circle tr",
        "large red triangle bl",
    ),
    _edited("Take the circle off.", _PAIR, "white", "large red triangle bl"),
    _edited("The triangle has to go.", _BOXES, "black", "large pink square tl"),
    _edited("We do not need the green circle here", _PAIR, "striped", "large red triangle bl"),
    _edited("Please lose the square on the left.", _BOXES, "gray", "small blue triangle br"),
    _edited("Let the background be black instead.", _ONE, "white", *_ONE, then="black"),
    _edited("This, but on a meadow, please", _STAR, "gray", *_STAR, then="meadow"),
    _edited("Try a striped background.", _PAIR, "white", *_PAIR, then="striped"),
    _edited("How about white behind it?", _ONE, "black", *_ONE, then="white"),
    _edited(
        "I would like the background to be checkered", _BOXES, "black", *_BOXES, then="checkered"
    ),
    _edited(
        "One more thing: a small red star in the bottom right corner",
        _ONE,
        "gray",
        *_ONE,
        "small red star br",
    ),
    _edited(
        "Could there be a large green triangle at the top left, too?",
        _STAR,
        "white",
        *_STAR,
        "large green triangle tl",
    ),
    _edited("It needs a pink square at the bottom left", _ONE, "meadow", *_ONE, "pink square bl"),
    _edited("Let the star move to the top right.", _STAR, "black", "small yellow star tr"),
    _edited(
        "Please have the circle go to the lower left corner",
        _ONE,
        "striped",
        "large blue circle bl",
    ),
    _edited(
        "Send the triangle to the upper right, please",
        _BOXES,
        "white",
        "large pink square tl",
        "small blue triangle tr",
    ),
    _edited(
        "I would rather have the circle in the top left",
        _PAIR,
        "gray",
        "small green circle tl",
        "large red triangle bl",
    ),
)
ALL = (*TEXT, *EDITS)


def skeleton(prompt: str) -> str:
    """A prompt's words with those for attributes replaced by what they are: its template."""
    text = re.sub(r"<[^>]*>", " ", prompt.lower())
    return " ".join(_CLASSES.get(word, word) for word in re.findall(r"\w+", text))


_CLASSES = {
    word: kind
    for kind, group in {
        "SHAPE": "circle disc disk ball dot square box block cube triangle star",
        "COLOUR": "red yellow green blue purple violet pink",
        "SIZE": "small little tiny large big huge",
        "ROW": "top upper bottom lower",
        "COLUMN": "left right",
        "GROUND": "white gray grey black striped stripy stripes checkered chequered checked "
        "checkerboard checks meadow grass grassy lawn",
    }.items()
    for word in group.split()
}


def run(
    pipe: OmniGenPipeline, wordings: Sequence[Wording] = ALL, seeds: int = SEEDS, **options
) -> list[list[Score]]:
    """Scores of each wording, one for each seed.

    Args:
        pipe: the model.
        wordings: what to draw.
        seeds: how many pictures of each.
        options: further arguments of the pipeline's call.
    """
    jobs = [(wording, seed) for seed in range(seeds) for wording in wordings]
    found: dict[Wording, list[Score]] = {wording: [] for wording in wordings}
    for first in range(0, len(jobs), _BATCH):
        some = jobs[first : first + _BATCH]
        images = pipe(
            [wording.prompt for wording, _ in some],
            [[render(wording.before)] if wording.before else [] for wording, _ in some],
            height=SIDE,
            width=SIDE,
            seed=first,
            progress=False,
            **options,
        )
        for (wording, _), image in zip(some, images):
            reading = checker.read(np.asarray(image))
            found[wording].append(
                checker.score(
                    reading,
                    wording.target,
                    stated=wording.stated,
                    background=wording.background_stated,
                )
            )
    return list(found.values())


def summary(scores: Sequence[Sequence[Score]]) -> tuple[float, float]:
    """Of stated attributes and of pictures: how many are right."""
    every = [score for some in scores for score in some]
    total = reduce(add, every, Score(0, 0))
    return total.right / total.asked, sum(score.all_right for score in every) / len(every)


def table(scores: Sequence[Sequence[Score]]) -> list[str]:
    """Rows of Markdown from the scores of `ALL`."""
    rows = [
        "| free wordings | prompts | pictures | stated attributes right | whole pictures right |",
        "|---|---|---|---|---|",
    ]
    for name, some in {
        "text to image": scores[: len(TEXT)],
        "edits": scores[len(TEXT) :],
        "**all**": scores,
    }.items():
        right, whole = summary(some)
        count = sum(map(len, some))
        rows.append(
            f"| {name} | {len(some)} | {count} | {100 * right:.1f} % | {100 * whole:.1f} % |"
        )
    return rows


def faults(scores: Sequence[Sequence[Score]]) -> list[str]:
    """A line for each wording of `ALL` that went wrong with some seed."""
    lines = []
    for wording, some in zip(ALL, scores):
        total = reduce(add, some, Score(0, 0))
        if not total.all_right:
            whole = sum(score.all_right for score in some)
            lines.append(f"  {total.right}/{total.asked} {whole}/{len(some)} {wording.prompt}")
    return lines
