"""Faults for the fake GPU to find: each function puts one into the product, until it is undone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from omnigen_fast import call, pipeline, step_values
from omnigen_fast.denoise import Loop, RecomputedVelocity
from omnigen_fast.holdings import Holdings
from omnigen_fast.model import Block, Expander, Transformer, Workspace
from omnigen_fast.packing import Pack
from omnigen_fast.step_values import MaskValues, ReuseValues, SolverValues
from omnigen_fast.streaming import HostMemory, Ring, Streamed, StreamLane
from omnigen_fast.vae import strips
from omnigen_fast.vae.vae import Vae

Patch = pytest.MonkeyPatch


def around(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces a function by `change(function, *its arguments)`."""
    patch.setattr(owner, name, _wrapped(getattr(owner, name), change))


def _wrapped(function: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **named: Any) -> Any:
        return change(function, *args, **named)

    return wrapped


def reads_the_counter(patch: Patch) -> None:
    def change(combine, loop, kind, moved):
        loop.values.step[0].item()
        combine(loop, kind, moved)

    around(patch, Loop, "_combine", change)


def keeps_image_latents_on_the_cpu(patch: Patch) -> None:
    around(patch, Vae, "encode", lambda encode, *args, **named: encode(*args, **named).cpu())


def keeps_group_ends_on_the_cpu(patch: Patch) -> None:
    def change(kind, **values):
        return kind(**{**values, "cu_groups": values["cu_groups"].cpu()})

    around(patch, step_values, "Passes", change)


def keeps_places_on_the_cpu(patch: Patch) -> None:
    def change(make, *args):
        found = make(*args)
        return replace(found, places=found.places.cpu())

    around(patch, step_values, "_pass_values", change)


def copies_without_their_event(patch: Patch) -> None:
    patch.setattr(StreamLane, "wait", lambda lane, mark: None)


def copies_before_the_last_reader(patch: Patch) -> None:
    around(patch, StreamLane, "submit", lambda submit, lane, copy, after: submit(lane, copy, None))


def stores_before_the_writer(patch: Patch) -> None:
    def change(release, ring, item, store=None):
        if store is None:
            release(ring, item)
        else:
            slot = ring._taken.pop(item)
            ring._free.append((slot, ring._lane.submit(partial(store, slot), None)))

    around(patch, Ring, "release", change)


def frees_while_copies_are_under_way(patch: Patch) -> None:
    patch.setattr(StreamLane, "drain", lambda lane: None)


def forgets_positions_in_every_step(patch: Patch) -> None:
    def change(predict, velocity, *args):
        velocity._model.forget_crops()
        return predict(velocity, *args)

    around(patch, RecomputedVelocity, "__call__", change)


def measures_strips_on_the_host(patch: Patch) -> None:
    around(patch, strips.Moments, "add", lambda add, moments, strip: add(moments, strip.cpu()))


def leaves_pixels_on_the_cpu(patch: Patch) -> None:
    patch.setattr(
        strips,
        "normalized",
        lambda pixels, device: torch.from_numpy(pixels).permute(2, 0, 1).float(),
    )
    around(
        patch,
        strips.Pixels,
        "rows",
        lambda rows, pixels, *args, **named: rows(pixels, *args, **named).cpu(),
    )


def merges_on_the_cpu(patch: Patch) -> None:
    around(
        patch,
        Transformer,
        "set_parameter",
        lambda put, model, name, value: put(model, name, value.cpu()),
    )


def keeps_captures_of_other_weights(patch: Patch) -> None:
    patch.setattr(Holdings, "_weights_changed", lambda holdings: None)


def takes_latents_as_they_are(patch: Patch) -> None:
    patch.setattr(call, "draw_noise", lambda request, dtype, device: request.latents.clone())


def puts_the_callbacks_latents_in_place(patch: Patch) -> None:
    def change(latents, given, changed):
        latents.data = given.clone()

    patch.setattr(pipeline, "_replace", change)


def keeps_the_mask_on_the_cpu(patch: Patch) -> None:
    def blend(values, latents, step):
        time = values.reached.index_select(0, step).view(-1, 1, 1, 1)
        way = (1 - time) * values.noise + time * values.known
        latents.copy_(torch.where(values.edited.cpu(), latents, way))

    patch.setattr(MaskValues, "blend_", blend)


def builds_a_table_in_the_step(patch: Patch) -> None:
    def change(advance, values, latents, step):
        values.moved.mul_(torch.tensor([1.0]).to(latents.device))
        advance(values, latents, step)

    around(patch, SolverValues, "advance_", change)


def asks_whether_to_keep(patch: Patch) -> None:
    def change(keep, values, velocity, step):
        if bool((values._of(step)[-1] > 0).all()):
            keep(values, velocity, step)

    around(patch, ReuseValues, "keep_", change)


def expands_into_new_memory(patch: Patch) -> None:
    def change(expand, expander, stored):
        expander.layer = stored.for_products(expander.layer.input_norm)
        return expand(expander, stored)

    around(patch, Expander, "__call__", change)


def releases_before_it_expands(patch: Patch) -> None:
    def take(streamed, layer):
        if layer in streamed._resident:
            return streamed._expand(streamed._resident[layer])
        found = streamed._slots[streamed._ring.take(layer)]
        streamed._ring.release(layer)
        return streamed._expand(found)

    patch.setattr(Streamed, "take", take)


def locks_no_pages(patch: Patch) -> None:
    patch.setattr(HostMemory, "_lock", lambda memory, tensor: None)


def keeps_scales_on_the_cpu(patch: Patch) -> None:
    def change(make, space, *args):
        make(space, *args)
        space.scales = space.scales.cpu()

    around(patch, Workspace, "__init__", change)


def seeks_in_every_step(patch: Patch) -> None:
    def change(step, pack, evaluations):
        pack._at = None
        step(pack, evaluations)

    around(patch, Pack, "step", change)


def leaves_the_autoencoder_on_the_host(patch: Patch) -> None:
    patch.setattr(Vae, "loaded", lambda vae: contextlib.nullcontext())


def moves_all_but_the_norm(patch: Patch) -> None:
    def change(move, model, device):
        norm = model.norm
        move(model, device)
        model.set_parameter("norm", norm.data)

    around(patch, Transformer, "move", change)


def keeps_a_ring_without_its_owner(patch: Patch) -> None:
    patch.setattr(Ring, "reset", lambda ring: None)


def waits_between_evaluations(patch: Patch) -> None:
    def change(advance, values, latents, step):
        advance(values, latents, step)
        torch.cuda.synchronize()

    around(patch, SolverValues, "advance_", change)


def activates_on_another_stream(patch: Patch) -> None:
    def change(activated, block, gate_up, space):
        with torch.cuda.stream(torch.cuda.Stream()):
            return activated(block, gate_up, space)

    around(patch, Block, "_activated", change)
