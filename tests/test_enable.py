"""diffusers' own pipeline on this runtime: its call, callbacks and schedulers, our images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_cases import CASES, GOLDEN, golden_request, golden_result, relative_error

import omnigen_fast

ROOT = Path(__file__).parents[1]
FLOAT32 = [name for name, case in CASES.items() if not (case.get("dtype") or case.get("lora"))]
# what only the original's pipeline has
OURS_ALONE = ("seed", "separate_cfg_infer", "use_img_guidance", "use_kv_cache", "negative_prompt")
TOLERANCE = 1e-5
CAT = "<img><|image_1|></img> The cat at night."
SMALL = {"height": 32, "width": 48, "num_inference_steps": 3}
EDIT = {"prompt": CAT, "input_images": [str(GOLDEN / "images/cat.png")], **SMALL}
EDIT["max_input_image_size"] = 64


@pytest.fixture(scope="module")
def build(diffusers_folder):
    """Builds diffusers' own pipeline on the golden checkpoint, as it is without this project."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        OmniGenPipeline,
        OmniGenTransformer2DModel,
    )
    from transformers import PreTrainedTokenizerFast

    omnigen_fast.enable(OmniGenPipeline)  # torchvision may be missing

    def make(dtype: torch.dtype = torch.float32):
        folder = diffusers_folder
        transformer = OmniGenTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype
        )
        pipe = OmniGenPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            tokenizer=PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer/tokenizer.json")
            ),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    yield make
    omnigen_fast.disable(OmniGenPipeline)


@pytest.fixture(scope="module")
def shared(build):
    """One pipeline for all tests that leave it as it is."""
    return build()


@pytest.fixture
def plain(shared):
    yield omnigen_fast.disable(shared)
    omnigen_fast.disable(shared)


@pytest.fixture
def enabled(plain):
    return omnigen_fast.enable(plain)


def draw(pipe, seed: int = 0, output_type: str = "latent", **arguments) -> torch.Tensor:
    return pipe(
        **arguments, generator=torch.Generator().manual_seed(seed), output_type=output_type
    ).images


def theirs(name: str) -> dict:
    """A golden case's arguments as diffusers names them."""
    request = golden_request(name)
    request["seed"] = request.get("seed", 0)
    for argument in set(OURS_ALONE) - {"seed"}:
        request.pop(argument, None)
    return request


@pytest.mark.parametrize("name", FLOAT32)
def test_images_are_the_originals(enabled, name):
    request = golden_request(name)
    if request.get("use_img_guidance") is False or "negative_prompt" in request:
        pytest.skip("diffusers has no such argument")
    expected = golden_result(name)
    assert relative_error(draw(enabled, **theirs(name)), expected["latents"]) < TOLERANCE
    image = draw(enabled, output_type="pt", **theirs(name))
    assert relative_error(image, expected["image"]) < TOLERANCE
