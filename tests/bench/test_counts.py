"""Counts that no machine changes: held to the paper count, and to what is committed."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import counts
from bench.cases import COLUMNS, Size, Task
from bench.common import full_config, small_config
from bench.gpu.pictures import step_flops
from omnigen_fast.denoise import Loop

# TFLOP of a step at 1024 px, counted on paper for the real model
PAPER = {"text": 72.9, "one image": 122.5, "two images": 135.7}
SMALL = Task(Size(64, 64), 1, 5)


@pytest.fixture(scope="module")
def full():
    return counts.summaries()


@pytest.mark.parametrize("column", COLUMNS)
def test_operations_of_a_step_are_the_paper_count(full, column):
    assert full[f"1024 px, {column}"]["flops"] / 1e12 == pytest.approx(PAPER[column], rel=0.01)


def test_no_count_has_risen(full):
    """After a change that earns it: `python -m bench.counts --write`, in the same commit."""
    assert counts.rises(full, counts.read_committed()) == []


def test_a_rise_is_found_and_a_fall_is_none(full):
    committed = copy.deepcopy(full)
    name = "512 px, text"
    committed[name]["launches"] -= 1
    committed[name]["copies"].pop("copy_")
    found = counts.rises(full, committed)
    assert len(found) == 2 and found[0].startswith(f"{name}: launches: ")
    committed = copy.deepcopy(full)
    committed[name]["bytes"] += 1
    assert counts.rises(full, committed) == []


def wasteful_step(loop):
    loop.latents.copy_(loop.latents.clone())
    run_step(loop)


run_step = Loop.step


def test_a_step_that_copies_more_counts_more(monkeypatch):
    before = counts.count(small_config(), SMALL).step.summary()
    monkeypatch.setattr(Loop, "step", wasteful_step)
    after = counts.count(small_config(), SMALL).step.summary()
    assert after["launches"] == before["launches"] + 2
    assert after["copies"]["clone"] == before["copies"].get("clone", 0) + 1
    assert after["allocations"] == before["allocations"] + 1
    assert after["bytes"] == before["bytes"] + 4 * 4 * 4 * 8 * 8
    assert counts.rises(after, before)


def test_a_step_that_waits_for_the_device_is_refused(monkeypatch):
    def waiting(loop):
        loop.latents.cpu()
        run_step(loop)

    monkeypatch.setattr(Loop, "step", waiting)
    with pytest.raises(NotImplementedError, match="no data"):
        counts.count(small_config(), SMALL)


def test_a_step_copies_the_caches_time_tokens_and_the_latents_only():
    """The embedded noise of each branch is made of the latents' one copy."""
    config = full_config()
    step = counts.count(config, Task(Size(1024, 1024), 1, 50)).step
    token = 2 * config.num_layers * config.hidden_size * 2  # keys and values, bfloat16
    of_latents = 3 * 4096 * config.hidden_size * 2
    for one in step.of(counts.COPIES):
        most = of_latents if one.name in ("index", "index_select") else max(3 * token, 4096 * 64)
        assert one.written <= most, one
    # nothing of the size of the cache, or of what a layer makes, is copied
    assert sum(one.written > 4096 * 64 + 3 * token for one in step.of(counts.COPIES)) <= 1


def test_counts_are_those_of_a_real_run(load_pipe):
    """Operations of products and attention, with values and without."""
    pipe = load_pipe()
    task = Task(Size(64, 64), 1, 4)
    with counts.Counter() as counter:
        counted = []
        original = Loop.step

        def step(loop):
            before = len(counter.operations)
            original(loop)
            counted.append(counter.operations[before:])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "step", step)
            # on a CPU only what is ours is counted: PyTorch's own runs on the host
            pipe(**task.arguments(), latents=torch.zeros(task.latent_shape))
    expected = counts.count(pipe.config, task).step
    ours = [one.name for one in expected.operations if one.name in counts.OURS]
    assert [one.name for one in counted[1]] == ours
    attention = [one.flops for one in counted[1] if one.family == counts.ATTENTION]
    # the tokenizer of both is the same
    assert attention == [one.flops for one in expected.of(counts.ATTENTION)]


def test_products_of_both_counts_agree():
    config = small_config()
    step = counts.count(config, SMALL).step
    cached = [one.flops for one in step.of(counts.ATTENTION)]
    noise = SMALL.noise_tokens
    keys = cached[0] // (4 * config.hidden_size * noise)  # of all branches together
    branches = 3
    formula = step_flops(config, noise, [keys / branches - noise] * branches)
    assert step.flops == pytest.approx(formula, rel=2e-3)
