"""Safetensors files written tensor by tensor, so that no more than one is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..forms import Part
from .files import SAFETENSORS_NAMES

_HEADER_UNIT = 8  # bytes; the data after the header is aligned to it


def write_safetensors(
    path: str,
    parts: Mapping[str, Part],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file.

    Args:
        path: of the file.
        parts: shapes and dtypes of the tensors, by name.
        tensors: on the host, in the order of `parts`.
        metadata: more fields of the header.

    Raises OSError if it can't be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, part in parts.items():
        start, end = end, end + part.nbytes
        kind = SAFETENSORS_NAMES[part.dtype]
        header[name] = {"dtype": kind, "shape": part.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_UNIT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, part), tensor in zip(parts.items(), tensors, strict=True):
            assert tensor.shape == part.shape, name
            assert tensor.dtype == getattr(torch, part.dtype), name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
