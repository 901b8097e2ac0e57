"""ConditionCache: keys and values of condition and time tokens, written once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch

from .config import ModelConfig


@dataclass(frozen=True)
class Span:
    """The rows of one branch in the cache: `[condition | current time token | time tokens]`."""

    start: int
    condition: int  # condition tokens
    steps: int  # time tokens

    @property
    def rows(self) -> int:
        return self.condition + 1 + self.steps

    @property
    def stop(self) -> int:
        return self.start + self.rows

    @property
    def time_slot(self) -> int:
        """The row in which a step finds its time token, right behind the condition."""
        return self.start + self.condition


class ConditionCache:
    """One block of rows for all branches; the least recently used are dropped for new ones.

    Storage is `[layers, rows, kv_heads, head_dim]` for keys (after rotation) and for values. A
    branch's rows are contiguous, so a step reads them where they were written. Branches that no
    request uses now stay while all rows together need at most `budget_bytes`; what a request itself
    needs is always given.

    Args:
        config: sizes of the model.
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
        self._row_shape = (config.num_kv_heads, config.head_dim)
        self.budget_bytes = budget_bytes
        self._spans: OrderedDict[Hashable, Span] = OrderedDict()
        self.keys = torch.empty(self.layers, 0, *self._row_shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        heads, head_dim = self._row_shape
        return 2 * self.layers * heads * head_dim * self.keys.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the storage as it stands."""
        return self.keys.shape[1] * self.row_bytes

    @property
    def used_rows(self) -> int:
        return sum(span.rows for span in self._spans.values())

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._spans

    def __getitem__(self, key: Hashable) -> Span:
        return self._spans[key]

    def clear(self) -> None:
        """Drops every branch and frees the storage."""
        self._spans.clear()
        self.keys = self.keys.new_empty(self.layers, 0, *self._row_shape)
        self.values = torch.empty_like(self.keys)

    def reserve(self, branches: Mapping[Hashable, tuple[int, int]]) -> list[Hashable]:
        """Gives every branch of a request its rows.

        Args:
            branches: (condition tokens, steps) by key.

        Returns:
            The keys whose rows are new and must be written now, or dropped by `discard`.
        """
        missing = [key for key in branches if key not in self._spans]
        for key in branches:
            if key in self._spans:
                self._spans.move_to_end(key)
        needed = sum(_rows(*branches[key]) for key in branches)
        new = sum(_rows(*branches[key]) for key in missing)
        limit = max(self.budget_bytes // self.row_bytes, needed)
        for key in [key for key in self._spans if key not in branches]:
            if self.used_rows + new <= limit:
                break
            del self._spans[key]
        if self.keys.shape[1] > limit:  # a larger request came before
            self._resize(limit)
        # the largest first: small branches fit the gaps that are left
        for key in sorted(missing, key=lambda key: -_rows(*branches[key])):
            start = self._find_gap(_rows(*branches[key]))
            if start is None:
                self._resize(min(limit, max(self.used_rows + new, 2 * self.keys.shape[1])))
                start = self._find_gap(_rows(*branches[key]))
                assert start is not None
            new -= _rows(*branches[key])
            self._spans[key] = Span(start, *branches[key])
        return missing

    def select_step(self, time_slots: torch.Tensor, step: torch.Tensor | int) -> None:
        """Puts the time token of `step` behind its branch's condition, in every layer.

        Args:
            time_slots: `Span.time_slot` of the branches, int64, without repetition.
            step: from 0; as a tensor [1] on the device it is read when the copy runs.
        """
        for storage in (self.keys, self.values):
            storage.index_copy_(1, time_slots, storage.index_select(1, time_slots + (1 + step)))

    def discard(self, keys: list[Hashable]) -> None:
        """Forgets branches, for instance ones whose prefill failed."""
        for key in keys:
            self._spans.pop(key, None)

    def _find_gap(self, rows: int) -> int | None:
        """First place with so many free rows."""
        place = 0
        for span in sorted(self._spans.values(), key=lambda span: span.start):
            if span.start - place >= rows:
                return place
            place = span.stop
        return place if self.keys.shape[1] - place >= rows else None

    def _resize(self, rows: int) -> None:
        """Moves the kept branches together at the front of storage of so many rows."""
        moved, place = OrderedDict(), 0
        for key, span in self._spans.items():
            moved[key] = Span(place, span.condition, span.steps)
            place += span.rows
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(self.layers, rows, *self._row_shape)
            for key, span in self._spans.items():
                new[:, moved[key].start : moved[key].stop] = old[:, span.start : span.stop]
            setattr(self, name, new)
            del old
        self._spans = moved


def _rows(condition: int, steps: int) -> int:
    return Span(0, condition, steps).rows
