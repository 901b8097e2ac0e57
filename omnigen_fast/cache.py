"""Keys and values of condition and time tokens: the protocol, and the cache on the device."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import BusyError
from .forms import cache_row_bytes
from .memory.plan import Condition


@dataclass(frozen=True)
class Span:
    """The rows of a branch in the cache.

    A step reads one run of rows: the condition, and at one of its ends the slot of the step's time
    token. The order of rows is free, since keys carry their positions.
    """

    start: int  # first row that a step reads
    condition: int  # condition tokens
    slot: int  # row in which a step finds its time token
    times: int  # row of the first step's time token; the other steps' follow
    shared: int  # so many tokens, from the first on, another branch has in the same rows
    rest: int  # row of the first token that is not shared

    def rows(self, steps: int, device: torch.device) -> Tensor:
        """Rows of what the branch computes itself: tokens that are not shared, time tokens."""
        own = torch.arange(self.condition - self.shared, device=device) + self.rest
        return torch.cat([own, torch.arange(steps, device=device) + self.times])


@dataclass(frozen=True)
class Entry:
    """What is kept or dropped as one: the rows of one branch, or of two that begin alike.

    One branch: `[condition | slot | time tokens]`. Two, with what they share in the middle:
    `[time tokens | slot | rest of the second | shared | rest of the first | slot | time tokens]`,
    so that each of them still reads one run of rows.
    """

    keys: tuple[Hashable, ...]  # of the branches
    condition: Condition
    steps: int
    form: Hashable = None  # what else decides the bits of its rows: how prefill was carried out
    copy: int = 0  # calls that step together each need a slot, and so rows, of their own

    @property
    def rows(self) -> int:
        return self.condition.rows(self.steps)

    def spans(self, place: int) -> tuple[Span, ...]:
        """The branches' rows in an entry that starts at row `place`."""
        tokens, shared = self.condition.tokens, self.condition.shared
        if len(tokens) == 2:
            rest = place + self.steps + 1
            place = rest + tokens[1] - shared
            second = Span(rest - 1, tokens[1], rest - 1, rest - 1 - self.steps, shared, rest)
        slot = place + tokens[0]
        # the first branch is the one that computes the shared rows
        first = Span(place, tokens[0], slot, slot + 1, 0, place)
        return (first, second) if len(tokens) == 2 else (first,)


class Cache(Protocol):
    """What prefill and steps need of a cache, and how requests hold rows in it.

    Rows that a request has reserved are its own until it releases them; then they stay for later
    requests while there is room.
    """

    layers: int  # that are stored; 1 where each layer overwrites the one before
    budget_bytes: int  # to keep for later requests

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""

    @property
    def used_rows(self) -> int:
        """Rows that entries have, held or kept."""

    def reserve(self, entries: Sequence[Entry]) -> list[Entry]:
        """Gives every entry of a request its rows, until `give_back`.

        Returns:
            The entries whose rows are new and must be written now, or dropped by `discard`.

        Raises:
            BusyError: another request holds rows that would have to move.
        """

    def give_back(self, entries: Sequence[Entry]) -> None:
        """The request that reserved these entries is over; they are kept for later ones."""

    def hold(self, entries: Sequence[Entry]) -> None:
        """After a failure: holds these entries, one for each request that has it, and no others."""

    def discard(self, entries: Sequence[Entry]) -> None:
        """Forgets entries, for instance ones whose prefill failed."""

    def clear(self) -> None:
        """Drops every entry and frees the storage."""

    def reset(self) -> None:
        """After a step or prefill that failed: what is under way is over."""

    def __getitem__(self, entry: Entry) -> tuple[Span, ...]:
        """The spans of a reserved entry's branches."""

    def filling(self, entries: Sequence[Entry]) -> AbstractContextManager[None]:
        """Around the prefill of these entries."""

    def staging(self, branches: int) -> Tensor:
        """Memory for `select_step` to work in."""

    def select_step(self, slots: Tensor, rows: Tensor, staging: Tensor) -> None:
        """Puts time tokens beside their branches' conditions, in every layer that is taken next.

        Args:
            slots: `Span.slot` of the branches, [branches] int64, without repetition.
            rows: where the time tokens are, [branches] int64; read when the copy runs.
            staging: from `staging`, so that a step allocates nothing.
        """

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [rows, *row_shape], until `release`."""

    def release(self, layer: int) -> None:
        """The layer's rows have been read, or written."""


def row_shape(config: ModelConfig, dtype: torch.dtype) -> tuple[int, ...]:
    """Of a token's keys, or values, in one layer.

    [kv_heads, head_dim]; in 8 bits (int8, uint8 for e4m3) a row of bytes, scales and all.
    """
    heads, head_dim = config.num_kv_heads, config.head_dim
    return (heads, head_dim) if dtype.is_floating_point else (cache_row_bytes(heads, head_dim),)


class ConditionCache:
    """One block of rows for all entries; the least recently used are dropped for new ones.

    Storage is `[layers, rows, *row_shape]` for keys (after rotation) and for values. An entry's
    rows are contiguous, so a step reads them where they were written. Entries that no request uses
    now stay while all rows together need at most `budget_bytes`; what a request itself needs is
    always given.

    Args:
        config: sizes of the model.
        dtype: of keys and values; int8, or uint8 for e4m3, with scales in the rows.
        device: where they are.
        budget_bytes: how much to keep for later requests.
        layers: how many layers are stored; 1 for a cache that each layer overwrites.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
        layers: int | None = None,
    ) -> None:
        self.layers = config.num_layers if layers is None else layers
        self._row_shape = row_shape(config, dtype)
        self.budget_bytes = budget_bytes
        self._places: OrderedDict[Entry, int] = OrderedDict()
        self._held: Counter[Entry] = Counter()  # by how many requests
        self.keys = torch.empty(self.layers, 0, *self._row_shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * math.prod(self._row_shape) * self.keys.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return self.keys.shape[1] * self.row_bytes

    @property
    def used_rows(self) -> int:
        return sum(entry.rows for entry in self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._places

    def __getitem__(self, entry: Entry) -> tuple[Span, ...]:
        """The spans of an entry's branches."""
        return entry.spans(self._places[entry])

    def clear(self) -> None:
        """See `Cache.clear`."""
        self._places.clear()
        self._held.clear()
        self.keys = self.keys.new_empty(self.layers, 0, *self._row_shape)
        self.values = torch.empty_like(self.keys)

    def reserve(self, entries: Sequence[Entry]) -> list[Entry]:
        """See `Cache.reserve`."""
        wanted = dict.fromkeys(entries)
        others = sum(entry.rows for entry in self._held if entry not in wanted)
        needed = sum(entry.rows for entry in wanted)
        limit = max(self.budget_bytes // self.row_bytes, needed)
        if self._held:
            if others + needed > self.keys.shape[1]:
                raise self._busy()
        elif not needed <= self.keys.shape[1] <= limit:
            # Storage for a smaller or larger request. Two of them at once might be too much, so
            # what is kept in it is given up.
            self.clear()
            keys = self.keys.new_empty(self.layers, limit, *self._row_shape)
            self.keys, self.values = keys, torch.empty_like(keys)
        missing = [entry for entry in wanted if entry not in self._places]
        for entry in wanted:
            if entry in self._places:
                self._places.move_to_end(entry)
        new = sum(entry.rows for entry in missing)
        free = [one for one in self._places if one not in wanted and one not in self._held]
        while free and self.used_rows + new > self.keys.shape[1]:
            del self._places[free.pop(0)]
        try:
            if not self._place(missing, free):
                # what is kept of this request is in the way: it is computed again elsewhere
                for entry in wanted:
                    if entry not in self._held:
                        self._places.pop(entry, None)
                missing = [entry for entry in wanted if entry not in self._places]
                if not self._place(missing, free):
                    for entry in missing:
                        self._places.pop(entry, None)
                    raise self._busy()
        except BusyError:
            raise
        except BaseException:  # an interrupt: rows may be half moved
            self.clear()
            raise
        self._held.update(wanted.keys())
        return missing

    def _place(self, missing: Sequence[Entry], free: list[Entry]) -> bool:
        """Gives entries their rows; False where held rows, which can't move, leave no gap.

        Args:
            missing: the entries.
            free: entries that may be dropped, the first ones first.
        """
        # the largest first: small ones fit the gaps that are left
        for entry in sorted(missing, key=lambda entry: -entry.rows):
            place = self._find_gap(entry.rows)
            if place is None and not self._held:
                place = self._close_gaps()
            while place is None and free:
                del self._places[free.pop(0)]
                place = self._find_gap(entry.rows)
            if place is None:
                return False
            self._places[entry] = place
        return True

    def give_back(self, entries: Sequence[Entry]) -> None:
        """See `Cache.give_back`."""
        self._held -= Counter(dict.fromkeys(entries, 1))

    def hold(self, entries: Sequence[Entry]) -> None:
        """See `Cache.hold`."""
        self._held = Counter(entries)

    def copy_rows(self, source: Entry, target: Entry) -> None:
        """Makes the rows of a reserved entry those of another of the same kind."""
        start, place, rows = self._places[source], self._places[target], target.rows
        for storage in (self.keys, self.values):
            storage[:, place : place + rows] = storage[:, start : start + rows]

    def _busy(self) -> BusyError:
        return BusyError(
            "another request holds the condition cache; finish it first, or give "
            "condition_cache_bytes for both"
        )

    def staging(self, branches: int) -> Tensor:  # [layers, branches, *row_shape]
        """See `Cache.staging`."""
        return self.keys.new_empty(self.layers, branches, *self._row_shape)

    def select_step(self, slots: Tensor, rows: Tensor, staging: Tensor) -> None:
        """See `Cache.select_step`; done at once."""
        for storage in (self.keys, self.values):
            torch.index_select(storage, 1, rows, out=staging)
            storage.index_copy_(1, slots, staging)

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `Cache.take`."""
        return self.keys[layer % self.layers], self.values[layer % self.layers]

    def release(self, layer: int) -> None:
        """See `Cache.release`; nothing is to be done."""

    def filling(self, entries: Sequence[Entry]) -> AbstractContextManager[None]:
        """See `Cache.filling`; nothing is to be done."""
        return nullcontext()

    def reset(self) -> None:
        """See `Cache.reset`; nothing is under way."""

    def discard(self, entries: Sequence[Entry]) -> None:
        """See `Cache.discard`."""
        for entry in entries:
            self._places.pop(entry, None)
            self._held.pop(entry, None)

    def _find_gap(self, rows: int) -> int | None:
        """First place with so many free rows."""
        place = 0
        for entry, start in sorted(self._places.items(), key=lambda item: item[1]):
            if start - place >= rows:
                return place
            place = start + entry.rows
        return place if self.keys.shape[1] - place >= rows else None

    def _close_gaps(self) -> int:
        """Moves all entries to the front, one layer at a time; returns the first free row."""
        rows = [torch.empty(0, dtype=torch.int64)]
        place = 0
        for entry, start in self._places.items():
            rows.append(torch.arange(start, start + entry.rows))
            self._places[entry] = place
            place += entry.rows
        order = torch.cat(rows).to(self.keys.device)
        for storage in (self.keys, self.values):
            for layer in storage:
                layer[:place] = layer.index_select(0, order)
        return place
