"""Keys and values of the condition in 8 bits: how much they change, and what they must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_cases import golden_request, golden_result, relative_error
from omnigen_fast.kernels import contract
from omnigen_fast.profiles import load as load_profile
from recording import recording_graphs
from shipped import STATED_REQUEST
from step_cases import PLAN, assert_packed_is_alone

from omnigen_fast import OmniGenPipeline, RequestError
from omnigen_fast.config import released_sizes
from omnigen_fast.forms import CACHES, cache_row_bytes
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.cost import Estimate
from omnigen_fast.memory.plan import MemoryPlan, typical_workload
from omnigen_fast.precision import Precision

pytestmark = pytest.mark.early

REQUEST = {
    "prompt": "A cat on a mat.",
    "height": 64,
    "width": 48,
    "num_inference_steps": 4,
    "seed": 11,
    "progress": False,
    "output_type": "latent",
}
caches = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture(scope="module")
def pipes(load_pipe):
    """Pipelines in float32 by how they keep keys and values."""
    return {name: load_pipe(cache=name) for name in (None, *CACHES)}


class TestErrors:
    """Of latents, in units of the error of bfloat16 arithmetic."""

    @pytest.mark.parametrize("case", ["text", "one_image", "two_images", "mixed_batch"])
    def test_of_golden_cases(self, pipes, load_pipe, case):
        request = {**golden_request(case), "progress": False, "output_type": "latent"}
        exact = golden_result(case)["latents"]
        measure = relative_error(load_pipe(dtype="bfloat16")(**request), exact)
        errors = {name: relative_error(pipes[name](**request), exact) for name in CACHES}
        assert 0 < errors["int8"] <= 0.5 * measure
        assert errors["int8"] < errors["fp8"] <= 2 * measure

    @pytest.mark.slow
    def test_of_the_shipped_model(self):
        def latents(dtype: str, cache: str | None = None) -> torch.Tensor:
            pipe = OmniGenPipeline.from_pretrained("shapes", dtype=dtype, cache=cache)
            return pipe(**STATED_REQUEST)

        exact = latents("float32")
        measure = relative_error(latents("bfloat16"), exact)
        for cache, most in (("int8", 1), ("fp8", 2)):
            error = relative_error(latents("float32", cache), exact)
            assert 0 < error <= most * measure, cache


class TestPlaces:
    @caches
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_resident_is_streamed_is_captured(self, load_pipe, cache, dtype):
        """To the bit; also as one layer that each step fills again, up to rounding."""
        pipe = load_pipe(dtype=dtype, cache=cache, condition_cache_bytes=0)
        expected = pipe(**REQUEST, memory=PLAN)
        assert pipe.engine.cache.keys.dtype == getattr(torch, CACHES[cache])
        assert torch.equal(pipe(**REQUEST, memory=PLAN), expected), "kept from the call before"
        for change in ({"cache": "ring"}, {"cache": "ring", "resident_layers": 1}):
            pipe.clear_cache()
            assert torch.equal(pipe(**REQUEST, memory=replace(PLAN, **change)), expected), change
        assert pipe.engine.streamed.tensors()[1].dtype == pipe.engine.cache.keys.dtype
        pipe.clear_cache()
        pipe.engine.graphs, events = recording_graphs()
        assert torch.equal(pipe(**REQUEST, memory=replace(PLAN, capture=True)), expected)
        assert "replay" in events
        recomputed = pipe(**REQUEST, memory=replace(PLAN, cache="none"))
        assert relative_error(recomputed, expected) < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]

    @caches
    def test_packed_is_alone(self, pipes, cache):
        batch = {**REQUEST, "prompt": ["a cat", "a dog and a cat"], "input_images": [[], []]}
        del batch["seed"]
        noise = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
        assert_packed_is_alone(pipes[cache], batch, noise)

    @caches
    def test_branches_one_by_one(self, pipes, cache):
        together = pipes[cache](**REQUEST, separate_cfg_infer=False)
        apart = pipes[cache](**REQUEST, separate_cfg_infer=True)
        assert relative_error(apart, together) < 1e-5

    def test_with_weights_and_products_in_8_bits(self, load_pipe):
        pipe = load_pipe(dtype="bfloat16", weights="nf4", compute="int8", cache="fp8")
        expected = pipe(**REQUEST, memory=PLAN)
        assert torch.equal(pipe(**REQUEST, memory=replace(PLAN, cache="ring")), expected)

    def test_the_dtype_itself_is_the_default(self, load_pipe, pipes):
        named = load_pipe(dtype="float32", cache="float32")
        assert named.engine.precision == pipes[None].engine.precision
        assert torch.equal(named(**REQUEST), pipes[None](**REQUEST))

    def test_another_dtype_keeps_the_form(self, load_pipe, pipes):
        pipe = load_pipe(dtype="bfloat16", cache="int8")
        assert torch.equal(pipe(**REQUEST, dtype="float32"), pipes["int8"](**REQUEST))
        assert pipe.engine.precision == Precision("float32", "float32", "int8")


class TestBytes:
    @caches
    def test_of_the_storage(self, load_pipe, cache):
        pipe = load_pipe(dtype="bfloat16", cache=cache)
        plain = load_pipe(dtype="bfloat16").engine
        pipe(**REQUEST)
        engine, config = pipe.engine, pipe.config
        row = 2 * config.num_layers * contract.cache_width(config.num_kv_heads, config.head_dim)
        assert engine.cache.row_bytes == row and engine.cache.nbytes % row == 0
        assert row < 0.6 * plain.cache.row_bytes

    @pytest.mark.parametrize(("heads", "head_dim"), [(32, 96), (1, 6), (3, 20), (5, 2)])
    def test_of_a_row(self, heads, head_dim):
        width = contract.cache_width(heads, head_dim)
        assert width == cache_row_bytes(heads, head_dim)
        assert heads * (head_dim + 4) <= width < heads * (head_dim + 4) + 16 and width % 16 == 0
        cache = torch.zeros(3, width, dtype=torch.int8)
        values, scales = contract.cache_parts(cache, heads, head_dim)
        values.fill_(1)
        scales.fill_(torch.nan)
        assert bool((values == 1).all()) and values.shape == (3, heads, head_dim)

    @caches
    def test_full_size(self, cache):
        """A condition of three input images: half the memory, and half of what a ring copies."""
        workload = typical_workload(1024, 1024, images=3, max_input_image_size=1024)
        plan = replace(MemoryPlan.plain(32), cache="ring")
        plain, narrow = (
            Estimate(released_sizes(), VaeShape(), precision, workload, load_profile("rtx3090"))
            for precision in (
                Precision.of("bfloat16"),
                Precision.of("bfloat16", cache=cache),
            )
        )
        share = narrow.bytes.row_bytes(plan) / plain.bytes.row_bytes(plan)
        assert share == 100 / 192
        assert narrow.seconds.copied_bytes(plan) == share * plain.seconds.copied_bytes(plan)
        held = [{one.name: one for one in each.bytes.held(PLAN)} for each in (plain, narrow)]
        assert held[1]["cache"].bytes < 0.53 * held[0]["cache"].bytes
        assert f"in {cache}" in held[1]["cache"].why and "in " not in held[0]["cache"].why


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"cache": "int4"}, "cache must be bfloat16, int8 or fp8, got 'int4'"),
            ({"cache": 8}, "cache must be a name such as int8, got 8"),
            ({"cache": "x" * 10**6}, "cache must be"),
            ({"cache": "float32", "dtype": "bfloat16"}, "can't be combined"),
            ({"cache": "int4", "weights": "auto"}, "cache must be"),
        ],
        ids=["unknown", "no name", "long", "other dtype", "auto"],
    )
    def test_refused(self, load_pipe, arguments, words):
        with pytest.raises(RequestError, match=words) as caught:
            load_pipe(**arguments)
        assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()
