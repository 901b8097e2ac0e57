"""LoRAs as others write them: PEFT, diffusers, kohya and ComfyUI; files, hub ids, state dicts.

They differ in names and in how an update is scaled:

    writer      names                                           scale
    PEFT        base_model.model.MODULE.lora_A.weight           adapter_config.json
    diffusers   transformer.MODULE.lora_A.weight                metadata or MODULE.alpha, else 1
    ComfyUI     diffusion_model.MODULE.lora_A or lora_down      MODULE.alpha, else 1
    kohya       lora_unet_MODULE_WITH_UNDERSCORES.lora_down     MODULE.alpha, else 1
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, RequestError
from .checkpoint import Checkpoint
from .files import find_weights, open_file, read_json, resolve
from .lora import MAX_SCALE, Adapter, LowRank
from .lora_scale import check_config, scale_of
from .names import DIFFUSERS, ORIGINAL, layout_sources

_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_FILE = "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"  # diffusers' key in a file's header
_HUB_FILES = (_PEFT_CONFIG, f"{_PEFT_FILE}*", "adapter_model-*.safetensors", _DIFFUSERS_FILE)
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EXPECTED = "give a LoRA's folder, its .safetensors file or a hub id (owner/name)"

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "_orig_mod.")
_FLAT = re.compile(r"(?:lora_unet_|lora_transformer_|lycoris_)(?:transformer_|diffusion_model_)?")
_KEY = re.compile(r"(.+)\.lora(?:_linear_layer)?[._](A|B|down|up)(?:(?:\.[^.]+)?\.weight)?")
_PARTS = {"A": "down", "down": "down", "B": "up", "up": "up"}
_KINDS = (  # what a name holds, or ends in after a dot, and what such a file has
    (("lokr_",), "a LoKr"),
    (("hada_",), "a LoHa"),
    (("lora_magnitude_vector", "dora_scale"), "a DoRA"),
    (("oft_",), "an OFT adapter"),
    (("ia3_",), "an IA3 adapter"),
    (("lora_mid",), "a LoCon in Tucker form"),
    (("lora_embedding_",), "a LoRA of the embedding"),
    ((".diff", ".diff_b", ".set_weight"), "whole weight differences"),
    (("lora_te", "text_encoder"), "a LoRA of a text encoder, which OmniGen lacks"),
    ((".bias", ".b_norm"), "biases"),
)

# Bounds of what is read; the largest LoRA of the published model has 1,500 tensors.
_MAX_TENSORS = 1 << 16
_MAX_NAME = 256
_MAX_HEADER_BYTES = 32 << 20  # trainers write tags of their data into it
_MAX_JSON_BYTES = 4 << 20
_MIN_RANK_LIMIT = 1024  # and the larger side of the matrix
_MAX_UPDATE = 1e20  # of a single value, before a weight of up to MAX_SCALE


@dataclass(frozen=True)
class _Stored:
    """A tensor that can be read."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Contents:
    """What a LoRA's file, folder or state dict holds."""

    where: str  # for errors
    tensors: Mapping[str, _Stored]
    config: Mapping[str, Any] | None  # of PEFT or diffusers


@dataclass(frozen=True)
class _Target:
    """Rows of a parameter that a module fills."""

    parameter: str
    start: int
    rows: int
    inputs: int


@dataclass
class _Module:
    """What was found for one module."""

    name: str  # as a config names it
    parts: dict[str, _Stored] = field(default_factory=dict)  # down, up, alpha


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    checkpoint: Checkpoint,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> Adapter:
    """Reads a LoRA: a folder, a .safetensors file, a hub id or a state dict.

    Modules may have the original's names or diffusers', whatever the checkpoint's layout.

    Args:
        source: what to read.
        checkpoint: of the model that it is for.
        weight_name: the file in the folder or in the hub's repository.
        subfolder: where in the folder or repository that is.
        hub: `revision`, `cache_dir`, `token` and `local_files_only`, as `resolve` takes them.

    Raises:
        CheckpointError: files are missing or malformed, the adapter is not a LoRA, or it doesn't
            fit the model (the tensors that don't are named).
        RequestError: `source` is none of these.
    """
    if isinstance(source, Mapping):
        contents = _from_dict(source)
    elif isinstance(source, str | os.PathLike) and isinstance(os.fspath(source), str):
        contents = _from_path(os.fspath(source), weight_name, subfolder, hub)
    else:
        raise RequestError(
            f"a LoRA must be a path, a hub id or a state dict, got {type(source).__name__}; "
            f"{_EXPECTED}"
        )
    return _assembled(contents, checkpoint)


# Where the tensors are


def _from_path(
    path: str, weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]
) -> _Contents:
    for name, value in (("weight_name", weight_name), ("subfolder", subfolder)):
        parts = value.replace("\\", "/").split("/") if isinstance(value, str) else []
        if value is not None and (not value or ".." in parts or os.path.isabs(value)):
            raise RequestError(f"{name} must be a name inside the folder, got {shown(value)}")
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


def _from_folder(folder: str, local: bool) -> _Contents:
    def there(name: str) -> bool:
        return os.path.isfile(os.path.join(folder, name))

    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    peft = any(name.startswith("adapter_model") for name in names)
    if there(_PEFT_CONFIG) or peft:
        if there(f"{_PEFT_FILE}.index.json"):
            _check_size(os.path.join(folder, f"{_PEFT_FILE}.index.json"))
        config = _peft_config(folder)
        return _from_files(find_weights(folder, "adapter_model"), config)
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


def _from_file(path: str) -> _Contents:
    if path.endswith(_PICKLES):
        raise CheckpointError(_pickle(path))
    config = None
    folder, name = os.path.split(path)
    if name == _PEFT_FILE and os.path.isfile(os.path.join(folder, _PEFT_CONFIG)):
        config = _peft_config(folder)
    return _from_files([path], config)


def _from_files(paths: list[str], config: Mapping[str, Any] | None) -> _Contents:
    where = shown_path(paths[0])
    tensors: dict[str, _Stored] = {}
    for path in paths:
        _check_header(path)
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
    return _Contents(where, tensors, config)


def _stored(file: Any, name: str, shape: tuple[int, ...], dtype: str) -> _Stored:
    return _Stored(shape, dtype, dtype in _FLOATS, lambda: file.get_tensor(name))


def _from_dict(tensors: Mapping[Any, Any]) -> _Contents:
    where = "the state dict"
    _check_count(where, len(tensors))
    found: dict[str, _Stored] = {}
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
        found[name] = _Stored(tuple(tensor.shape), dtype, floating, tensor.detach)
    return _Contents(where, found, None)


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


# What they are


def _assembled(contents: _Contents, checkpoint: Checkpoint) -> Adapter:
    where = contents.where
    modules, unknown = _modules(contents, _targets(checkpoint))
    odd = [
        f"{shown(name)[1:-1]} holds {tensor.dtype}"
        for name, tensor in contents.tensors.items()
        if not tensor.floating and not name.endswith(".alpha")
    ]
    if odd:
        raise CheckpointError(f"{where}: {_some(odd)}, not floating-point weights")
    if unknown or not modules:
        names = ", ".join(shown(name)[1:-1] for name in sorted(unknown)[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{where} has tensors that belong to no OmniGen layer: "
            f"{names or 'no LoRA tensors at all'}{more}{_kind(unknown)}"
        )
    if contents.config is not None and any("alpha" in one.parts for one in modules.values()):
        raise CheckpointError(
            f"{where} gives its scale twice, in a config and as .alpha tensors; remove one"
        )
    _check_disjoint(where, modules)
    config = contents.config
    updates = [_update(where, target, one, config) for target, one in modules.items()]
    return Adapter(tuple(sorted(updates, key=lambda update: (update.parameter, update.start))))


def _modules(
    contents: _Contents, targets: Mapping[str, _Target]
) -> tuple[dict[_Target, _Module], set[str]]:
    """What there is for each module, and the names that say nothing to this model."""
    flat = {name.replace(".", "_"): name for name in targets}
    modules: dict[_Target, _Module] = {}
    unknown = set()
    for name, tensor in contents.tensors.items():
        module, part = _split(name)
        target = targets.get(flat.get(module, module))
        fits = part == "alpha" or len(tensor.shape) >= 2
        found = None if target is None else modules.setdefault(target, _Module(module))
        if found is None or not part or not fits or part in found.parts:
            unknown.add(name if found is not None or not part else module)
        else:
            found.parts[part] = tensor
    for target, found in list(modules.items()):
        if not {"down", "up"} <= found.parts.keys():
            del modules[target]
            unknown.add(found.name)
    return modules, unknown


def _split(name: str) -> tuple[str, str]:
    """Module and part (down, up or alpha) that a tensor's name says; no part if none."""
    if len(name) > _MAX_NAME:
        return "", ""
    if name.endswith(".alpha"):
        module, part = name.removesuffix(".alpha"), "alpha"
    else:
        match = _KEY.fullmatch(name)
        if match is None:
            return "", ""
        module, part = match[1], _PARTS[match[2]]
    while prefix := next((p for p in _PREFIXES if module.startswith(p)), ""):
        module = module.removeprefix(prefix)
    if match := _FLAT.match(module):
        module = module[match.end() :]
    return module, part


def _targets(checkpoint: Checkpoint) -> dict[str, _Target]:
    """The matrices of the model by the names of their modules, in both layouts."""
    targets = {}
    for layout in (DIFFUSERS, ORIGINAL):
        for parameter, sources in layout_sources(checkpoint.config, layout).items():
            for source in sources:
                module, _, kind = source.name.rpartition(".")
                if kind != "weight" or len(source.shape) < 2:
                    continue  # a vector (a norm's weight) has no low-rank update
                rows, inputs = source.shape[0], math.prod(source.shape[1:])
                target = _Target(parameter, source.start, rows, inputs)
                targets[module] = target
                # adapters of the language model alone, and its prefix before diffusers' names
                targets.setdefault(module.removeprefix("llm."), target)
                if module.startswith("layers."):
                    targets.setdefault(f"llm.{module}", target)
    return targets


def _update(
    where: str, target: _Target, module: _Module, config: Mapping[str, Any] | None
) -> LowRank:
    name = shown(module.name)[1:-1]
    a, b = module.parts["down"], module.parts["up"]
    rank = a.shape[0]
    sizes = math.prod(a.shape[1:]), math.prod(b.shape[1:])
    if sizes != (target.inputs, rank) or b.shape[0] != target.rows or not rank:
        raise CheckpointError(
            f"{where}: {name} has A {_shape(a.shape)} and B {_shape(b.shape)},"
            f" whose product does not match the model's {target.rows} x {target.inputs}"
        )
    if rank > max(_MIN_RANK_LIMIT, target.rows, target.inputs):
        raise CheckpointError(
            f"{where}: {name} has rank {rank}, more than its {target.rows} x {target.inputs} "
            "weights can use"
        )
    down, up = _matrix(a), _matrix(b)
    largest = float(down.abs().amax()) * float(up.abs().amax()) * rank
    if not math.isfinite(largest):
        raise CheckpointError(f"{where}: {name} holds NaN or infinities")
    scale = scale_of(config, module.name, rank, _alpha(where, name, module.parts.get("alpha")))
    if not abs(scale) <= MAX_SCALE or not largest * abs(scale) <= _MAX_UPDATE:
        raise CheckpointError(
            f"{where}: {name} changes weights by up to {largest * abs(scale):.3g}, which is too "
            "much"
        )
    return LowRank(target.parameter, target.start, down, up, scale)


def _alpha(where: str, name: str, stored: _Stored | None) -> float | None:
    if stored is None:
        return None
    alpha = math.nan
    if math.prod(stored.shape) == 1 and not stored.dtype.lower().startswith(("bool", "c")):
        alpha = float(stored.read())
    if not abs(alpha) <= MAX_SCALE:
        raise CheckpointError(
            f"{where}: {name}.alpha must be a number up to {MAX_SCALE:g}, got "
            f"{alpha if math.prod(stored.shape) == 1 else _shape(stored.shape)}"
        )
    return alpha


def _matrix(stored: _Stored) -> Tensor:
    """A copy [rows, columns] of one's own, in float32 on the host."""
    tensor = stored.read().to(torch.device("cpu"), torch.float32, copy=True)
    return tensor.flatten(1).contiguous()


def _check_disjoint(where: str, modules: Mapping[_Target, _Module]) -> None:
    """A fused qkv_proj and a to_q beside it would be added to the same rows."""
    ordered = sorted(modules, key=lambda target: (target.parameter, target.start))
    for one, other in pairwise(ordered):
        if one.parameter == other.parameter and one.start + one.rows > other.start:
            names = " and ".join(shown(modules[target].name) for target in (one, other))
            raise CheckpointError(f"{where}: {names} change the same weights")


def _kind(names: Iterable[str]) -> str:
    for parts, kind in _KINDS:
        if any(
            name.endswith(part) if part.startswith(".") else part in name[-_MAX_NAME:]
            for name in names
            for part in parts
        ):
            return f"; it has {kind}: only plain LoRA is supported, merge it first"
    return ""


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


def _check_header(path: str) -> None:
    """Raises CheckpointError for a safetensors header too large to be parsed."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"{shown_path(path)} can't be read: {error.strerror}") from error
    if _MAX_HEADER_BYTES < size < os.path.getsize(path):
        raise CheckpointError(
            f"{shown_path(path)} has a header of {size} bytes; at most {_MAX_HEADER_BYTES} are read"
        )


def _pickle(path: str) -> str:
    return (
        f"{shown_path(path)} is a pickle, which can run code and is not read. Convert one you "
        "trust with safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        "'lora.safetensors')"
    )


def _some(texts: list[str], most: int = 3) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _shape(shape: tuple[int, ...]) -> str:
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
