"""From the request that a picture carries to the fields of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RequestError, brief, printable
from ..fewer_steps import QUALITIES, left_to_preset
from ..request import DEFAULT_NEGATIVE_PROMPT
from .loras import NONE, Loras
from .record import RECORDED_OPTIONS, RECORDED_PRECISION, Record

MAX_IMAGES = 3  # that the page has room for
LARGEST_SEED = (1 << 53) - 1  # JSON's integers end here
_FIELDS = {"mask_blur", "quality"}  # the recorded options that the page has fields for


def fields_of(
    record: Record, loras: Loras, model: str, dtype: str, loading: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Values of `job.Fields` by their names, and what the fields can't say, in words.

    Nothing that the record names is opened: neither input images nor LoRAs, of which only those
    that the page offers can be chosen.

    Args:
        record: from an untrusted file.
        loras: that the page offers.
        model, dtype: of the page.
        loading: other arguments that its pipeline was loaded with.

    Raises RequestError for numbers that a browser can't hold.
    """
    made = record.arguments
    per_prompt = max(1, made["num_images_per_prompt"])
    place = min(record.index // per_prompt, len(record.prompts) - 1)
    images = record.input_images[place]
    quality = made.get("quality", QUALITIES[0])
    quality = quality if quality in QUALITIES else QUALITIES[0]
    negatives = record.negative_prompts
    seed, listed = made["seed"], ""
    if abs(seed) > LARGEST_SEED:
        seed, listed = 0, str(seed)[:40]
    values: dict[str, Any] = {
        "prompt": record.prompts[place],
        "height": made["height"],
        "width": made["width"],
        "guidance_scale": made["guidance_scale"],
        "img_guidance_scale": made["img_guidance_scale"],
        "steps": made["num_inference_steps"],
        "seed": seed,
        "randomize": False,
        "max_input_image_size": made["max_input_image_size"],
        "use_input_image_size": made["use_input_image_size_as_output"],
        "negative_prompt": (
            DEFAULT_NEGATIVE_PROMPT
            if negatives is None
            else negatives[min(place, len(negatives) - 1)]
        ),
        "quality": quality,
        "mask_blur": made.get("mask_blur", 0),
        "pictures": 1,
        "seeds": listed,
        "lora": NONE,
        "lora_strength": 1.0,
    }
    if not images:
        values |= dict.fromkeys(("image_1", "image_2", "image_3"))
    notes = []
    if record.model != model:
        notes.append(f"it was made with the model {record.model}")
    if images:
        one = "its input image" if len(images) == 1 else f"its {len(images)} input images"
        notes.append(f"upload {one} again")
    if len(images) > MAX_IMAGES:
        notes.append(f"the page takes {MAX_IMAGES}")
    if record.mask_image:
        notes.append("paint its mask again")
    notes += _lora(record, loras, values)
    if len(record.prompts) * per_prompt > 1:
        notes.append("it was made in one call with others, which the page does one by one")
    others = _not_on_the_page(record, quality)
    if record.vae_path != loading.get("vae_path"):
        others.append(f"VAE {record.vae_path or 'of the model'}")
    here = {name: loading.get(name, usual) for name, usual in RECORDED_PRECISION.items()}
    there = {name: record.precision.get(name, usual) for name, usual in RECORDED_PRECISION.items()}
    others += [f"{name}={there[name]}" for name in here if here[name] != there[name]]
    if made["dtype"] != dtype:
        others.append(f"dtype={made['dtype']}")
    if others:
        notes.append(f"the page has no field for its {', '.join(others)}")
    for name, value in values.items():
        if isinstance(value, int | float) and not abs(value) <= LARGEST_SEED:
            raise RequestError(f"the settings have {name}={brief(value)}, which no page can use")
    return values, [printable(note) for note in notes]


def _lora(record: Record, loras: Loras, values: dict[str, Any]) -> list[str]:
    """Chooses the LoRA if the page offers it; returns what can't be done."""
    if not record.loras:
        return []
    if len(record.loras) == 1:
        for offered in loras.offered.values():
            source, colon, weight = record.loras[0].rpartition(":")
            if record.loras[0] == offered.source:
                source, colon, weight = offered.source, ":", "1"
            try:
                strength = float(weight) / offered.weight
            except (ValueError, ZeroDivisionError):
                continue
            if colon and source == offered.source:
                values |= {"lora": offered.name, "lora_strength": round(strength, 6)}
                return []
    return [f"start the page with --lora {' --lora '.join(record.loras)} for its LoRA"]


def _not_on_the_page(record: Record, quality: str) -> list[str]:
    """Recorded settings that the page has no fields for, unless the quality stands for them."""
    stands_for = left_to_preset({"quality": quality})
    found = [
        f"{name}={record.arguments[name]}"
        for name in RECORDED_OPTIONS
        if name in record.arguments
        and name not in _FIELDS
        and record.arguments[name] != stands_for.get(name)
    ]
    if not record.arguments["use_img_guidance"]:
        found.append("use_img_guidance=False")
    found += ["latents"] * (record.latents is not None)
    return found
