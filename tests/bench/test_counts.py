"""Counts that no machine changes: held to the paper count, and to what is committed."""

from __future__ import annotations

import copy

import pytest
import torch

from bench import counts
from bench.cases import COLUMNS, Size, Task
from bench.common import full_config, small_config
from bench.gpu.pictures import make_pipeline, prefill_flops, step_flops
from omnigen_fast.engine import Engine
from omnigen_fast.model import Transformer
from omnigen_fast.vae.vae import Vae

# TFLOP at 1024 px, counted on paper for the real model and its autoencoder
PAPER = {"text": 72.9, "one image": 122.5, "two images": 135.7}
PAPER_ENCODE, PAPER_DECODE = 4.88, 10.47  # of one image
SMALL = Task(Size(64, 64), 1, 5)


@pytest.fixture(scope="module")
def full():
    return counts.summaries()


@pytest.mark.parametrize("column", COLUMNS)
def test_operations_of_a_picture_are_the_paper_count(full, column):
    found = {part: one["flops"] / 1e12 for part, one in full[f"1024 px, {column}"].items()}
    assert found["step"] == pytest.approx(PAPER[column], rel=0.01)
    assert found["encode"] == pytest.approx(COLUMNS.index(column) * PAPER_ENCODE, rel=0.01)
    assert found["decode"] == pytest.approx(PAPER_DECODE, rel=0.01)


def test_no_count_has_risen(full):
    """After a change that earns it: `python -m bench.counts --write`, in the same commit."""
    assert counts.rises(full, counts.read_committed()) == []


def test_a_rise_is_found_and_a_fall_is_none(full):
    committed = copy.deepcopy(full)
    name = "512 px, text"
    committed[name]["step"]["launches"] -= 1
    committed[name]["decode"]["copies"].pop("copy_")
    found = counts.rises(full, committed)
    assert len(found) == 2 and found[0].startswith(f"{name}: step: launches: ")
    committed = copy.deepcopy(full)
    committed[name]["prefill"]["bytes"] += 1
    assert counts.rises(full, committed) == []


step = Engine.step


def test_a_step_that_copies_more_counts_more(monkeypatch):
    def wasteful(engine, running):
        running.latents.copy_(running.latents.clone())
        step(engine, running)

    before = counts.count(small_config(), SMALL).step.summary()
    monkeypatch.setattr(Engine, "step", wasteful)
    after = counts.count(small_config(), SMALL).step.summary()
    assert after["launches"] == before["launches"] + 2
    assert after["copies"]["clone"] == before["copies"].get("clone", 0) + 1
    assert after["allocations"] == before["allocations"] + 1
    assert after["bytes"] == before["bytes"] + 4 * 4 * 4 * 8 * 8
    assert counts.rises(after, before)


def test_a_step_that_waits_for_the_device_is_refused(monkeypatch):
    def waiting(engine, running):
        running.latents.cpu()
        step(engine, running)

    monkeypatch.setattr(Engine, "step", waiting)
    with pytest.raises(NotImplementedError, match="no data"):
        counts.count(small_config(), SMALL)


def test_a_last_layer_that_computes_what_nothing_reads_counts_more(monkeypatch):
    """Prefill needs keys and values of the last layer, but not its attention and MLP."""
    prefill_layer = Transformer._prefill_layer

    def whole(model, layer, block, *rest):
        model.layers.append(block)  # so that this layer is not the last
        try:
            prefill_layer(model, layer, block, *rest)
        finally:
            del model.layers[-1]

    before = counts.count(small_config(), SMALL).summary()
    monkeypatch.setattr(Transformer, "_prefill_layer", whole)
    after = counts.count(small_config(), SMALL).summary()
    assert counts.rises(after["prefill"], before["prefill"])
    more = {
        family: number - before["prefill"]["launches_by_family"][family]
        for family, number in after["prefill"]["launches_by_family"].items()
    }
    # of each of three branches: attention, a norm, three products and the activation
    assert more == {"products": 9, "attention": 3, "norms": 3, "elementwise": 3, "copies": 0}
    for part in ("encode", "step", "decode"):
        assert after[part] == before[part]


def test_an_image_that_is_encoded_twice_counts_more(monkeypatch):
    encode = Vae.encode

    def twice(vae, *args, **more):
        encode(vae, *args, **more)
        return encode(vae, *args, **more)

    before = counts.count(small_config(), SMALL)
    monkeypatch.setattr(Vae, "encode", twice)
    after = counts.count(small_config(), SMALL)
    assert after.encode.flops == 2 * before.encode.flops
    assert (after.prefill, after.decode) == (before.prefill, before.decode)


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
    task, engine = Task(Size(64, 64), 1, 4), pipe.engine
    arguments = task.arguments() | {"latents": torch.zeros(task.latent_shape)}
    plan = pipe.plan(**arguments).plan
    with torch.no_grad(), counts.Counter() as counter:
        running = engine.start(pipe.make_call(**arguments), plan)
        counted = []
        for _ in range(2):
            # on a CPU only what is ours is counted: PyTorch's own runs on the host
            counter.operations.clear()
            engine.step(running)
            counted.append(list(counter.operations))
        engine.drop(running)
    expected = counts.count(pipe.config, task).step
    ours = [one.name for one in expected.operations if one.name in counts.OURS]
    assert [one.name for one in counted[1]] == ours
    attention = [one.flops for one in counted[1] if one.family == counts.ATTENTION]
    # the tokenizer of both is the same
    assert attention == [one.flops for one in expected.of(counts.ATTENTION)]


def test_products_of_both_counts_agree():
    config = small_config()
    found = counts.count(config, SMALL)
    branches = branches_of(config, SMALL)
    formula = step_flops(config, SMALL.noise_tokens, [one.length + 1 for one in branches])
    assert found.step.flops == pytest.approx(formula, rel=2e-3)
    # embeddings of times and of the input image come on top
    formula = prefill_flops(config, branches, SMALL.steps)
    assert formula < found.prefill.flops < 1.02 * formula


def branches_of(config, task):
    pipe = make_pipeline(config, counts.meta_weights(config), torch.device("meta"))
    call = pipe.make_call(**task.arguments(), latents=torch.zeros(task.latent_shape))
    return [branch for branch, _ in call.pictures[0]]
