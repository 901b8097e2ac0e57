"""Model files: where they are, whether they are complete, and what is in them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import MAX_MESSAGE, CheckpointError, first_line, printable

SDXL_VAE = "stabilityai/sdxl-vae"  # the original's fallback
SHIPPED = ("shapes",)  # models bundled with this package
_MODELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")
MODEL_FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names
# Bytes to convert before a file is mapped anew, so that its pages don't add to the copies' memory.
_NAMED = 8  # tensors that a message names at most
_RENEW_BYTES = 256 << 20


def resolve(
    name: str | os.PathLike[str],
    *,
    patterns: Sequence[str] = MODEL_FILES,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """The local folder of a model: `name` if it is a folder, else a download from the hub.

    Downloads only the files that match `patterns`. A name in `SHIPPED` always means the bundled
    model; pass a folder of that name as "./shapes".

    Raises:
        CheckpointError: not a folder, and the hub doesn't have it or can't be reached.
    """
    name = os.fspath(name)
    if name in SHIPPED:
        if os.path.isdir(name):
            warnings.warn(
                f"{name} is the model bundled with this package; for the folder here give ./{name}",
                UserWarning,
                stacklevel=3,
            )
        folder = os.path.join(_MODELS, name)
        if not os.path.isfile(os.path.join(folder, "model.safetensors")):
            raise CheckpointError(
                f"the model {name} is not in this copy of the package; train it with python -m "
                f"examples.{name}.train --out FOLDER and give that folder"
            )
        return folder
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name:
        raise CheckpointError(
            f"{name or 'an empty path'} does not exist; give a model folder or a hub id "
            "(owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
        )
    except Exception as error:  # network, permission, no such repository
        raise CheckpointError(
            f"{name} is not a local folder, and fetching it from the hub failed: "
            f"{first_line(error)}"
        ) from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises CheckpointError if it is missing, malformed or not an object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; the model folder is not complete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def find_weights(folder: str, stem: str) -> list[str]:
    """The safetensors files of a folder: `stem`.safetensors or the shards listed in its index.

    Raises:
        CheckpointError: there are none, a shard is missing, or there are only pickles.
    """
    single = os.path.join(folder, f"{stem}.safetensors")
    if os.path.isfile(single):
        return [single]
    index_path = f"{single}.index.json"
    if os.path.isfile(index_path):
        shards = read_json(index_path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index_path} has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        # an index must not point outside its folder
        bad = [name for name in names if os.path.basename(name) != name]
        if bad:
            raise CheckpointError(f"{index_path} names {bad[0]!r}, which is not a file beside it")
        missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if missing:
            raise CheckpointError(f"{folder} lacks shards: {_some(missing)}")
        return [os.path.join(folder, name) for name in names]
    pickles = sorted(
        name
        for name in (os.listdir(folder) if os.path.isdir(folder) else [])
        if name.endswith((".pt", ".bin", ".pth", ".ckpt"))
    )
    if pickles:
        raise CheckpointError(
            f"{folder} has {pickles[0]} but no {stem}.safetensors; pickles can run code and are "
            "not read. Convert one you trust: safetensors.torch.save_file(torch.load("
            f"{pickles[0]!r}, weights_only=True), '{stem}.safetensors')"
        )
    raise CheckpointError(f"{folder} has no {stem}.safetensors")


def read_tensors(
    paths: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rename: Callable[[str], str] = lambda name: name,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """All tensors of safetensors files, by `rename`d name.

    Raises:
        CheckpointError: a file is malformed, or its tensors are not those of `shapes`.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} does not exist; the model folder is not complete")
    found, files = read_headers(paths)
    if shapes is not None:
        renamed = {rename(name): shape for name, shape in found.items()}
        check_shapes(paths[0], renamed, shapes)
    with TensorReader(files, dtype) as reader:
        return {rename(name): reader.read(name, device) for name in found}


def read_single_tensor(path: str) -> Tensor:
    """The tensor of a safetensors file that holds only one, as float32.

    Raises CheckpointError if it holds none or several, or can't be read.
    """
    tensors = read_tensors([path], torch.float32, torch.device("cpu"))
    if len(tensors) != 1:
        raise CheckpointError(f"{path} has {len(tensors)} tensors; it must have only the latents")
    return next(iter(tensors.values()))


def check_shapes(
    where: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises one CheckpointError naming all missing, unexpected and misshapen tensors."""
    lists = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} is {list(found[name])} instead of {list(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    if any(lists.values()):
        for most in range(_NAMED, 0, -1):  # so many that each list is seen in the message
            faults = [f"{kind} {_some(names, most)}" for kind, names in lists.items() if names]
            place = where if len(faults) == 1 else printable(where, 80)
            message = f"{place}: {'; '.join(faults)}"
            if len(faults) == 1 or len(message) <= MAX_MESSAGE:
                break
        raise CheckpointError(message)


def _some(names: Sequence[str], most: int = _NAMED) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_headers(paths: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and files of all tensors, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, str] = {}
    odd = []
    for path in paths:
        with open_file(path, torch.device("cpu")) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
                header = file.get_slice(name)
                if header.get_dtype() not in _FLOATS:
                    odd.append(f"{name} holds {header.get_dtype()}")
                shapes[name] = tuple(header.get_shape())
                files[name] = path
    if odd:
        raise CheckpointError(f"{paths[0]}: {_some(odd)}, not floating-point weights")
    return shapes, files


def open_file(path: str, device: torch.device) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


class TensorReader:
    """Reads tensors from several files, converted to one dtype; keeps the files open meanwhile."""

    def __init__(self, files: Mapping[str, str], dtype: torch.dtype) -> None:
        self._files = files
        self._dtype = dtype
        self._stack = ExitStack()
        self._handles: dict[tuple[str, torch.device], Any] = {}
        self._converted_bytes = 0

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, name: str, device: torch.device) -> Tensor:
        path = self._files[name]
        if (path, device) not in self._handles:
            self._handles[path, device] = self._stack.enter_context(open_file(path, device))
        tensor = self._handles[path, device].get_tensor(name)
        if tensor.dtype == self._dtype:
            return tensor
        converted = tensor.to(self._dtype)
        self._converted_bytes += tensor.nbytes
        if self._converted_bytes > _RENEW_BYTES:
            del tensor
            self._stack.close()
            self._handles.clear()
            self._converted_bytes = 0
        return converted
