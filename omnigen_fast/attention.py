"""Who computes a step's attention: the kernels of this package, or a library of PyTorch's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .config import ModelConfig
from .errors import RequestError
from .kernels import library, ops, winners
from .precision import AUTO, Precision


def attention_for(precision: Precision, config: ModelConfig, device: torch.device) -> str:
    """ "triton", "flash" or "cudnn", for a model on a device.

    "auto" is who was fastest on this card (`kernels.winners`), if that can be had in this
    precision; else Triton, or plain PyTorch where there is none.

    Raises:
        RequestError: the precision names a library that can't be had.
    """
    if precision.attention == AUTO:
        if device.type != "cuda":
            return winners.TRITON
        fastest = _library(winners.winner(torch.cuda.get_device_name(device), config.head_dim))
        if fastest is None or _why_not(fastest, precision, config, device) is not None:
            return winners.TRITON
        return fastest
    named = _library(precision.attention)
    reason = None if named is None else _why_not(named, precision, config, device)
    if reason is not None:
        raise RequestError(
            f'attention="{named}" can\'t be had on {device}: {reason}; use attention="triton", or '
            f'"{AUTO}"'
        )
    return precision.attention


def attending(name: str) -> AbstractContextManager[object]:
    """Inside, a step's attention is by this library, unless a caller has chosen others."""
    chosen = _library(name)
    if chosen is None or ops.choice().attention != winners.TRITON:
        return nullcontext()
    return ops.use(attention=chosen)


def _library(name: str) -> library.Library | None:
    return next((one for one in library.LIBRARIES if one == name), None)


def _why_not(
    name: library.Library, precision: Precision, config: ModelConfig, device: torch.device
) -> str | None:
    if precision.quantised_cache is not None:
        return f"it reads no keys and values in {precision.quantised_cache}"
    return library.why_not(name, device, precision.arithmetic_dtype, config.head_dim)
