"""convert: a model as others store it, written as a folder that `from_pretrained` loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import CheckpointError, OmniGenError, RequestError
from .forms import Part
from .model_defaults import FILE as DEFAULTS_FILE
from .parameters import parameter_shapes
from .processor import Processor
from .quantised import QuantisedWeight, quantised
from .regular_files import read_json
from .vae.vae import Vae, find_vae
from .weights.checkpoint import (
    Checkpoint,
    file_parts,
    find_folders,
    find_tokenizer,
    form_metadata,
    is_quantised,
    layout_of,
    read_config,
)
from .weights.files import VAE_FILES, check_shapes, locate, resolve
from .weights.foreign import ForeignWeights, Read, all_finite, open_foreign
from .weights.names import ORIGINAL, TensorRows, layout_sources
from .weights.writing import write_safetensors
from .whole_files import temporary_folder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BASE_FILES = (
    "*.json",
    "transformer/config.json",
    "tokenizer/*.json",
    "vae/*.json",
    "vae/*.safetensors",
)


@dataclass(frozen=True)
class Converted:
    """What was written."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class _Parts:
    """Where everything but the weights comes from."""

    config: str
    tokenizer: str
    vae: str


def convert(
    model: str,
    out: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weights: str | None = None,
    base: str | None = None,
    vae_path: str | None = None,
) -> Converted:
    """Writes a model in the original's layout, under a temporary name until it is complete.

    Args:
        model: a folder, or a .safetensors, .gguf or `torch.save` file, with the weights of OmniGen
            in either layout; float8 is multiplied by its scales.
        out: the folder to make.
        dtype: of the written weights: bfloat16, float16 or float32.
        weights: one of `forms.FORMS`, in which the matrices of the layers are written instead. They
            load without being quantised again, and are what quantising at load gives, bit for bit.
            Float8 weights with one scale each or one for each row stay as they are in "fp8".
        base: folder or hub id of a model; what is missing beside the weights is taken from it.
        vae_path: folder, file or hub id of the VAE.

    Raises:
        CheckpointError: files are missing or malformed, or not OmniGen's.
        RequestError: `out` exists.
        OSError: `out` can't be written.
    """
    _check_out(out)
    foreign = open_foreign(model)
    parts = _find_parts(model, base, vae_path)
    values = read_json(parts.config)
    values.pop("quantization_config", None)  # the weights say what they are
    layout = layout_of(foreign.shapes, default=ORIGINAL)
    config = read_config(values, foreign.shapes, layout)
    sources = layout_sources(config, layout)
    expected = {part.name: part.shape for some in sources.values() for part in some}
    check_shapes(foreign.where, foreign.shapes, expected)
    Processor.from_file(parts.tokenizer, config)
    vae = Vae.from_folder(parts.vae, torch.device("cpu")).autoencoder.state_dict()
    # in the original's layout each of our parameters is one tensor
    written = layout_sources(config, ORIGINAL)
    tensors = file_parts(written, weights, _name(dtype))
    vae_parts = {name: Part(tuple(value.shape), "float32") for name, value in vae.items()}
    nbytes = sum(part.nbytes for part in (*tensors.values(), *vae_parts.values()))
    _check_room(out, nbytes)
    with _new_folder(out) as folder:
        with foreign.opened() as read:

            def values_of_tensors() -> Iterator[Tensor]:
                for name, rows in sources.items():
                    if weights is not None and is_quantised(name):
                        yield from _quantised(foreign, read, rows, weights).parts.values()
                    else:
                        value = _stacked([read(one.name) for one in rows])
                        yield _converted(value, written[name][0].name, dtype)

            path = os.path.join(folder, "model.safetensors")
            write_safetensors(path, tensors, values_of_tensors(), form_metadata(weights))
        _write_json(os.path.join(folder, "config.json"), _config_values(values, config, dtype))
        shutil.copyfile(parts.tokenizer, os.path.join(folder, "tokenizer.json"))
        defaults = os.path.join(os.path.dirname(parts.config), DEFAULTS_FILE)
        if os.path.isfile(defaults):
            shutil.copyfile(defaults, os.path.join(folder, DEFAULTS_FILE))
        os.mkdir(os.path.join(folder, "vae"))
        path = os.path.join(folder, "vae", "diffusion_pytorch_model.safetensors")
        values_of_vae = (_converted(value, name, torch.float32) for name, value in vae.items())
        write_safetensors(path, vae_parts, values_of_vae)
        vae_config = read_json(os.path.join(find_vae(parts.vae)[0], "config.json"))
        _write_json(os.path.join(folder, "vae", "config.json"), vae_config)
        Checkpoint.open(folder)
    parameters = sum(prod(shape) for shape in parameter_shapes(config).values())
    return Converted(parameters, nbytes)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(list(values))


def _quantised(
    foreign: ForeignWeights, read: Read, rows: Sequence[TensorRows], form: str
) -> QuantisedWeight:
    """A parameter's weight in a form; float8 that fits it as it is stored."""
    if form == "fp8":
        kept = [foreign.float8(one.name) for one in rows]
        if all(one is not None for one in kept):
            parts = [one for one in kept if one is not None]
            joined = {part: _stacked([one[part] for one in parts]) for part in parts[0]}
            return QuantisedWeight(form, rows[0].shape[1], joined)
    value = _stacked([read(one.name) for one in rows])
    return quantised(rows[0].name, value, form)


def _converted(value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype; raises CheckpointError for values that are too large for it."""
    converted = value.to(dtype)
    if not all_finite(converted):
        raise CheckpointError(f"{name} overflows {dtype}; choose bfloat16 or float32")
    return converted


def _find_parts(model: str, base: str | None, vae_path: str | None) -> _Parts:
    """Config, tokenizer and VAE: beside the weights, else from the base."""
    folders = [find_folders(model)]
    if base is not None:
        folders.append(find_folders(resolve(base, patterns=_BASE_FILES)))

    def first(what: str, paths: list[str], also: str = "") -> str:
        for path in paths:
            if os.path.lexists(path):
                return path
        raise CheckpointError(
            f"{model} has no {what} beside it{' and neither has the base' * (base is not None)}; "
            f"give a folder that has it as --base{also}"
        )

    return _Parts(
        first("config.json", [os.path.join(inner, "config.json") for _, inner in folders]),
        first("tokenizer.json", [find_tokenizer(folder) for folder, _ in folders]),
        locate(vae_path, patterns=VAE_FILES)
        if vae_path is not None
        else first("vae", [os.path.join(folder, "vae") for folder, _ in folders], " or --vae-path"),
    )


def _config_values(
    values: Mapping[str, Any], config: ModelConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """The config to write: the one that was read if it is the original's."""
    written = dict(values) if "num_hidden_layers" in values else config.to_phi3()
    return written | {"torch_dtype": _name(dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: str, values: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)


# The folder


def _check_out(out: str) -> None:
    """Raises now what would fail after the work."""
    if os.path.lexists(out):
        raise RequestError(f"{out} exists; nothing is overwritten: give a new folder")
    parent = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(parent):
        raise RequestError(f"the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise RequestError(f"the folder {parent} can't be written to")


def _check_room(out: str, nbytes: int) -> None:
    parent = os.path.dirname(os.path.abspath(out))
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OmniGenError(
            f"{parent} has {free / 1e9:.2f} GB free and the model takes {nbytes / 1e9:.2f}; free "
            "some space, or give another folder"
        )


@contextmanager
def _new_folder(out: str) -> Iterator[str]:
    """A folder to write to that becomes `out` in the end, or nothing if the work fails."""
    try:
        with temporary_folder(out) as folder:
            yield folder
            _check_out(out)
            os.rename(folder, out)
    except OSError as error:
        raise OSError(f"{out} can't be written: {error.strerror or error}") from error
