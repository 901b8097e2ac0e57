"""omnigen_fast.json of a model folder: arguments that suit the model, and what it can draw.

A model needs none. The bundled one has it: it makes smaller pictures than the released model, in
fewer steps, and knows only some words.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import CheckpointError, brief
from .regular_files import read_json

SHIPPED = ("shapes",)  # models bundled with this package
FILE = "omnigen_fast.json"
MAX_VOCABULARY = 240  # characters: it is part of a message
_INTEGERS = ("height", "width", "max_input_image_size", "num_inference_steps")
_NUMBERS = ("guidance_scale", "img_guidance_scale")


@dataclass(frozen=True)
class ModelDefaults:
    """What suits a model."""

    call: Mapping[str, int | float] = field(default_factory=dict)  # arguments of a call
    vocabulary: str | None = None  # a sentence on what it draws, if it knows only some words


def shipped_folder(name: str) -> str:
    """The folder of a model in `SHIPPED`."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "models", name)


def defaults_of(model: str) -> ModelDefaults:
    """Of a bundled or local model by its name; those of a model on the hub are not looked up.

    Raises CheckpointError if its file is malformed.
    """
    if model in SHIPPED:
        return read_defaults(shipped_folder(model))
    return read_defaults(os.path.dirname(model) if os.path.isfile(model) else model)


def read_defaults(folder: str | os.PathLike[str]) -> ModelDefaults:
    """Of a model folder; empty without the file.

    Raises CheckpointError if the file is malformed.
    """
    path = os.path.join(folder, FILE)
    if not os.path.lexists(path):
        return ModelDefaults()
    values = read_json(path)
    call, vocabulary = values.get("call", {}), values.get("vocabulary")
    known = (*_INTEGERS, *_NUMBERS)
    unknown = [*(values.keys() - {"call", "vocabulary"})]
    if isinstance(call, dict):
        unknown += call.keys() - set(known)
    if unknown or not isinstance(call, dict):
        raise CheckpointError(
            f"{path}: it must have call, an object of {', '.join(known)}, and vocabulary, got "
            f"{brief(min(unknown, default=call))}"
        )
    for name, value in call.items():
        kinds = int if name in _INTEGERS else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"{path}: {name} must be a number, got {brief(value)}")
    if vocabulary is not None and not isinstance(vocabulary, str):
        raise CheckpointError(f"{path}: vocabulary must be a text, got {brief(vocabulary)}")
    return ModelDefaults(call, vocabulary and vocabulary[:MAX_VOCABULARY])
