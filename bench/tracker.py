"""Counts the live bytes of all tensors, operation by operation: peaks without the device.

On meta tensors the runtime allocates exactly what it allocates on a GPU, so a peak at full size is
known to the byte on any machine. Not counted are memory that an operation allocates temporarily (a
matrix product's work space), the allocator's rounding and fragmentation, and the device's context.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Counts the storages on a device that live inside a `with` block.

    Args:
        existing: tensors from before the block to include.
        device: type of the device whose storages are counted.

    Attributes:
        peak_bytes: most bytes that lived at once, since the start or `restart`.
        allocations: storages made, since the start or `restart`.
    """

    def __init__(self, existing: Iterable[Tensor] = (), device: str = "meta") -> None:
        super().__init__()
        self._device = device
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0
        self.restart()
        for tensor in existing:
            self._see(tensor)
        self.restart()

    @property
    def live_bytes(self) -> int:
        self._forget_dead()
        return self._bytes

    def restart(self) -> None:
        """Counts peak and allocations from here."""
        self.peak_bytes = self.live_bytes
        self.allocations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._live or not storage.nbytes():
            return
        self._forget_dead()
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._bytes += storage.nbytes()
        self.allocations += 1
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _forget_dead(self) -> None:
        # a weak reference keeps its address from being given to another storage
        for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
            self._bytes -= self._live.pop(key)[1]
