"""StreamedCache: keys and values on the host, a ring of layers on the device."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .cache import Entry, Span, row_shape
from .config import ModelConfig
from .errors import OmniGenError
from .memory.plan import RING
from .streaming import HostMemory, Lane, Ring


class StreamedCache:
    """As `ConditionCache`, with the keys and values on the host and a ring of layers on the device.

    The ring's buffers hold the rows of the running request only. Prefill writes a layer there, and
    it is copied to the host once; a step finds each layer copied in ahead of its use.

    Args:
        config: sizes of the model.
        dtype: of keys and values, as there.
        device: of the ring.
        budget_bytes: how much of the host's memory to keep for later requests.
        host: gives that memory.
        lane: runs the copies.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
        host: HostMemory,
        lane: Lane,
    ) -> None:
        self.layers = config.num_layers
        self.budget_bytes = budget_bytes
        self._row_shape = row_shape(config, dtype)
        self._host = host
        self._lane = lane
        # of each layer [2, rows, *row_shape]: keys and values on the host
        self._kept: OrderedDict[Entry, list[Tensor]] = OrderedDict()
        self._places: dict[Entry, int] = {}  # of the running request's entries, in the buffers
        self._held: tuple[Entry, ...] = ()  # by that request
        self._buffers = torch.empty(RING, 2, 0, *self._row_shape, dtype=dtype, device=device)
        self._ring = self._new_ring()
        self._filled: Sequence[Entry] | None = None
        self._step: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * math.prod(self._row_shape) * self._buffers.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._buffers.nbytes

    @property
    def used_rows(self) -> int:
        """Rows that are kept on the host."""
        return sum(entry.rows for entry in self._kept)

    def tensors(self) -> list[Tensor]:
        """Everything that it holds, on the device and on the host."""
        return [self._buffers, *(one for kept in self._kept.values() for one in kept)]

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._kept

    def __getitem__(self, entry: Entry) -> tuple[Span, ...]:
        """The spans of a running request's entry's branches."""
        return entry.spans(self._places[entry])

    def clear(self) -> None:
        """See `Cache.clear`."""
        self.free()
        self._kept.clear()
        self._places.clear()
        self._held = ()

    def reserve(self, entries: Sequence[Entry]) -> list[Entry]:
        """See `Cache.reserve`; one request at a time, since the ring holds its rows alone."""
        if self._held:
            raise OmniGenError(
                "another request streams its keys and values; finish it first, or keep them on the "
                "device"
            )
        self.reset()  # the ring holds another request's rows
        wanted = dict.fromkeys(entries)
        missing = [entry for entry in wanted if entry not in self._kept]
        for entry in wanted:
            if entry in self._kept:
                self._kept.move_to_end(entry)
        needed = sum(entry.rows for entry in wanted)
        new = sum(entry.rows for entry in missing)
        limit = max(self.budget_bytes // self.row_bytes, needed)
        for entry in [entry for entry in self._kept if entry not in wanted]:
            if self.used_rows + new <= limit:
                break
            del self._kept[entry]
        self._places, place = {}, 0
        for entry in wanted:
            self._places[entry] = place
            place += entry.rows
        if self._buffers.shape[2] != needed:
            self._buffers = self._buffers.new_empty(RING, 2, 0, *self._row_shape)  # frees it first
            self._buffers = self._buffers.new_empty(RING, 2, needed, *self._row_shape)
            self._ring.reset()  # the buffers are others
        try:
            for entry in missing:
                shape = (2, entry.rows, *self._row_shape)
                dtype = self._buffers.dtype
                self._kept[entry] = [self._host.empty(shape, dtype) for _ in range(self.layers)]
        except BaseException:
            self.discard(missing)
            raise
        self._held = tuple(wanted)
        return missing

    def give_back(self, entries: Sequence[Entry]) -> None:
        """See `Cache.give_back`."""
        self._held = ()
        self._step = None

    def hold(self, entries: Sequence[Entry]) -> None:
        """See `Cache.hold`."""
        self._held = tuple(entries)

    def staging(self, branches: int) -> Tensor:  # [branches, *row_shape], of one layer
        """See `Cache.staging`."""
        return self._buffers.new_empty(branches, *self._row_shape)

    def select_step(self, slots: Tensor, rows: Tensor, staging: Tensor) -> None:
        """See `Cache.select_step`; done in each layer when it is taken."""
        self._step = (slots, rows, staging)

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `Cache.take`."""
        if self._filled is not None:
            keys, values = self._buffers[self._ring.lend(layer)]
            return keys, values
        keys, values = self._buffers[self._ring.take(layer)]
        assert self._step is not None
        slots, rows, moved = self._step
        for storage in (keys, values):
            torch.index_select(storage, 0, rows, out=moved)
            storage.index_copy_(0, slots, moved)
        return keys, values

    def release(self, layer: int) -> None:
        """See `Cache.release`."""
        if self._filled is None:
            self._ring.release(layer)
        else:
            filled = self._filled
            self._ring.release(layer, lambda slot: self._copy_out(slot, layer, filled))

    @contextmanager
    def filling(self, entries: Sequence[Entry]) -> Iterator[None]:
        """See `Cache.filling`."""
        self._filled = entries
        try:
            yield
        finally:
            self._filled = None

    def free(self) -> None:
        """Frees the device's memory; what is kept on the host stays."""
        self.reset()
        self._buffers = self._buffers.new_empty(RING, 2, 0, *self._row_shape)

    def discard(self, entries: Sequence[Entry]) -> None:
        """See `Cache.discard`."""
        self._held = ()
        self.reset()  # a copy may be on its way there
        for entry in entries:
            self._kept.pop(entry, None)

    def reset(self) -> None:
        """See `Cache.reset`."""
        self._step = None
        self._ring.reset()

    def _new_ring(self) -> Ring:
        return Ring(self._lane, RING, range(self.layers), self._copy_in)

    def _copy_in(self, slot: int, layer: int) -> None:
        for entry, place in self._places.items():
            rows = slice(place, place + entry.rows)
            for mine, kept in zip(self._buffers[slot], self._kept[entry][layer]):
                mine[rows].copy_(kept, non_blocking=True)

    def _copy_out(self, slot: int, layer: int, entries: Sequence[Entry]) -> None:
        for entry in entries:
            rows = slice(self._places[entry], self._places[entry] + entry.rows)
            for mine, kept in zip(self._buffers[slot], self._kept[entry][layer]):
                kept.copy_(mine[rows], non_blocking=True)
