"""Where a LoRA's tensors are: in a folder, a file, a hub's repository or a state dict."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, RequestError
from ..regular_files import read_json
from .files import FLOATS, check_inside, find_weights, open_file, resolve
from .lora_scale import check_config

_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_FILE = "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"  # diffusers' key in a file's header
_HUB_FILES = (_PEFT_CONFIG, f"{_PEFT_FILE}*", "adapter_model-*.safetensors", _DIFFUSERS_FILE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EXPECTED = "give a LoRA's folder, its .safetensors file or a hub id (owner/name)"

# Bounds of what is read; a LoRA of all matrices of the published model has 600 tensors.
_MAX_TENSORS = 1 << 16
_MAX_JSON_BYTES = 4 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Contents:
    """What a LoRA's file, folder or state dict holds."""

    where: str  # for errors
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] | None  # of PEFT or diffusers


def open_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    weight_name: str | None,
    subfolder: str | None,
    hub: Mapping[str, Any],
) -> Contents:
    """Finds and lists a LoRA's tensors without reading them; arguments as of `read_adapter`."""
    if isinstance(source, Mapping):
        return _from_dict(source)
    if isinstance(source, str | os.PathLike) and isinstance(os.fspath(source), str):
        return _from_path(os.fspath(source), weight_name, subfolder, hub)
    raise RequestError(
        f"a LoRA must be a path, a hub id or a state dict, got {type(source).__name__}; {_EXPECTED}"
    )


def _from_path(
    path: str, weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> Contents:
    for name, value in (("weight_name", weight_name), ("subfolder", subfolder)):
        if value is not None:
            check_inside(name, value)
    if "\0" in path:
        raise RequestError(f"a LoRA's path can't hold {shown(path)}")
    inner = "/".join(part for part in (subfolder, weight_name) if part)
    if os.path.isfile(path):
        return _from_file(path)
    folder = path
    if not os.path.isdir(path):
        if path.startswith((".", "/", "~")) or path.count("/") != 1 or "\\" in path:
            raise CheckpointError(
                f"{shown_path(path)} is not a folder or a file that is there; {_EXPECTED}"
            )
        below = f"{subfolder}/" if subfolder else ""
        patterns = (inner,) if weight_name else tuple(below + name for name in _HUB_FILES)
        if weight_name:  # PEFT's files are scaled by what stands beside them
            patterns += (below + _PEFT_CONFIG,)
        folder = resolve(path, patterns=patterns, **hub)
    folder = os.path.join(folder, subfolder) if subfolder else folder
    if weight_name is None:
        return _from_folder(folder, local=folder == path)
    file = os.path.join(folder, weight_name)
    if not os.path.isfile(file):
        raise CheckpointError(f"{shown_path(path)} has no file {shown(inner)}")
    return _from_file(file)


def _from_folder(folder: str, local: bool) -> Contents:
    def there(name: str) -> bool:
        return os.path.isfile(os.path.join(folder, name))

    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    peft = any(name.startswith("adapter_model") for name in names)
    if there(_PEFT_CONFIG) or peft:
        if there(f"{_PEFT_FILE}.index.json"):
            _check_size(os.path.join(folder, f"{_PEFT_FILE}.index.json"))
        config = _peft_config(folder)
        return _from_files(find_weights(folder, "adapter_model").paths, config)
    if there(_DIFFUSERS_FILE):
        return _from_file(os.path.join(folder, _DIFFUSERS_FILE))
    others = [
        name
        for name in names
        if name.endswith(".safetensors")
        and not name.startswith(("model", "diffusion_pytorch_model", "optimizer", "scheduler"))
    ]
    if len(others) == 1:
        return _from_file(os.path.join(folder, others[0]))
    if others:
        raise CheckpointError(
            f"{shown_path(folder)} has {len(others)} .safetensors files; choose one with "
            f"weight_name={shown(others[0])}"
        )
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise CheckpointError(_pickle(os.path.join(folder, pickles[0])))
    way_out = "" if local else "; name another file with weight_name="
    raise CheckpointError(
        f"{shown_path(folder)} has no LoRA: {_PEFT_CONFIG} does not exist there, nor does "
        f"{_DIFFUSERS_FILE}{way_out}"
    )


def _from_file(path: str) -> Contents:
    if path.endswith(_PICKLES):
        raise CheckpointError(_pickle(path))
    config = None
    folder, name = os.path.split(path)
    if name == _PEFT_FILE and os.path.isfile(os.path.join(folder, _PEFT_CONFIG)):
        config = _peft_config(folder)
    return _from_files([path], config)


def _from_files(paths: Sequence[str], config: Mapping[str, Any] | None) -> Contents:
    where = shown_path(paths[0])
    tensors: dict[str, Stored] = {}
    for path in paths:
        file = open_file(path, torch.device("cpu"))
        names = file.keys()
        _check_count(where, len(tensors) + len(names))
        for name in names:
            if name in tensors:
                raise CheckpointError(f"{where}: {shown(name)} is in two of its files")
            header = file.get_slice(name)
            tensors[name] = _stored(file, name, tuple(header.get_shape()), header.get_dtype())
        if config is None:
            config = _metadata(path, file.metadata() or {})
    return Contents(where, tensors, config)


def _stored(file: Any, name: str, shape: tuple[int, ...], dtype: str) -> Stored:
    return Stored(shape, dtype, dtype in FLOATS, lambda: file.get_tensor(name))


def _from_dict(tensors: Mapping[Any, Any]) -> Contents:
    where = "the state dict"
    _check_count(where, len(tensors))
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise RequestError(
                f"{where} must hold tensors by name, got {type(tensor).__name__} under "
                f"{shown(name)}"
            )
        if tensor.is_meta or tensor.is_nested or tensor.is_quantized:
            raise RequestError(f"{where}: {shown(name)} holds no plain values; give dense tensors")
        if tensor.layout != torch.strided:
            raise RequestError(f"{where}: {shown(name)} is {tensor.layout}; give dense tensors")
        dtype = str(tensor.dtype).removeprefix("torch.")
        floating = tensor.dtype.is_floating_point
        found[name] = Stored(tuple(tensor.shape), dtype, floating, tensor.detach)
    return Contents(where, found, None)


def _peft_config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, _PEFT_CONFIG)
    _check_size(path)
    config = read_json(path)
    check_config(config, shown_path(folder))
    return config


def _metadata(path: str, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The config that diffusers writes into a file's header, if any."""
    if _METADATA not in metadata:
        return None
    try:
        values = json.loads(metadata[_METADATA])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown_path(path)}: {_METADATA} can't be read as JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{shown_path(path)}: {_METADATA} must be a JSON object, got {type(values).__name__}"
        )
    config = {name.removeprefix("transformer."): value for name, value in values.items()}
    check_config(config, shown_path(path))
    return config


# Bounds


def _check_count(where: str, tensors: int) -> None:
    if tensors > _MAX_TENSORS:
        raise CheckpointError(f"{where} has more than {_MAX_TENSORS} tensors; it is not a LoRA")


def _check_size(path: str) -> None:
    """Raises CheckpointError for a JSON file too large to be a config; a missing one may pass."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{shown_path(path)} is not a regular file")
    if os.path.isfile(path) and os.path.getsize(path) > _MAX_JSON_BYTES:
        raise CheckpointError(
            f"{shown_path(path)} has {os.path.getsize(path)} bytes; at most {_MAX_JSON_BYTES} are "
            "read"
        )


def _pickle(path: str) -> str:
    return (
        f"{shown_path(path)} is a pickle, which can run code and is not read. Convert one you "
        "trust with safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        "'lora.safetensors')"
    )


def some(texts: list[str], most: int = 3) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def shape_text(shape: tuple[int, ...]) -> str:
    return shown(list(shape[:8]))[1:-1] if len(shape) > 8 else str(list(shape))


def shown(value: Any, most: int = 70) -> str:
    """A value for an error message: printable, cut in the middle."""
    cut = value if not isinstance(value, str) or len(value) <= most else _middle(value, most)
    text = ascii(cut) if isinstance(value, str) and not value.isprintable() else repr(cut)
    return text if len(text) <= most + 10 else _middle(text, most)


def shown_path(path: str) -> str:
    return shown(path, 100)[1:-1] or "an empty path"


def _middle(text: str, most: int) -> str:
    half = (most - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
