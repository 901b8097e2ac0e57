"""The palette: requests of many kinds on the golden checkpoint, and plans for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from golden_cases import GOLDEN

from omnigen_fast.memory.plan import MemoryPlan

LAYERS = 3  # of the golden checkpoint
PLAIN = MemoryPlan.plain(LAYERS, kept_bytes=8 << 20)
PLANS = {
    "resident": PLAIN,
    "branch by branch": replace(PLAIN, branches_per_pass=1),
    "rows in chunks": replace(PLAIN, mlp_rows=16),
    "strips": replace(PLAIN, strip_rows=2),
    "recomputed": replace(PLAIN, cache="none", branches_per_pass=1),
    "streamed": replace(PLAIN, resident_layers=1, cache="ring", strip_rows=2, vae_resident=False),
    "all streamed": replace(PLAIN, resident_layers=0),
    "keys on the host": replace(PLAIN, cache="ring"),
}
COMMON: dict[str, Any] = {
    "height": 48,
    "width": 32,
    "num_inference_steps": 3,
    "output_type": "pt",
    "progress": False,
    "max_input_image_size": 64,
}


def picture(name: str) -> str:
    return str(GOLDEN / "images" / f"{name}.png")


def pattern(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _palette() -> dict[str, dict[str, Any]]:
    """Forty requests; each by itself gives the same picture whatever came before it."""
    found: dict[str, dict[str, Any]] = {}
    for index, (height, width) in enumerate([(32, 32), (48, 32), (32, 64), (64, 64), (96, 48)]):
        for steps in (1, 3):
            found[f"text {height}x{width}, {steps} steps"] = {
                "prompt": f"A cat on a mat, number {index}.",
                "height": height,
                "width": width,
                "num_inference_steps": steps,
            }
    one, two = "<img><|image_1|></img>", "<img><|image_2|></img>"
    for name in ("astronaut", "cat", "coffee", "rocket"):
        images = {"input_images": [picture(name)]}
        found[f"edit of {name}"] = {"prompt": f"{one} at night", **images}
        found[f"edit of {name}, its size"] = {
            "prompt": f"{one} in winter",
            "use_input_image_size_as_output": True,
            **images,
        }
    for index, size in enumerate([(32, 32), (48, 80), (64, 64), (100, 30)]):
        images = {"input_images": [pattern(*size, seed=index)]}
        found[f"edit of an array {size}"] = {"prompt": f"Make {one} green.", **images}
    for first, second in (("cat", "rocket"), ("coffee", "cat")):
        found[f"{first} and {second}"] = {
            "prompt": f"{one} beside {two}",
            "input_images": [picture(first), picture(second)],
        }
        found[f"{first} and {second}, one guidance"] = {
            "prompt": f"{one} in front of {two}",
            "input_images": [picture(first), picture(second)],
            "use_img_guidance": False,
        }
    found["batch"] = {"prompt": ["A cat.", "A red bicycle in the rain.", "Snow."]}
    found["batch of edits"] = {
        "prompt": [f"{one} blue", f"{one} with {two}"],
        "input_images": [[picture("cat")], [picture("rocket"), picture("coffee")]],
    }
    found["mixed batch"] = {
        "prompt": ["A tree.", f"{one} red"],
        "input_images": [[], [picture("coffee")]],
    }
    found["four of one prompt"] = {"prompt": "A tree.", "num_images_per_prompt": 4}
    found["two of an edit"] = {
        "prompt": f"{one} red",
        "input_images": [picture("cat")],
        "num_images_per_prompt": 2,
    }
    found["negative prompt"] = {"prompt": "A house.", "negative_prompt": "grey, blurred"}
    found["negative prompts"] = {"prompt": ["A house.", "A lake."], "negative_prompt": ["", "fog"]}
    found["no guidance"] = {"prompt": "A house.", "guidance_scale": 1.0}
    found["one by one"] = {"prompt": "A house.", "separate_cfg_infer": True}
    found["no cache"] = {"prompt": "A house.", "use_kv_cache": False}
    found["cache on the host"] = {"prompt": "A house.", "offload_kv_cache": True}
    found["long prompt"] = {"prompt": "A wide landscape of mountains under an evening sky. " * 12}
    found["latents"] = {"prompt": "A boat.", "output_type": "latent"}
    found["arrays"] = {"prompt": "A boat.", "output_type": "np"}
    return {name: {**COMMON, "seed": seed, **one} for seed, (name, one) in enumerate(found.items())}


PALETTE = _palette()

SIX = {  # request, plan, whether with the LoRA
    "text": ("text 48x32, 3 steps", "resident", False),
    "edit": ("edit of cat", "resident", False),
    "two images": ("cat and rocket", "resident", False),
    "batch": ("batch", "resident", False),
    "streamed": ("edit of coffee", "streamed", False),
    "LoRA": ("text 64x64, 3 steps", "resident", True),
}
REFUSED: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"prompt": "A cat.", "height": 1000},
    {"prompt": "A cat.", "num_inference_steps": 0},
    {"prompt": "<img><|image_2|></img> red", "input_images": [picture("cat")]},
    {"prompt": "<img><|image_1|></img> red"},
    {"prompt": "cat " * 200_000},
    {"prompt": "A cat.", "seed": "seven"},
    {"prompt": "A cat.", "memory": "some"},
    {"prompt": "A cat.", "latents": np.zeros(4)},
)
