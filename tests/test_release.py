"""Memory that a pipeline gives up, and what is the same afterwards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from golden_cases import GOLDEN, TINY

from omnigen_fast import MemoryPlan, OmniGenPipeline
from omnigen_fast.errors import OmniGenError, RequestError

CALL = {
    "prompt": "<img><|image_1|></img> at night",
    "input_images": [str(GOLDEN / "images/cat.png")],
    "height": 64,
    "width": 64,
    "max_input_image_size": 64,
    "num_inference_steps": 2,
    "seed": 0,
    "output_type": "np",
    "progress": False,
}


@pytest.fixture
def pipe():
    """Its weights are converted: in memory, not in the mapped file."""
    return OmniGenPipeline.from_pretrained(TINY, dtype="bfloat16")


@pytest.mark.parametrize("resident", [None, 1], ids=["resident", "streamed"])
def test_all_is_given_up_and_read_again(pipe, resident):
    plan = MemoryPlan.plain(pipe.config.num_layers if resident is None else resident)
    before = pipe(**CALL, memory=plan)
    held = pipe.engine.held_bytes()
    freed = pipe.release_memory()
    # on a CPU the VAE stays where it is
    vae = sum(one.nbytes for one in pipe.vae.autoencoder.parameters())
    assert freed == held - pipe.engine.held_bytes() and pipe.engine.held_bytes() <= vae
    assert pipe.engine._model is None and not pipe.vae.resident
    assert pipe.release_memory() == 0
    assert np.array_equal(pipe(**CALL, memory=plan), before)


def test_what_is_kept_between_calls_goes_first(pipe):
    before = pipe(**CALL)
    layers = pipe.engine.store.resident
    assert pipe.engine.cache.keys.nbytes
    assert pipe.release_memory(1) > 0
    assert not pipe.engine.cache.keys.nbytes and pipe.engine.store.resident == layers
    assert np.array_equal(pipe(**CALL), before)


def test_then_layers(pipe):
    before = pipe(**CALL)
    layers = pipe.engine.store.resident
    size = sum(one.nbytes for one in pipe.model.layers[0].parameters())
    pipe.clear_cache()
    assert pipe.release_memory(size + 1) == 2 * size
    assert pipe.engine.store.resident == layers - 2
    assert np.array_equal(pipe(**CALL), before)
    assert pipe.engine.store.resident == layers


def test_loras_that_change_meanwhile(pipe):
    plain = pipe(**CALL)
    pipe.load_lora_weights(GOLDEN / "lora")
    changed = pipe(**CALL)
    pipe.release_memory()
    assert np.array_equal(pipe(**CALL), changed)
    pipe.release_memory()
    pipe.unload_lora_weights()
    assert np.array_equal(pipe(**CALL), plain)


def test_other_precisions(pipe):
    int8 = replace(pipe.engine.precision, storage="int8")
    plan = replace(MemoryPlan.plain(pipe.config.num_layers), precision=int8)
    before = pipe(**CALL, memory=plan)
    pipe.release_memory()
    assert np.array_equal(pipe(**CALL, memory=plan), before)


def test_a_call_that_runs_keeps_its_own(pipe):
    before = pipe(**CALL)

    def ask(running, *_given):
        with pytest.raises(OmniGenError, match="can't be called from a callback"):
            running.release_memory()

    assert np.array_equal(pipe(**CALL, callback_on_step_end=ask), before)
    with pipe.driving() as engine:
        running = engine.start(pipe.make_call(**CALL), MemoryPlan.plain(pipe.config.num_layers))
        with pytest.raises(OmniGenError, match="a call is under way"):
            engine.release()
        engine.drop(running)


@pytest.mark.parametrize("amount", [-1, "1GiB", 1.5])
def test_amounts_that_are_none(pipe, amount):
    with pytest.raises(RequestError, match="nbytes must be"):
        pipe.release_memory(amount)
