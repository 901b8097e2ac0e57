"""The pipeline's own code on meta tensors of the full model's width, and the bytes that it makes.

Of its layers, twelve: what each of them adds would show.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.common import full_config
from bench.tracker import MemoryTracker
from omnigen_fast import streaming
from omnigen_fast.call import Call
from omnigen_fast.engine import Engine
from omnigen_fast.linear import Weight
from omnigen_fast.memory.plan import MemoryPlan, Switches
from omnigen_fast.model import Transformer
from omnigen_fast.parameters import layer_parts, parameter_shapes
from omnigen_fast.precision import Precision
from omnigen_fast.quantised import as_weight, empty_parts
from omnigen_fast.schedule import StepSchedule
from omnigen_fast.sequence import EncodedBranch
from omnigen_fast.weights.checkpoint import is_quantised

CONFIG = replace(full_config(), num_layers=12)
META = torch.device("meta")
TEXT = 20  # tokens before and behind what is random


class NoLane:
    """Copies nothing: there are no values."""

    def submit(self, copy: Any, after: Any) -> None:
        return None

    def mark(self) -> None:
        return None

    def wait(self, mark: Any) -> None:
        pass

    def drain(self) -> None:
        pass


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The position table is on the host, as on a GPU; no page of it is touched but for crops."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cpu" if name == "pos_embed" else META)


SHAPES = parameter_shapes(CONFIG)


def fresh(name: str, precision: Precision, device: torch.device) -> Weight:
    """A parameter as a precision stores it."""
    if not is_quantised(name):
        return torch.empty(SHAPES[name], dtype=precision.arithmetic_dtype, device=device)
    parts = layer_parts(CONFIG, precision)[name.split(".")[2]]
    form = precision.form_of(name.split(".")[2])
    return as_weight(form, SHAPES[name], empty_parts(parts, device))


def weights_in(precision: Precision) -> dict[str, Weight]:
    """All on the device; the position table is on the host."""
    return {
        name: values(name, SHAPES[name]) if name == "pos_embed" else fresh(name, precision, META)
        for name in SHAPES
    }


class Checkpoint:
    """Fresh weights."""

    config = CONFIG

    def read_stored(
        self, precision: Precision, device: torch.device, names: Iterable[str]
    ) -> dict[str, Weight]:
        return {name: fresh(name, precision, device) for name in names}


class Dry(MemoryTracker):
    """Touches no page of the host's memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].device.type == "cpu":
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


def image(digest: str, height: int, width: int) -> Any:
    return SimpleNamespace(digest=digest, size=(height, width))


def branch(key: str, text: int, images: list[Any], noise_tokens: int, first: bool) -> EncodedBranch:
    """Text and then images, or images first."""
    ids, ends, spans = [7] * TEXT, list(range(1, TEXT + 1)), []
    if not first:
        ids += [ord(key[0])] * text
        ends += range(TEXT + 1, TEXT + text + 1)
    for one in images:
        start, slots = len(ids), one.size[0] * one.size[1] // 256
        ids += [0] * slots + [9]
        ends += [start + slots] * slots + [start + slots + 1]
        spans.append((start, start + slots, one))
    ids += [ord(key[0])] * text
    ends += range(len(ends) + 1, len(ids) + 1)
    long = CONFIG.uses_long_factor(len(ids) + 1 + noise_tokens)
    arrays = np.array(ids, np.int64), np.array(ends, np.int32)
    return EncodedBranch(*arrays, tuple(spans), long, (key, text, len(images), first))


def random_pictures(rng: random.Random, height: int, width: int) -> list[Any]:
    """Branches of one to three pictures with up to three input images each."""
    noise, pictures = height * width // 256, []
    for number in range(rng.choice((1, 1, 2, 3))):
        sides = [rng.choice((256, 512, 768, 1024)) for _ in range(2 * rng.choice((0, 0, 1, 2, 3)))]
        images = [
            image(f"{number}-{i}", *pair) for i, pair in enumerate(zip(sides[::2], sides[1::2]))
        ]
        first = rng.random() < 0.5
        cond = branch(f"c{number}", rng.randrange(5, 300), images, noise, first)
        pictures.append([(cond, 1.0), (branch("u", 121, [], noise, False), 1.0)])
        if images:
            pictures[-1].append((branch(f"i{number}", 3, images, noise, True), 1.0))
    return pictures


def random_case(
    rng: random.Random,
    storage: str | None = None,
    compute: str | None = None,
    cache: str | None = None,
) -> tuple[Call, MemoryPlan]:
    """A request and a plan for it, with weights stored, products computed, rows cached so."""
    height, width = (rng.choice((256, 512, 768, 1024, 1280)) for _ in range(2))
    pictures = random_pictures(rng, height, width)
    request = SimpleNamespace(
        height=height,
        width=width,
        steps=rng.choice((1, 10, 50)),
        noise_tokens=height * width // 256,
        latent_shape=(len(pictures), 4, height // 8, width // 8),
        switches=Switches(),
        images=len(pictures),
        edit=None,
    )
    latents = torch.empty(request.latent_shape, device=META)
    schedule = StepSchedule.euler(request.steps)
    precision = Precision.of("bfloat16", storage, compute, cache)
    call = Call(request, schedule, pictures, precision, latents)
    layers = CONFIG.num_layers
    plan = MemoryPlan(
        resident_layers=rng.choice((layers, layers, 0, 1, 8, layers - 1)),
        cache=rng.choice(("device", "ring", "none")),
        branches_per_pass=rng.choice((None, 1, 2)),
        mlp_rows=rng.choice((1024, 2048, 4096)),
        vae_resident=False,
        strip_rows=None,
        capture=False,
        kept_bytes=rng.choice((0, 1 << 30, 4 << 30)),
    )
    return call, plan


def as_edit(call: Call) -> None:
    """Makes a call an edit of part of a picture, of an input image that a branch has."""
    height, width = call.request.height, call.request.width
    mask = SimpleNamespace(latents=np.zeros((height // 8, width // 8), bool))
    call.request.edit = SimpleNamespace(image=image("edited", height, width), mask=mask)
    call.noise = torch.empty_like(call.latents)


def peaks(call: Call, plan: MemoryPlan) -> dict[str, int]:
    """Most bytes of prefill and of a step, without context and VAE; those of two of their terms."""
    model = Transformer(CONFIG, weights_in(call.precision))
    vae = SimpleNamespace(place=bool, resident=False)
    engine = Engine.of(model, Checkpoint(), vae, 0, call.precision)
    images = [] if call.request.edit is None else [call.request.edit.image]
    for picture in call.pictures:
        images += [one for branch, _ in picture for _, _, one in branch.spans]
    for one in images:
        height, width = one.size
        latents = torch.empty(4, height // 8, width // 8, device=META)
        engine.image_latents[one.digest, None] = latents
    others = [value for name, value in model.named_parameters() if not name.startswith("layers.")]
    found = {}
    noise = [] if call.noise is None else [call.noise]
    tracker = Dry([*others, call.latents, *noise, *engine.image_latents.values()])
    prefill = model.prefill

    def watched(*args: Any) -> None:
        prefill(*args)
        found["prefill"] = tracker.peak_bytes

    model.prefill = watched
    with mock.patch.object(streaming, "ThreadLane", NoLane), torch.no_grad(), tracker:
        # the output's positions are there from an earlier call
        model.crop_pos_embed(call.request.height // 16, call.request.width // 16)
        running = engine.start(call, plan)
        tracker.restart()
        engine.step(running)
        running.save()
        found["denoise"] = tracker.peak_bytes
    found["positions"] = sum(crop.nbytes for crop in model.crops())
    latents = [call.latents, running.latents, *engine.image_latents.values()]
    found["latents"] = sum(one.nbytes for one in latents)
    return found
