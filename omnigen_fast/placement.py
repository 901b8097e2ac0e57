"""Placement: which guidance branches run here, and where their velocities meet."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Placement(Protocol):
    """How the branches of all pictures are divided among the ranks of a run."""

    def runs(self, picture: int, branch: int) -> bool:
        """Whether this rank computes a branch, by its place in the picture's list."""

    def gather(self, prediction: Tensor) -> None:
        """Fills in the velocities of the other ranks, [groups, N, 16]; this rank's own are there.

        In place: an extrapolated step reads them again.
        """


class OneDevice:
    """All branches run here."""

    def runs(self, picture: int, branch: int) -> bool:
        return True

    def gather(self, prediction: Tensor) -> None:
        pass
