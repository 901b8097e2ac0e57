"""LoRAs that the page was started with: chosen by name, one call at a time."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from golden_cases import GOLDEN

from omnigen_fast.errors import OmniGenError, RequestError
from omnigen_fast.page.loras import NONE, Loras

LORA = str(GOLDEN / "lora")


@pytest.fixture
def loras(pipe):
    yield Loras(pipe, [(LORA, 0.5), (LORA, 1.0)])
    pipe.unload_lora_weights()


def picture(pipe, loras, chosen):
    with loras.acting(chosen):
        (made,) = pipe("A cat.", height=32, width=32, num_inference_steps=1, seed=0, progress=False)
    return np.array(made)


def test_none_acts_until_it_is_chosen(pipe, loras):
    (plain,) = pipe("A cat.", height=32, width=32, num_inference_steps=1, seed=0, progress=False)
    assert list(loras.offered) == ["lora", "lora (2)"]  # not their folders
    np.testing.assert_array_equal(picture(pipe, loras, loras.choice(NONE, 1)), np.array(plain))
    strong = picture(pipe, loras, loras.choice("lora (2)", 1))
    assert (strong != np.array(plain)).any()
    # the strength is a factor on the weight that it was started with
    half = picture(pipe, loras, loras.choice("lora", 1))
    np.testing.assert_array_equal(half, picture(pipe, loras, loras.choice("lora (2)", 0.5)))
    np.testing.assert_array_equal(strong, picture(pipe, loras, loras.choice("lora", 2)))
    np.testing.assert_array_equal(picture(pipe, loras, None), np.array(plain))


def test_as_the_command_line_takes_them(loras):
    assert str(loras.choice("lora", 1)) == f"{LORA}:0.5"
    assert str(loras.choice("lora", 2)) == LORA
    assert loras.choice(None, 1) is None


@pytest.mark.parametrize(
    ("name", "strength", "message"),
    [
        (LORA, 1, "the LoRA must be one of none, lora, lora (2), got "),
        ("../lora", 1, "must be one of"),
        (7, 1, "must be one of"),
        ("lora", None, "LoRA strength must be a finite number"),
        ("lora", "1", "LoRA strength must be a finite number"),
        ("lora", 1e300, "LoRA strength must be at most"),
    ],
)
def test_other_choices_are_refused(loras, name, strength, message):
    with pytest.raises(RequestError) as caught:
        loras.choice(name, strength)
    assert message in str(caught.value)


def test_one_call_at_a_time(pipe, loras):
    """The weights stay those of a call until it has ended."""
    order = []

    def second():
        with loras.acting(None):
            order.append(pipe.get_active_adapters())

    with loras.acting(loras.choice("lora", 1)):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append(pipe.get_active_adapters())
    waiting.join(60)
    assert order == [["lora"], []]


def test_one_that_does_not_fit_is_refused_at_the_start(pipe, tmp_path):
    with pytest.raises(OmniGenError, match="none"):
        Loras(pipe, [(str(tmp_path / "none.safetensors"), 1.0)])
