"""Streaming of layers that do not fit: a ring of buffers, filled ahead of their use.

Copies overlap with the computation on a lane of their own, and events order the two: a buffer is
read only after its copy and overwritten only after its last reader. The host's copy is the master;
only newly computed keys and values are copied to it.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

_log = logging.getLogger("omnigen_fast")

T = TypeVar("T")
Mark = Any  # a point in the computation's or the lane's order of work


class Lane(Protocol):
    """Runs copies concurrently with the computation, in order of submission."""

    def submit(self, copy: Callable[[], None], after: Mark) -> Mark:
        """Runs `copy` once the computation has passed `after`; returns the mark of the copy."""

    def mark(self) -> Mark:
        """The point that the computation has reached."""

    def wait(self, mark: Mark) -> None:
        """Makes the computation wait for a copy; raises the copy's exception."""

    def drain(self) -> None:
        """Returns once all submitted copies are done."""


class StreamLane:
    """A CUDA stream, ordered with the current one by events; the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(self, copy: Callable[[], None], after: Mark) -> Mark:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            copy()
            return self._stream.record_event()

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def drain(self) -> None:
        self._stream.synchronize()


class ThreadLane:
    """A thread that copies while the CPU computes; there a computation is done when it returns.

    Copies and file reads release the GIL.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="omnigen-copies")
        self._last: Future | None = None

    def submit(self, copy: Callable[[], None], after: Mark) -> Mark:
        self._last = self._thread.submit(_without_gradients, copy)
        return self._last

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        mark.result()

    def drain(self) -> None:
        last, self._last = self._last, None  # a failed one's traceback holds tensors
        if last is not None:
            last.exception()  # waits


def _without_gradients(work: Callable[[], None]) -> None:
    with torch.no_grad():  # a thread's own setting
        work()


def lane_for(device: torch.device) -> Lane:
    """The lane for a device's copies."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane()


class Ring:
    """Buffers that items pass through cyclically, always in the same order.

    Args:
        lane: runs the copies.
        slots: number of buffers, at least 1; one more than the number of copies in flight.
        order: the items, without repetition; the last is followed by the first.
        fill: copies an item into a buffer, `fill(slot, item)`.
    """

    def __init__(
        self, lane: Lane, slots: int, order: Sequence[int], fill: Callable[[int, int], None]
    ) -> None:
        assert slots > 0 and order
        self._lane = lane
        self._slots = slots
        self._order = tuple(order)
        self._fill = fill
        self._place = {item: place for place, item in enumerate(order)}
        # the computation may still read what the buffers' memory held before
        now = lane.mark()
        self._free: deque[tuple[int, Mark]] = deque((slot, now) for slot in range(slots))
        self._coming: deque[tuple[int, int, Mark]] = deque()  # item, slot, mark of its copy
        self._taken: dict[int, int] = {}
        self._next = 0

    def take(self, item: int) -> int:
        """The slot that holds an item from here on, for the computation."""
        if not self._coming or self._coming[0][0] != item:
            self._give_up()
            self._next = self._place[item]
        self._load()
        _, slot, there = self._coming.popleft()
        self._taken[item] = slot  # from here on `reset` frees it, even if the copy has failed
        self._lane.wait(there)
        return slot

    def lend(self, item: int) -> int:
        """A slot that the computation writes an item into."""
        self._give_up()
        slot, free = self._free.popleft()
        if free is not None:
            self._lane.wait(free)
        self._taken[item] = slot
        return slot

    def release(self, item: int, store: Callable[[int], None] | None = None) -> None:
        """The computation is done with an item.

        Args:
            item: that was taken or lent.
            store: copies it out of its slot before the slot is reused.
        """
        slot, done = self._taken.pop(item), self._lane.mark()
        if store is None:
            self._free.append((slot, done))
            self._load()
        else:
            self._free.append((slot, self._lane.submit(partial(store, slot), done)))

    def reset(self) -> None:
        """Forgets contents and users of all buffers: items have changed, or a step failed."""
        self._lane.drain()
        now = self._lane.mark()
        # all there are: Ctrl-C may have come while one was in none of the three
        self._free = deque((slot, now) for slot in range(self._slots))
        self._coming.clear()
        self._taken.clear()

    def _load(self) -> None:
        while self._free:
            slot, free = self._free[0]
            item = self._order[self._next]
            there = self._lane.submit(partial(self._fill, slot, item), free)
            self._free.popleft()  # only now: a copy that can't be submitted changes nothing
            self._coming.append((item, slot, there))
            self._next = (self._next + 1) % len(self._order)

    def _give_up(self) -> None:
        """Frees the slots of prefetched items that are not needed next; a lane keeps its order."""
        while self._coming:
            _, slot, there = self._coming.popleft()
            self._free.append((slot, there))


class Streamed(Generic[T]):
    """Layers, some on the device and the others streamed through a ring.

    Args:
        ring: of the layers that are not resident; None if all are.
        slots: the computation's view of each of the ring's buffers.
        resident: the other layers.
        expand: makes what is computed with of what is stored; None where that is the same.
    """

    def __init__(
        self,
        ring: Ring | None,
        slots: Sequence[T],
        resident: Mapping[int, T],
        expand: Callable[[T], T] | None = None,
    ) -> None:
        self._ring = ring
        self._slots = slots
        self._resident = resident
        self._expand = expand

    def take(self, layer: int) -> T:
        found = self._resident.get(layer)
        if found is not None:
            return found if self._expand is None else self._expand(found)
        assert self._ring is not None
        found = self._slots[self._ring.take(layer)]
        if self._expand is None:
            return found
        expanded = self._expand(found)
        self._ring.release(layer)  # the next copy need not wait for the products
        return expanded

    def release(self, layer: int) -> None:
        if self._ring is not None and self._expand is None and layer not in self._resident:
            self._ring.release(layer)

    def reset(self) -> None:
        """See `Ring.reset`."""
        if self._ring is not None:
            self._ring.reset()


def spread(resident: int, layers: int) -> frozenset[int]:
    """Which layers stay on the device: `resident` of them, spread evenly over all layers."""
    return frozenset(
        layer
        for layer in range(layers)
        if (layer + 1) * resident // layers > layer * resident // layers
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = (
        "out of memory",  # CUDA, in libraries that raise plain errors
        "can't allocate memory",  # PyTorch on a CPU
        "not enough memory",  # likewise, on Windows
        "ALLOC_FAILED",  # cuBLAS, cuDNN
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class HostMemory:
    """Buffers on the host, page-locked as far as the rest of the system allows.

    Copies from page-locked memory overlap with the computation. Memory is locked after it was
    allocated, in its exact size: PyTorch's allocator for pinned memory rounds up to powers of two.

    Args:
        device: that copies go to; only memory for CUDA is locked.
        most_locked_bytes: how much may be locked; half of the free memory by default.
    """

    def __init__(self, device: torch.device, most_locked_bytes: int | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._most = most_locked_bytes
        self._locked = 0
        self._noticed = False

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the host."""
        tensor = torch.empty(*shape, dtype=dtype)
        if self._cuda and tensor.nbytes:
            self._lock(tensor)
        return tensor

    def _lock(self, tensor: Tensor) -> None:
        if self._most is None:
            from .memory.device import free_host_bytes

            self._most = free_host_bytes() // 2
        size, address = tensor.nbytes, tensor.data_ptr()
        locked = self._locked + size <= self._most and self._register(address, size)
        if locked:
            self._locked += size
            weakref.finalize(tensor.untyped_storage(), self._unlock, address, size)
        elif not self._noticed:
            self._noticed = True
            _log.warning(
                "%.1f GB of host memory are page-locked and no more can be; copies from the rest "
                "do not overlap with the computation",
                self._locked / 1e9,
            )

    def _register(self, address: int, size: int) -> bool:
        return int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0

    def _unlock(self, address: int, size: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)
        self._locked -= size
