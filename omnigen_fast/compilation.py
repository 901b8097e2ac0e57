"""Whether operations of a CPU run in C++ that is built on this machine, and where that is kept."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch

from .config import ModelConfig
from .errors import RequestError, brief
from .kernels import cpu, ops
from .parameters import layer_shapes

_log = logging.getLogger("omnigen_fast")

_COMPILERS = ("g++", "clang++", "c++")
# Weights of all layers from which "auto" builds: below, a picture takes about as long as the build.
_WORTH = 25_000_000


def check_compile(given: Any) -> bool | None:
    """An argument `compile`: True, False, or None for "auto".

    Raises:
        RequestError: it is something else.
    """
    if given is None or (isinstance(given, str) and given == "auto"):
        return None
    if not isinstance(given, bool):
        raise RequestError(f'compile must be True, False or "auto", got {brief(given)}')
    return given


def compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command: CXX of the environment, or the first that is installed."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return tuple(named)
    return next(((one,) for one in _COMPILERS if shutil.which(one)), None)


def folder() -> Path | None:
    """Where what is built is kept: `omnigen_fast` in XDG_CACHE_HOME or in ~/.cache."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # nobody's home
        return None
    return Path(cache) / "omnigen_fast"


class Compilation:
    """Operations in C++ for one model; PyTorch's run wherever these can't be had.

    Args:
        wanted: True or False; None for where it is worth the time.
    """

    def __init__(self, wanted: bool | None = None) -> None:
        self.wanted = wanted
        self.active = False  # whether the operations are there and used

    def prepare(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Builds or loads what a model needs on a device; a failure is logged in one line."""
        self.active = False
        if self.wanted is False:
            return
        asked, command = self.wanted is True, compiler()
        reason: str | None = None
        if device.type != "cpu":
            reason = "it is for CPUs" if device.type == "mps" else "a GPU's kernels always are"
        elif dtype != torch.bfloat16:
            reason = f"its operations are in bfloat16, not in {str(dtype).removeprefix('torch.')}"
        else:
            reason = cpu.why_not()
        if reason is None and command is None:
            reason = "there is no C++ compiler; install one, or set CXX"
        if reason is None:
            assert command is not None
            if not asked and _layer_weights(config) < _WORTH:
                return
            try:
                cpu.prepare(cpu.Builder.of_this_cpu(command, folder()), config.head_dim)
                self.active = True
                return
            except cpu.Unavailable as error:
                asked, reason = True, str(error)  # a compiler that fails is worth a line
        if asked:
            _log.warning("Nothing is compiled (%s); PyTorch's operations run instead.", reason)

    def operations(self) -> AbstractContextManager[object]:
        """Inside, a CPU's operations are those in C++, unless a caller has chosen others."""
        if self.active and ops.choice().kernels == "auto":
            return ops.use("cpp")
        return nullcontext()


def _layer_weights(config: ModelConfig) -> int:
    return config.num_layers * sum(prod(shape) for shape in layer_shapes(config).values())
