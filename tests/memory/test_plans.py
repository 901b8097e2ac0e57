"""Every plan gives the same image; where the arithmetic is the same, to the bit."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from golden_cases import GOLDEN, golden_request, relative_error
from omnigen_fast.kernels import ops

from omnigen_fast.memory.plan import MemoryPlan
from omnigen_fast.weights import store
from omnigen_fast.weights.checkpoint import Checkpoint

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


# Plans under which sums are taken in another order.
ORDERS = {
    "plain": PLAIN,
    "strips": replace(PLAIN, strip_rows=1),
    "short MLP": replace(PLAIN, mlp_rows=16),
    "ring, both": replace(PLAIN, cache="ring", strip_rows=1, mlp_rows=16),
    "recomputed, strips": replace(PLAIN, cache="none", strip_rows=1),
}


@pytest.mark.parametrize("name", ["text", "two_images"])
def test_bits_do_not_depend_on_the_plan_before(pipe, name):
    """What is kept is named by all that decides its bits; each plan after each other."""
    request = {**golden_request(name), "output_type": "latent", "num_inference_steps": 2}

    def run(order: str) -> torch.Tensor:
        return pipe(**request, progress=False, memory=ORDERS[order])

    fresh = {}
    for order in ORDERS:
        pipe.clear_cache()
        fresh[order] = run(order)
    assert len({latents.numpy().tobytes() for latents in fresh.values()}) > 1
    for before, after in permutations(ORDERS, 2):
        pipe.clear_cache()
        run(before)
        assert torch.equal(run(after), fresh[after]), (before, after)


def test_keys_and_values_are_named_by_the_kernels_that_made_them(pipe):
    call = pipe.make_call(**golden_request("one_image"))
    with ops.use(attention="library"):
        others = call.entries(PLAIN)
    assert not others.keys() & call.entries(PLAIN).keys()


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


@pytest.mark.parametrize("copies", ["mapped file", "host"])
def test_adapters_while_layers_are_on_their_way(load_pipe, monkeypatch, copies):
    """The ring holds the next call's first layers already; they are read again.

    Latents end without the decoder, for which the ring would be given up.
    """
    if copies == "host":  # as for a GPU
        monkeypatch.setattr(store, "on_host", lambda device: False)
    request = {**golden_request("text"), "output_type": "latent", "progress": False}
    pipe, fresh = (load_pipe(memory=replace(PLAIN, resident_layers=0)) for _ in range(2))
    without = pipe(**request)
    pipe.load_lora_weights(GOLDEN / "lora")
    fresh.load_lora_weights(GOLDEN / "lora")
    with_adapter = fresh(**request)
    assert relative_error(with_adapter, without) > 1e-3
    assert torch.equal(pipe(**request), with_adapter)
    pipe.unload_lora_weights()
    assert torch.equal(pipe(**request), without)


@pytest.mark.parametrize("layers", [LAYERS, 1, 0])
def test_another_dtype_is_read_by_plan(load_pipe, monkeypatch, layers):
    """No layer that the plan streams is read meanwhile, and never are two models there at once."""
    pipe = load_pipe(memory=replace(PLAIN, resident_layers=layers))
    request = {**golden_request("text"), "output_type": "latent", "progress": False}
    expected = pipe(**request)
    real = Checkpoint.read
    for new in (torch.bfloat16, torch.float32):
        old, read = [weakref.ref(one) for one in pipe.model.parameters()], []

        def watched(self, dtype, device, names=None, old=old, read=read, new=new):
            if dtype == new:  # a ring may still be filled from the other one's file
                alive = [one for one in old if one() is not None]
                read.append((len(alive), set(self.sources if names is None else names)))
            return real(self, dtype, device, names)

        monkeypatch.setattr(Checkpoint, "read", watched)
        found = pipe(**request, dtype=new)
        alive, names = read[0]
        at_once = {name.split(".")[1] for name in names if name.startswith("layers.")}
        assert not alive
        assert len(at_once) == layers == pipe.engine.store.resident
        assert pipe.dtype == new
    assert torch.equal(found, expected)


def test_streamed_layers_hold_no_memory(pipe):
    ask(pipe, "text", replace(PLAIN, resident_layers=0))
    assert all(p.is_meta for block in pipe.model.layers for p in block.parameters())
    assert not pipe.engine.store.slots, "the ring is given up before the decoder runs"
    ask(pipe, "text", PLAIN)
    assert not any(p.is_meta for p in pipe.model.parameters())
    assert pipe.model.stream is None
