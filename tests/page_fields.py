"""The fields of the page, as its buttons send them."""

from __future__ import annotations

from typing import Any

from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT


def page_fields(**changes: Any) -> list[Any]:
    """The values of a small request in the page's order."""
    fields = {
        "prompt": "A cat.",
        **dict.fromkeys(("image_1", "image_2", "image_3")),
        "height": 32,
        "width": 32,
        "guidance_scale": 2.5,
        "img_guidance_scale": 1.6,
        "steps": 2,
        "seed": 0,
        "randomize": False,
        "max_input_image_size": 32,
        "use_input_image_size": False,
        "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
        "memory": "auto",
        "quality": "exact",
        "mask": None,
        "mask_blur": 0,
        "pictures": 1,
        "seeds": "",
        "lora": "none",
        "lora_strength": 1,
    }
    return list((fields | changes).values())
