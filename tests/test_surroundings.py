"""What callers set in PyTorch around a call changes neither the picture nor what is kept."""

from __future__ import annotations

import contextlib

import pytest
import torch
from golden_cases import GOLDEN

CALL = {
    "prompt": "<img><|image_1|></img> remove the cup",
    "input_images": [str(GOLDEN / "images" / "coffee.png")],
    "max_input_image_size": 96,
    "height": 64,
    "width": 48,
    "num_inference_steps": 2,
    "seed": 3,
    "output_type": "pt",
    "progress": False,
}
OTHER = {**CALL, "prompt": "<img><|image_1|></img> paint the cup red", "seed": 4}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: default_device("meta"),
    "another GPU by default": lambda: default_device("cuda:1"),
}


@pytest.fixture(scope="module")
def expected(load_pipe):
    pipe = load_pipe()
    return pipe(**CALL), pipe(**OTHER)


@pytest.mark.parametrize("inside", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_calls_inside_and_outside_give_the_same_pictures(load_pipe, expected, inside):
    pipe = load_pipe()
    with inside():
        assert torch.equal(pipe(**CALL), expected[0])
    # the image's latents and the negative prompt's keys were made inside
    assert torch.equal(pipe(**OTHER), expected[1])
    with inside():
        assert torch.equal(pipe(**OTHER), expected[1])
        assert torch.equal(pipe(**CALL), expected[0])


@pytest.mark.parametrize("inside", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_loading_inside_is_loading(load_pipe, expected, inside):
    with inside():
        pipe = load_pipe()
    assert torch.equal(pipe(**CALL), expected[0])


@pytest.mark.parametrize("inside", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_adapters_come_and_go_on_either_side(load_pipe, expected, inside):
    pipe = load_pipe()
    with inside():
        pipe.load_lora_weights(GOLDEN / "lora")
    changed = pipe(**CALL)
    assert not torch.equal(changed, expected[0])
    with inside():
        assert torch.equal(pipe(**CALL), changed)
        pipe.unload_lora_weights()
    assert torch.equal(pipe(**CALL), expected[0])


def test_what_a_call_returns_is_an_ordinary_tensor(load_pipe):
    with torch.inference_mode():
        picture = load_pipe()(**CALL)
    assert not picture.is_inference() and not picture.requires_grad


def test_latents_and_callbacks_of_inference_mode(load_pipe, expected):
    pipe = load_pipe()
    with torch.inference_mode():
        noise = torch.zeros(1, 4, 8, 6)

        def halve(pipe, step, time, tensors):
            return {"latents": tensors["latents"] / 2}

        found = pipe(**{**CALL, "seed": None}, latents=noise, callback_on_step_end=halve)
    again = pipe(
        **{**CALL, "seed": None}, latents=torch.zeros(1, 4, 8, 6), callback_on_step_end=halve
    )
    assert torch.equal(found, again)


def test_the_callers_settings_are_back_after_a_call(load_pipe):
    pipe = load_pipe()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        pipe(**CALL)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        with pytest.raises(Exception, match="height"):
            pipe(**{**CALL, "height": 63})
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
