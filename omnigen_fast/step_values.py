"""StepValues: the tensors that the steps of a call read and write, laid out before the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .cache import Cache, Entry, Span
from .config import PATCH
from .model import NoiseRows, TimeEmbeddings, Transformer, patches_of
from .parallel.exchange import Share, velocity_places
from .placement import Placement
from .schedule import ALL_BRANCHES, StepKind, StepSchedule
from .sequence import EncodedBranch


@dataclass(frozen=True)
class PlacedBranch:
    """A guidance branch, its rows in the cache, and its coefficient."""

    branch: EncodedBranch
    span: Span | None  # None where another rank has them
    coefficient: float

    @staticmethod
    def of(
        pictures: Sequence[Sequence[tuple[EncodedBranch, float]]],
        entries: Mapping[Entry, Sequence[EncodedBranch]],
        cache: Cache,
    ) -> list[list[PlacedBranch]]:
        """Those of each picture, from its branches with their coefficients."""
        spans = {
            branch.key: span
            for entry, branches in entries.items()
            for branch, span in zip(branches, cache[entry])
        }
        return [
            [
                PlacedBranch(branch, spans.get(branch.key), coefficient)
                for branch, coefficient in one
            ]
            for one in pictures
        ]


@dataclass(frozen=True)
class PassValues:
    """The (picture, branch) groups that run together."""

    pictures: tuple[int, ...]  # of each group: whose latents
    places: Tensor  # [groups], int64: where in the prediction their velocities go
    cu_rows: Tensor  # [groups + 1], int32
    cache_start: Tensor  # [groups], int32
    cache_len: Tensor  # [groups], int32
    cached: tuple[tuple[int, int], ...]  # of each group: what the two say, on the host
    cos: Tensor  # [groups * N, head_dim / 2], float32
    sin: Tensor  # [groups * N, head_dim / 2], float32
    step: Tensor  # [groups], int64, of `StepValues.counters`

    def spans(self, keys: int | None = None) -> list[int]:
        """See `ops.attention_step`; each group has so many keys of its own, None for its rows."""
        rows, found = len(self.cos) // len(self.pictures), []
        keys = rows if keys is None else keys
        for group, (first, length) in enumerate(self.cached):
            found += [group * rows, (group + 1) * rows, group * keys, (group + 1) * keys]
            found += [first, first + length]
        return found


@dataclass(frozen=True)
class SharedValues:
    """What a step whose groups are divided among ranks needs besides."""

    share: Share  # of this rank
    noise: NoiseRows
    sent: int  # rows of velocities that each rank sends, padding included
    places: Tensor  # [groups * N], int64, see `velocity_places`

    @classmethod
    def make(
        cls,
        placement: Placement,
        chosen: Sequence[Sequence[_Chosen]],
        kind: StepKind,
        branches: Sequence[Sequence[EncodedBranch]],
        branches_per_pass: int | None,
        latents: Tensor,
    ) -> tuple[list[list[_Member]], SharedValues]:
        """The passes of this rank, and what they need.

        Args:
            placement: of this rank.
            chosen: see `_chosen`.
            kind: of the steps.
            branches: all that each picture has.
            branches_per_pass: see `StepValues.make`.
            latents: of all pictures.
        """
        patches = patches_of(torch.arange(latents.numel(), device=latents.device).view_as(latents))
        tokens = patches.shape[1:3].numel()
        division = placement.divide(kind, branches)
        share = placement.share(division, tokens)
        assert tokens >= share.layout.rows, "see `Placement.check`"
        by_part = [_members(_kept(chosen, part), branches_per_pass) for part in division.parts]
        orders = [[place for one in passes for place, *_ in one] for passes in by_part]
        places, sent = velocity_places(division, orders, tokens, sum(map(len, chosen)))
        own = by_part[share.layout.branch_rank(placement.rank)]
        pictures = tuple(sorted({picture for one in own for _, picture, _ in one}))
        index = patches.flatten(1, 2)[list(pictures), share.first : share.stop].flatten(2)
        return own, cls(
            share=share,
            noise=NoiseRows(
                pictures=pictures,
                first=share.first,
                places=index.contiguous(),
                values=latents.new_empty(index.shape),
            ),
            sent=sent,
            places=torch.tensor(places, dtype=torch.int64).to(latents.device),
        )


@dataclass(frozen=True)
class Passes:
    """The groups of a kind of step, pass by pass, and how their velocities are combined."""

    passes: tuple[PassValues, ...]
    branches: tuple[int, ...]  # whose conditions they read, of the call's distinct ones
    coefficient: Tensor  # [groups], float32
    cu_groups: Tensor  # [pictures + 1], int32
    shared: SharedValues | None = None  # None where all groups run here

    @property
    def rows(self) -> int:
        """Of all groups that run here."""
        return sum(len(one.cos) for one in self.passes)

    @property
    def in_order(self) -> bool:
        """Whether one pass computes all groups in the prediction's own order."""
        whole = len(self.passes) == 1 and len(self.passes[0].pictures) == len(self.coefficient)
        return whole and self.shared is None


@dataclass(frozen=True)
class SolverValues:
    """What updates other than Euler's need; see `solvers.Update`."""

    weights: Tensor  # [pictures, evaluations, 5], float32: the update of each
    history: Tensor  # like latents
    velocity: Tensor  # likewise
    moved: Tensor  # likewise

    @classmethod
    def make(
        cls,
        schedule: StepSchedule,
        chosen: Mapping[StepKind, Sequence[Sequence[_Chosen]]],
        latents: Tensor,
    ) -> SolverValues:
        """For pictures that start from `latents`, with these branches in each kind of step.

        A picture whose branches or coefficients change begins anew: what was found before belongs
        to another flow.
        """
        runs = [chosen[replace(kind, computed=True)] for kind in schedule.kinds]
        tables = []
        for picture in range(len(latents)):
            own = [[(place, b.coefficient) for _, place, b in one[picture]] for one in runs]
            fresh = [True, *(one != before for before, one in pairwise(own))]
            tables.append(schedule.updates(fresh))
        weights = torch.tensor(tables, dtype=torch.float32).to(latents.device)
        return cls(
            weights=weights,
            history=torch.zeros_like(latents),
            velocity=torch.empty_like(latents),
            moved=torch.empty_like(latents),
        )

    def advance_(self, latents: Tensor, step: Tensor) -> None:
        """Moves latents by their velocities, each picture by the update of its step."""
        place = step.view(-1, 1, 1).expand(-1, 1, self.weights.shape[2])
        row = self.weights.gather(1, place).view(len(latents), -1, 1, 1, 1)
        velocity, same, history, kept_latents, kept_velocity = row.unbind(1)  # as `Update`
        torch.mul(self.history, history, out=self.moved)
        self.moved.addcmul_(latents, same).addcmul_(self.velocity, velocity)
        torch.mul(latents, kept_latents, out=self.history)
        self.history.addcmul_(self.velocity, kept_velocity)
        latents.copy_(self.moved)


@dataclass(frozen=True)
class ReuseValues:
    """The velocities of the last computed steps, from which others are extrapolated."""

    weights: Tensor  # [evaluations, order + 2], float32, see `StepSchedule.extrapolations`
    kept: Tensor  # [order + 1, *latents], float32, the latest first

    @classmethod
    def make(cls, schedule: StepSchedule, latents: Tensor) -> ReuseValues:
        """For pictures like `latents`, of which nothing is kept yet."""
        weights = torch.tensor(schedule.extrapolations(), dtype=torch.float32)
        kept = latents.new_zeros(schedule.order + 1, *latents.shape)
        return cls(weights.to(latents.device), kept)

    def keep_(self, velocity: Tensor, step: Tensor) -> None:
        """Keeps computed velocities, each picture's if its step wants that."""
        keeps = self._of(step)[-1] > 0
        for older, newer in reversed(list(pairwise((velocity, *self.kept)))):
            newer.copy_(torch.where(keeps, older, newer))

    def extrapolate(self, step: Tensor, out: Tensor) -> None:
        """Writes the velocities of a step that is not computed."""
        *weights, _ = self._of(step)
        torch.mul(self.kept[0], weights[0], out=out)
        for weight, velocity in zip(weights[1:], self.kept[1:]):
            out.addcmul_(velocity, weight)

    def _of(self, step: Tensor) -> tuple[Tensor, ...]:
        """The columns of `weights` for each picture, [pictures, 1, 1, 1]."""
        rows = self.weights.index_select(0, step)
        return rows.view(len(step), -1, 1, 1, 1).unbind(1)


@dataclass(frozen=True)
class MaskValues:
    """What keeps latents outside a mask on the input image's own way from the call's noise."""

    edited: Tensor  # [height / 8, width / 8], bool
    known: Tensor  # [4, height / 8, width / 8], float32: of the input image
    noise: Tensor  # like latents
    reached: Tensor  # [evaluations], float32: the time after each

    def blend_(self, latents: Tensor, step: Tensor) -> None:
        """Puts that way's latents outside the mask: `(1 - t) noise + t known`."""
        time = self.reached.index_select(0, step).view(-1, 1, 1, 1)
        way = (1 - time) * self.noise + time * self.known
        latents.copy_(torch.where(self.edited, latents, way))


@dataclass(frozen=True)
class StepValues:
    """The tensors that the steps of one call read and write, workspace excluded.

    Whatever differs from step to step depends on `counters` alone, which live on the device too:
    every step does the same work, so it can be captured once and replayed.
    """

    latents: Tensor  # [pictures, 4, height / 8, width / 8], float32, updated by each step
    # [pictures | groups of every pass | branches], int64: the step that comes next for each picture
    # and each group, and the cache row of each branch's time token. One addition advances all.
    counters: Tensor
    first: Tensor  # the counters of step 0
    lengths: Tensor  # [steps], float32: of each Euler step
    times: TimeEmbeddings
    kinds: Mapping[StepKind, Passes]
    slots: Tensor  # [branches], int64, see `Cache.select_step`
    pos_embed: Tensor  # [N, hidden]: held here, since a captured step reads it in later calls too
    solver: SolverValues | None = None  # None where latents only move by their velocities
    mask: MaskValues | None = None
    reuse: ReuseValues | None = None  # None where nothing is extrapolated

    @classmethod
    def make(
        cls,
        model: Transformer,
        pictures: Sequence[Sequence[PlacedBranch]],
        latents: Tensor,
        lengths: Tensor,
        times: TimeEmbeddings,
        kinds: Sequence[StepKind] = (ALL_BRANCHES,),
        branches_per_pass: int | None = None,
        placement: Placement | None = None,
        schedule: StepSchedule | None = None,
        mask: MaskValues | None = None,
    ) -> StepValues:
        """Lays out the groups of all pictures.

        Args:
            model: gives rotary tables, positions and the device.
            pictures: the branches of each picture.
            latents: see above.
            lengths: likewise.
            times: the embedded times of all steps.
            kinds: of the steps, without repetition.
            branches_per_pass: so many branches of every picture at once; None for all.
            placement: which branches and rows run here; None for all.
            schedule: of all steps; None where nothing but their velocities is wanted.
            mask: of an edit that keeps part of its input image.
        """
        device, placement = model.device, placement or Placement()
        height, width = (side // PATCH for side in latents.shape[2:])
        noise_tokens = height * width
        branches = distinct_branches(pictures)
        chosen = {kind: _chosen(pictures, kind) for kind in kinds}
        passes, shared = {}, dict.fromkeys(kinds)
        if placement.group is None:
            passes = {kind: _members(groups, branches_per_pass) for kind, groups in chosen.items()}
        else:
            encoded = [[b.branch for b in picture] for picture in pictures]
            for kind, some in chosen.items():
                passes[kind], shared[kind] = SharedValues.make(
                    placement, some, kind, encoded, branches_per_pass, latents
                )
        groups = sum(len(one) for some in passes.values() for one in some)
        first = torch.zeros(len(pictures) + groups + len(branches), dtype=torch.int64)
        first[len(first) - len(branches) :] = torch.tensor([span_of(b).times for b in branches])
        first = first.to(device)
        counters = first.clone()
        place, made = len(pictures), {}
        for kind, members in passes.items():
            values, own = [], shared[kind]
            rows = range(noise_tokens)
            if own is not None:
                rows = rows[own.share.first : own.share.stop]
            for one in members:
                step = counters[place : place + len(one)]
                values.append(_pass_values(model, one, rows, step))
                place += len(one)
            counts = [len(picture) for picture in chosen[kind]]
            read = {b.branch.key for one in members for *_, b in one}
            made[kind] = Passes(
                passes=tuple(values),
                branches=tuple(i for i, b in enumerate(branches) if b.branch.key in read),
                coefficient=torch.tensor(
                    [b.coefficient for picture in chosen[kind] for *_, b in picture],
                    dtype=torch.float32,
                    device=device,
                ),
                cu_groups=torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device),
                shared=own,
            )
        return cls(
            latents=latents,
            counters=counters,
            first=first,
            lengths=lengths,
            times=times,
            kinds=made,
            slots=torch.tensor([span_of(b).slot for b in branches], device=device),
            pos_embed=model.crop_pos_embed(height, width),
            solver=None
            if schedule is None or schedule.plain
            else SolverValues.make(schedule, chosen, latents),
            mask=mask,
            reuse=None
            if schedule is None or not schedule.extrapolates
            else ReuseValues.make(schedule, latents),
        )

    @property
    def step(self) -> Tensor:
        """[pictures], int64: the step that comes next."""
        return self.counters[: len(self.latents)]

    @property
    def time_rows(self) -> Tensor:
        """[branches], int64: the cache row of the time token that comes next."""
        return self.counters[len(self.counters) - len(self.slots) :]

    @property
    def noise_tokens(self) -> int:
        """Of one picture."""
        return len(self.pos_embed)

    def seek(self, step: int) -> None:
        """Makes `step` the one that comes next."""
        torch.add(self.first, step, out=self.counters)

    def tensors(self) -> list[Tensor]:
        """Everything whose values differ between calls of one shape."""
        found = [self.latents, self.counters, self.first, self.lengths, self.slots]
        found += [self.times.shift, self.times.scale]
        if self.solver is not None:
            found += [self.solver.weights, self.solver.history]
        if self.reuse is not None:
            found += [self.reuse.weights, self.reuse.kept]
        if self.mask is not None:
            found += [self.mask.edited, self.mask.known, self.mask.noise, self.mask.reached]
        for one in self.kinds.values():
            found += [one.coefficient, one.cu_groups]
            if one.shared is not None:
                found += [one.shared.places, one.shared.noise.places]
            for each in one.passes:
                found += [each.places, each.cu_rows, each.cache_start, each.cache_len]
                found += [each.cos, each.sin]
        return found


def distinct_branches(pictures: Sequence[Sequence[PlacedBranch]]) -> list[PlacedBranch]:
    """The branches of all pictures that run here, without repetition."""
    here = [b for picture in pictures for b in picture if b.span is not None]
    return list({b.branch.key: b for b in here}.values())


def span_of(placed: PlacedBranch) -> Span:
    """Its rows in the cache of this rank, which runs it."""
    assert placed.span is not None, "its condition is on another rank"
    return placed.span


# (place in the prediction, place in the picture's list, the branch)
_Chosen = tuple[int, int, PlacedBranch]
# (place in the prediction, picture, branch)
_Member = tuple[int, int, PlacedBranch]


def _chosen(pictures: Sequence[Sequence[PlacedBranch]], kind: StepKind) -> list[list[_Chosen]]:
    """The branches of each picture that a kind of step combines."""
    found: list[list[_Chosen]] = []
    group = 0
    for picture, branches in enumerate(pictures):
        some = []
        for place, coefficient in kind.places(picture, len(branches)):
            one = branches[place]
            if coefficient is not None:
                one = replace(one, coefficient=coefficient)
            some.append((group, place, one))
            group += 1
        found.append(some)
    return found


def _members(
    pictures: Sequence[Sequence[_Chosen]], branches_per_pass: int | None
) -> list[list[_Member]]:
    """The groups of each pass."""
    most = max(map(len, pictures))
    size = min(branches_per_pass or most, most)
    return [
        [
            (group, picture, b)
            for picture, branches in enumerate(pictures)
            for group, _, b in branches[first : first + size]
        ]
        for first in range(0, most, size)
    ]


def _kept(
    pictures: Sequence[Sequence[_Chosen]], part: Sequence[tuple[int, int]]
) -> list[list[_Chosen]]:
    """Those that are of a part, as (picture, place in its list)."""
    kept = set(part)
    return [
        [one for one in branches if (picture, one[1]) in kept]
        for picture, branches in enumerate(pictures)
    ]


def _pass_values(
    model: Transformer, members: Sequence[_Member], rows: range, step: Tensor
) -> PassValues:
    """Args: the groups, and which of each picture's noise tokens run here."""
    device, spans = model.device, [span_of(b) for *_, b in members]
    places = torch.arange(rows.start, rows.stop, device=device)
    tables = [
        model.rotary(places + span.condition + 1, b.branch.long)
        for span, (*_, b) in zip(spans, members)
    ]

    def integers(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return PassValues(
        pictures=tuple(picture for _, picture, _ in members),
        places=integers([place for place, _, _ in members], torch.int64),
        cu_rows=integers([i * len(rows) for i in range(len(members) + 1)]),
        cache_start=integers([span.start for span in spans]),
        cache_len=integers([span.condition + 1 for span in spans]),
        cached=tuple((span.start, span.condition + 1) for span in spans),
        cos=torch.cat([cos for cos, _ in tables]),
        sin=torch.cat([sin for _, sin in tables]),
        step=step,
    )
