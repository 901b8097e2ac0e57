"""Memory that runs out, at every place that takes some: another plan, or one clear line, and then
a pipeline that works as if nothing had been."""

from __future__ import annotations

import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from golden_cases import golden_request, relative_error
from omnigen_fast.kernels import ops
from soak.failures import faults, sample, sites
from soak.interrupts import interrupt_fault, interruptible
from soak.scenarios import MAIN, Models, Scenarios

from omnigen_fast.errors import OmniGenError
from omnigen_fast.memory.plan import MemoryPlan
from omnigen_fast.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.early

REQUEST = {
    **golden_request("one_image"),
    "num_inference_steps": 2,
    "output_type": "pt",
    "progress": False,
}


PLAIN = MemoryPlan.plain(3, kept_bytes=1 << 20)
PLANS = {
    "plain": PLAIN,
    "offloaded": replace(PLAIN, resident_layers=1, cache="ring", strip_rows=2, vae_resident=False),
    "recomputed": replace(PLAIN, cache="none", branches_per_pass=1),
}


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    return Scenarios(Models(tmp_path_factory.mktemp("failures") / "models"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_a_failure_at_any_allocation(scenarios, name):
    """At each call stack that allocates, from the input image to the picture."""
    scenario = scenarios.make(name)
    found = sites(scenario)
    assert len(found) > 60
    assert faults(scenario, sample(found)) == []


@pytest.mark.slow
def test_failures_elsewhere(scenarios):
    """Where loading, LoRAs, moves and captures allocate; and some of what calls share."""
    seen = {stack for name in MAIN for stack in sites(scenarios.make(name))}
    for name in scenarios.names:
        if name not in MAIN:
            scenario = scenarios.make(name)
            found = sites(scenario)
            tried = {
                stack: numbers
                for index, (stack, numbers) in enumerate(found.items())
                if stack not in seen or index % 40 == 0
            }
            assert tried
            assert faults(scenario, sample(tried)) == [], name
            seen |= found.keys()


def test_the_next_plan_goes_on_from_the_last_finished_step(load_pipe, monkeypatch):
    """A failure in a step of an automatic plan: one notice, and the same image."""
    pipe = load_pipe()
    expected = pipe(**REQUEST)
    steps = []
    real = pipe.engine.step

    def step(*running):
        if len(steps) == 1:
            steps.append("failed")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        real(*running)
        steps.append("done")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.engine, "step", step)
        found = pipe(**REQUEST)
    assert steps == ["done", "failed", "done"]
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(pipe(**REQUEST), expected)


def kept(engine) -> list[weakref.ref]:
    """Crops of the position table, image latents, keys and values."""
    tensors = [*engine.model.crops(), *engine.image_latents.values(), engine.cache.keys]
    return [weakref.ref(tensor) for tensor in tensors]


def test_what_is_kept_is_freed_before_the_next_plan(load_pipe, monkeypatch):
    """And what the failed step worked with: a smaller plan may need that memory."""
    pipe = load_pipe()
    held, starts, real_start = [], [], pipe.engine.start

    def start(call, plan):
        starts.append([one() for one in held])
        running = real_start(call, plan)
        held.extend([*kept(pipe.engine), *map(weakref.ref, running.loop.memory())])
        return running

    def step(running):
        if len(starts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        real_step(running)

    real_step = pipe.engine.step
    monkeypatch.setattr(pipe.engine, "start", start)
    monkeypatch.setattr(pipe.engine, "step", step)
    pipe(**REQUEST)
    assert len(starts) == 2 and len(starts[1]) > 20
    assert all(one is None for one in starts[1])


def test_clear_cache_frees_what_is_kept(load_pipe):
    pipe = load_pipe()
    pipe(**REQUEST)
    held = kept(pipe.engine)
    assert len(held) == 4  # positions of the picture and of its input image
    pipe.clear_cache()
    assert all(one() is None for one in held)


@pytest.mark.parametrize("fails", ["arrange", "read"])
def test_the_last_plan_is_one_that_was(load_pipe, monkeypatch, fails):
    """Not one whose weights could not be brought to their places."""
    pipe = load_pipe(memory=PLAIN)
    pipe(**REQUEST)
    last, summary = pipe.last_plan, pipe.summary()

    def fail(*arguments):
        raise OSError("the disk is gone")

    other = {"memory": replace(PLAIN, resident_layers=1)}
    if fails == "read":
        other["dtype"] = "bfloat16"
        monkeypatch.setattr(Checkpoint, "read", fail)
    else:
        monkeypatch.setattr(pipe.engine, "arrange", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        pipe(**REQUEST, **other)
    assert (pipe.last_plan, pipe.summary()) == (last, summary)
    monkeypatch.undo()
    pipe(**REQUEST, **other)
    assert pipe.last_plan.resident_layers == 1


def test_no_plan_is_tried_twice(load_pipe, monkeypatch):
    pipe = load_pipe()
    expected = pipe(**REQUEST)
    tried = []

    def arrange(plan, call):
        tried.append(plan)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with monkeypatch.context() as patch, pytest.raises(OmniGenError, match="out of memory"):
        patch.setattr(pipe.engine, "arrange", arrange)
        pipe(**REQUEST)
    assert len(tried) > 1 and len(set(tried)) == len(tried)
    assert torch.equal(pipe(**REQUEST), expected)


def test_a_callback_that_fails_is_not_tried_again(load_pipe):
    pipe = load_pipe()
    calls = []

    def callback(pipe, step, time, tensors):
        calls.append(step)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        pipe(**REQUEST, callback_on_step_end=callback)
    assert calls == [0]


@pytest.mark.slow
def test_an_interrupt_while_the_dtype_changes(scenarios):
    """At a line in forty, and wherever PyTorch hands control back while it reads a file."""
    scenario = scenarios.make("dtype")
    found = interruptible(scenario)
    assert len(found) > 500
    tried = [
        numbers[-(index % 2)]
        for index, (line, numbers) in enumerate(found.items())
        if index % 40 == 0 or not line[0].startswith("omnigen_fast")
    ]
    assert len(tried) > len(found) // 40 + 1
    faults = [(number, interrupt_fault(scenario, number)) for number in tried]
    assert [one for one in faults if one[1] is not None] == []


@pytest.mark.parametrize("name", PLANS)
def test_an_interrupt_in_the_middle_of_a_step(load_pipe, name):
    """Layers and keys that were taken from a ring are free again."""
    pipe = load_pipe(memory=PLANS[name])
    expected = pipe(**REQUEST)
    calls, real = [], ops.attention_step

    def attend(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    for _ in range(3):
        calls.clear()
        with mock.patch.object(ops, "attention_step", attend), pytest.raises(KeyboardInterrupt):
            pipe(**REQUEST)
        assert torch.equal(pipe(**REQUEST), expected)
