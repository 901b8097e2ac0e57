"""GGUF files: their header, read in bounds, and their tensors as float32.

The header is read here, so that no file can make that long. The gguf package, an extra, knows the
quantised types.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, RequestError, brief
from ..regular_files import check_regular

SUFFIX = ".gguf"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_HEADER_BYTES = 32 << 20
_MAX_TENSORS = 1 << 16
_MAX_FIELDS = 1 << 16
_MAX_AXES = 4
_ALIGNMENT = "general.alignment"
_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that was stored in another shape
# Types of a field: struct's letter for a number.
_NUMBERS = "BbHhIif?"
_STRING, _ARRAY = 8, 9
_LONG = {10: "Q", 11: "q", 12: "d"}
_PLAIN = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}  # types of tensors, bytes of a value
_BLOCK_VALUES = 1 << 22  # converted at once


@dataclass(frozen=True)
class GgufTensor:
    """A tensor where it is stored."""

    name: str
    shape: tuple[int, ...]
    columns: int  # of a stored row
    kind: int  # GGML's number of its type
    kind_name: str
    start: int  # first byte in the file
    row_bytes: int
    rows: int


class _Header:
    """Reads the values of a header one after the other."""

    def __init__(self, path: str, data: bytes) -> None:
        self._path = path
        self._data = data
        self.place = 0

    def bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.place:
            raise CheckpointError(
                f"{self._path} is cut off in its header, or that is longer than "
                f"{_MAX_HEADER_BYTES >> 20} MiB"
            )
        self.place += count
        return self._data[self.place - count : self.place]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.bytes(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def value(self, inside: bool = False) -> Any:
        """A field's value with its type before it; None for what is not needed."""
        return self._of(self.number("I"), inside)

    def _of(self, kind: int, inside: bool) -> Any:
        if kind < len(_NUMBERS):
            return self.number(_NUMBERS[kind])
        if kind in _LONG:
            return self.number(_LONG[kind])
        if kind == _STRING:
            self.bytes(self.number("Q"))
            return None
        if kind == _ARRAY and not inside:
            return self._array(self.number("I"), self.number("Q"))
        raise CheckpointError(f"{self._path}: a field of its header has the unknown type {kind}")

    def _array(self, kind: int, count: int) -> list[Any] | None:
        letter = _NUMBERS[kind] if kind < len(_NUMBERS) else _LONG.get(kind)
        if letter is None:
            for _ in range(count):  # each takes 8 bytes of what there is, or fails
                self._of(kind, inside=True)
            return None
        size = struct.calcsize(f"<{letter}")
        if count > _MAX_AXES:
            self.bytes(count * size)
            return None
        return [self.number(letter) for _ in range(count)]


def list_gguf(path: str) -> dict[str, GgufTensor]:
    """The tensors of a file, by name.

    Raises:
        CheckpointError: it is malformed or cut off, or has a type that is not known.
        RequestError: it needs the gguf package, which is not there.
    """
    check_regular(path, "GGUF")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = _Header(path, file.read(_MAX_HEADER_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if size < 4 or header.bytes(4) != _MAGIC:
        raise CheckpointError(f"{path} is no GGUF file")
    version = header.number("I")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} is GGUF of version {version}; 2 and 3 are read")
    count, fields = header.number("Q"), header.number("Q")
    if count > _MAX_TENSORS or fields > _MAX_FIELDS:
        raise CheckpointError(
            f"{path} says that it has {count} tensors and {fields} fields; at most "
            f"{_MAX_TENSORS} are read"
        )
    values = {header.text(): header.value() for _ in range(fields)}
    alignment = values.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{path}: {_ALIGNMENT} is {brief(alignment)}")
    infos = [_info(header, path) for _ in range(count)]
    start = -(-header.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, axes, kind, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{path} has {brief(name)} twice")
        tensors[name] = _tensor(path, name, axes, kind, start + offset, size, values)
    return tensors


def _info(header: _Header, path: str) -> tuple[str, tuple[int, ...], int, int]:
    name, count = header.text(), header.number("I")
    if not 1 <= count <= _MAX_AXES:
        raise CheckpointError(f"{path}: {brief(name)} has {count} axes; 1 to {_MAX_AXES} are read")
    axes = tuple(header.number("Q") for _ in range(count))[::-1]  # the innermost is stored first
    return name, axes, header.number("I"), header.number("Q")


def _tensor(
    path: str,
    name: str,
    axes: tuple[int, ...],
    kind: int,
    start: int,
    size: int,
    fields: Mapping[str, Any],
) -> GgufTensor:
    kind_name, values, nbytes = _type_of(path, name, kind)
    columns, rows = axes[-1], math.prod(axes[:-1])
    if not columns or columns % values:
        raise CheckpointError(
            f"{path}: rows of {brief(name)} have {columns} values, not whole blocks of {values}"
        )
    row_bytes = columns // values * nbytes
    if start + rows * row_bytes > size:
        raise CheckpointError(f"{path} is cut off in {brief(name)}")
    shape = fields.get(_SHAPE + name)
    if not isinstance(shape, list):
        shape = axes
    elif math.prod(shape) != math.prod(axes) or min(shape, default=0) < 1:
        raise CheckpointError(f"{path}: {brief(name)} is {list(axes)}, which can't be {shape}")
    return GgufTensor(name, tuple(shape), columns, kind, kind_name, start, row_bytes, rows)


def _type_of(path: str, name: str, kind: int) -> tuple[str, int, int]:
    """Name of a type, and values and bytes of its blocks."""
    if kind in _PLAIN:
        kind_name, nbytes = _PLAIN[kind]
        return kind_name, 1, nbytes
    gguf = _package(path)
    try:
        known = gguf.GGMLQuantizationType(kind)
        values, nbytes = gguf.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path}: {brief(name)} has the unknown type {kind}; convert what it was made of"
        ) from None
    return known.name, values, nbytes


def _package(path: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise RequestError(
            f"{path} has quantised weights, which the gguf package reads; install it: "
            "pip install 'omnigen_fast[gguf]'"
        ) from error
    return gguf


@contextmanager
def open_gguf(path: str, tensors: Mapping[str, GgufTensor]) -> Iterator[Callable[[str], Tensor]]:
    """Reads tensors of a file as float32."""
    mapped = np.memmap(path, np.uint8, "r")

    def read(name: str) -> Tensor:
        one = tensors[name]
        stop = one.start + one.rows * one.row_bytes
        if stop > len(mapped):  # it has become shorter
            raise CheckpointError(f"{path} is cut off in {brief(name)}")
        rows = mapped[one.start : stop].reshape(one.rows, one.row_bytes)
        value = torch.empty(one.rows, one.columns)
        block = max(1, _BLOCK_VALUES // one.columns)
        for first in range(0, one.rows, block):
            some = slice(first, first + block)
            value[some] = _decoded(path, one, np.array(rows[some]))
        return value.view(one.shape)

    yield read


def _decoded(path: str, tensor: GgufTensor, rows: np.ndarray) -> Tensor:
    """[rows, columns] in a floating dtype, of [rows, bytes]."""
    if tensor.kind in _PLAIN:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return torch.from_numpy(rows).view(dtype[tensor.kind_name])
    gguf = _package(path)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused later
            decoded = gguf.dequantize(rows, gguf.GGMLQuantizationType(tensor.kind))
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: {brief(tensor.name)} is {tensor.kind_name}, which the gguf package does not "
            "read; convert the file that it was made of"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(decoded)).view(len(rows), tensor.columns)
