"""The whole pipeline through the kernels, and the whole model under torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_cases import golden_request, golden_result, relative_error
from numerics import DEVICE
from omnigen_fast.kernels import launch, ops

from omnigen_fast.sequence import lay_out_all

pytestmark = pytest.mark.early

TRITON_CASES = ["mixed_batch", "one_image_lora"]  # the first has a prompt without images, too


@pytest.fixture
def large_tiles(monkeypatch):
    """Of attention in float32, in the interpreter, where a program takes as long as a large one.

    What ships for float32 is checked in `test_attention`.
    """
    choose = launch.choose

    def chosen(kernel, x, head_dim=0):
        found = choose(kernel, x, head_dim)
        return replace(found, block_m=64, block_n=64) if head_dim else found

    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "choose", chosen)


@pytest.mark.slow
@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", TRITON_CASES)
def test_golden_cases_through_the_kernels(load_pipe, name):
    from golden_cases import CASES, GOLDEN

    pipe = load_pipe()
    if CASES[name].get("lora"):
        pipe.merge_lora(GOLDEN / "lora")
    with ops.use("triton"):
        found = pipe(**golden_request(name), output_type="latent", progress=False)
    assert relative_error(found, golden_result(name)["latents"]) < 1e-5


@pytest.mark.slow
def test_bfloat16_through_the_kernels_is_as_close_as_the_originals(load_pipe):
    exact, original = golden_result("text"), golden_result("text_bfloat16")
    with ops.use("triton"):
        found = load_pipe(dtype="bfloat16")(
            **golden_request("text"), output_type="latent", progress=False
        )
    limit = 1.5 * relative_error(original["latents"], exact["latents"])
    assert relative_error(found, exact["latents"]) <= limit


@pytest.fixture
def begun(load_pipe):
    """A pipeline, and a call of it before its first step.

    With room for one condition only: compiled as here, each write to the cache copies it.
    """
    pipe = load_pipe(condition_cache_bytes=0)
    request = {**golden_request("one_image"), "output_type": "latent"}
    plan = pipe.plan(**request).plan
    running = pipe.engine.start(pipe.make_call(**request), plan)
    yield pipe, running
    pipe.engine.drop(running)


def test_prefill_compiles_without_a_graph_break(begun):
    pipe, running = begun
    cache, call, model = running.cache, running.call, pipe.model
    sequences = lay_out_all(call.entries(running.plan), cache, pipe.device)
    images = {digest: latents for (digest, _), latents in pipe.engine.image_latents.items()}
    times = model.embed_times(call.schedule.tensor()[:-1])
    expected = cache.keys.clone(), cache.values.clone()
    cache.keys.zero_()
    cache.values.zero_()
    compiled = torch.compile(model.prefill, fullgraph=True, backend="aot_eager")
    compiled(sequences, images, times.tokens, cache)
    for sequence in sequences:
        rows = sequence.cache_rows
        for found, wanted in zip((cache.keys, cache.values), expected):
            assert relative_error(found[:, rows], wanted[:, rows]) < 1e-6


def test_a_step_compiles_without_a_graph_break(begun):
    _, running = begun
    loop, values = running.loop, running.loop.values
    noise = golden_result("one_image")["noise"]

    def take(step):
        values.seek(0)
        values.latents.copy_(noise)
        step()
        return values.latents.clone()

    expected = take(loop.step)
    compiled = torch.compile(loop.step, fullgraph=True, backend="aot_eager")
    assert relative_error(take(compiled), expected) < 1e-6
    assert values.step.tolist() == [1]
