"""Weights as trainers and converters leave them: pickles, GGUF, prefixed names, scaled float8."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import CheckpointError, brief
from .checkpoint import find_folders
from .files import (
    FLOATS,
    PICKLES,
    SCALE_SUFFIXES,
    TensorReader,
    WeightFiles,
    find_weights,
    list_tensors,
    stored_form,
)
from .gguf_files import SUFFIX, GgufTensor, list_gguf, open_gguf
from .names import DIFFUSERS, ORIGINAL
from .pickles import read_pickle

Read = Callable[[str], Tensor]  # a stored tensor by name, in float32

_PREFIXES = {"module", "_orig_mod", "model", "diffusion_model", "transformer"}
_ANCHORS = (ORIGINAL["pos_embed"][0], DIFFUSERS["pos_embed"][0])
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_DTYPES = {  # of a pickle's tensors: safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_MARKER = "scaled_fp8"  # of ComfyUI, an empty tensor
_QUANT = ".comfy_quant"  # a module's format, JSON as bytes
_QUANT_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_MAX_QUANT_BYTES = 4096
_UNUSED = (".scale_input", ".input_scale", ".rotary_emb.inv_freq")  # of activations and positions
_BLOCK = 128  # rows and columns that share a scale in DeepSeek's files and those that follow them
_NOT_MODELS = ("ema", "optimizer", "opt", "scheduler", "scaler", "random_states", "training_args")


@dataclass(frozen=True)
class Stored:
    """A tensor where it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, or PyTorch's where that has none


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file and what is in it."""

    path: str
    tensors: Mapping[str, GgufTensor]


Files: TypeAlias = WeightFiles | GgufFile | Mapping[str, Tensor]


@dataclass(frozen=True)
class ForeignWeights:
    """A model's weights by their plain names, whatever they are stored as."""

    where: str  # for messages
    tensors: Mapping[str, Stored]
    scales: Mapping[str, Stored]  # by weight
    files: Files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: one.shape for name, one in self.tensors.items()}

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """Reads weights by their plain names, in float32 and multiplied by their scales.

        Reading raises CheckpointError for NaN, infinities and unusable scales.
        """
        with _opened(self.files) as read:
            yield lambda name: self._value(name, read)

    def _value(self, name: str, read: Read) -> Tensor:
        one = self.tensors[name]
        value = read(one.name)
        if name in self.scales:
            scale = read(self.scales[name].name)
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise CheckpointError(f"{self.where}: the scale of {name} is no positive number")
            if one.dtype in _FLOAT8:
                value = value * self._spread(name, scale)
            elif not bool((scale == 1).all()):
                raise CheckpointError(
                    f"{self.where}: {name} is {one.dtype} and has a scale, as only float8 weights "
                    "may have"
                )
        if value.numel() and not all_finite(value):
            raise CheckpointError(f"{self.where}: {name} holds NaN or infinities; it is damaged")
        return value

    def float8(self, name: str) -> dict[str, Tensor] | None:
        """A weight as `forms` has it in fp8, if it is stored so: with one scale, or one for a row.

        Raises CheckpointError as reading it does.
        """
        one = self.tensors[name]
        rows = one.shape[0]
        scale = torch.ones(1)
        if one.dtype != "F8_E4M3":
            return None
        with _opened(self.files, None) as read:
            self._value(name, lambda stored: read(stored).float())  # for what it refuses
            if name in self.scales:
                scale = read(self.scales[name].name).float()
            if tuple(scale.shape) not in ((), (1,), (1, 1), (rows,), (rows, 1)):
                return None
            scales = scale.reshape(-1, 1).expand(rows, 1).contiguous()
            return {"values": read(one.name), "scales": scales}

    def _spread(self, name: str, scale: Tensor) -> Tensor:
        """A scale in a shape that multiplies its weight: of all, of rows, columns or blocks."""
        shape = self.tensors[name].shape
        if scale.numel() == 1:
            return scale.reshape(())
        if len(shape) == 2:
            rows, columns = shape
            if tuple(scale.shape) in ((rows,), (rows, 1)):
                return scale.reshape(rows, 1)
            if tuple(scale.shape) == (1, columns):
                return scale
            if scale.ndim == 2:
                blocks = _block_sides(shape, (scale.shape[0], scale.shape[1]))
                if blocks is not None:
                    tall = scale.repeat_interleave(blocks[0], 0)[:rows]
                    return tall.repeat_interleave(blocks[1], 1)[:, :columns]
        raise CheckpointError(
            f"{self.where}: {name} is {list(shape)} and its scale {list(scale.shape)}, which do "
            "not fit"
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor with values holds neither NaN nor infinities, in one pass over it."""
    low, high = tensor.aminmax()  # NaN if any value is
    return math.isfinite(low) and math.isfinite(high)


def _block_sides(weight: tuple[int, ...], scale: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale."""
    if all(math.ceil(size / _BLOCK) == count for size, count in zip(weight, scale)):
        return _BLOCK, _BLOCK
    if all(count and size % count == 0 for size, count in zip(weight, scale)):
        return weight[0] // scale[0], weight[1] // scale[1]
    return None


def open_foreign(path: str) -> ForeignWeights:
    """Finds and lists a model's weights; arguments and errors as of `convert`.

    Args:
        path: a safetensors file, a file of `torch.save`, or a folder with either.

    Raises:
        CheckpointError: there are none or several, or a file is malformed or not a model's.
    """
    found = _find(path)
    if isinstance(found, str) and found.endswith(SUFFIX):
        file = GgufFile(found, list_gguf(found))
        stored = [Stored(one.name, one.shape, one.kind_name) for one in file.tensors.values()]
        return _listed(found, stored, file)
    if isinstance(found, str):
        tensors = read_pickle(found)
        stored = [
            Stored(name, tuple(one.shape), _DTYPES.get(one.dtype, str(one.dtype)))
            for name, one in tensors.items()
        ]
        return _listed(found, stored, tensors)
    form = stored_form(found)
    if form is not None:
        raise CheckpointError(
            f"{found.paths[0]} has {form} weights already; convert the model that they were made of"
        )
    listed = list_tensors(found)
    stored = [Stored(name, one.shape, one.dtype) for name, one in listed.items()]
    return _listed(found.paths[0], stored, found)


def _find(path: str) -> WeightFiles | str:
    """The safetensors files of a model, or its GGUF file or pickle."""
    if not os.path.isdir(path):
        if path.endswith(PICKLES):
            if os.path.basename(path).startswith(_NOT_MODELS):
                raise CheckpointError(
                    f"{path} is named as the average of weights or the state of a training run; "
                    "give the trainer's model.pt"
                )
            return path
        if path.endswith(SUFFIX) and os.path.exists(path):
            return path
        if path.endswith(".safetensors"):
            return WeightFiles((path,))
        raise CheckpointError(
            f"{path} {'is no' if os.path.exists(path) else 'does not exist; give a'} folder, "
            ".safetensors file or file of torch.save (.pt, .pth, .bin, .ckpt), and no .gguf file"
        )
    folder, inner = find_folders(path)
    names = sorted(os.listdir(inner))
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        ggufs = [name for name in names if name.endswith(SUFFIX)]
        if len(ggufs) == 1:
            return os.path.join(inner, ggufs[0])
        pickles = [
            name for name in names if name.endswith(PICKLES) and not name.startswith(_NOT_MODELS)
        ]
        if "model.pt" in pickles or len(pickles) == 1:
            return os.path.join(inner, "model.pt" if "model.pt" in pickles else pickles[0])
        if pickles:
            raise CheckpointError(
                f"{inner} has {len(pickles)} files of weights; give the path of one, such as "
                f"{pickles[0]}"
            )
    stem = "model" if folder == inner else "diffusion_pytorch_model"
    return find_weights(inner, stem, any_name=True)


def _listed(where: str, stored: Sequence[Stored], files: Files) -> ForeignWeights:
    plain = _without_prefixes(where, stored)
    tensors: dict[str, Stored] = {}
    scales: dict[str, Stored] = {}
    for name, one in plain.items():
        suffix = next((suffix for suffix in SCALE_SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None:
            weight = f"{name.removesuffix(suffix)}.weight"
            if weight not in plain or weight in scales:
                how = "two scales" if weight in scales else "a scale but no weight"
                raise CheckpointError(f"{where} has {how} for {weight}")
            if one.dtype not in FLOATS:
                raise CheckpointError(f"{where}: {name} is {one.dtype}; a scale must be a float")
            scales[weight] = one
        elif not (name == _MARKER or name.endswith((_QUANT, *_UNUSED))):
            if one.dtype not in FLOATS and not isinstance(files, GgufFile):
                raise CheckpointError(
                    f"{where}: {name} holds {one.dtype}, not floating-point weights; quantized "
                    "weights are not read, except float8"
                )
            tensors[name] = one
    _check_formats(where, [one for name, one in plain.items() if name.endswith(_QUANT)], files)
    return ForeignWeights(where, tensors, scales, files)


def _without_prefixes(where: str, stored: Sequence[Stored]) -> dict[str, Stored]:
    """Tensors by their names without what wrappers have put before them."""
    prefix = ""
    for one in stored:
        anchor = next((anchor for anchor in _ANCHORS if one.name.endswith(anchor)), "")
        before = one.name.removesuffix(anchor)
        if anchor and set(before.split(".")[:-1]) <= _PREFIXES and len(before) >= len(prefix):
            prefix = before
    plain: dict[str, Stored] = {}
    for one in stored:
        name = one.name.removeprefix(prefix).replace("_orig_mod.", "")
        if name in plain:
            raise CheckpointError(f"{where} has {name} twice, under two of its names")
        plain[name] = one
    return plain


def _check_formats(where: str, formats: Sequence[Stored], files: Files) -> None:
    """Raises CheckpointError for a module in another format than float8."""
    if not formats:
        return
    with _opened(files) as read:
        for one in formats:
            size = math.prod(one.shape)
            try:
                text = bytes(int(byte) for byte in read(one.name).flatten()[:_MAX_QUANT_BYTES])
                kind = json.loads(text).get("format")
            except (ValueError, AttributeError, RecursionError):
                kind = None
            if size > _MAX_QUANT_BYTES or kind not in _QUANT_FORMATS:
                raise CheckpointError(
                    f"{where}: {one.name} says {brief(kind)}; supported are "
                    f"{' and '.join(_QUANT_FORMATS)}"
                )


@contextmanager
def _opened(files: Files, dtype: torch.dtype | None = torch.float32) -> Iterator[Read]:
    """Reads stored tensors by name; with a dtype of None as they are."""
    if isinstance(files, GgufFile):
        with open_gguf(files.path, files.tensors) as read:
            yield read
        return
    if not isinstance(files, WeightFiles):
        yield lambda name: files[name] if dtype is None else files[name].to(dtype)
        return
    places = {name: one.path for name, one in list_tensors(files).items()}
    with TensorReader(places, dtype) as reader:
        yield lambda name: reader.read(name, torch.device("cpu"))
