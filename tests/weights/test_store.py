"""Which layers are on the device, and how often each is read."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from golden_cases import TINY

from omnigen_fast.parameters import layer_shapes
from omnigen_fast.streaming import HostMemory
from omnigen_fast.weights import store as stores
from omnigen_fast.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")
LAYERS = 3  # of the golden checkpoint
CHECKPOINT = Checkpoint.open(TINY)
WEIGHTS = CHECKPOINT.read(torch.float32, CPU)
PARAMETERS = len(layer_shapes(CHECKPOINT.config))  # of a layer


@pytest.fixture
def engine(load_pipe):
    """With all layers on the device."""
    engine = load_pipe().engine
    engine.store.arrange(LAYERS)
    return engine


@pytest.fixture
def reads(engine, monkeypatch) -> Counter[int]:
    """How often a parameter of each layer is read."""
    counted: Counter[int] = Counter()
    read = Checkpoint.read

    def counting(self, dtype, device, names=None):
        found = read(self, dtype, device, names)
        counted.update(int(name.split(".")[1]) for name in found if name.startswith("layers."))
        return found

    monkeypatch.setattr(Checkpoint, "read", counting)
    return counted


def check_layers(model) -> None:
    """Takes each as a step does; it has its own weights."""
    for layer in range(LAYERS):
        block = model.block(layer) if model.stream is None else model.stream.take(layer)
        for name in layer_shapes(CHECKPOINT.config):
            assert torch.equal(getattr(block, name), WEIGHTS[f"layers.{layer}.{name}"])
        if model.stream is not None:
            model.stream.release(layer)


def resident(engine) -> set[int]:
    return {layer for layer in range(LAYERS) if not engine.model.layers[layer].qkv_proj.is_meta}


def test_a_layer_that_stays_is_not_read_again(engine, reads):
    store = engine.store
    store.arrange(LAYERS)
    assert not reads
    store.arrange(1)
    check_layers(engine.model)
    store.stop()
    kept = resident(engine)
    assert len(kept) == store.resident == 1
    reads.clear()
    store.arrange(LAYERS)
    assert reads == dict.fromkeys({0, 1, 2} - kept, PARAMETERS)
    assert engine.model.stream is None and resident(engine) == {0, 1, 2}
    check_layers(engine.model)


@pytest.mark.parametrize("copies", ["mapped file", "host"])
def test_streamed_layers_are_read_once_if_the_host_has_copies(engine, reads, monkeypatch, copies):
    monkeypatch.setattr(stores, "on_host", lambda device: copies == "mapped file")
    engine.store.arrange(0)
    for _ in range(3):
        check_layers(engine.model)
    engine.store.stop()
    if copies == "mapped file":
        assert set(reads) == {0, 1, 2} and min(reads.values()) >= 3 * PARAMETERS
    else:
        engine.store.arrange(LAYERS)
        assert reads == dict.fromkeys(range(LAYERS), PARAMETERS)
        check_layers(engine.model)


def test_copies_follow_the_weights(engine, reads, monkeypatch):
    monkeypatch.setattr(stores, "on_host", lambda device: False)
    engine.store.arrange(1)
    (here,) = resident(engine)
    reads.clear()
    engine.store.refresh([*(f"layers.{layer}.down_proj" for layer in range(LAYERS)), "norm"])
    assert reads == {layer: 1 if layer == here else PARAMETERS for layer in range(LAYERS)}
    engine.store.to(CPU, HostMemory(CPU))
    reads.clear()
    engine.store.arrange(1)  # the copies were the other device's
    assert set(reads) == {0, 1, 2} - {here}
    check_layers(engine.model)
