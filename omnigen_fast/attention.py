"""Who computes a step's attention: the kernels of this package, or a library of PyTorch's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .config import ModelConfig
from .errors import RequestError
from .kernels import library, ops, winners
from .precision import AUTO, LIBRARIES, Precision


def attention_for(precision: Precision, config: ModelConfig, device: torch.device) -> str:
    """ "triton", "flash" or "cudnn", for a model on a device.

    "auto" is who was fastest on this card (`kernels.winners`), if that can be had in this
    precision, and else Triton, or plain PyTorch where there is none.

    Raises:
        RequestError: the precision names a library that can't be had.
    """
    name = precision.attention
    if name in LIBRARIES:
        reason = _why_not(name, precision, config, device)
        if reason is not None:
            raise RequestError(
                f'attention="{name}" can\'t be had on {device}: {reason}; use attention="triton", '
                'or "auto"'
            )
    if name == AUTO:
        name = winners.TRITON
        if device.type == "cuda":
            name = winners.winner(torch.cuda.get_device_name(device), config.head_dim)
            if name in LIBRARIES and _why_not(name, precision, config, device) is not None:
                name = winners.TRITON
    return name


def _why_not(
    name: str, precision: Precision, config: ModelConfig, device: torch.device
) -> str | None:
    assert name == "flash" or name == "cudnn"
    if precision.quantised_cache is not None:
        return f"it reads no keys and values in {precision.quantised_cache}"
    return library.why_not(name, device, precision.arithmetic_dtype, config.head_dim)


def attending(name: str) -> AbstractContextManager[object]:
    """Inside, a step's attention is by this library, unless a caller has chosen others."""
    if ops.choice().attention == winners.TRITON and (name == "flash" or name == "cudnn"):
        return ops.use(attention=name)
    return nullcontext()
