"""Schedule, guidance and the loop from noise to latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .cache import ConditionCache, Span
from .config import PATCH
from .kernels import ops
from .model import StepGroups, TimeEmbeddings, Transformer
from .processor import EncodedBranch, lay_out


def schedule(steps: int) -> Tensor:
    """Times of the Euler steps, [steps + 1] float32 on the CPU, from 0 (noise) to 1 (image)."""
    return torch.linspace(0, 1, steps + 1)


@dataclass(frozen=True)
class Velocity:
    """A branch of a picture: its condition, where that lies in the cache, what it counts."""

    branch: EncodedBranch
    span: Span
    coefficient: float


@dataclass(frozen=True)
class Pass:
    """The groups that run together, one for each of some pictures' branches."""

    places: Tensor  # [groups], int64: where their velocities stand in the prediction
    groups: StepGroups
    branches: tuple[Velocity, ...]  # without repetition


# (latents, pass, index of the step) -> velocities of the pass's groups, [groups, N, 16]
Step = Callable[[Tensor, Pass, int], Tensor]


@dataclass(frozen=True)
class GuidancePlan:
    """Which (picture, branch) groups run together, and how their velocities are combined."""

    passes: tuple[Pass, ...]
    coefficient: Tensor  # [groups], float32
    cu_groups: Tensor  # [pictures + 1], int32

    @classmethod
    def make(
        cls,
        model: Transformer,
        pictures: Sequence[Sequence[Velocity]],
        noise_tokens: int,
        branches_per_pass: int | None,
    ) -> GuidancePlan:
        """Plans the groups of all pictures.

        Args:
            model: gives rotary tables and the device.
            pictures: the branches of each picture.
            noise_tokens: of each picture.
            branches_per_pass: so many branches of every picture at once; None for all.
        """
        device = model.device
        most = max(map(len, pictures))
        size = min(branches_per_pass or most, most)
        offsets = [0, *accumulate(map(len, pictures))]
        passes = []
        space = model.workspace(sum(min(size, len(one)) for one in pictures) * noise_tokens)
        for first in range(0, most, size):
            members = [
                (offset + first + i, picture, velocity)
                for picture, (offset, velocities) in enumerate(zip(offsets, pictures))
                for i, velocity in enumerate(velocities[first : first + size])
            ]
            groups = [(picture, v.span, v.branch.long) for _, picture, v in members]
            passes.append(
                Pass(
                    places=torch.tensor([place for place, _, _ in members], device=device),
                    groups=model.step_groups(groups, noise_tokens, space),
                    branches=tuple({v.branch.key: v for _, _, v in members}.values()),
                )
            )
        return cls(
            passes=tuple(passes),
            coefficient=torch.tensor(
                [velocity.coefficient for velocities in pictures for velocity in velocities],
                dtype=torch.float32,
                device=device,
            ),
            cu_groups=torch.tensor(offsets, dtype=torch.int32, device=device),
        )


def cached_step(model: Transformer, cache: ConditionCache, times: TimeEmbeddings) -> Step:
    """A step that reads a cache filled by prefill."""
    slots: dict[int, Tensor] = {}

    def run(latents: Tensor, one: Pass, index: int) -> Tensor:
        if id(one) not in slots:
            slots[id(one)] = time_slots(one, latents.device)
        cache.select_step(slots[id(one)], index)
        return model.step(latents, one.groups, times.shift[index], times.scale[index], cache)

    return run


def recomputed_step(
    model: Transformer,
    cache: ConditionCache,
    times: TimeEmbeddings,
    image_latents: Mapping[str, Tensor],
) -> Step:
    """A step that computes the condition anew, layer by layer, in a cache of one layer."""

    def run(latents: Tensor, one: Pass, index: int) -> Tensor:
        time_token = times.tokens[index : index + 1]
        sequences = [lay_out(v.branch, 1, v.span.start, latents.device) for v in one.branches]
        return model.step_recomputed(
            latents,
            one.groups,
            times.shift[index],
            times.scale[index],
            sequences,
            [model.embed_condition(s, image_latents, time_token) for s in sequences],
            time_slots(one, latents.device),
            cache,
        )

    return run


def time_slots(one: Pass, device: torch.device) -> Tensor:
    """Where the pass's branches have their step's time token, for `ConditionCache.select_step`."""
    return torch.tensor([v.span.time_slot for v in one.branches], device=device)


def denoise(
    latents: Tensor,
    times: Tensor,
    plan: GuidancePlan,
    step: Step,
    after_step: Callable[[int, Tensor], bool],
) -> None:
    """Integrates the guided velocity from noise to image, in place, on one float32 copy.

    `z += (t_{i+1} - t_i) * sum_b coefficient_b v_b(z, t_i)` (rectified flow; Liu et al., 2022).

    Args:
        latents: [pictures, 4, height / 8, width / 8], float32: the noise, then the result.
        times: [steps + 1] from `schedule`.
        plan: groups and their coefficients.
        step: gives velocities.
        after_step: called with the step's index and the latents; returns whether to go on.
    """
    lengths = times.diff().to(latents.device)
    for index in range(len(lengths)):
        if len(plan.passes) == 1:  # its groups stand in the prediction's own order
            prediction = step(latents, plan.passes[0], index)
        else:
            prediction = None
            for one in plan.passes:
                velocities = step(latents, one, index)
                if prediction is None:
                    shape = (len(plan.coefficient), *velocities.shape[1:])
                    prediction = velocities.new_empty(shape)
                prediction.index_copy_(0, one.places, velocities)
        ops.guidance_step_(
            latents, prediction, plan.coefficient, plan.cu_groups, lengths[index], PATCH
        )
        if not after_step(index, latents):
            return
