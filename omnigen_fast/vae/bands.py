"""Bands: the rows of an image that each rank decodes, and what neighbouring bands need to know.

An activation's band ends where the neighbour's begins. A 3 x 3 convolution reads one row of it, so
ranks exchange the first and last rows of their bands; a norm's mean and variance are those of all
bands, and the middle attention has the keys and values of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..parallel.group import Group
from ..parallel.layout import Layout


class Bands:
    """The bands of a picture.

    Args:
        group: the ranks; at most as many as there are rows.
        height: rows of latents.
    """

    def __init__(self, group: Group, height: int) -> None:
        self._group, self._height = group, height
        self._layout = Layout(rows=group.size)

    @property
    def most_rows(self) -> int:
        """Rows of latents in the longest band."""
        return self._layout.most_rows(self._height)

    def bounds(self, height: int, rank: int | None = None) -> tuple[int, int]:
        """First row of a band and the one after its last, in an activation of so many rows.

        Args:
            height: a multiple of that of the latents.
            rank: whose band; None for this rank's.
        """
        first, last = self._layout.row_bounds(
            self._height, self._group.rank if rank is None else rank
        )
        scale = height // self._height
        return first * scale, last * scale

    def neighbours(self, edges: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows above and below this rank's band, [1, channels, 1, width]; None at the image's
        edge.

        Args:
            edges: the band's own first and last row, [2, channels, width].
        """
        all_ = self._gathered(edges)
        rank = self._group.rank
        above = None if rank == 0 else all_[rank - 1, 1][None, :, None]
        below = None if rank == self._group.size - 1 else all_[rank + 1, 0][None, :, None]
        return above, below

    def of_all(self, values: Tensor) -> list[Tensor]:
        """Values of one shape from every rank, in their order."""
        return list(self._gathered(values))

    def join_(self, whole: Tensor, height: int) -> None:
        """Fills in the other ranks' bands, in place.

        Args:
            whole: [channels, height * columns], its own band filled.
            height: of the activation.
        """
        columns = whole.shape[1] // height
        most = self.most_rows * height // self._height * columns
        first, last = (columns * row for row in self.bounds(height))
        sent = whole.new_empty(len(whole), most)
        sent[:, : last - first] = whole[:, first:last]
        for rank, band in enumerate(self._gathered(sent)):
            if rank != self._group.rank:
                first, last = (columns * row for row in self.bounds(height, rank))
                whole[:, first:last] = band[:, : last - first]

    def _gathered(self, sent: Tensor) -> Any:  # [ranks, *sent]
        sent = sent.contiguous()
        gathered = torch.empty(
            (self._group.size, *sent.shape), dtype=sent.dtype, device=sent.device
        )
        self._group.gather_bands(sent, gathered)
        return gathered
