"""Mixed requests on one pipeline, each compared with a fresh one, between all that goes wrong."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers_models import pipeline as diffusers_pipeline
from diffusers_models import write_folder
from golden_cases import GOLDEN, TINY
from image_attacks import exif_of_one_block, sliver
from omnigen_fast.kernels import ops
from PIL import Image
from torch import Tensor

import omnigen_fast
from omnigen_fast import OmniGenPipeline, RequestError
from omnigen_fast.errors import OmniGenError
from omnigen_fast.memory.plan import MemoryPlan

from .allocations import FAILURES, Allocations
from .requests import COMMON, PALETTE, PLAIN, PLANS, REFUSED
from .scenarios import held_tensors
from .watch import measure, storage_bytes

LORA = str(GOLDEN / "lora")
BUDGETS = ("auto", "700MiB", "300MiB", "200MiB", "1MiB")
DTYPES = ("float32", "bfloat16")
DIFFUSERS = {"prompt": "A cat.", "height": 32, "width": 48, "num_inference_steps": 2}


class WrongBits(AssertionError):
    """A picture is not the one that a fresh pipeline makes."""


class Broken(Exception):
    """What a callback raises."""


@dataclass(frozen=True)
class State:
    """What decides the bits of a request's picture."""

    name: str  # in the palette
    dtype: str
    plan: MemoryPlan
    lora: float  # its strength, 0 without
    stop_after: int | None = None  # steps


def load(dtype: str = "float32", memory: Any = "auto") -> OmniGenPipeline:
    return OmniGenPipeline.from_pretrained(TINY, dtype=dtype, memory=memory, device="cpu")


def digest(result: Any) -> str:
    """Of the bits of what a call returned."""
    if isinstance(result, Tensor):
        result = result.cpu().numpy()
    parts = result if isinstance(result, list) else [result]
    return hashlib.sha256(b"".join(np.asarray(one).tobytes() for one in parts)).hexdigest()


class References:
    """The pictures of fresh pipelines, by their digests; each is made once."""

    def __init__(self) -> None:
        self._found: dict[State, str] = {}

    def __len__(self) -> int:
        return len(self._found)

    def of(self, state: State) -> str:
        if state not in self._found:
            pipe = load(state.dtype, state.plan)
            if state.lora:
                pipe.load_lora_weights(LORA, "style", weight=state.lora)
            self._found[state] = digest(draw(pipe, state.name, stop_after=state.stop_after))
        return self._found[state]


def draw(
    pipe: OmniGenPipeline, name: str, *, stop_after: int | None = None, **arguments: Any
) -> Any:
    """A request of the palette, stopped after so many steps."""
    if stop_after is not None:

        def callback(pipe: Any, step: int, time: float, tensors: Any) -> None:
            pipe._interrupt = step + 1 == stop_after

        arguments["callback_on_step_end"] = callback
    return pipe(**{**PALETTE[name], **arguments})


class Mixed:
    """The pipeline that everything happens to.

    Args:
        rng: decides all.
        folder: an empty one, for diffusers' files.
    """

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng = rng
        self.references = References()
        self.done: Counter[str] = Counter()
        self.pipe = load()
        self.lora = 0.0
        omnigen_fast.enable(diffusers.OmniGenPipeline)  # torchvision may be missing
        self.theirs = diffusers_pipeline(write_folder(folder))
        self._first: dict[str, str] = {}  # digests of what has no fresh pipeline to compare with
        self._actions: dict[Callable[[], None], int] = {
            self.picture: 12,
            self.stopped: 2,
            self.lora_changed: 3,
            self.callback_raises: 2,
            self.interrupted: 2,
            self.memory_runs_out: 3,
            self.request_refused: 2,
            self.image_refused: 1,
            self.budget: 3,
            self.new_prompt: 2,
            self.new_image: 1,
            self.loaded_and_dropped: 1,
            self.diffusers_enabled: 2,
            self.cleared: 1,
        }

    def step(self) -> None:
        """One request, of whatever kind.

        Raises WrongBits, or AssertionError where something else is not as it must be.
        """
        (action,) = self.rng.choices(list(self._actions), list(self._actions.values()))
        action()
        self.done[action.__name__] += 1

    def measure(self, request: int) -> dict[str, int]:
        """A point of the curve, with the pipeline in a state that is always the same."""
        self._set_lora(0.0)
        self._compare("text 48x32, 3 steps", "float32", PLAIN)
        found = measure(self._held())
        kept = storage_bytes(held_tensors(self.pipe))
        return {"request": request, **found, "held_bytes": kept}

    def _held(self) -> Iterator[Tensor]:
        yield from held_tensors(self.pipe)
        for part in (self.theirs.transformer, self.theirs.vae):
            yield from part.parameters()
            yield from part.buffers()

    # What may happen

    def picture(self) -> None:
        """Any request under any plan, in either dtype, whatever surrounds the call."""
        name, dtype = self._any_request(), self.rng.choice(DTYPES)
        with self._surroundings():
            self._compare(name, dtype, self.rng.choice(list(PLANS.values())))

    def budget(self) -> None:
        """An amount of memory; too little is said in one line."""
        name, dtype = self._any_request(), self.rng.choice(DTYPES)
        try:
            self._compare(name, dtype, self.rng.choice(BUDGETS))
        except omnigen_fast.MemoryBudgetError:
            self.done["budget too small"] += 1

    def stopped(self) -> None:
        """Ended by its callback."""
        name = self._any_request(steps=3)
        self._compare(name, "float32", self._any_plan(), stop_after=self.rng.choice((1, 2)))

    def lora_changed(self) -> None:
        """Loaded, unloaded, or with another strength; then a picture."""
        self._set_lora(self.rng.choice((0.0, 0.5, 1.0)))
        self._compare(self._any_request(), self.rng.choice(DTYPES), self._any_plan())

    def callback_raises(self) -> None:
        """The callback's own error passes, as it is."""

        def callback(pipe: Any, step: int, time: float, tensors: Any) -> None:
            raise Broken

        self._fails(Broken, callback_on_step_end=callback)

    def interrupted(self) -> None:
        """Ctrl-C in the middle of a step."""
        left, real = self.rng.randrange(1, 12), ops.attention_step

        def attend(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return real(*arguments, **more)

        with mock.patch.object(ops, "attention_step", attend):
            try:
                draw(self.pipe, self._any_request(), memory=self._any_plan())
            except KeyboardInterrupt:
                return
        assert left > 0, "the interrupt was lost"

    def memory_runs_out(self) -> None:
        """At some allocation: one line."""
        number, failure = self.rng.randrange(600), self.rng.choice(list(FAILURES.values()))
        allocations = Allocations(number, failure, lasting=self.rng.random() < 0.5)
        name, plan = self._any_request(), self._any_plan()
        try:
            with allocations.watching():
                draw(self.pipe, name, memory=plan)
        except OmniGenError as error:
            assert "out of memory" in str(error), error
        else:
            assert not allocations.failed

    def request_refused(self) -> None:
        self._fails(RequestError, **self.rng.choice(REFUSED))

    def image_refused(self) -> None:
        """Damaged, crafted, or no image."""
        data = self.rng.choice(
            (b"GIF89a" + self.rng.randbytes(500), self.rng.randbytes(2000), b"", _cut_png())
        )
        attack = self.rng.choice((data, data, sliver(), b"P6 " + b" " * 5_000_000))
        self._fails(RequestError, prompt="<img><|image_1|></img> red", input_images=[attack])

    def new_prompt(self) -> None:
        """One that nobody has asked for: what is kept of it must make room for others."""
        words = self.rng.choices(("red", "cat", "house", "rain", "tree", "old", "blue"), k=6)
        self._twice(prompt=f"{' '.join(words)} {self.rng.random()}")

    def new_image(self) -> None:
        """Likewise; sometimes one whose metadata would cost more than its pixels."""
        size = self.rng.randrange(16, 90), self.rng.randrange(16, 90)
        image: Any = Image.frombytes("RGB", size, self.rng.randbytes(3 * size[0] * size[1]))
        if self.rng.random() < 0.2:
            image = exif_of_one_block()
        self._twice(prompt="<img><|image_1|></img> red", input_images=[image])

    def loaded_and_dropped(self) -> None:
        """Another pipeline that lives for one call."""
        pipe = load(self.rng.choice(DTYPES), self._any_plan())
        draw(pipe, self._any_request())

    def diffusers_enabled(self) -> None:
        """diffusers' own pipeline: on this runtime, and back."""
        if self.rng.random() < 0.3:
            omnigen_fast.disable(self.theirs)
        else:
            omnigen_fast.enable(self.theirs)
        kind = "ours" if "omnigen_fast" in omnigen_fast.summary(self.theirs).split()[1] else "own"
        result = self.theirs(
            **DIFFUSERS, output_type="pt", generator=torch.Generator().manual_seed(5)
        ).images
        found = digest(result)
        if self._first.setdefault(kind, found) != found:
            raise WrongBits(f"diffusers' pipeline, {kind}")

    def cleared(self) -> None:
        self.pipe.clear_cache()

    # How it is checked

    def _compare(
        self, name: str, dtype: str, memory: Any, *, stop_after: int | None = None
    ) -> None:
        result = draw(self.pipe, name, dtype=dtype, memory=memory, stop_after=stop_after)
        plan = self.pipe.last_plan
        assert plan is not None
        plan = replace(plan, precision=None)
        state = State(name, dtype, plan, self.lora, stop_after)
        if digest(result) != self.references.of(state):
            raise WrongBits(str(state))

    def _twice(self, **request: Any) -> None:
        """Here and by a fresh pipeline."""
        request = {**COMMON, "seed": 1, "memory": PLAIN, **request}
        found = digest(self.pipe(**request, dtype="float32"))
        fresh = load(memory=PLAIN)
        if self.lora:
            fresh.load_lora_weights(LORA, weight=self.lora)
        if found != digest(fresh(**request)):
            raise WrongBits(f"{request['prompt']}")

    def _fails(self, kind: type[BaseException], **arguments: Any) -> None:
        try:
            self.pipe(**{**COMMON, "prompt": "A cat.", "memory": self._any_plan(), **arguments})
        except kind:
            return
        raise AssertionError(f"no {kind.__name__}")

    def _set_lora(self, strength: float) -> None:
        if strength == 0:
            self.pipe.unload_lora_weights()
        elif self.lora:
            self.pipe.set_adapters("style", strength)
        else:
            self.pipe.load_lora_weights(LORA, "style", weight=strength)
        self.lora = strength

    def _any_request(self, steps: int | None = None) -> str:
        names = [
            name
            for name, request in PALETTE.items()
            if steps is None or request["num_inference_steps"] == steps
        ]
        return self.rng.choice(names)

    def _any_plan(self) -> MemoryPlan:
        return self.rng.choice(list(PLANS.values()))

    def _surroundings(self) -> AbstractContextManager[Any]:
        return self.rng.choice(
            (
                nullcontext,
                torch.inference_mode,
                lambda: torch.autocast("cpu", torch.bfloat16),
                torch.enable_grad,
            )
        )()


def _cut_png() -> bytes:
    return (GOLDEN / "images/cat.png").read_bytes()[:300]
