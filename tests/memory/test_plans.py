"""Every plan gives the same image; where the arithmetic is the same, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, golden_request, relative_error

from omnigen_fast.memory.plan import MemoryPlan

LAYERS = 3  # of the golden checkpoint
PLAIN = MemoryPlan.plain(LAYERS, kept_bytes=1 << 20)
SAME_BITS = {
    "streamed": {"resident_layers": 0},
    "half streamed": {"resident_layers": 1},
    "ring": {"cache": "ring"},
    "streamed, ring": {"resident_layers": 0, "cache": "ring"},
    "moved VAE": {"vae_resident": False},
    "nothing kept": {"kept_bytes": 0},
}
SAME_IMAGE = {
    "passes of one": {"branches_per_pass": 1},
    "short MLP": {"mlp_rows": 7},
    "strips": {"strip_rows": 2},
    "recomputed": {"cache": "none"},
    "recomputed, streamed": {"cache": "none", "resident_layers": 0},
    "all at once": {
        "resident_layers": 0,
        "cache": "ring",
        "branches_per_pass": 1,
        "mlp_rows": 16,
        "vae_resident": False,
        "strip_rows": 1,
        "kept_bytes": 0,
    },
}
CASES = ("text", "one_image", "two_images", "mixed_batch")


def ask(pipe, name: str, plan: MemoryPlan) -> torch.Tensor:
    return pipe(**golden_request(name), output_type="pt", progress=False, memory=plan)


@pytest.fixture(scope="module")
def plain(shared_pipe):
    """The image of each case under the plain plan."""
    return {name: ask(shared_pipe, name, PLAIN) for name in CASES}


@pytest.mark.parametrize("change", SAME_BITS)
@pytest.mark.parametrize("name", CASES)
def test_same_bits(pipe, plain, name, change):
    plan = replace(PLAIN, **SAME_BITS[change])
    assert torch.equal(ask(pipe, name, plan), plain[name])
    assert torch.equal(ask(pipe, name, plan), plain[name]), "with what the first call has kept"


@pytest.mark.parametrize("change", SAME_IMAGE)
@pytest.mark.parametrize("name", CASES)
def test_same_image(pipe, plain, name, change):
    image = ask(pipe, name, replace(PLAIN, **SAME_IMAGE[change]))
    assert relative_error(image, plain[name]) < 1e-5


def test_from_plan_to_plan(pipe, plain):
    """Layers and caches move between calls; what is left behind changes nothing."""
    for change in ("half streamed", "streamed, ring", "ring", "streamed", "moved VAE"):
        for name in ("one_image", "text"):
            plan = replace(PLAIN, **SAME_BITS[change])
            assert torch.equal(ask(pipe, name, plan), plain[name])
            assert pipe.engine.store.resident == plan.resident_layers


def test_adapters_on_streamed_layers(load_pipe):
    """Loaded before, loaded while layers are streamed, taken out again: as with resident layers."""
    streamed, resident = load_pipe(), load_pipe()
    plan = replace(PLAIN, resident_layers=0)
    without = ask(streamed, "text", plan)
    for pipe in (streamed, resident):
        pipe.load_lora_weights(GOLDEN / "lora")
    with_adapter = ask(resident, "text", PLAIN)
    assert relative_error(with_adapter, without) > 1e-3
    assert torch.equal(ask(streamed, "text", plan), with_adapter)
    assert torch.equal(ask(streamed, "text", PLAIN), with_adapter)
    assert torch.equal(ask(streamed, "text", plan), with_adapter)
    streamed.unload_lora_weights()
    assert torch.equal(ask(streamed, "text", plan), without)


def test_streamed_layers_hold_no_memory(pipe):
    ask(pipe, "text", replace(PLAIN, resident_layers=0))
    assert all(p.is_meta for block in pipe.model.layers for p in block.parameters())
    assert not pipe.engine.store.slots, "the ring is given up before the decoder runs"
    ask(pipe, "text", PLAIN)
    assert not any(p.is_meta for p in pipe.model.parameters())
    assert pipe.model.stream is None
