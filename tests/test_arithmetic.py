"""Products in 8 bits: how much they change, and what they must not."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from golden_cases import GOLDEN, golden_request, golden_result, relative_error
from recording import recording_graphs
from step_cases import PLAN, assert_packed_is_alone

from omnigen_fast.errors import RequestError
from omnigen_fast.forms import COMPUTED, PRODUCTS
from omnigen_fast.pipeline import check_compute
from omnigen_fast.quantised import QuantisedWeight

REQUEST = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 4,
    "seed": 11,
    "progress": False,
    "output_type": "latent",
}
computes = pytest.mark.parametrize("compute", PRODUCTS)


@pytest.fixture(scope="module")
def pipes(load_pipe):
    """Pipelines in bfloat16 by what their products are computed in."""
    return {name: load_pipe(dtype="bfloat16", compute=name) for name in (None, *PRODUCTS)}


@pytest.mark.parametrize("case", ["text", "one_image", "two_images", "mixed_batch"])
def test_golden_cases(pipes, case):
    """Latents of products in bfloat16 set the measure."""
    exact, errors = golden_result(case)["latents"], {}
    for name, pipe in pipes.items():
        found = pipe(**golden_request(case), output_type="latent", progress=False)
        errors[name] = relative_error(found, exact)
    assert errors["int8"] <= 3 * errors[None]
    assert errors["fp8"] <= 5 * errors[None]
    assert min(errors["int8"], errors["fp8"]) > errors[None]  # or nothing was in 8 bits


def test_the_dtype_itself_is_the_default(load_pipe, pipes):
    expected = pipes[None](**REQUEST)
    assert torch.equal(load_pipe(dtype="bfloat16", compute="bfloat16")(**REQUEST), expected)
    assert torch.equal(load_pipe(dtype="bfloat16")(**REQUEST), expected)


@computes
@pytest.mark.parametrize("weights", [None, "nf4"])
def test_resident_is_streamed_is_captured(load_pipe, compute, weights):
    """To the bit; also where the products that are not in 8 bits have weights to be expanded."""
    pipe = load_pipe(dtype="bfloat16", compute=compute, weights=weights)
    expected = pipe(**REQUEST, memory=PLAN)
    for change in ({"resident_layers": 0}, {"resident_layers": 1}, {"cache": "ring"}):
        pipe.clear_cache()
        assert torch.equal(pipe(**REQUEST, memory=replace(PLAN, **change)), expected), change
    pipe.clear_cache()
    pipe.engine.graphs, events = recording_graphs()
    assert torch.equal(pipe(**REQUEST, memory=replace(PLAN, capture=True)), expected)
    assert "replay" in events


@computes
def test_which_products(pipes, compute):
    """Those that the table names have weights in the form of products, all others plain ones."""
    for block in pipes[compute].model.layers:
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            weight = getattr(block, name)
            if name in COMPUTED[compute]:
                assert isinstance(weight, QuantisedWeight) and weight.form == PRODUCTS[compute]
            else:
                assert weight.dtype == torch.bfloat16


def test_packed_is_alone(load_pipe):
    pipe = load_pipe(compute="int8")
    batch = {**REQUEST, "prompt": ["a cat", "a dog and a cat"], "input_images": [[], []]}
    del batch["seed"]
    noise = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    assert_packed_is_alone(pipe, batch, noise)


@computes
def test_chunks_of_the_mlp_change_nothing(pipes, compute):
    expected = pipes[compute](**REQUEST, memory=PLAN)
    assert torch.equal(pipes[compute](**REQUEST, memory=replace(PLAN, mlp_rows=5)), expected)


def test_a_lora_is_merged_and_undone_to_the_bit(load_pipe):
    pipe = load_pipe(dtype="bfloat16", compute="int8")
    before = pipe(**REQUEST)
    pipe.load_lora_weights(GOLDEN / "lora")
    changed = pipe(**REQUEST)
    pipe.unload_lora_weights()
    assert torch.equal(pipe(**REQUEST), before) and not torch.equal(changed, before)


def test_a_saved_model_has_the_checkpoints_weights(load_pipe, pipes, tmp_path):
    pipes["int8"].save_pretrained(tmp_path / "saved")
    again = load_pipe(tmp_path / "saved", dtype="bfloat16")
    assert torch.equal(again(**REQUEST), pipes[None](**REQUEST))


def test_another_dtype_keeps_the_products(load_pipe):
    pipe = load_pipe(dtype="bfloat16", compute="int8")
    found = pipe(**REQUEST, dtype="float32")
    assert pipe.engine.precision.compute == "int8" and pipe.dtype == torch.float32
    assert torch.equal(found, load_pipe(dtype="float32", compute="int8")(**REQUEST))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compute": "int4"}, "compute must be .*int8.*got 'int4'"),
        ({"compute": 8}, "compute must be a name such as int8, got 8"),
        ({"compute": "bfloat16", "dtype": "float32"}, "compute=bfloat16 needs dtype=bfloat16"),
        ({"compute": "int4", "weights": "auto"}, "compute must be .*int8"),
    ],
)
def test_what_can_not_be_computed(load_pipe, arguments, words):
    with pytest.raises(RequestError, match=words):
        load_pipe(**{"dtype": "bfloat16", **arguments})


def test_fp8_needs_ada():
    gpu = torch.device("cuda", 0)
    with mock.patch("torch.cuda.get_device_capability", return_value=(8, 6)):
        check_compute("int8", gpu)
        with pytest.raises(
            RequestError, match=r"8\.9 or later, this one has 8\.6; use compute=int8"
        ):
            check_compute("fp8", gpu)
    with mock.patch("torch.cuda.get_device_capability", return_value=(8, 9)):
        check_compute("fp8", gpu)
