"""Placement: which guidance branches and which noise rows of a step this rank computes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from .errors import RequestError
from .parallel.exchange import Share
from .parallel.group import Group
from .parallel.layout import Division, Layout, divide
from .schedule import StepKind
from .sequence import EncodedBranch, pair_up


class Placement:
    """Divides the groups of a step, which are (picture, guidance branch) pairs, among the ranks.

    Args:
        group: the ranks; None where everything runs here.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group
        self.layout = Layout() if group is None else group.layout
        self.rank = 0 if group is None else group.rank

    def divide(self, kind: StepKind, pictures: Sequence[Sequence[EncodedBranch]]) -> Division:
        """The groups of each part of the ranks.

        Args:
            kind: of the step.
            pictures: the branches of each picture.
        """
        units = []
        for picture, branches in enumerate(pictures):
            run: dict[Hashable, list[int]] = {}  # places by key: a prompt may be its negative too
            for place, _ in kind.places(picture, len(branches)):
                run.setdefault(branches[place].key, []).append(place)
            pairs = pair_up([branches[places[0]] for places in run.values()])
            units.append(
                [[(place, one.key) for one in pair for place in run[one.key]] for pair in pairs]
            )
        return divide(self.layout, units)

    def check(
        self, kinds: Iterable[StepKind], pictures: Sequence[Sequence[EncodedBranch]], tokens: int
    ) -> None:
        """Raises RequestError, on all ranks alike, if a step can't be divided among them.

        Args:
            kinds: of the call's steps.
            pictures: the branches of each picture.
            tokens: noise tokens of each picture.
        """
        if self.group is None:
            return
        for kind in kinds:
            rows = self.divide(kind, pictures).layout.rows
            if tokens < rows:
                raise RequestError(
                    f"pictures of {tokens} noise tokens can't be split into {rows} parts; "
                    "ask for larger ones or start fewer ranks"
                )

    def share(self, division: Division, tokens: int) -> Share:
        """What of a step this rank computes; of each picture's `tokens` noise tokens."""
        return Share.of(division, self.rank, tokens)

    def conditions(
        self, kinds: Iterable[StepKind], pictures: Sequence[Sequence[EncodedBranch]]
    ) -> set[Hashable] | None:
        """The keys of the branches whose conditions this rank needs; None for all.

        Args:
            kinds: of the call's steps.
            pictures: the branches of each picture.
        """
        if self.group is None:
            return None
        found: set[Hashable] = set()
        for kind in kinds:
            division = self.divide(kind, pictures)
            for picture, place in division.parts[division.layout.branch_rank(self.rank)]:
                found.add(pictures[picture][place].key)
        return found
