"""Every allocation of a piece of work, counted, and one of them or all after it made to fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import omnigen_fast
from omnigen_fast import streaming

_PACKAGE = str(Path(omnigen_fast.__file__).resolve().parent)

Stack = tuple[tuple[str, int], ...]  # the package's files and lines, innermost first

# As a GPU, a CPU and Python say that there is no more memory.
FAILURES: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
}


class Allocations:
    """Counts what PyTorch allocates inside `watching`, in this thread and in those that copy.

    Args:
        fail_at: the number of the allocation that fails, counted from 0; None for none.
        failure: what is raised there.
        lasting: whether all later ones fail too, as they do while memory stays short.

    Attributes:
        stacks: where each allocation was asked for.
        failed: whether one has failed.
    """

    def __init__(
        self,
        fail_at: int | None = None,
        failure: Callable[[], BaseException] = MemoryError,
        lasting: bool = False,
    ) -> None:
        self.stacks: list[Stack] = []
        self.failed = False
        self._made: list[StorageWeakRef] = []
        self._fail_at = fail_at
        self._failure = failure
        self._lasting = lasting
        self._count = 0

    @contextmanager
    def watching(self) -> Iterator[Allocations]:
        work_of_lane = streaming._without_gradients

        def in_lane(work: Callable[[], None]) -> None:
            with _Mode(self):
                work_of_lane(work)

        with mock.patch.object(streaming, "_without_gradients", in_lane), _Mode(self):
            yield self

    def see(self, result: Any) -> None:
        """What an operation has allocated; raises if it is to fail, as if it had not been there."""
        made = [
            leaf.untyped_storage()
            for leaf in ((result,) if isinstance(result, Tensor) else tree_leaves(result))
            if isinstance(leaf, Tensor) and leaf.device.type != "meta" and leaf.nbytes
        ]
        made = [storage for storage in made if storage.resizable()]  # a mapped file is not
        if not made:
            return  # nothing, or nothing that can fail
        number = self._count
        self._count += 1
        if self._fail_at is None:
            self.stacks.append(_stack())
        elif number == self._fail_at or (self._lasting and number > self._fail_at):
            self.failed = True
            raise self._failure()
        self._made += map(StorageWeakRef, made)

    def alive(self) -> set[int]:
        """Storages that were made and still live."""
        return {one.cdata for one in self._made if not one.expired()}


class _Mode(TorchDispatchMode):
    def __init__(self, allocations: Allocations) -> None:
        super().__init__()
        self._allocations = allocations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _allocates(func):
            self._allocations.see(result)
        return result


@cache
def _allocates(func: Any) -> bool:
    """Whether an operation gives a tensor that is no view and no argument."""
    if func is torch.ops.aten.lift_fresh.default:
        return True  # where `torch.tensor` has just allocated
    returns = func._schema.returns
    return any(one.alias_info is None and "Tensor" in str(one.type) for one in returns)


def _stack() -> Stack:
    """The package's lines that ask for memory; of a copying thread, that thread's."""
    found = []
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and not name.endswith("surroundings.py"):
            found.append((name[len(_PACKAGE) + 1 :], frame.f_lineno))
        frame = frame.f_back
    return tuple(found)
