"""What identifies a call's arguments, so that ranks that were given different ones are found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BYTES = 32
_SAMPLES = 1 << 16  # values of a larger tensor that are looked at, about


def digest(*values: Any) -> bytes:
    """32 bytes, equal for equal values.

    Args:
        values: dataclasses, sequences, arrays, tensors and generators are taken apart; anything
            else is told by its `repr`.
    """
    found = hashlib.blake2b(digest_size=_BYTES)
    for part in _parts(values):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        flat = value.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for one in value:
            yield from _parts(one)
    else:
        yield repr(value).encode()
