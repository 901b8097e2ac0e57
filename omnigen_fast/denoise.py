"""Schedule, guidance and the loop from noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .cache import ConditionCache, Entry, Span
from .config import PATCH
from .kernels import ops
from .memory.plan import MLP_ROWS
from .model import StepGroups, TimeEmbeddings, Transformer
from .sequence import EncodedBranch, lay_out
from .streamed_cache import StreamedCache


def schedule(steps: int) -> Tensor:
    """Times of the Euler steps, [steps + 1] float32 on the CPU, from 0 (noise) to 1 (image)."""
    return torch.linspace(0, 1, steps + 1)


@dataclass(frozen=True)
class Velocity:
    """A branch of a picture: its condition, where that lies in the cache, what it counts."""

    branch: EncodedBranch
    span: Span
    coefficient: float

    @staticmethod
    def of(
        pictures: Sequence[Sequence[tuple[EncodedBranch, float]]],
        entries: Mapping[Entry, Sequence[EncodedBranch]],
        cache: Mapping[Entry, Sequence[Span]],
    ) -> list[list[Velocity]]:
        """Those of each picture, from its branches and what each counts."""
        spans = {
            branch.key: span
            for entry, branches in entries.items()
            for branch, span in zip(branches, cache[entry])
        }
        return [
            [Velocity(branch, spans[branch.key], coefficient) for branch, coefficient in picture]
            for picture in pictures
        ]


@dataclass(frozen=True)
class GuidancePlan:
    """Which (picture, branch) groups run together, and how their velocities are combined."""

    passes: tuple[StepGroups, ...]
    places: tuple[Tensor, ...]  # [groups] of each pass, int64: where in the prediction they stand
    branches: tuple[Velocity, ...]  # without repetition
    slots: Tensor  # [branches], int64, see `ConditionCache.select_step`
    times: Tensor  # [branches], int64, likewise
    prediction: Tensor | None  # [groups, N, 16], where the passes' velocities meet
    coefficient: Tensor  # [groups], float32
    cu_groups: Tensor  # [pictures + 1], int32

    @classmethod
    def make(
        cls,
        model: Transformer,
        pictures: Sequence[Sequence[Velocity]],
        noise_tokens: int,
        branches_per_pass: int | None,
        mlp_rows: int = MLP_ROWS,
    ) -> GuidancePlan:
        """Plans the groups of all pictures.

        Args:
            model: gives rotary tables and the device.
            pictures: the branches of each picture.
            noise_tokens: of each picture.
            branches_per_pass: so many branches of every picture at once; None for all.
            mlp_rows: see `model.Workspace`.
        """
        device = model.device
        most = max(map(len, pictures))
        size = min(branches_per_pass or most, most)
        offsets = [0, *accumulate(map(len, pictures))]
        rows = sum(min(size, len(one)) for one in pictures) * noise_tokens
        space = model.workspace(rows, mlp_rows)
        passes, places = [], []
        for first in range(0, most, size):
            members = [
                (offset + first + i, picture, velocity)
                for picture, (offset, velocities) in enumerate(zip(offsets, pictures))
                for i, velocity in enumerate(velocities[first : first + size])
            ]
            groups = [(picture, v.span, v.branch.long) for _, picture, v in members]
            passes.append(model.step_groups(groups, noise_tokens, space))
            places.append(torch.tensor([place for place, _, _ in members], device=device))
        branches = {v.branch.key: v for velocities in pictures for v in velocities}.values()
        return cls(
            passes=tuple(passes),
            places=tuple(places),
            branches=tuple(branches),
            slots=torch.tensor([v.span.slot for v in branches], device=device),
            times=torch.tensor([v.span.times for v in branches], device=device),
            prediction=(
                passes[0].values.new_empty(offsets[-1], noise_tokens, passes[0].values.shape[1])
                if len(passes) > 1
                else None
            ),
            coefficient=torch.tensor(
                [velocity.coefficient for velocities in pictures for velocity in velocities],
                dtype=torch.float32,
                device=device,
            ),
            cu_groups=torch.tensor(offsets, dtype=torch.int32, device=device),
        )


# (latents, plan, index of the step [1]) -> velocities of each pass's groups, [groups, N, 16]
VelocityOf = Callable[[Tensor, GuidancePlan, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Loop:
    """What the steps of one call read and write.

    Everything that differs from step to step hangs on `index`, which is on the device like the
    rest: a step's work is the same each time, so it can be captured once and replayed.
    """

    latents: Tensor  # [pictures, 4, height / 8, width / 8], float32, updated by each step
    index: Tensor  # [1], int64: the step that comes next
    lengths: Tensor  # [steps], float32: of each Euler step
    times: TimeEmbeddings
    plan: GuidancePlan
    velocity: VelocityOf

    def step(self) -> None:
        """One Euler step: `z += (t_{i+1} - t_i) * sum_b coefficient_b v_b(z, t_i)`."""
        plan = self.plan
        velocities = self.velocity(self.latents, plan, self.index)
        prediction = plan.prediction
        if prediction is None:  # one pass, whose groups stand in the prediction's own order
            (prediction,) = velocities
        else:
            for places, values in zip(plan.places, velocities):
                prediction.index_copy_(0, places, values)
        ops.guidance_step_(
            self.latents,
            prediction,
            plan.coefficient,
            plan.cu_groups,
            self.lengths,
            self.index,
            PATCH,
        )
        self.index.add_(1)

    def tensors(self) -> list[Tensor]:
        """All that another call of the same shapes has other values of."""
        plan = self.plan
        found = [self.latents, self.index, self.lengths, self.times.shift, self.times.scale]
        found += [plan.coefficient, plan.cu_groups, plan.slots, plan.times, *plan.places]
        for groups in plan.passes:
            found += [groups.cu_rows]
            found += [groups.cache_start, groups.cache_len, groups.cos, groups.sin]
        return found


def cached_velocity(
    model: Transformer, cache: ConditionCache | StreamedCache, times: TimeEmbeddings
) -> VelocityOf:
    """Velocities from a cache filled by prefill."""
    staging: list[tuple[Tensor, Tensor]] = []

    def velocity(latents: Tensor, plan: GuidancePlan, index: Tensor) -> list[Tensor]:
        if not staging:
            staging.append(cache.staging(len(plan.slots)))
        cache.select_step(plan.slots, plan.times, index, staging[0])
        return model.step(latents, plan.passes, (times.shift, times.scale, index), cache)

    return velocity


def recomputed_velocity(
    model: Transformer,
    cache: ConditionCache,
    times: TimeEmbeddings,
    image_latents: Mapping[str, Tensor],
    mlp_rows: int = MLP_ROWS,
) -> VelocityOf:
    """Velocities with the condition computed anew, layer by layer, in a cache of one layer."""

    def velocity(latents: Tensor, plan: GuidancePlan, index: Tensor) -> list[Tensor]:
        time_token = times.tokens.index_select(0, index)
        sequences = [lay_out(v.branch, 1, v.span, latents.device) for v in plan.branches]
        return model.step_recomputed(
            latents,
            plan.passes,
            (times.shift, times.scale, index),
            sequences,
            [model.embed_condition(s, image_latents, time_token) for s in sequences],
            plan.slots,
            plan.times,
            cache,
            mlp_rows,
        )

    return velocity


def denoise(
    loop: Loop,
    run: Callable[[], None],
    after_step: Callable[[int, Tensor], bool],
    first: int = 0,
) -> None:
    """Integrates from noise to image (rectified flow; Liu et al., 2022), in `loop.latents`.

    Args:
        loop: at step `first`.
        run: takes the next step: `loop.step`, or a replay of it.
        after_step: called with the step's index and the latents; returns whether to go on.
        first: how many steps were taken before.
    """
    for index in range(first, len(loop.lengths)):
        run()
        if not after_step(index, loop.latents):
            return
