"""The pipeline's own code at full size on meta tensors, and the bytes that it makes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.common import full_config
from bench.tracker import MemoryTracker
from omnigen_fast import pipeline
from omnigen_fast.denoise import schedule
from omnigen_fast.memory.plan import MemoryPlan, Switches
from omnigen_fast.model import Transformer
from omnigen_fast.parameters import parameter_shapes
from omnigen_fast.sequence import EncodedBranch
from omnigen_fast.streamed_cache import StreamedCache
from omnigen_fast.weights import store as weights

CONFIG = full_config()
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
WEIGHTS = {name: values(name, shape) for name, shape in SHAPES.items()}


def read(names: Any, device: torch.device) -> list[tuple[str, torch.Tensor]]:
    """Fresh weights on the device; a host's copy is left as it is."""
    return [(name, values(name, SHAPES[name])) for name in names] if device.type == "meta" else []


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


def random_case(rng: random.Random) -> tuple[pipeline.RunningCall, MemoryPlan]:
    """A request and a plan for it."""
    height, width = (rng.choice((256, 512, 768, 1024, 1280)) for _ in range(2))
    pictures = random_pictures(rng, height, width)
    request = SimpleNamespace(
        height=height,
        width=width,
        steps=rng.choice((1, 10, 50)),
        noise_tokens=height * width // 256,
        latent_shape=(len(pictures), 4, height // 8, width // 8),
        switches=Switches(),
    )
    latents = torch.empty(request.latent_shape, device=META)
    run = pipeline.RunningCall(request, pictures, latents, schedule(request.steps))
    layers = CONFIG.num_layers
    plan = MemoryPlan(
        resident_layers=rng.choice((layers, layers, 0, 1, 20, layers - 1)),
        cache=rng.choice(("device", "ring", "none")),
        branches_per_pass=rng.choice((None, 1, 2)),
        mlp_rows=rng.choice((1024, 2048, 4096)),
        vae_resident=False,
        strip_rows=None,
        capture=False,
        kept_bytes=rng.choice((0, 1 << 30, 4 << 30)),
    )
    return run, plan


def peaks(run: pipeline.RunningCall, plan: MemoryPlan) -> dict[str, int]:
    """Most bytes of prefill and of a step, without context and VAE; those of two of their terms."""
    model = Transformer(CONFIG, WEIGHTS)
    pipe = pipeline.OmniGenPipeline(
        SimpleNamespace(config=CONFIG), model, SimpleNamespace(place=bool), None
    )
    pipe._streamed = StreamedCache(CONFIG, torch.bfloat16, META, 0, pipe._host, NoLane())
    pipe._store = weights.LayerStore(model, read, pipe._host, NoLane())
    for picture in run.pictures:
        for _, _, one in (span for branch, _ in picture for span in branch.spans):
            height, width = one.size
            latents = torch.empty(4, height // 8, width // 8, device=META)
            pipe._image_latents[one.digest] = latents
    others = [value for name, value in model.named_parameters() if not name.startswith("layers.")]
    found = {}
    tracker = MemoryTracker([*others, run.latents, *pipe._image_latents.values()])
    prefill = pipe._prefill

    def watched(*args: Any) -> None:
        prefill(*args)
        found["prefill"] = tracker.peak_bytes

    pipe._prefill = watched
    with torch.no_grad(), tracker:
        pipe._arrange(plan, run)
        # the output's positions are there from an earlier call
        model._crop_pos_embed(run.request.height // 16, run.request.width // 16)
        loop, _ = pipe._prepare(plan, run)
        tracker.restart()
        loop.step()
        found["denoise"] = tracker.peak_bytes
    found["positions"] = sum(crop.nbytes for crop in model._pos_embed_crops.values())
    latents = [run.latents, loop.latents, *pipe._image_latents.values()]
    found["latents"] = sum(one.nbytes for one in latents)
    return found
