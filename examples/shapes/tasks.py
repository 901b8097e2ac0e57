"""Tasks: input pictures, words, and the scene that should come out."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    MASK_COLOUR,
    PLACES,
    TRAINED,
    Scene,
    Thing,
    random_scene,
    random_thing,
)

Pairs = Collection[tuple[str, str]]  # of shape and colour

# The first of each list is the name that the project uses.
_SHAPE_WORDS = {
    "circle": ["circle", "disc"],
    "square": ["square", "box"],
    "triangle": ["triangle"],
    "star": ["star"],
}
_COLOUR_WORDS = {colour: [colour] for colour in COLOURS} | {"purple": ["purple", "violet"]}
_SIZE_WORDS = {"small": ["small", "little"], "large": ["large", "big"]}
_BACKGROUND_WORDS = {name: [name] for name in BACKGROUNDS} | {"gray": ["gray", "grey"]}
_OBJECT_WORDS = ["object", "shape", "thing"]
_IMAGES = [f"<img><|image_{number}|></img>" for number in (1, 2, 3)]


@dataclass(frozen=True)
class Stated:
    """Which attributes of a thing a prompt names. `place`: "both", "row", "column" or ""."""

    size: bool = True
    colour: bool = True
    place: str = "both"


ALL_STATED = Stated()


def places_of(stated: Sequence[tuple[str, int]]) -> list[int]:
    """Where things stand whose places a prompt states in full, in part or not at all.

    What is left open is the first free place in reading order. A model that is left to choose among
    places gives each its share, and draws a thing at several of them.

    Args:
        stated: of each thing, in the order of the prompt, `Stated.place` and a place that has what
            is stated of it.
    """
    taken = [place for part, place in stated if part == "both"]
    found = []
    for part, place in stated:
        if part != "both":
            free = [one for one in range(len(PLACES)) if one not in taken]
            if part:
                same = _ROW_OR_COLUMN[part]
                free = [one for one in free if same(one) == same(place)] or [place]
            place = free[0]
            taken.append(place)
        found.append(place)
    return found


_ROW_OR_COLUMN: dict[str, Callable[[int], int]] = {
    "row": lambda place: place // 2,
    "column": lambda place: place % 2,
}


@dataclass(frozen=True)
class Task:
    """What is asked, and what a right answer shows.

    `words` draws one of the wordings.
    """

    kind: str
    inputs: tuple[Scene, ...]
    target: Scene
    words: Callable[[random.Random], str]
    sizes_stated: bool = True


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _place(rng: random.Random, place: int) -> str:
    name = PLACES[place]
    return rng.choice([f"at the {name}", f"in the {name} corner"])


def _looks(rng: random.Random, thing: Thing, sized: bool = True) -> str:
    """Such as "a small red circle"."""
    words = [_COLOUR_WORDS[thing.colour], _SHAPE_WORDS[thing.shape]]
    if sized:
        words.insert(0, _SIZE_WORDS[thing.size])
    return _a(" ".join(map(rng.choice, words)))


def _which(rng: random.Random, thing: Thing) -> str:
    """Such as "the red circle"; shapes and colours of a scene all differ."""
    shape, colour = rng.choice(_SHAPE_WORDS[thing.shape]), rng.choice(_COLOUR_WORDS[thing.colour])
    return rng.choice([f"the {shape}", f"the {colour} {shape}", f"the {colour} shape"])


def _background(rng: random.Random, name: str) -> str:
    return rng.choice(_BACKGROUND_WORDS[name])


def _end(rng: random.Random, text: str) -> str:
    """Sentences begin and end as people write them: with or without capital and full stop."""
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + rng.choice(["", "."])


def describe(scene: Scene, rng: random.Random, sized: bool = True) -> str:
    """Words for a whole scene."""
    things = list(scene.things)
    rng.shuffle(things)
    parts = []
    for thing in things:
        parts.append(f"{_looks(rng, thing, sized)} {_place(rng, thing.place)}")
    joined = rng.choice([" and ", ", "]).join(parts)
    ground = _background(rng, scene.background)
    if not parts:
        return _end(rng, rng.choice([f"{_a(ground)} background", f"an empty {ground} background"]))
    text = rng.choice(
        [
            f"{joined} on {_a(ground)} background",
            f"{joined}, {ground} background",
            f"{_a(ground)} background with {joined}",
            f"a picture of {joined} on {_a(ground)} background",
            f"draw {joined} on {_a(ground)} background",
        ]
    )
    return _end(rng, text)


def text_task(scene: Scene, sized: bool = True) -> Task:
    """A described scene."""
    return Task("text", (), scene, lambda rng: describe(scene, rng, sized), sized)


def _edit(kind: str, before: Scene, after: Scene, say: Callable[[random.Random], str]) -> Task:
    def words(rng: random.Random) -> str:
        text = _end(rng, say(rng))
        return f"{_IMAGES[0]} {text}"

    return Task(kind, (before,), after, words)


def edit_task(kind: str, before: Scene, after: Scene) -> Task:
    """The edit of one `kind` of `EDITS` that leads from one scene to another."""
    gone = [thing for thing in before.things if thing not in after.things]
    new = [thing for thing in after.things if thing not in before.things]

    def say(rng: random.Random) -> str:
        if kind == "background":
            ground = _background(rng, after.background)
            return rng.choice(
                [
                    f"change the background to {ground}",
                    f"make the background {ground}",
                    f"use {_a(ground)} background",
                ]
            )
        if kind == "add":
            verb = rng.choice(["add", "put", "draw"])
            return f"{verb} {_looks(rng, new[0])} {_place(rng, new[0].place)}"
        which = _which(rng, gone[0])
        if kind == "remove":
            return f"{rng.choice(['remove', 'delete', 'erase', 'take away'])} {which}"
        if kind == "move":
            if rng.random() < 0.5:
                return f"move {which} to the {PLACES[new[0].place]}"
            return f"put {which} {_place(rng, new[0].place)}"
        colour = rng.choice(_COLOUR_WORDS[new[0].colour])
        return rng.choice(
            [
                f"make {which} {colour}",
                f"turn {which} {colour}",
                f"paint {which} {colour}",
                f"change the color of {which} to {colour}",
            ]
        )

    return _edit(kind, before, after, say)


def subject_task(source: Scene, target: Scene) -> Task:
    """The one thing of image 1, with its size, as the first thing of a described scene."""
    moved, *others = target.things

    def words(rng: random.Random) -> str:
        word = rng.choice(_OBJECT_WORDS)
        parts = [f"the {word} in {_IMAGES[0]} {_place(rng, moved.place)}"]
        parts += [f"{_looks(rng, one)} {_place(rng, one.place)}" for one in others]
        rng.shuffle(parts)
        text, ground = " and ".join(parts), _background(rng, target.background)
        return _end(
            rng,
            rng.choice(
                [
                    f"{text} on {_a(ground)} background",
                    f"draw {text}, {ground} background",
                    f"{_a(ground)} background with {text}",
                ]
            ),
        )

    return Task("subject", (source,), target, words)


def compose_task(first: Scene, second: Scene) -> Task:
    """The thing of image 1, where it stands, on the background of image 2."""

    def words(rng: random.Random) -> str:
        verb, word = rng.choice(["", "put ", "place ", "draw "]), rng.choice(_OBJECT_WORDS)
        return _end(rng, f"{verb}the {word} of {_IMAGES[0]} on the background of {_IMAGES[1]}")

    target = replace(first, background=second.background)
    return Task("compose", (first, second), target, words)


def mask_task(scene: Scene, thing: Thing) -> Task:
    """A named thing in white on black: segmentation."""

    def words(rng: random.Random) -> str:
        which = _which(rng, thing)
        return _end(
            rng,
            rng.choice(
                [
                    f"the mask of {which} in {_IMAGES[0]}",
                    f"show the mask of {which} in {_IMAGES[0]}",
                    f"segment {which} in {_IMAGES[0]}",
                ]
            ),
        )

    return Task("mask", (scene,), mask_of(thing), words)


def mask_of(thing: Thing) -> Scene:
    """The scene that a mask is a picture of."""
    return Scene((replace(thing, colour=MASK_COLOUR),), "black")


def pair_task(first: Scene, second: Scene, third: Scene, target: Scene) -> Task:
    """What changed from image 1 to image 2 is to be done to image 3."""

    def words(rng: random.Random) -> str:
        one, two, three = _IMAGES
        return rng.choice(
            [
                f"{one} becomes {two}. Do the same to {three}",
                f"{one} becomes {two}. {three} becomes",
                f"From {one} to {two}. Change {three} the same way.",
            ]
        )

    return Task("pair", (first, second, third), target, words)


# What a scene becomes, with new attributes drawn; each returns None where nothing can be done.


def recoloured(scene: Scene, rng: random.Random, pairs: Pairs = TRAINED) -> Scene | None:
    """The first thing takes another colour."""
    thing, *others = scene.things
    used = {one.colour for one in scene.things}
    colours = [c for c in COLOURS if (thing.shape, c) in pairs and c not in used]
    if not colours:
        return None
    return replace(scene, things=(replace(thing, colour=rng.choice(colours)), *others))


def removed(scene: Scene, rng: random.Random, pairs: Pairs = TRAINED) -> Scene:
    """The first thing goes."""
    return replace(scene, things=scene.things[1:])


def added(scene: Scene, rng: random.Random, pairs: Pairs = TRAINED) -> Scene:
    """One thing more."""
    return replace(scene, things=(*scene.things, random_thing(rng, pairs, scene.things)))


def moved(scene: Scene, rng: random.Random, pairs: Pairs = TRAINED) -> Scene:
    """The first thing goes elsewhere."""
    thing, *others = scene.things
    used = {one.place for one in scene.things}
    place = rng.choice([place for place in range(len(PLACES)) if place not in used])
    return replace(scene, things=(replace(thing, place=place), *others))


def on_other_background(scene: Scene, rng: random.Random, pairs: Pairs = TRAINED) -> Scene:
    """Another background behind the same things."""
    names = [name for name in BACKGROUNDS if name != scene.background]
    return replace(scene, background=rng.choice(names))


EDITS: dict[str, Callable[[Scene, random.Random, Pairs], Scene | None]] = {
    "recolour": recoloured,
    "remove": removed,
    "add": added,
    "move": moved,
    "background": on_other_background,
}
KINDS = ("text", *EDITS, "subject", "compose", "mask", "pair")


def random_task(kind: str, rng: random.Random, pairs: Pairs = TRAINED) -> Task:
    """A task of one of `KINDS` on scenes made for it, of (shape, colour) `pairs` only."""
    while True:
        task = _try_task(kind, rng, pairs)
        if task is not None:
            return task


def _try_task(kind: str, rng: random.Random, pairs: Pairs) -> Task | None:
    if kind == "text":
        return text_task(random_scene(rng, rng.choice([1, 2]), pairs), rng.random() < 0.8)
    if kind in EDITS:
        before = random_scene(rng, 1 if kind == "add" else rng.choice([1, 2]), pairs)
        after = EDITS[kind](before, rng, pairs)
        return None if after is None else edit_task(kind, before, after)
    if kind == "mask":
        scene = random_scene(rng, rng.choice([1, 2]), pairs)
        return mask_task(scene, scene.things[0])
    first = random_scene(rng, 1, pairs)
    if kind == "subject":
        target = moved(first, rng)
        if rng.random() < 0.5:
            target = added(target, rng, pairs)
        return subject_task(first, replace(target, background=rng.choice(BACKGROUNDS)))
    if kind == "compose":
        second = random_scene(rng, rng.choice([0, 1]), pairs)
        return None if second.background == first.background else compose_task(first, second)
    (one,) = first.things
    third = Scene((random_thing(rng, pairs, [one]),), rng.choice(BACKGROUNDS))
    if rng.random() < 0.5:
        second = on_other_background(first, rng)
        target = replace(third, background=second.background)
    else:
        second = recoloured(first, rng, pairs)
        if second is None:
            return None
        thing = replace(third.things[0], colour=second.things[0].colour)
        if (thing.shape, thing.colour) not in pairs:
            return None
        target = replace(third, things=(thing,))
    return None if target == third else pair_task(first, second, third, target)
