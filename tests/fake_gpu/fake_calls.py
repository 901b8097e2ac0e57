"""Kinds of calls on a GPU that is not there, each with a fault and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import seeded_faults as faults
import torch
from fake_device import CUDA, FakeGpu, reason_to_skip
from golden_cases import GOLDEN, TINY
from timeline import Fault

from omnigen_fast import OmniGenPipeline
from omnigen_fast.memory.plan import MemoryPlan

# Of a file of tests: where they run, and first among those of all processes.
MARKS = [
    pytest.mark.early,
    pytest.mark.skipif(reason_to_skip() is not None, reason=reason_to_skip() or ""),
]

STEPS = 4
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": STEPS,
    "seed": 3,
    "progress": False,
    "output_type": "pt",
}
IMAGE = str(GOLDEN / "images" / "coffee.png")
EDIT = {
    **TEXT,
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [IMAGE],
    "max_input_image_size": 96,
}
BATCH = {
    **EDIT,
    "prompt": ["A cat.", "<img><|image_1|></img> remove the cup"],
    "input_images": [None, [IMAGE]],
}
MASKED = {**EDIT, "mask_image": IMAGE, "use_input_image_size_as_output": True}
REUSED = {**EDIT, "solver": "ab2", "num_inference_steps": 20, "reuse": 1e-3}
CAPTURED = MemoryPlan.plain(layers=3, kept_bytes=2 << 30, capture=True)
EAGER = replace(CAPTURED, capture=False)

Calls = Callable[[OmniGenPipeline, FakeGpu], None]


def call_twice(pipe: OmniGenPipeline, gpu: FakeGpu, **request: Any) -> None:
    """The second call finds its condition, and the capture of its shape."""
    for seed in (1, 2):
        shape = (len(request["prompt"]) if isinstance(request["prompt"], list) else 1, 3)
        pictures = pipe(**{**request, "seed": seed})
        assert tuple(pictures.shape[:2]) == shape and pictures.device == CUDA


def call_with_latents(pipe: OmniGenPipeline, gpu: FakeGpu) -> None:
    """Latents of the CPU and of the GPU; latents back."""
    for device in ("cpu", CUDA):
        given = torch.zeros(1, 4, 8, 6, device=device)
        request = {**TEXT, "latents": given, "seed": None, "output_type": "latent"}
        assert pipe(**request).device == CUDA


def call_with_callbacks(pipe: OmniGenPipeline, gpu: FakeGpu) -> None:
    """Callbacks that look, change in place, and give other latents, also ones on the CPU."""
    seen = []

    def changes(_: Any, step: int, time: float, tensors: dict[str, Any]) -> Any:
        latents = tensors["latents"]
        seen.append(latents.device)
        if step == 1:
            latents.mul_(0.5)
        return [None, None, {"latents": latents + 1}, {"latents": latents.cpu()}][step]

    for _ in range(2):
        pipe(**TEXT, callback_on_step_end=changes)
    assert seen == [CUDA] * 2 * STEPS


def call_with_lora(pipe: OmniGenPipeline, gpu: FakeGpu) -> None:
    """Without, with, and without an adapter again."""
    pipe(**TEXT)
    pipe.load_lora_weights(GOLDEN / "lora")
    pipe(**TEXT)
    pipe.unload_lora_weights()
    pipe(**TEXT)


def call_after_move(pipe: OmniGenPipeline, gpu: FakeGpu) -> None:
    """A pipeline that was loaded on the CPU."""
    pipe.to(CUDA)
    pipe(**EDIT)


def call_in_turns(pipe: OmniGenPipeline, gpu: FakeGpu) -> None:
    """Other plans and shapes, so that all that is kept moves: captures, rings, caches."""
    for plan, request in (
        (CAPTURED, TEXT),
        (replace(EAGER, resident_layers=1, cache="ring"), EDIT),
        (replace(EAGER, resident_layers=0, vae_resident=False), BATCH),
        (replace(CAPTURED, branches_per_pass=1), {**TEXT, "width": 64}),
        (replace(EAGER, cache="none"), EDIT),
        (CAPTURED, TEXT),
    ):
        pipe(**request, memory=plan)


def call_packed(pipe: OmniGenPipeline, gpu: FakeGpu) -> None:
    """Two calls that step together, one of them begun earlier; no wait between two steps."""
    one = pipe.make_call(**{**TEXT, "num_inference_steps": 8})
    other = pipe.make_call(**{**TEXT, "prompt": "A dog.", "num_inference_steps": 6})
    with pipe.driving() as engine:
        engine.cache_bytes = 1 << 30
        first = engine.start(one, EAGER, own_rows=True)
        engine.step(first)
        second = engine.start(other, EAGER, own_rows=True)
        engine.step_together(first, second)
        before = gpu.waits
        for _ in range(4):
            engine.step_together(first, second)
        if gpu.waits != before:
            raise Fault("steps that are taken together wait for the device")
        for running in (first, second):
            while not running.finished:
                engine.step(running)
            assert engine.decode(engine.finish(running), EAGER).device == CUDA


TEXT_TWICE = partial(call_twice, **TEXT)


@dataclass(frozen=True)
class Case:
    """A kind of call, and a fault of its own.

    Attributes:
        id: its name.
        fault: puts the fault into the product.
        found: what then fails, and what it says.
        calls: the calls, on a pipeline of this plan and these arguments.
        captures: how many steps are captured, at least.
        allocates: whether a captured step takes memory for the time of itself.
    """

    id: str
    fault: Callable[[pytest.MonkeyPatch], None]
    found: tuple[type[Exception], str]
    calls: Calls = TEXT_TWICE
    plan: MemoryPlan = CAPTURED
    load: dict[str, Any] = field(default_factory=dict)
    captures: int = 0
    allocates: bool = False


UNORDERED = "in no order with"
MIXED = (RuntimeError, "same device")  # what PyTorch says
CASES = (
    Case(
        "text",
        faults.reads_the_counter,
        (Fault, "a step waits for the device: the host reads a value"),
        captures=1,
    ),
    Case(
        "one image",
        faults.keeps_image_latents_on_the_cpu,
        MIXED,
        partial(call_twice, **EDIT),
        captures=1,
    ),
    Case(
        "mixed batch",
        faults.keeps_group_ends_on_the_cpu,
        (ValueError, "cu_groups must be on the device"),
        partial(call_twice, **BATCH),
        captures=1,
    ),
    Case(
        "branches one by one",
        faults.keeps_places_on_the_cpu,
        MIXED,
        partial(call_twice, **BATCH),
        replace(CAPTURED, branches_per_pass=1),
        captures=1,
    ),
    Case(
        "all layers streamed",
        faults.copies_without_their_event,
        (Fault, f"the default stream reads device memory .*{UNORDERED} stream"),
        plan=replace(EAGER, resident_layers=0),
    ),
    Case(
        "half of the layers streamed",
        faults.copies_before_the_last_reader,
        (Fault, f"stream .* writes device memory .*{UNORDERED} the default stream"),
        partial(call_twice, **EDIT),
        replace(EAGER, resident_layers=1),
    ),
    Case(
        "keys and values in a ring",
        faults.stores_before_the_writer,
        (Fault, f"stream .* reads device memory .*{UNORDERED} the default stream, which writes"),
        partial(call_twice, **EDIT),
        replace(EAGER, cache="ring"),
    ),
    Case(
        "layers, keys and values in rings",
        faults.frees_while_copies_are_under_way,
        (Fault, "is freed while stream|in no order with stream"),
        partial(call_twice, **BATCH),
        replace(EAGER, cache="ring", resident_layers=0),
    ),
    Case(
        "no cache",
        faults.forgets_positions_in_every_step,
        (Fault, "a step has a tensor on the CPU"),
        partial(call_twice, **EDIT),
        replace(EAGER, cache="none"),
    ),
    Case(
        "encoded in strips",
        faults.leaves_pixels_on_the_cpu,
        MIXED,
        partial(call_twice, **EDIT),
        replace(CAPTURED, strip_rows=2),
        captures=1,
    ),
    Case(
        "decoded in strips",
        faults.measures_strips_on_the_host,
        MIXED,
        plan=replace(CAPTURED, strip_rows=2),
        captures=1,
    ),
    Case(
        "autoencoder and strips on the host",
        faults.leaves_the_autoencoder_on_the_host,
        MIXED,
        partial(call_twice, **EDIT),
        replace(CAPTURED, strip_rows=2, strips_on_host=True, vae_resident=False),
        captures=1,
    ),
    Case(
        "LoRA",
        faults.merges_on_the_cpu,
        MIXED,
        call_with_lora,
        captures=3,
    ),
    Case(
        "LoRA after a capture",
        faults.keeps_captures_of_other_weights,
        (Fault, "replayed .* uses device memory .*, which was freed"),
        call_with_lora,
        captures=3,
    ),
    Case(
        "latents given",
        faults.takes_latents_as_they_are,
        (Fault, "a step has a tensor on the CPU"),
        call_with_latents,
        captures=1,
    ),
    Case(
        "callbacks",
        faults.puts_the_callbacks_latents_in_place,
        (Fault, "replayed .* uses device memory .*, which was freed"),
        call_with_callbacks,
        captures=1,
    ),
    Case(
        "mask",
        faults.keeps_the_mask_on_the_cpu,
        (Fault, "a step waits for the device|a step has a tensor on the CPU"),
        partial(call_twice, **MASKED),
        captures=1,
        allocates=True,
    ),
    Case(
        "solver of second order",
        faults.builds_a_table_in_the_step,
        (Fault, "a step has a tensor on the CPU"),
        partial(call_twice, **{**EDIT, "solver": "dpmpp2m"}),
        captures=1,
        allocates=True,
    ),
    Case(
        "two evaluations in a step",
        faults.waits_between_evaluations,
        (Fault, "a step waits for the device"),
        partial(call_twice, **{**TEXT, "solver": "heun"}),
        captures=1,
        allocates=True,
    ),
    Case(
        "reuse",
        faults.asks_whether_to_keep,
        (Fault, "a step waits for the device"),
        partial(call_twice, **REUSED),
        captures=2,
        allocates=True,
    ),
    Case(
        "weights in int8",
        faults.expands_into_new_memory,
        (Fault, "a capture leaves memory of its own in use"),
        load={"weights": "int8"},
        captures=1,
    ),
    Case(
        "weights in nf4, streamed",
        faults.releases_before_it_expands,
        (Fault, f"the default stream reads device memory .*{UNORDERED} stream"),
        plan=replace(EAGER, resident_layers=0),
        load={"weights": "nf4"},
    ),
    Case(
        "weights in fp8, half streamed",
        faults.locks_no_pages,
        (Fault, "a step .* the"),
        plan=replace(EAGER, resident_layers=1),
        load={"weights": "fp8"},
    ),
    Case(
        "products in int8",
        faults.keeps_scales_on_the_cpu,
        (ValueError, "scales must be on the device"),
        load={"compute": "int8"},
        captures=1,
    ),
    Case(
        "products in fp8",
        faults.activates_on_another_stream,
        (Fault, f"stream .* reads .*{UNORDERED} the default stream"),
        partial(call_twice, **EDIT),
        load={"compute": "fp8"},
        captures=1,
    ),
    Case(
        "packed steps",
        faults.seeks_in_every_step,
        (Fault, "taken together wait"),
        call_packed,
        EAGER,
    ),
    Case(
        "loaded on the CPU",
        faults.moves_all_but_the_norm,
        MIXED,
        call_after_move,
        load={"device": "cpu"},
        captures=1,
    ),
    Case(
        "plans and shapes in turns",
        faults.keeps_a_ring_without_its_owner,
        (Fault, "is freed while stream|in no order with stream"),
        call_in_turns,
        captures=3,
    ),
)


def carry_out(case: Case, gpu: FakeGpu) -> None:
    """In a frame of its own: a failure must not keep what was loaded."""
    arguments = {"device": CUDA, "memory": case.plan, **case.load}
    pipe = OmniGenPipeline.from_pretrained(TINY, **arguments)
    case.calls(pipe, gpu)
    assert not pipe.engine.graphs.refused
