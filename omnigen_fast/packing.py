"""Pack: the next steps of several calls in one pass over the weights.

The step index is per picture, so calls need not have started together, nor have the same number of
steps. Each keeps its own values; a pack copies its latents back after every step, so a call can
leave at any time and go on alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .cache import ConditionCache
from .denoise import CachedVelocity, Loop
from .model import TimeEmbeddings, Transformer
from .schedule import ALL_BRANCHES, StepKind
from .step_values import Passes, PassValues, StepValues


@dataclass(frozen=True)
class Member:
    """A call in a pack: its values, and the kind of step that comes next."""

    values: StepValues
    kind: StepKind

    @property
    def passes(self) -> Passes:
        return self.values.kinds[self.kind]


class Pack:
    """Members whose steps run together; of one picture size, all by Euler's method, none masked.

    Their conditions are in one cache, and no two members have rows in common.
    """

    def __init__(self, members: Sequence[Member], loop: Loop) -> None:
        self._members = tuple(members)
        self._loop = loop
        self._at: list[int] | None = None  # the evaluations that the counters name

    @classmethod
    def of(
        cls,
        model: Transformer,
        cache: ConditionCache,
        members: Sequence[Member],
        mlp_rows: int,
    ) -> Pack:
        """Joins the values of some members.

        Args:
            model: of the calls.
            cache: where their conditions are.
            members: see the class.
            mlp_rows: see `model.Workspace`.
        """
        values = _joined(members)
        velocity = CachedVelocity(model, cache, len(values.slots))
        return cls(members, Loop(model, values, velocity, mlp_rows))

    def takes(self, members: Sequence[Member]) -> bool:
        """Whether the next steps of these are what this pack was made for."""
        return len(members) == len(self._members) and all(
            mine.values is theirs.values and mine.kind == theirs.kind
            for mine, theirs in zip(self._members, members)
        )

    def step(self, evaluations: Sequence[int]) -> None:
        """The next step of every member.

        Args:
            evaluations: of each member, the one that comes next.
        """
        joint = self._loop.values
        if self._at != list(evaluations):
            self._seek(evaluations)
        pictures = [one.values.latents for one in self._members]
        torch.cat(pictures, out=joint.latents)
        self._at = None  # until the step is over
        self._loop.step()
        for latents, own in zip(joint.latents.split([len(one) for one in pictures]), pictures):
            own.copy_(latents)
        for one in self._members:
            one.values.counters.add_(1)
        self._at = [one + 1 for one in evaluations]

    def _seek(self, evaluations: Sequence[int]) -> None:
        joint = self._loop.values
        counts = _counts(self._members)
        moved = [
            evaluation
            for part in zip(*counts)
            for count, evaluation in zip(part, evaluations)
            for _ in range(count)
        ]
        step = torch.tensor(moved, dtype=torch.int64).to(joint.counters.device)
        torch.add(joint.first, step, out=joint.counters)


def _counts(members: Sequence[Member]) -> list[list[int]]:
    """How many counters each member has: of pictures, of the groups of each pass, of branches."""
    most = max(len(one.passes.passes) for one in members)
    found = []
    for one in members:
        passes = [len(each.pictures) for each in one.passes.passes]
        passes += [0] * (most - len(passes))
        found.append([len(one.values.latents), *passes, len(one.values.slots)])
    return found


def _joined(members: Sequence[Member]) -> StepValues:
    """The values of all members as those of one call; its steps are of one kind."""
    values = [one.values for one in members]
    lengths = [len(one.lengths) for one in values]
    firsts = [0, *accumulate(lengths)][:-1]  # where the evaluations of each begin
    device = values[0].latents.device
    counts = _counts(members)
    offsets = [
        first
        for part in list(zip(*counts))[:-1]
        for count, first in zip(part, firsts)
        for _ in range(count)
    ]
    times = torch.cat([one.first[len(one.first) - len(one.slots) :] for one in values])
    first = torch.cat([torch.tensor(offsets, dtype=torch.int64).to(device), times])
    counters = first.clone()
    return StepValues(
        latents=torch.cat([one.latents for one in values]),
        counters=counters,
        first=first,
        lengths=torch.cat([one.lengths for one in values]),
        times=TimeEmbeddings(
            *(
                torch.cat([getattr(one.times, name) for one in values])
                for name in ("tokens", "shift", "scale")
            )
        ),
        kinds={ALL_BRANCHES: _joined_passes(members, counters)},
        slots=torch.cat([one.slots for one in values]),
        pos_embed=values[0].pos_embed,
    )


def _joined_passes(members: Sequence[Member], counters: Tensor) -> Passes:
    """The passes of all members, pass by pass; some have fewer than others.

    Args:
        members: see `Pack`.
        counters: of the joint values.
    """
    pictures = [0, *accumulate(len(one.values.latents) for one in members)]
    groups = [0, *accumulate(len(one.passes.coefficient) for one in members)]
    place, made = pictures[-1], []
    for i in range(max(len(one.passes.passes) for one in members)):
        parts = [
            (first, group, one.passes.passes[i])
            for first, group, one in zip(pictures, groups, members)
            if i < len(one.passes.passes)
        ]
        count = sum(len(one.pictures) for *_, one in parts)
        step = counters[place : place + count]
        made.append(_joined_pass(parts, len(members[0].values.pos_embed), step))
        place += count
    ends = [one.passes.cu_groups[1:] + group for group, one in zip(groups, members)]
    return Passes(
        passes=tuple(made),
        branches=tuple(range(sum(len(one.values.slots) for one in members))),
        coefficient=torch.cat([one.passes.coefficient for one in members]),
        cu_groups=torch.cat([ends[0].new_zeros(1), *ends]),
    )


def _joined_pass(
    parts: Sequence[tuple[int, int, PassValues]], noise_tokens: int, step: Tensor
) -> PassValues:
    """One pass; of each part its member's first picture, first group, and values."""
    passes = [one for *_, one in parts]
    rows = [i * noise_tokens for i in range(len(step) + 1)]
    return PassValues(
        pictures=tuple(first + each for first, _, one in parts for each in one.pictures),
        places=torch.cat([one.places + group for _, group, one in parts]),
        cu_rows=torch.tensor(rows, dtype=torch.int32, device=step.device),
        cache_start=torch.cat([one.cache_start for one in passes]),
        cache_len=torch.cat([one.cache_len for one in passes]),
        cached=tuple(each for one in passes for each in one.cached),
        cos=torch.cat([one.cos for one in passes]),
        sin=torch.cat([one.sin for one in passes]),
        step=step,
    )
