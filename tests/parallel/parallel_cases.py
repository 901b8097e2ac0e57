"""Calls whose pictures must not depend on how many ranks make them, and how ranks make them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from golden_cases import GOLDEN, TINY, golden_request

from omnigen_fast.memory.plan import MemoryPlan

PLAIN = MemoryPlan.plain(layers=3, kept_bytes=16 << 20)
GOLDENS = ("text", "one_image", "two_images", "mixed_batch")
TEXT = {
    "prompt": "A cat on a mat.",
    "height": 80,  # 15 noise tokens, which neither 2 nor 4 nor 6 divides
    "width": 48,
    "num_inference_steps": 3,
    "guidance_scale": 2.5,
    "max_input_image_size": 96,
    "seed": 11,
}
EDIT = {
    **TEXT,
    "prompt": "<img><|image_1|></img> no cup",
    "input_images": [str(GOLDEN / "images" / "coffee.png")],
}
MASKED = {
    **EDIT,
    "mask_image": EDIT["input_images"][0],
    "mask_blur": 3,
    "strength": 0.7,
    "use_input_image_size_as_output": True,
    "height": None,
    "width": None,
}
CALLS: dict[str, dict[str, Any]] = {
    "uneven text": TEXT,
    "uneven edit": EDIT,
    "streamed": {**EDIT, "memory": replace(PLAIN, resident_layers=1, cache="ring")},
    "recomputed": {**EDIT, "memory": replace(PLAIN, cache="none")},
    "one branch at a time": {**EDIT, "memory": replace(PLAIN, branches_per_pass=1)},
    "strips": {**EDIT, "memory": replace(PLAIN, strip_rows=1, strips_on_host=True)},
    "intervals": {
        **EDIT,
        "num_inference_steps": 4,
        "guidance_interval": (0, 0.6),
        "image_guidance_interval": (0.3, 1),
    },
    "no guidance": {**TEXT, "guidance_scale": 1},
    "masked": MASKED,
    "reuse": {**EDIT, "num_inference_steps": 14, "reuse": 5e-3},
    "two evaluations": {**EDIT, "solver": "heun"},
    "several pictures": {
        **EDIT,
        "prompt": [TEXT["prompt"], EDIT["prompt"]],
        "input_images": [[], EDIT["input_images"]],
        "num_images_per_prompt": 2,
    },
    "negative like the prompt": {**TEXT, "negative_prompt": TEXT["prompt"]},
}
# How a model is loaded: (arguments, a LoRA).
LOADED: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({}, True),
    "int8": ({"weights": "int8"}, False),
    "nf4": ({"weights": "nf4"}, False),
    "bfloat16 VAE": ({"vae_dtype": "bfloat16"}, False),
    "products in int8": ({"compute": "int8"}, False),
}


def load(parallel: Any = None, lora: bool = False, **options: Any) -> Any:
    """A pipeline in float32 on the golden checkpoint."""
    from omnigen_fast import OmniGenPipeline

    arguments = {"dtype": "float32", "memory": PLAIN, **options}
    pipe = OmniGenPipeline.from_pretrained(TINY, parallel=parallel, **arguments)
    if lora:
        pipe.merge_lora(GOLDEN / "lora")
    return pipe


def latents_and_image(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """What a call makes: the last latents, and the image where this rank returns it."""
    kept = {}

    def keep(_, step, time, tensors):
        kept["latents"] = tensors["latents"].clone()

    found = pipe(**call, output_type="pt", progress=False, callback_on_step_end=keep)
    return {**kept, "image": found if len(found) else None}


def golden_calls() -> dict[str, dict[str, Any]]:
    return {name: golden_request(name) for name in GOLDENS}
