"""What ranks exchange inside a step: keys and values of noise rows, and velocities.

All shapes are fixed and all memory is there before the first step, so that a step can be captured
with its exchanges. Parts that are shorter than others are sent with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .group import Group
from .layout import Division, Layout


@dataclass(frozen=True)
class Share:
    """What a rank computes of a kind of step.

    Attributes:
        layout: of the step.
        groups: of this rank and its neighbours in the rows: (picture, place in its list).
        tokens: noise tokens of a picture.
        first: of each group's noise tokens, the first that this rank computes.
        stop: the one after the last.
    """

    layout: Layout
    groups: tuple[tuple[int, int], ...]
    tokens: int
    first: int
    stop: int

    @classmethod
    def of(cls, division: Division, rank: int, tokens: int) -> Share:
        """That of a rank."""
        layout = division.layout
        bounds = layout.row_bounds(tokens, layout.row_rank(rank))
        return cls(layout, division.parts[layout.branch_rank(rank)], tokens, *bounds)

    @property
    def rows(self) -> int:
        """Of each group."""
        return self.stop - self.first


def velocity_places(
    division: Division, orders: Sequence[Sequence[int]], tokens: int, groups: int
) -> tuple[list[int], int]:
    """Where each velocity of a step is in what all ranks send.

    Args:
        division: of the step.
        orders: of each place among the branches, the groups in the order that it computes them in,
            by their places in the prediction.
        tokens: noise tokens of a picture.
        groups: of the step.

    Returns:
        Of each row of the prediction, [groups * tokens], its row in what was gathered; and how many
        rows every rank sends, padding included.
    """
    layout = division.layout
    sent = division.most_groups * layout.most_rows(tokens)
    places = [0] * (groups * tokens)
    for rank in range(layout.size):
        first, stop = layout.row_bounds(tokens, layout.row_rank(rank))
        place = rank * sent
        for group in orders[layout.branch_rank(rank)]:
            start = group * tokens
            places[start + first : start + stop] = range(place, place + stop - first)
            place += stop - first
    return places, sent


class VelocityGather:
    """Collects the velocities of a step from all ranks.

    Args:
        group: of the ranks.
        velocities: [rows of this rank and padding, 16], which the step writes.
        gathered: memory for those of all ranks, as large or larger.
        places: see `velocity_places`, int64.
    """

    def __init__(self, group: Group, velocities: Tensor, gathered: Tensor, places: Tensor) -> None:
        self._group, self._sent, self._places = group, velocities, places
        count = group.size * len(velocities)
        self._gathered = gathered[:count].view(group.size, *velocities.shape)

    def __call__(self, prediction: Tensor) -> None:
        """Fills `prediction`, [groups, N, 16], with the velocities of all groups."""
        self._group.gather_velocities(self._sent, self._gathered)
        rows = self._gathered.flatten(0, 1)
        torch.index_select(rows, 0, self._places, out=prediction.flatten(0, 1))


class RowExchange:
    """Collects the keys and values of a pass's groups from the ranks that have their other rows.

    Args:
        group: of the ranks.
        share: of this rank in the step.
        groups: of the pass.
        space: memory for the exchanges of all layers, passes and steps.
    """

    def __init__(self, group: Group, share: Share, groups: int, space: ExchangeSpace) -> None:
        layout, tokens = share.layout, share.tokens
        self.tokens = tokens  # of each group, whose keys and values come together here
        self._group, self._parts, self._rows = group, layout.rows, share.rows
        most = layout.most_rows(tokens)
        row = space.sent.shape[1:]
        self._sent = space.sent[: groups * most].view(groups, most, *row)
        self._gathered = space.gathered[: groups * layout.rows * most].view(groups, -1, *row)
        device = space.sent.device
        bounds = [tokens * i for i in range(groups + 1)]
        self.cu_keys = torch.tensor(bounds, dtype=torch.int32, device=device)
        # of a group's rows, where parts are of unequal length
        self._places: Tensor | None = None
        self._ordered = self._gathered
        if not _even(share):
            places: list[int] = []
            for part in range(layout.rows):
                first, stop = layout.row_bounds(tokens, part)
                places += range(part * most, part * most + stop - first)
            self._places = torch.tensor(places, dtype=torch.int64, device=device)
            self._ordered = space.ordered[: groups * tokens].view(groups, tokens, *row)

    def __call__(self, keys_values: Tensor) -> Tensor:
        """Keys and values of all rows, [groups * N, 2 kv_heads, head_dim], until the next call.

        Args:
            keys_values: of this rank's rows, [groups * rows, 2 kv_heads, head_dim].
        """
        self._sent[:, : self._rows].copy_(keys_values.unflatten(0, (len(self._sent), -1)))
        # one by one, so that each group's rows arrive in their order
        for sent, gathered in zip(self._sent, self._gathered):
            self._group.exchange_rows(sent, gathered, self._parts)
        if self._places is not None:
            torch.index_select(self._gathered, 1, self._places, out=self._ordered)
        return self._ordered.flatten(0, 1)

    def tensors(self) -> list[Tensor]:
        """What it holds of its own."""
        return [self.cu_keys] if self._places is None else [self.cu_keys, self._places]


@dataclass(frozen=True)
class ExchangeSpace:
    """Memory for keys and values on their way, [rows, 2 kv_heads, head_dim] each."""

    sent: Tensor
    gathered: Tensor
    ordered: Tensor

    @classmethod
    def of(cls, passes: Sequence[tuple[Share, int]], like: Tensor) -> ExchangeSpace:
        """Enough for each of these passes, with so many groups.

        Args:
            passes: of all steps.
            like: [0, 2 kv_heads, head_dim], of the right dtype and device.
        """
        sent = [groups * share.layout.most_rows(share.tokens) for share, groups in passes]
        gathered = [rows * share.layout.rows for rows, (share, _) in zip(sent, passes)]
        ordered = [0 if _even(share) else groups * share.tokens for share, groups in passes]
        row = like.shape[1:]
        return cls(
            *(like.new_empty(max(one, default=0), *row) for one in (sent, gathered, ordered))
        )

    def tensors(self) -> list[Tensor]:
        return [self.sent, self.gathered, self.ordered]


def _even(share: Share) -> bool:
    """Whether all parts of the rows are of one length."""
    return share.tokens % share.layout.rows == 0
