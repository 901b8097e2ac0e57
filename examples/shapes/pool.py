"""The pool of training pictures, encoded once, and tasks drawn from it without end."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from omnigen_fast.guidance import Branch
from omnigen_fast.images import InputImage
from omnigen_fast.processor import Processor

from .network import Conditions
from .scenes import BACKGROUNDS, SIDE, Scene, random_scene
from .tasks import (
    EDITS,
    Task,
    compose_task,
    edit_task,
    mask_of,
    mask_task,
    pair_task,
    subject_task,
    text_task,
)

_T = TypeVar("_T")

# What undoes an edit: a scene and its edited version give two tasks.
_INVERSE = {
    "recolour": "recolour",
    "move": "move",
    "background": "background",
    "add": "remove",
    "remove": "add",
}


@dataclass(frozen=True)
class Family:
    """A scene, and what each kind of edit makes of it."""

    base: Scene
    edited: dict[str, Scene]


def make_families(count: int, rng: random.Random) -> list[Family]:
    """Families of scenes of one or two trained things."""
    families = []
    for index in range(count):
        things = 1 + index % 2
        base = random_scene(rng, things)
        kinds = ["recolour", "move", "background", "remove" if things == 2 else "add"]
        edited = {kind: EDITS[kind](base, rng) for kind in kinds}
        families.append(Family(base, {k: scene for k, scene in edited.items() if scene}))
    return families


class Pool:
    """Tasks over the pictures of some families. Every (shape, colour) in it is a trained one."""

    def __init__(self, families: Sequence[Family]) -> None:
        self.families = families
        pictures = [s for family in families for s in (family.base, *family.edited.values())]
        empty = [Scene((), name) for name in BACKGROUNDS]
        masks = [mask_of(thing) for family in families for thing in family.base.things]
        self.scenes = list({_key(scene): scene for scene in [*pictures, *empty, *masks]}.values())
        self._index = {_key(scene): index for index, scene in enumerate(self.scenes)}
        self._pictures = pictures
        self._in_order = [
            scene
            for scene in pictures
            if sorted(thing.place for thing in scene.things) == [*range(len(scene.things))]
        ]
        self._singles = [scene for scene in pictures if len(scene.things) == 1]
        self._with_subject: dict[tuple[str, str, str], list[Scene]] = defaultdict(list)
        for scene in pictures:
            for thing in scene.things:
                others = tuple(one for one in scene.things if one != thing)
                first = replace(scene, things=(thing, *others))
                self._with_subject[thing.shape, thing.colour, thing.size].append(first)
        self._subjects = [
            scene
            for scene in self._singles
            if any(one.things[0].place != scene.things[0].place for one in self._shown(scene))
        ]
        self._on_background = defaultdict(list)
        for scene in [*self._singles, *empty * (len(self._singles) // 6)]:
            self._on_background[scene.background].append(scene)
        # changes of single things, by what an example of them shows
        self._changes: dict[tuple[str, str], list[tuple[Scene, Scene]]] = defaultdict(list)
        self._swaps = []  # the same thing on two backgrounds
        for family in families:
            if len(family.base.things) == 1:
                for kind in ("recolour", "background"):
                    if kind in family.edited:
                        one, two = family.base, family.edited[kind]
                        for first, second in ((one, two), (two, one)):
                            shown = second.things[0].colour
                            if kind == "background":
                                shown = second.background
                                self._swaps.append((first, second))
                            self._changes[kind, shown].append((first, second))
        # those that another thing shows, too
        self._shared = [
            change
            for change, shown in self._changes.items()
            if len({first.things for first, _ in shown}) > 1
        ]

    def index(self, scene: Scene) -> int:
        """Which of `scenes` has the same picture."""
        return self._index[_key(scene)]

    def task(self, kind: str, rng: random.Random, implied: float = 0.0) -> Task:
        """A task of one of `tasks.KINDS`.

        Args:
            kind: which.
            rng: draws it.
            implied: of the "text" tasks, how many have their things where a prompt that states no
                place puts them, beyond those that have by chance.

        Raises:
            ValueError: the families are too few for it.
        """
        if kind == "text":
            pictures = self._in_order if rng.random() < implied else self._pictures
            return text_task(rng.choice(pictures), rng.random() < 0.8)
        if kind in EDITS:
            return self._edit(kind, rng)
        if kind == "mask":
            scene = rng.choice(self.families).base
            return mask_task(scene, rng.choice(scene.things))
        if kind == "subject":
            return self._subject(rng)
        if kind == "compose":
            first, target = _choice(rng, self._swaps, kind)
            return compose_task(first, rng.choice(self._on_background[target.background]))
        change, shown = _choice(rng, self._shared, kind)
        while True:
            (one, two), (three, four) = rng.choices(self._changes[change, shown], k=2)
            if one.things != three.things:
                return pair_task(one, two, three, four)

    def _edit(self, kind: str, rng: random.Random) -> Task:
        while True:
            family = rng.choice(self.families)
            there, back = kind in family.edited, _INVERSE[kind] in family.edited
            if there and (not back or rng.random() < 0.5):
                return edit_task(kind, family.base, family.edited[kind])
            if back:
                return edit_task(kind, family.edited[_INVERSE[kind]], family.base)
            if kind == "remove" and rng.random() < 0.1:
                single = rng.choice(self._singles)
                return edit_task(kind, single, replace(single, things=()))

    def _subject(self, rng: random.Random) -> Task:
        source = _choice(rng, self._subjects, "subject")
        while True:
            target = rng.choice(self._shown(source))
            if target.things[0].place != source.things[0].place:
                return subject_task(source, target)

    def _shown(self, source: Scene) -> list[Scene]:
        """Scenes with the one thing of another as their first, anywhere."""
        (thing,) = source.things
        return self._with_subject[thing.shape, thing.colour, thing.size]


def _choice(rng: random.Random, tasks: Sequence[_T], kind: str) -> _T:
    if not tasks:
        raise ValueError(f"too few families for a {kind} task")
    return rng.choice(tasks)


def _key(scene: Scene) -> tuple[frozenset, str]:
    return frozenset(scene.things), scene.background


_ANY_IMAGE = InputImage(np.zeros((SIDE, SIDE, 3), np.uint8))


def collate(
    processor: Processor,
    texts: Sequence[str],
    images: Tensor,  # [batch, images, 4, height, width]
) -> Conditions:
    """Tokenizes as the runtime does; every text names the same number of images."""
    branches = [
        processor.encode(Branch(text, (_ANY_IMAGE,) * images.shape[1]), 0, 1) for text in texts
    ]
    length = max(branch.length for branch in branches)
    token_ids = torch.zeros(len(texts), length, dtype=torch.int64)
    kv_end = torch.full((len(texts), length), length)  # padding sees anything, nothing sees it
    for row, branch in enumerate(branches):
        token_ids[row, : branch.length] = torch.from_numpy(branch.token_ids)
        kv_end[row, : branch.length] = torch.from_numpy(branch.kv_end)
    return Conditions(
        token_ids,
        kv_end,
        torch.tensor([branch.length for branch in branches]),
        images,
        torch.tensor([[first for first, _, _ in branch.spans] for branch in branches]).view(
            len(texts), -1
        ),
    )
