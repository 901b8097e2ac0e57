"""save: an engine's model as a folder that can be loaded again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .engine import Engine
from .errors import OmniGenError, RequestError, brief, first_line
from .linear import Weight
from .model_defaults import FILE as DEFAULTS_FILE
from .quantised import QuantisedWeight, parts_of_weight
from .weights.checkpoint import file_parts, form_metadata
from .weights.lora import merged
from .weights.writing import write_safetensors
from .whole_files import temporary_folder

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
_SAVED = {"model_index.json", "config.json", "vae", "transformer", "tokenizer", "scheduler"}
_SAVED |= {"model.safetensors", DEFAULTS_FILE, *_TOKENIZER_FILES}


def save(engine: Engine, folder: str | os.PathLike[str]) -> None:
    """Writes the model in the layout that it was loaded from, whole or not at all.

    Weights are saved as they are: in the engine's dtype, with adapters merged in. Memory for one
    parameter is enough.

    Args:
        engine: which runs nothing.
        folder: new, empty, or one that was saved before and is replaced.

    Raises:
        RequestError: the folder holds other files, or it is the one that the weights come from.
        OmniGenError: it can't be written.
    """
    target = _checked(folder, engine)
    parent = os.path.dirname(target)
    try:
        os.makedirs(parent, exist_ok=True)
        with temporary_folder(target) as temporary:
            new, old = os.path.join(temporary, "new"), os.path.join(temporary, "old")
            os.mkdir(new)
            _write(engine, new)
            if os.path.isdir(target):
                os.rename(target, old)
            try:
                os.rename(new, target)
            except OSError:
                if os.path.isdir(old):
                    os.rename(old, target)
                raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OmniGenError(f"{target} can't be written: {reason}") from error


def _checked(folder: Any, engine: Engine) -> str:
    """The path of a folder that may be written or replaced."""
    text = os.fspath(folder) if isinstance(folder, str | os.PathLike) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise RequestError(f"save_directory must be the path of a folder, got {brief(folder)}")
    target = os.path.realpath(os.path.expanduser(text))
    if os.path.exists(target) and not os.path.isdir(target):
        raise RequestError(f"{target} is a file; give a folder")
    if target == os.path.realpath(engine.checkpoint.folder):
        raise RequestError(f"the pipeline reads its weights from {target}; give another folder")
    names = set(os.listdir(target)) if os.path.isdir(target) else set()
    saved = "vae" in names and names & {"model.safetensors", "transformer"}
    others = sorted(names - _SAVED if saved else names)
    if others:
        raise RequestError(f"{target} holds other files, such as {others[0]}; give an empty folder")
    return target


def _write(engine: Engine, folder: str) -> None:
    source = engine.checkpoint.folder
    diffusers = os.path.isdir(os.path.join(source, "transformer"))
    weights, tokenizer = (folder, folder)
    if diffusers:
        weights, tokenizer = (os.path.join(folder, name) for name in ("transformer", "tokenizer"))
        scheduler = os.path.join("scheduler", "scheduler_config.json")
        _copy(source, folder, ["model_index.json", scheduler])
        _copy(os.path.join(source, "transformer"), weights, ["config.json"])
    else:
        _copy(source, folder, ["config.json"])
    _copy(os.path.dirname(engine.checkpoint.tokenizer_path), tokenizer, _TOKENIZER_FILES)
    _copy(source, folder, [DEFAULTS_FILE])
    stem = "diffusion_pytorch_model" if diffusers else "model"
    _write_weights(engine, os.path.join(weights, f"{stem}.safetensors"))
    engine.vae.autoencoder.save_pretrained(os.path.join(folder, "vae"))


def _copy(source: str, target: str, names: Iterable[str]) -> None:
    """Copies those of some files that are there, making folders."""
    os.makedirs(target, exist_ok=True)
    for name in names:
        path = os.path.join(source, name)
        if os.path.isfile(path):
            os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
            shutil.copyfile(path, os.path.join(target, name))


def _write_weights(engine: Engine, path: str) -> None:
    """Writes the weights with the checkpoint's names, one parameter at a time."""
    sources, precision = engine.checkpoint.sources, engine.precision.saved
    value_of = _values(engine)

    def tensors() -> Iterator[Tensor]:
        for name, rows in sources.items():
            parts = parts_of_weight(value_of(name))
            for one in rows:
                for part in parts.values():
                    yield part[one.start : one.start + one.shape[0]]

    form = precision.storage if precision.quantised else None
    parts = file_parts(sources, form, precision.arithmetic)
    write_safetensors(path, parts, tensors(), form_metadata(form))


def _values(engine: Engine) -> Callable[[str], Weight]:
    """Reads parameters to the host: those in memory as they are, streamed ones from their files."""
    host, precision = torch.device("cpu"), engine.precision.saved
    adapters = list(engine.loras.applied())

    def value(name: str) -> Weight:
        held = _held(engine, name)
        if isinstance(held, QuantisedWeight) and held.form != precision.storage:
            held = None  # in the form of products
        if held is None:
            return dict(merged(engine.checkpoint, adapters, precision, host, [name]))[name]
        if isinstance(held, QuantisedWeight):
            parts = {part: one.to(host) for part, one in held.parts.items()}
            return QuantisedWeight(held.form, held.shape[1], parts)
        return held.data.to(host, precision.arithmetic_dtype)

    return value


def _held(engine: Engine, name: str) -> Weight | None:
    """A parameter of the model in memory; None if it is streamed, or a mapped file."""
    if name == "pos_embed":
        return None
    found: Weight = engine.model.parameter(name)
    return None if found.is_meta else found
