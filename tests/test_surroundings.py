"""What callers set in PyTorch around a call changes neither the picture nor what is kept."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys

import pytest
import torch
from golden_cases import GOLDEN, TINY

from omnigen_fast import MemoryPlan, OmniGenError, RequestError

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


class TestWeightsOfOthers:
    """Somebody writes to the weights between two calls: nothing kept may be used again."""

    @pytest.mark.parametrize("how", ["data", "in place", "replaced"])
    def test_a_change_of_weights_is_noticed(self, load_pipe, how):
        pipe, fresh = load_pipe(), load_pipe()
        before = pipe(**CALL)
        for model in (pipe.model, fresh.model):
            for block in model.layers:
                if how == "data":
                    block.qkv_proj.data.mul_(0.5)
                elif how == "in place":
                    with torch.no_grad():
                        block.qkv_proj.mul_(0.5)
                else:
                    block.qkv_proj.data = block.qkv_proj.data * 0.5
        found = pipe(**CALL)
        assert torch.equal(found, fresh(**CALL))
        assert not torch.equal(found, before)

    def test_plans_and_adapters_are_no_change(self, load_pipe):
        """Where layers lie, and what adapters make of them, keeps the conditions."""
        pipe = load_pipe()
        pipe(**CALL)
        for resident in (0, 3, 1, 3):
            plan = MemoryPlan.plain(resident, kept_bytes=1 << 30)
            pipe(**CALL, memory=plan)
            kept = pipe.engine.cache.used_rows
            assert kept and len(pipe.engine.cache)
            pipe(**CALL, memory=plan)
            assert pipe.engine.cache.used_rows == kept

    @pytest.mark.parametrize(
        "move", [lambda m: m.half(), lambda m: m.to(torch.float32), lambda m: m.cpu()]
    )
    def test_the_model_alone_is_not_moved(self, load_pipe, expected, move):
        pipe = load_pipe()
        with pytest.raises(RequestError, match=r"pipe\.to"):
            move(pipe.model)
        assert torch.equal(pipe(**CALL), expected[0])

    def test_another_model_is_refused(self, load_pipe):
        pipe = load_pipe()
        with pytest.raises(AttributeError):
            pipe.model = load_pipe().model


class TestMoving:
    def test_dtypes_and_devices_as_diffusers_takes_them(self, load_pipe, expected):
        half = load_pipe(dtype="bfloat16")
        assert torch.equal(half.to(torch.float32)(**CALL), expected[0])
        assert torch.equal(half.to("cpu", torch.bfloat16).to(dtype="float32")(**CALL), expected[0])
        assert half.to(device="cpu") is half and half.dtype == torch.float32

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("cpu", "cpu"), "one device"),
            ((torch.float32, torch.float32), "one device and one dtype"),
            ((), "needs a device or a dtype"),
            ((torch.float16,), "overflows"),
            ((torch.float64,), "bfloat16 or float32"),
            (("no such device",), "can't be used"),
            ((None,), "needs a device"),
        ],
    )
    def test_what_is_neither_is_refused(self, pipe, arguments, message):
        with pytest.raises(RequestError, match=message):
            pipe.to(*arguments)

    @pytest.mark.parametrize(
        "copy", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__
    )
    def test_copies_are_refused_in_one_line(self, pipe, copy):
        with pytest.raises(OmniGenError, match="from_pretrained"):
            copy(pipe)


FORKED = """
import os, sys, torch
torch.set_num_threads({threads})
from omnigen_fast import MemoryPlan, OmniGenError, OmniGenPipeline
pipe = OmniGenPipeline.from_pretrained({folder!r}, dtype="float32")
call = dict(prompt="A cat.", height=64, width=64, num_inference_steps=2, seed=1, progress=False,
            output_type="latent", memory=MemoryPlan.plain(0))
expected = pipe(**call)
child = os.fork()
if not child:
    try:
        same = torch.equal(pipe(**call), expected)
        os._exit(0 if same else 3)
    except OmniGenError as error:
        print(error)
        os._exit(4)
assert torch.equal(pipe(**call), expected)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow_for("1-0")
@pytest.mark.parametrize(("threads", "status"), [(1, 0), (2, 4)])
def test_a_forked_child_computes_or_says_why_not(threads, status):
    """After streamed layers, whose copies run in a thread that the child has not."""
    code = FORKED.format(threads=threads, folder=str(TINY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert not status or "spawn" in done.stdout
