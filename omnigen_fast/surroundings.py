"""What the caller has set in PyTorch must not reach what is computed and kept here.

Services call under `torch.inference_mode`, autocast or another default dtype or device. Tensors
made under inference mode could not be updated outside it, and autocast would change results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEVICES = ("cpu", "cuda", "mps")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, nothing is recorded for gradients or inference mode, and autocast is off.

    New tensors are on the CPU unless told otherwise. The default dtype is one of the whole process
    and stays: dtypes are explicit wherever it would matter.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":  # a mode of its own slows every call
            stack.enter_context(torch.device("cpu"))
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def isolated(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that runs `undisturbed`."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with undisturbed():
            return function(*args, **kwargs)

    return run
