"""The whole pipeline through the kernels, and the whole model under torch.compile."""

from __future__ import annotations

import pytest
import torch
from golden_cases import golden_request, golden_result, relative_error
from omnigen_fast.kernels import ops

from omnigen_fast.denoise import Loop

TRITON_CASES = ["text", "mixed_batch", "one_image_lora"]


@pytest.mark.parametrize("name", TRITON_CASES)
def test_golden_cases_through_the_kernels(load_pipe, name):
    from golden_cases import CASES, GOLDEN

    pipe = load_pipe()
    if CASES[name].get("lora"):
        pipe.merge_lora(GOLDEN / "lora")
    with ops.use("triton"):
        found = pipe(**golden_request(name), output_type="latent", progress=False)
    assert relative_error(found, golden_result(name)["latents"]) < 1e-5


def test_bfloat16_through_the_kernels_is_as_close_as_the_originals(load_pipe):
    exact, original = golden_result("text"), golden_result("text_bfloat16")
    with ops.use("triton"):
        found = load_pipe(dtype="bfloat16")(
            **golden_request("text"), output_type="latent", progress=False
        )
    limit = 1.5 * relative_error(original["latents"], exact["latents"])
    assert relative_error(found, exact["latents"]) <= limit


@pytest.fixture
def prepared(load_pipe):
    """A pipeline, its model's arguments for prefill, and a loop at its first step."""
    pipe = load_pipe()
    prefills, loops = [], []
    prefill, step = pipe.model.prefill, Loop.step

    def keep_prefill(sequences, embedded, cache, *rest):
        prefills.append((sequences, [rows.clone() for rows in embedded], cache))
        prefill(sequences, embedded, cache, *rest)

    def keep_loop(loop):
        if not loops:
            loops.append(loop)
        step(loop)

    pipe.model.prefill = keep_prefill
    Loop.step = keep_loop
    try:
        pipe(**golden_request("one_image"), output_type="latent", progress=False)
    finally:
        Loop.step = step
        del pipe.model.prefill
    return pipe, prefills[0], loops[0]


def test_prefill_compiles_without_a_graph_break(prepared):
    pipe, (sequences, embedded, cache), _ = prepared
    expected = cache.keys.clone(), cache.values.clone()
    cache.keys.zero_()
    cache.values.zero_()
    torch.compile(pipe.model.prefill, fullgraph=True, backend="aot_eager")(
        sequences, embedded, cache
    )
    for sequence in sequences:
        rows = sequence.cache_rows
        for found, wanted in zip((cache.keys, cache.values), expected):
            assert relative_error(found[:, rows], wanted[:, rows]) < 1e-6


def test_a_step_compiles_without_a_graph_break(prepared):
    _, _, loop = prepared
    noise = golden_result("one_image")["noise"]

    def take(step):
        loop.index.zero_()
        loop.latents.copy_(noise)
        step()
        return loop.latents.clone()

    expected = take(loop.step)
    compiled = torch.compile(loop.step, fullgraph=True, backend="aot_eager")
    assert relative_error(take(compiled), expected) < 1e-6
    assert int(loop.index) == 1
