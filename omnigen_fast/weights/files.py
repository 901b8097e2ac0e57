"""Model files: where they are, whether they are complete, and what is in them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    MAX_MESSAGE,
    CheckpointError,
    RequestError,
    brief,
    first_line,
    printable,
)
from ..forms import FORMS
from ..model_defaults import SHIPPED, shipped_folder
from ..regular_files import check_regular, read_json

SDXL_VAE = "stabilityai/sdxl-vae"  # the original's fallback
MODEL_FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names
_INTEGERS = ("I8", "U8")
FORM_FIELD = "omnigen_fast.weights"  # of a header's metadata: one of `forms.FORMS`
# Of the tensors that a quantised one is stored as, by their names in `forms`.
PART_SUFFIXES = {"values": "", "scales": "_scale", "ranges": "_range"}
SAFETENSORS_NAMES = {  # of PyTorch's dtypes
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
}
# of tensors that a module's float8 weight is to be multiplied by, as others name them
SCALE_SUFFIXES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
PICKLES = (".pt", ".bin", ".pth", ".ckpt")
_CONVERT = "Convert the model, without running any: omnigen-fast convert MODEL OUT"
_NAMED = 8  # tensors that a message names at most
_MAX_TENSORS = 1 << 16  # the released model has 300
_MAX_HEADER_BYTES = 32 << 20  # trainers write tags of their data into it
# Bytes to convert before a file is mapped anew, so that its pages don't add to the copies' memory.
_RENEW_BYTES = 256 << 20


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files that hold a model's tensors."""

    paths: tuple[str, ...]
    index: Mapping[str, str] | None = None  # tensor: path, where an index says so


def resolve(
    name: str | os.PathLike[str],
    *,
    patterns: Sequence[str] = MODEL_FILES,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """The local folder of a model: `name` if it is a folder, else a download from the hub.

    With a `subfolder`, that folder in it. Downloads only the files that match `patterns`. A name in
    `SHIPPED` always means the bundled model; pass a folder of that name as "./shapes".

    Raises:
        CheckpointError: not a folder, and the hub doesn't have it or can't be reached.
        RequestError: `name` is not a path, or `subfolder` is not a name inside it.
    """
    name = checked_path("a model or a VAE", name)
    if subfolder is not None:
        check_inside("subfolder", subfolder)
        patterns = [f"{subfolder}/{pattern}" for pattern in patterns]
    folder = _local(name) or _fetched(name, patterns, revision, cache_dir, token, local_files_only)
    if subfolder is not None:
        folder = os.path.join(folder, subfolder)
        if not os.path.isdir(folder):
            raise CheckpointError(f"{name} has no folder {brief(subfolder)}")
    return folder


def locate(name: str | os.PathLike[str], **where: Any) -> str:
    """A local .safetensors file as it is given, else the folder that `resolve` finds."""
    path = checked_path("a model or a VAE", name)
    return (
        path if path.endswith(".safetensors") and os.path.isfile(path) else resolve(path, **where)
    )


def checked_path(what: str, path: Any) -> str:
    """A path as a string; raises RequestError for anything else."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise RequestError(f"{what} must be a folder or a hub id (owner/name), got {brief(path)}")
    return os.fspath(path)


def check_inside(name: str, value: Any) -> None:
    """Raises RequestError unless an argument names something inside a folder."""
    parts = value.replace("\\", "/").split("/") if isinstance(value, str) else []
    if not any(parts) or ".." in parts or os.path.isabs(value) or "\0" in value:
        raise RequestError(f"{name} must be a name inside the folder, got {brief(value)}")


def _local(name: str) -> str | None:
    """The folder of a bundled or local model; None for what must be on the hub."""
    if name in SHIPPED:
        if os.path.isdir(name):
            warnings.warn(
                f"{name} is the model bundled with this package; for the folder here give ./{name}",
                UserWarning,
                stacklevel=5,
            )
        folder = shipped_folder(name)
        if not os.path.isfile(os.path.join(folder, "model.safetensors")):
            raise CheckpointError(
                f"the model {name} is not in this copy of the package; train it with python -m "
                f"examples.{name}.train --out FOLDER and give that folder"
            )
        return folder
    if os.path.isdir(name):
        return name
    if os.path.isfile(name) and name.endswith(PICKLES):
        raise CheckpointError(f"{name} is a pickle, which can run code and is not read. {_CONVERT}")
    if os.path.exists(name):
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name:
        raise CheckpointError(
            f"{name or 'an empty path'} does not exist; give a model folder or a hub id "
            "(owner/name)"
        )
    return None


def _fetched(
    name: str,
    patterns: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> str:
    """The folder of a download from the hub."""
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
            f"{first_line(error)}; check name and network, or give a local folder"
        ) from error


def find_weights(
    folder: str,
    stem: str,
    *,
    variant: str | None = None,
    any_name: bool = False,
    convertible: bool = False,
) -> WeightFiles:
    """The safetensors files of a folder: `stem`.safetensors or the shards listed in its index.

    Args:
        folder: where to look.
        stem: of the usual name.
        variant: as in `stem`.fp16.safetensors, for "fp16".
        any_name: whether the only file there may have another name.
        convertible: whether `omnigen-fast convert` reads the pickles that may be there instead.

    Raises:
        CheckpointError: there are none, a shard is missing, or there are only pickles.
    """
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    index = f"{stem}.safetensors.index.{variant}.json" if variant else f"{name}.index.json"
    if os.path.lexists(os.path.join(folder, name)):
        return _single(os.path.join(folder, name))
    if os.path.lexists(os.path.join(folder, index)):
        return _shards(folder, os.path.join(folder, index))
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [other for other in names if other.endswith(".safetensors")]
    if any_name and not variant and len(found) == 1:
        return _single(os.path.join(folder, found[0]))
    if found:
        between = f" and no {index}" if any("-of-" in other for other in found) else ""
        way_out = ": give the path of one" if any_name and not between else ""
        raise CheckpointError(f"{folder} has no {name}{between}; it has {_some(found, 3)}{way_out}")
    pickles = [other for other in names if other.endswith(PICKLES)]
    if pickles and convertible:
        raise CheckpointError(
            f"{folder} has {pickles[0]} but no {name}; pickles can run code and are not read. "
            f"{_CONVERT}"
        )
    if pickles:
        raise CheckpointError(
            f"{folder} has {pickles[0]} but no {name}; pickles can run code and are "
            "not read. Convert one you trust: safetensors.torch.save_file(torch.load("
            f"{pickles[0]!r}, weights_only=True), {name!r})"
        )
    raise CheckpointError(
        f"{folder} has no {name}; give the folder of a model, or a hub id (owner/name)"
    )


def _single(path: str) -> WeightFiles:
    check_regular(path, "safetensors")
    return WeightFiles((path,))


def _shards(folder: str, index_path: str) -> WeightFiles:
    """The files that an index names; none of them may be outside its folder."""
    places = read_json(index_path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index_path} has no weight_map")
    if len(places) > _MAX_TENSORS:
        raise CheckpointError(f"{index_path} names more than {_MAX_TENSORS} tensors")
    for name in places.values():
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise CheckpointError(
                f"{index_path} names {brief(name)}, which is not a file beside it"
            )
    names = sorted(set(places.values()))
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise CheckpointError(f"{folder} lacks shards: {_some(missing)}")
    paths = tuple(os.path.join(folder, name) for name in names)
    return WeightFiles(paths, {name: os.path.join(folder, place) for name, place in places.items()})


def read_tensors(
    files: WeightFiles,
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
    found, places = read_headers(files)
    if shapes is not None:
        renamed = {rename(name): shape for name, shape in found.items()}
        if len(renamed) < len(found):
            raise CheckpointError(f"{files.paths[0]} has a tensor twice, under two of its names")
        check_shapes(files.paths[0], renamed, shapes)
    with TensorReader(places, dtype) as reader:
        return {rename(name): reader.read(name, device) for name in found}


def read_single_tensor(path: str) -> Tensor:
    """The tensor of a safetensors file that holds only one, as float32.

    Raises CheckpointError if it holds none or several, or can't be read.
    """
    tensors = read_tensors(WeightFiles((path,)), torch.float32, torch.device("cpu"))
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


@dataclass(frozen=True)
class Listed:
    """A tensor as a file's header lists it."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    path: str


def list_tensors(files: WeightFiles) -> dict[str, Listed]:
    """What safetensors files hold, by name.

    Raises CheckpointError for a malformed file, and for a tensor elsewhere than the index says,
    such as a second copy.
    """
    found: dict[str, Listed] = {}
    for path in files.paths:
        with open_file(path, torch.device("cpu")) as file:
            for name in tensor_names(file, path):
                _check_place(name, path, files.index)
                header = file.get_slice(name)
                found[name] = Listed(tuple(header.get_shape()), header.get_dtype(), path)
    for name, path in (files.index or {}).items():
        if name not in found:
            raise CheckpointError(f"{path} lacks {name}, which the index places there")
    return found


def stored_form(files: WeightFiles) -> str | None:
    """The form that the headers of quantised files name; None for plain files.

    Raises CheckpointError if they differ, or name one that is not known.
    """
    named: dict[str | None, str] = {}
    for path in files.paths:
        with open_file(path, torch.device("cpu")) as file:
            named.setdefault((file.metadata() or {}).get(FORM_FIELD), path)
    form, *others = named
    if others:
        raise CheckpointError(f"{named[form]} and {named[others[0]]} are of different forms")
    if form is not None and form not in FORMS:
        raise CheckpointError(
            f"{named[form]} says that its weights are {brief(form)}; known are {', '.join(FORMS)}"
        )
    return form


def check_dtypes(files: WeightFiles, expected: Mapping[str, str]) -> None:
    """Raises CheckpointError for tensors of other dtypes than PyTorch calls so; "" is any float."""
    listed = list_tensors(files)
    odd = []
    for name, dtype in expected.items():
        allowed = (SAFETENSORS_NAMES[dtype],) if dtype else FLOATS
        if listed[name].dtype not in allowed:
            instead = allowed[0] if dtype else "floats"
            odd.append(f"{name} holds {listed[name].dtype} instead of {instead}")
    if odd:
        raise CheckpointError(f"{files.paths[0]}: {_some(odd, 2)}")


def read_headers(
    files: WeightFiles, quantised: bool = False
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and files of all tensors, by name.

    Args:
        files: where they are.
        quantised: whether they may be what `convert` makes of quantised weights.

    Raises CheckpointError as `list_tensors` does, and for numbers that are no plain weights.
    """
    found = list_tensors(files)
    scales = [name for name in found if name.endswith(SCALE_SUFFIXES)]
    if scales and not quantised:
        raise CheckpointError(
            f"{files.paths[0]} holds float8 weights with scales, such as {scales[0]}; "
            "omnigen-fast convert writes them as bfloat16"
        )
    dtypes = (*FLOATS, *_INTEGERS) if quantised else FLOATS
    odd = [f"{name} holds {one.dtype}" for name, one in found.items() if one.dtype not in dtypes]
    if odd:
        raise CheckpointError(f"{files.paths[0]}: {_some(odd)}, not floating-point weights")
    shapes = {name: one.shape for name, one in found.items()}
    return shapes, {name: one.path for name, one in found.items()}


def _check_place(name: str, path: str, index: Mapping[str, str] | None) -> None:
    """Raises CheckpointError for a tensor in another file than the one that the index names."""
    if index is not None and index.get(name) != path:
        named = (
            f"the index places it in {os.path.basename(index[name])}"
            if name in index
            else ("the index does not name it")
        )
        raise CheckpointError(f"{path} holds {name}, but {named}; remove the tensor or the index")


def tensor_names(file: Any, path: str) -> list[str]:
    """The names in an open safetensors file; raises CheckpointError if they are too many."""
    names: list[str] = file.keys()
    if len(names) > _MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(names)} tensors; at most {_MAX_TENSORS} are read")
    return names


def open_file(path: str, device: torch.device) -> Any:
    """Opens a safetensors file; raises CheckpointError if it is malformed."""
    from safetensors import SafetensorError, safe_open

    check_regular(path, "safetensors")
    _check_header(path)
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _check_header(path: str) -> None:
    """Raises CheckpointError for a header too large to be parsed."""
    try:
        length = os.path.getsize(path)
        if length < 8:  # too short, as safetensors will say; reading one in /proc may wait forever
            return
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if _MAX_HEADER_BYTES < size < length:
        raise CheckpointError(
            f"{path} has a header of {size} bytes; at most {_MAX_HEADER_BYTES} are read"
        )


class TensorReader:
    """Reads tensors from several files; keeps the files open meanwhile.

    Args:
        files: the path of each tensor's.
        dtype: that they are converted to; None leaves them as they are.
    """

    def __init__(self, files: Mapping[str, str], dtype: torch.dtype | None) -> None:
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
        try:
            tensor = self._handles[path, device].get_tensor(name)
        except ValueError as error:
            if "could not determine the shape" not in str(error):
                raise
            # PyTorch says so of a mapped file if Ctrl-C comes while it looks at it
            raise KeyboardInterrupt from error
        if self._dtype is None or tensor.dtype == self._dtype:
            return tensor
        converted = tensor.to(self._dtype)
        self._converted_bytes += tensor.nbytes
        if self._converted_bytes > _RENEW_BYTES:
            del tensor
            self._stack.close()
            self._handles.clear()
            self._converted_bytes = 0
        return converted
