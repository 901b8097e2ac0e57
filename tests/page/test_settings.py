"""From the request that a picture carries to the page's fields, and what they can't say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omnigen_fast.errors import RequestError
from omnigen_fast.fewer_steps import preset
from omnigen_fast.page.loras import NONE, Loras, Offered
from omnigen_fast.page.record import Record, RecordedFile
from omnigen_fast.page.settings import fields_of
from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT

MADE = {
    "height": 48,
    "width": 64,
    "num_inference_steps": 7,
    "guidance_scale": 3.5,
    "use_img_guidance": True,
    "img_guidance_scale": 1.2,
    "max_input_image_size": 512,
    "use_input_image_size_as_output": False,
    "num_images_per_prompt": 1,
    "seed": 77,
    "dtype": "float32",
}
RECORD = Record("tiny", ("A cat.",), ((),), None, MADE)
FILE = RecordedFile("a.png", None)


def read(record: Record, loras: Loras | None = None, **loading):
    return fields_of(record, loras or Loras(None), "tiny", "float32", loading)


def test_every_field_that_was_recorded():
    values, notes = read(RECORD)
    assert notes == []
    assert values["negative_prompt"] == DEFAULT_NEGATIVE_PROMPT
    for name, value in {
        "height": 48,
        "width": 64,
        "steps": 7,
        "guidance_scale": 3.5,
        "seed": 77,
        "img_guidance_scale": 1.2,
        "max_input_image_size": 512,
        "randomize": False,
        "use_input_image_size": False,
        "prompt": "A cat.",
        "lora": NONE,
        "pictures": 1,
        "image_1": None,
        "image_2": None,
        "image_3": None,
        "quality": "exact",
    }.items():
        assert values[name] == value, name


def test_the_picture_of_a_call_of_several():
    made = {**MADE, "num_images_per_prompt": 2}
    record = Record("tiny", ("A.", "B."), ((), ()), ("x", "y"), made, index=2)
    values, notes = read(record)
    assert values["prompt"] == "B." and values["negative_prompt"] == "y"
    assert notes == ["it was made in one call with others, which the page does one by one"]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"model": "other"}, "it was made with the model other"),
        ({"input_images": ((FILE,),)}, "upload its input image again"),
        ({"input_images": ((FILE,) * 2,)}, "upload its 2 input images again"),
        ({"input_images": ((FILE,) * 4,)}, "the page takes 3"),
        ({"mask_image": FILE}, "paint its mask again"),
        ({"loras": ("/x/style",)}, "start the page with --lora /x/style for its LoRA"),
        ({"latents": FILE}, "latents"),
        ({"vae_path": "v"}, "VAE v"),
        ({"precision": {"weights": "int8"}}, "weights=int8"),
        ({"arguments": {**MADE, "dtype": "bfloat16"}}, "dtype=bfloat16"),
        ({"arguments": {**MADE, "solver": "heun"}}, "solver=heun"),
        ({"arguments": {**MADE, "use_img_guidance": False}}, "use_img_guidance=False"),
        ({"model": "a\x1b[2J\n"}, "made with the model a\\x1b[2J"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_the_fields_cannot_say_is_said(change, note):
    _, notes = read(replace(RECORD, **change))
    assert note in "; ".join(notes)


@pytest.mark.parametrize("quality", ["high", "fast"])
def test_what_a_quality_stands_for_needs_no_word(quality):
    from omnigen_fast.page.record import recorded_arguments

    made = recorded_arguments({**MADE, **preset(quality), "quality": quality})
    values, notes = read(replace(RECORD, arguments=made))
    assert values["quality"] == quality and notes == []


def test_the_lora_that_is_offered():
    loras = Loras(None)
    loras.offered["style"] = Offered("style", "/x/style", 0.5)
    for recorded, strength in {"/x/style:0.5": 1, "/x/style:0.25": 0.5, "/x/style": 2}.items():
        values, notes = read(replace(RECORD, loras=(recorded,)), loras)
        assert (values["lora"], values["lora_strength"]) == ("style", strength), recorded
        assert notes == []
    values, notes = read(replace(RECORD, loras=("/x/style", "/y")), loras)
    assert values["lora"] == NONE and "--lora /x/style --lora /y" in notes[0]


def test_numbers_that_no_browser_holds():
    values, _ = read(replace(RECORD, arguments={**MADE, "seed": (1 << 63) + 1}))
    assert (values["seed"], values["seeds"]) == (0, str((1 << 63) + 1))
    for name, value in {"height": 10**30, "guidance_scale": float("inf")}.items():
        with pytest.raises(RequestError, match=f"{name}=.* which no page can use"):
            read(replace(RECORD, arguments={**MADE, name: value}))
