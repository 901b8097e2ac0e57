"""A step recorded once and replayed is the step itself, for every step and every later call."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from golden_cases import GOLDEN, relative_error
from omnigen_fast.kernels import contract, ops
from recording import recording_graphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnigen_fast.graph import StepGraphs
from omnigen_fast.memory.plan import MemoryPlan

REQUEST = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 5,
    "seed": 11,
    "progress": False,
    "output_type": "latent",
}
# A CPU's own plans capture nothing.
CAPTURED = MemoryPlan.plain(layers=3, kept_bytes=2 << 30, capture=True)
EDIT = {
    **REQUEST,
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [str(GOLDEN / "images" / "coffee.png")],
    "max_input_image_size": 96,
}
MASKED = {
    **EDIT,
    "mask_image": str(GOLDEN / "images" / "coffee.png"),  # the cup is white
    "use_input_image_size_as_output": True,
}

REUSED = {**EDIT, "solver": "ab2", "num_inference_steps": 20, "reuse": 1e-3}


@pytest.fixture
def captured(load_pipe):
    """A pipeline whose steps are traced, and the list of what was traced and replayed."""
    pipe = load_pipe(memory=CAPTURED)
    pipe.engine.graphs, events = recording_graphs()
    return pipe, events


@pytest.mark.parametrize("request_", [REQUEST, EDIT], ids=["text", "edit"])
def test_replayed_steps_are_eager_steps(pipe, captured, request_):
    recording, events = captured
    assert torch.equal(recording(**request_), pipe(**request_))
    assert events[0] == "capture" and events.count("capture") == 1
    assert events.count("replay") == 4


def test_a_later_call_replays_with_its_own_values(pipe, captured):
    recording, events = captured
    first = recording(**REQUEST)
    kept = first.clone()
    for changes in (
        {"seed": 12},
        {"guidance_scale": 1.5, "seed": 13},
    ):
        found = recording(**{**REQUEST, **changes})
        assert torch.equal(found, pipe(**{**REQUEST, **changes})), changes
    assert torch.equal(first, kept)  # what a caller holds is not written again
    assert events.count("capture") == 1


def test_a_capture_serves_other_conditions(pipe, captured):
    """Longer and shorter prompts, in other places of the same cache."""
    recording, events = captured
    prompts = ["A cat.", "A dog that sleeps on a red sofa beside a window.", "A bird, small."]
    for prompt in prompts:  # until the cache has room for all
        recording(**{**REQUEST, "prompt": prompt})
    before = events.count("capture")
    for seed, prompt in enumerate(prompts * 2):
        changes = {**REQUEST, "prompt": prompt, "seed": seed}
        assert torch.equal(recording(**changes), pipe(**changes)), prompt
    assert events.count("capture") == before


def test_another_shape_takes_the_place_of_the_last(pipe, captured):
    recording, events = captured
    for width, captures in ((48, 1), (48, 1), (64, 2), (64, 2), (48, 3)):
        changes = {**REQUEST, "width": width}
        assert torch.equal(recording(**changes), pipe(**changes))
        assert events.count("capture") == captures


def test_a_callback_changes_replayed_steps_too(pipe, captured):
    recording, _ = captured

    def halve(_, step, time, tensors):
        return {"latents": tensors["latents"] / 2} if step == 2 else None

    def halve_in_place(_, step, time, tensors):
        if step == 2:
            tensors["latents"].div_(2)

    expected = pipe(**REQUEST, callback_on_step_end=halve)
    assert relative_error(expected, pipe(**REQUEST)) > 0.01
    for callback in (halve, halve, halve_in_place):
        assert torch.equal(recording(**REQUEST, callback_on_step_end=callback), expected)


def test_weights_that_change_end_a_capture(pipe, captured):
    recording, events = captured
    recording(**REQUEST)
    recording.load_lora_weights(GOLDEN / "lora")
    pipe.load_lora_weights(GOLDEN / "lora")
    try:
        assert torch.equal(recording(**REQUEST), pipe(**REQUEST))
    finally:
        pipe.unload_lora_weights()
    assert events.count("capture") == 2


def test_without_memory_steps_run_eagerly(pipe, load_pipe, caplog):
    tries = []

    def capture(work):
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    recording = load_pipe(memory=CAPTURED)
    recording.engine.graphs = StepGraphs(capture)
    with caplog.at_level(logging.WARNING, "omnigen_fast"):
        for seed in (1, 2):
            changes = {**REQUEST, "seed": seed}
            assert torch.equal(recording(**changes), pipe(**changes))
    assert len(tries) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "a step can't be captured (CUDA out of memory.); steps run one kernel at a time"
    ]


def test_few_steps_are_not_worth_a_capture(captured):
    recording, events = captured
    recording(**{**REQUEST, "num_inference_steps": 2})
    assert not events


def test_steps_are_eager_while_they_can_not_be_captured(pipe, load_pipe):
    allowed, tries = [], []

    def capture(work):
        tries.append(1)
        return work

    recording = load_pipe(memory=CAPTURED)
    recording.engine.graphs = StepGraphs(capture, possible=lambda: bool(allowed))
    assert torch.equal(recording(**REQUEST), pipe(**REQUEST))
    assert not tries
    allowed.append(1)
    assert torch.equal(recording(**REQUEST), pipe(**REQUEST))
    assert len(tries) == 1


def test_a_capture_keeps_what_it_reads(load_pipe):
    """The model's table of cut position embeddings forgets; a captured step reads on."""
    recording = load_pipe(memory=CAPTURED)
    recording.engine.graphs = StepGraphs(lambda work: work)
    recording(**REQUEST)
    crops = [weakref.ref(crop) for crop in recording.model.crops()]
    recording.model.forget_crops()
    gc.collect()
    assert len(crops) == 1 and crops[0]() is not None
    recording.engine.graphs.clear()
    gc.collect()
    assert crops[0]() is None


def test_no_capture_without_a_gpu(pipe):
    assert not pipe.engine.graphs.possible()
    with mock.patch.object(ops, "_why_not", return_value=None):
        graphs = StepGraphs.on(torch.device("cuda", 0))
        assert graphs.possible()
        with ops.use(attention="library"):
            assert not graphs.possible()


class OffDevice(TorchDispatchMode):
    """Collects the operations that touch a tensor of another device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.found, self.count = device, [], 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        tensors = [
            x for x in tree_leaves((arguments, named, result)) if isinstance(x, torch.Tensor)
        ]
        self.count += 1
        if any(x.device.type != self.device for x in tensors):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("branches_apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize(
    "request_",
    [REQUEST, EDIT, {**EDIT, "solver": "dpmpp2m"}, MASKED, REUSED],
    ids=["text", "edit", "solver", "mask", "reuse"],
)
def test_a_step_stays_on_the_device(load_pipe, monkeypatch, request_, branches_apart):
    """On a device without values: reading one would raise, a tensor elsewhere is found.

    A capture can do neither. The operations allow what the kernels allow.
    """
    checked = set()

    def stand_in(name):
        def run(*arguments):
            checked.add(name)
            operation = ops.OPERATIONS[name]
            getattr(contract, name)(*arguments[: operation.inputs], fused=True)
            out = operation.out(arguments)
            if out is not None:
                contract.same("out", out, operation.like(arguments[0]))
            return getattr(ops._SHAPES, name)(*arguments)

        return run

    stand_ins = SimpleNamespace(**{name: stand_in(name) for name in ops.OPERATIONS})
    pipe = load_pipe(dtype="bfloat16")
    call, engine = pipe.make_call(**request_), pipe.engine
    engine.to(torch.device("meta"))
    call.latents = call.latents.to("meta")
    call.noise = None if call.noise is None else call.noise.to("meta")
    branches = [branch for picture in call.pictures for branch, _ in picture]
    for _, _, image in (span for branch in branches for span in branch.spans):
        latents = torch.empty(4, *(side // 8 for side in image.size), device="meta")
        engine.image_latents[image.digest, None] = latents
    plan = replace(MemoryPlan.plain(layers=3), branches_per_pass=1 if branches_apart else None)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(ops, "_implementation", lambda x: stand_ins)
        running = engine.start(call, plan)
        engine.step(running)  # as a capture comes after the first step
        with OffDevice("meta") as off:
            engine.step(running)
            while call.schedule.kinds[call.steps_done - 1].computed and "reuse" in request_:
                engine.step(running)
    assert not off.found and off.count > 20
    narrow = {name for name in ops.OPERATIONS if "quantise" in name}
    narrow |= {"scaled_mm_", "attention_step_8bit"}
    # none of which plain weights and products need; and segments are joined for libraries alone
    assert checked == set(ops.OPERATIONS) - narrow - {"join_segments"}
