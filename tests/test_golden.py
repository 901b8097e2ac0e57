"""The original's images, case by case, from both layouts."""

from __future__ import annotations

import shutil

import pytest
import torch
from golden_cases import CASES, GOLDEN, golden_request, golden_result, relative_error
from safetensors.torch import load_file, save_file

from omnigen_fast.call import draw_noise
from omnigen_fast.guidance import guidance_branches
from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT, make_request

FLOAT32 = [name for name, case in CASES.items() if case.get("dtype") is None]
BFLOAT16 = [name for name, case in CASES.items() if case.get("dtype") == "bfloat16"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pipes(load_pipe, diffusers_folder):
    return {"original": load_pipe(), "diffusers": load_pipe(diffusers_folder)}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_is_the_originals(pipes, layout, name):
    pipe, expected = pipes[layout], golden_result(name)
    if CASES[name].get("lora"):
        pipe.merge_lora(GOLDEN / "lora")
    latents_after = {}

    def keep(_, step, time, tensors):
        latents_after[step] = (time, tensors["latents"].clone())

    try:
        image = pipe(
            **golden_request(name), output_type="pt", progress=False, callback_on_step_end=keep
        )
    finally:
        pipe.unload_lora_weights()
    last = max(latents_after)
    assert relative_error(image, expected["image"]) < TOLERANCE
    assert relative_error(latents_after[last][1], expected["latents"]) < TOLERANCE
    velocity = (latents_after[0][1] - expected["noise"]) * (last + 1)
    assert relative_error(velocity, expected["first_prediction"]) < TOLERANCE


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_as_close_as_the_originals(load_pipe, name):
    exact, original = golden_result(name.removesuffix("_bfloat16")), golden_result(name)
    pipe = load_pipe(dtype="bfloat16")
    for output_type, key in (("latent", "latents"), ("pt", "image")):
        found = pipe(**golden_request(name), output_type=output_type, progress=False)
        assert relative_error(found, exact[key]) <= 1.5 * relative_error(original[key], exact[key])


@pytest.mark.parametrize("name", FLOAT32)
def test_tokens_are_the_originals(shared_pipe, name):
    """Every branch's token ids; the original pads on the left with 2."""
    request = make_request(shared_pipe.config, **_defaults(golden_request(name)))
    expected = golden_result(name)
    kinds = sorted(key for key in expected if key.startswith("input_ids"))
    if len(kinds) == 1:  # all branches are rows of one batch: kind by kind
        rows = list(expected[kinds[0]])
        kind_rows = [rows[i :: len(request.prompts)] for i in range(len(request.prompts))]
    else:
        kind_rows = [[expected[k][i] for k in kinds] for i in range(len(request.prompts))]
    for prompt, rows in zip(request.prompts, kind_rows):
        branches = guidance_branches(prompt, request.guidance)
        for (branch, _), row in zip(branches, rows, strict=False):
            ids = shared_pipe.processor.encode(branch, request.noise_tokens, 1).token_ids
            padding = len(row) - len(ids)
            assert (row[:padding] == 2).all()
            assert row[padding:].tolist() == ids.tolist()
        assert len(branches) >= 2


def test_noise_is_the_originals(shared_pipe):
    for name in FLOAT32:
        request = make_request(shared_pipe.config, **_defaults(golden_request(name)))
        noise = draw_noise(request, torch.float32, shared_pipe.device)
        assert torch.equal(noise, golden_result(name)["noise"])


def test_the_built_in_negative_prompt_is_the_originals():
    assert (GOLDEN / "negative_prompt.txt").read_text().strip() == DEFAULT_NEGATIVE_PROMPT


def test_a_lora_of_diffusers_names_is_the_same(load_pipe, tmp_path):
    """The golden adapter with q, k and v apart, as a diffusers user would have it."""
    name = "one_image_lora"
    shutil.copy(GOLDEN / "lora" / "adapter_config.json", tmp_path)
    split = {}
    for key, value in load_file(GOLDEN / "lora" / "adapter_model.safetensors").items():
        key = key.replace("base_model.model.llm.", "transformer.")
        if "qkv_proj" not in key:
            split[key.replace("o_proj", "to_out.0")] = value
            continue
        rows = value.chunk(3) if "lora_B" in key else [value] * 3
        for part, tensor in zip("qkv", rows):
            split[key.replace("qkv_proj", f"to_{part}")] = tensor.clone()
    save_file(split, tmp_path / "adapter_model.safetensors")
    pipe = load_pipe()
    pipe.load_lora_weights(tmp_path)
    found = pipe(**golden_request(name), output_type="latent", progress=False)
    assert relative_error(found, golden_result(name)["latents"]) < TOLERANCE


def _defaults(request):
    return {
        "input_images": None,
        "height": 1024,
        "width": 1024,
        "use_img_guidance": True,
        "img_guidance_scale": 1.6,
        "max_input_image_size": 1024,
        "separate_cfg_infer": None,
        "use_kv_cache": None,
        "offload_kv_cache": None,
        "offload_model": None,
        "use_input_image_size_as_output": False,
        "output_type": "pil",
        "negative_prompt": None,
        "num_images_per_prompt": 1,
        "generator": None,
        "latents": None,
        **request,
    }
