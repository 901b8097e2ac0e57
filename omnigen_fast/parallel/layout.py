"""Layout: which guidance branches and which noise rows each rank computes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

from ..errors import RequestError, brief

Parallel: TypeAlias = "str | Mapping[str, int] | Layout"

AUTO = "auto"
MAX_RANKS = 64
_BRANCHES = 3  # that guidance combines for one picture at most
_FIELDS = ("branches", "rows")


@dataclass(frozen=True)
class Layout:
    """`branches * rows` ranks: so many parts of the branches, each split into parts of its rows.

    Rank `r` has place `r // rows` among the branches and `r % rows` among the rows: ranks that
    exchange the keys and values of one branch are neighbours.

    Args:
        branches: parts that a step's groups, which are (picture, guidance branch) pairs, are
            divided into.
        rows: parts that the noise rows of every group are divided into.
    """

    branches: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANKS:
                raise RequestError(
                    f"parallel needs {name} from 1 to {MAX_RANKS}, got {brief(value)}"
                )

    def __str__(self) -> str:
        return f"{self.branches} x {self.rows}"

    @property
    def size(self) -> int:
        """How many ranks it has."""
        return self.branches * self.rows

    def branch_rank(self, rank: int) -> int:
        """The place of a rank among the parts of the branches."""
        return rank // self.rows

    def row_rank(self, rank: int) -> int:
        """The place of a rank among the parts of the rows."""
        return rank % self.rows

    def row_bounds(self, tokens: int, row_rank: int) -> tuple[int, int]:
        """First of a part's rows and the one after its last, of `tokens` rows.

        Parts differ by one row at most, the longer ones come first.
        """
        each, more = divmod(tokens, self.rows)
        start = row_rank * each + min(row_rank, more)
        return start, start + each + (row_rank < more)

    def most_rows(self, tokens: int) -> int:
        """Rows of the longest part."""
        return -(-tokens // self.rows)

    def for_groups(self, groups: int) -> Layout:
        """The layout of a step of so many groups, over the same ranks.

        A step that has fewer groups than there are parts of branches would leave ranks idle: they
        split rows instead. The parts of branches are then the most that the number of ranks is
        divisible by.
        """
        if groups >= self.branches:
            return self
        branches = max(count for count in range(1, groups + 1) if self.size % count == 0)
        return Layout(branches, self.size // branches)

    def row_counts(self) -> list[int]:
        """The `rows` of all layouts that `for_groups` may give."""
        return sorted({self.for_groups(groups).rows for groups in range(1, self.branches + 1)})

    def parts(self, groups: int) -> list[range]:
        """Consecutive parts of so many groups, one for each place among the branches.

        They differ by one group at most, the longer ones come first.
        """
        assert groups >= self.branches, "see `for_groups`"
        each, more = divmod(groups, self.branches)
        ends = list(accumulate(each + (place < more) for place in range(self.branches)))
        return [range(start, stop) for start, stop in zip([0, *ends], ends)]


@dataclass(frozen=True)
class Division:
    """A step's groups, divided among the ranks.

    Attributes:
        layout: of the step, see `Layout.for_groups`.
        parts: of each place among the branches, its groups as (picture, place in its list).
    """

    layout: Layout
    parts: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def most_groups(self) -> int:
        """Groups of the largest part."""
        return max(map(len, self.parts))


def divide(
    layout: Layout, pictures: Sequence[Sequence[Sequence[tuple[int, Hashable]]]]
) -> Division:
    """Divides the groups of a step.

    Every group has as many noise rows, so parts of equal size take equal time. Of the divisions
    with such parts, the one whose ranks have to prefill the fewest conditions is taken: branches
    that share a prefix or a whole condition stay together where sizes allow.

    Args:
        layout: of the call.
        pictures: of each picture its branches, those with a common prefix together: (place in its
            list, what is equal for equal conditions).
    """
    by_picture = [
        [(picture, place, key) for place, key in unit]
        for picture, units in enumerate(pictures)
        for unit in units
    ]
    # pairs first, then single conditions, equal ones side by side
    keys = list(dict.fromkeys(key for unit in by_picture for *_, key in unit))
    pairs_first = sorted(by_picture, key=lambda unit: (-len(unit), keys.index(unit[0][2])))
    orders = [[one for unit in units for one in unit] for units in (by_picture, pairs_first)]
    own = layout.for_groups(len(orders[0]))

    def work(order: list[tuple[int, int, Hashable]]) -> tuple[int, int]:
        """Conditions of the rank that prefills the most; of all, and common prefixes again."""
        parts = [[order[i] for i in part] for part in own.parts(len(order))]
        counts = [len({key for *_, key in part}) for part in parts]
        together = sum(set(unit) <= set(part) for unit in by_picture for part in parts)
        return max(counts), sum(counts) + len(by_picture) - together

    order = min(orders, key=work)
    return Division(
        own,
        tuple(
            tuple(sorted((order[i][0], order[i][1]) for i in part))
            for part in own.parts(len(order))
        ),
    )


def most_branches(ranks: int) -> Layout:
    """The layout with the most parts of branches that one picture can use."""
    branches = max(count for count in range(1, _BRANCHES + 1) if ranks % count == 0)
    return Layout(branches, ranks // branches)


def parse_layout(parallel: Any, ranks: int) -> Layout | None:
    """What the argument `parallel` asks for; None for "auto".

    Args:
        parallel: "auto", {"branches": 2, "rows": 2} with 1 for what it leaves out, or a `Layout`.
        ranks: of the process group.

    Raises:
        RequestError: it is none of these, or is for another number of ranks.
    """
    if isinstance(parallel, str) and parallel == AUTO:
        return None
    if isinstance(parallel, Layout):
        layout = parallel
    elif isinstance(parallel, Mapping) and parallel and set(parallel) <= set(_FIELDS):
        layout = Layout(**parallel)
    else:
        raise RequestError(
            f'parallel must be "auto" or such as {{"branches": 2, "rows": 1}}, got '
            f"{brief(parallel)}"
        )
    if layout.size != ranks:
        raise RequestError(
            f"parallel asks for {layout.branches} x {layout.rows} = {layout.size} ranks, and the "
            f"process group has {ranks}; start as many ranks as that, or give "
            'parallel="auto"'
        )
    return layout
