"""StepSchedule: what each step of a call does. The loop reads it, the planner sums over it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .solvers import SOLVERS, Update, evaluation_times, evaluations, reached, updates

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StepKind:
    """The work of a step. Steps of one kind do the same work, so one recording serves them all."""

    # Which of each picture's guidance branches run, by their places in its list; None for all. A
    # picture that has no such branch leaves it out.
    branches: tuple[int, ...] | None = None
    coefficients: tuple[float, ...] | None = None  # of those branches; None for the request's own
    computed: bool = True  # or extrapolated from the velocities of earlier steps
    # Instead of these two, where pictures differ: (place, coefficient) of the branches of each.
    pictures: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def __post_init__(self) -> None:
        assert self.coefficients is None or len(self.coefficients) == len(self.branches or ())
        assert self.pictures is None or self.branches is None

    def places(self, picture: int, branches: int) -> Sequence[tuple[int, float | None]]:
        """(place, coefficient) of those of a picture's branches that run.

        Args:
            picture: which one.
            branches: how many it has.

        Returns:
            None as coefficient where it is the request's own.
        """
        if self.pictures is not None:
            return self.pictures[picture]
        places = range(branches) if self.branches is None else self.branches
        coefficients = self.coefficients or (None,) * len(places)
        return [(place, one) for place, one in zip(places, coefficients) if place < branches]

    @property
    def runs(self) -> tuple[object, ...]:
        """Equal for steps whose velocities are combined alike."""
        return self.branches, self.coefficients, self.pictures


ALL_BRANCHES = StepKind()


@dataclass(frozen=True)
class StepSchedule:
    """The steps of a call, in their order.

    Args:
        kinds: of each step.
        times: [steps + 1], of each step's beginning and the last one's end, from 0 (noise) to 1
            (image); None for equal steps.
        solver: one of `SOLVERS`. A step may evaluate the velocity twice; each evaluation has a time
            token of its own.
        order: of the extrapolation, where enough steps of the same kind were computed before; 0
            uses the velocities of the last one again.
    """

    kinds: tuple[StepKind, ...]
    times: tuple[float, ...] | None = None
    solver: str = "euler"
    order: int = 0

    def __post_init__(self) -> None:
        assert self.solver in SOLVERS
        assert self.kinds and self.kinds[0].computed
        assert self.times is None or len(self.times) == len(self.kinds) + 1
        for before, kind in zip(self.kinds, self.kinds[1:]):
            same = before.runs == kind.runs
            assert kind.computed or same, "a step extrapolates the velocities of the one before"

    @classmethod
    def euler(cls, steps: int) -> StepSchedule:
        """Equal Euler steps with all branches (rectified flow; Liu et al., 2022)."""
        return cls((ALL_BRANCHES,) * steps)

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def counts(self) -> dict[StepKind, int]:
        """How many evaluations there are of each kind, in the order of their first ones."""
        found: Counter[StepKind] = Counter()
        for kind, count in zip(self.kinds, self.per_step):
            found[kind] += count
        return dict(found)

    @cached_property
    def per_step(self) -> list[int]:
        """How often each step evaluates the velocity."""
        return evaluations(self.solver, len(self))

    @property
    def evaluations(self) -> int:
        """Of all steps."""
        return sum(self.per_step)

    def first(self, step: int) -> int:
        """The index of a step's first evaluation."""
        return sum(self.per_step[:step])

    @property
    def computed(self) -> int:
        """How many evaluations run the model; the others are extrapolated."""
        return sum(count for kind, count in self.counts.items() if kind.computed)

    @property
    def extrapolates(self) -> bool:
        """Whether a step needs more than the velocities of the one before."""
        return self.order > 0 and self.computed < self.evaluations

    @property
    def plain(self) -> bool:
        """Whether latents are moved by nothing but their velocities."""
        return self.solver == "euler" and not self.extrapolates

    @cached_property
    def evaluated(self) -> tuple[float, ...] | None:
        """The times of all evaluations; None for those of equal Euler steps."""
        if self.times is None and self.solver == "euler":
            return None
        return evaluation_times(self.solver, self.ends)

    @property
    def ends(self) -> tuple[float, ...]:
        """[steps + 1], of each step's beginning and the last one's end."""
        return tuple(self.time(step) for step in range(len(self) + 1))

    @property
    def reached(self) -> tuple[float, ...]:
        """The time that the latents have after each evaluation."""
        return reached(self.solver, self.ends)

    def updates(self, fresh: Sequence[bool]) -> list[Update]:
        """What the solver makes of each evaluation; see `solvers.updates`."""
        return updates(self.solver, self.ends, fresh)

    def extrapolations(self) -> list[tuple[float, ...]]:
        """What each evaluation makes of the kept velocities, the latest first.

        Their order + 1 coefficients; and 1 where the evaluation's own velocity is kept, else 0.
        """
        table: list[tuple[float, ...]] = []
        kept: list[float] = []  # times
        for step, (kind, count) in enumerate(zip(self.kinds, self.per_step)):
            if step and kind.runs != self.kinds[step - 1].runs:
                kept = []  # of another flow
            for place in range(count):
                # The second evaluation of a step is at other latents than a step that begins there.
                keeps = kind.computed and not place
                time = self.time_of(step, place)
                if keeps:
                    kept = [time, *kept[: self.order]]
                weights = () if kind.computed else _lagrange(kept, time)
                padded = (*weights, *(0.0,) * (self.order + 1 - len(weights)))
                table.append((*padded, float(keeps)))
        return table

    def time_of(self, step: int, evaluation: int) -> float:
        """Of one of a step's evaluations."""
        if self.evaluated is None:
            return self.time(step)
        return self.evaluated[self.first(step) + evaluation]

    def time(self, step: int) -> float:
        """At which a step begins."""
        return step / len(self) if self.times is None else self.times[step]

    def tensor(self) -> Tensor:
        """The times, [steps + 1] float32 on the CPU."""
        import torch  # takes seconds, and plans need none of it

        if self.times is None:
            return torch.linspace(0, 1, len(self) + 1, dtype=torch.float32, device="cpu")
        return torch.tensor(self.times, dtype=torch.float32, device="cpu")

    def evaluated_tensor(self) -> Tensor:
        """The times of all evaluations, [evaluations] float32 on the CPU."""
        import torch

        if self.evaluated is None or self.solver == "euler":
            return self.tensor()[:-1]
        return torch.tensor(self.evaluated, dtype=torch.float32, device="cpu")

    def lengths(self) -> Tensor:
        """Of each evaluation's Euler step, [evaluations] float32 on the CPU.

        1 where more is done with the velocity than moving the latents by it.
        """
        import torch

        if self.plain:
            return self.tensor().diff()
        return torch.ones(self.evaluations, dtype=torch.float32, device="cpu")


def _lagrange(points: Sequence[float], at: float) -> tuple[float, ...]:
    """Weights by which values at some points make the value of their polynomial at another."""
    return tuple(
        math.prod((at - other) / (one - other) for other in points if other != one)
        for one in points
    )
