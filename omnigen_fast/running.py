"""Running: a call that a plan carries out, and its state between two steps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Cache, Entry
from .call import Call
from .denoise import Loop
from .graph import Runner
from .memory.plan import MemoryPlan
from .solvers import MULTISTEP
from .step_values import StepValues


@dataclass(eq=False)  # two of one request are two
class Running:
    """A call that a plan carries out; its state between two steps."""

    call: Call
    plan: MemoryPlan
    cache: Cache
    entries: tuple[Entry, ...]
    loop: Loop | None  # None once its steps are over
    runner: Runner | None

    @property
    def latents(self) -> Tensor:
        """[pictures, 4, height / 8, width / 8], float32; the next step starts from it."""
        return self.call.latents if self.loop is None else self.loop.values.latents

    def save(self) -> None:
        """Gives the call what the latest step has left, so that another plan can go on from it."""
        self.call.latents.copy_(self.latents)
        left = [] if self.loop is None else left_by_steps(self.call, self.loop.values)
        if not self.call.history:
            self.call.history = [torch.empty_like(one) for one in left]
        for kept, one in zip(self.call.history, left):
            kept.copy_(one)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, or the call was stopped."""
        return self.call.finished

    @property
    def like(self) -> Hashable | None:
        """Equal for calls whose next steps `Engine.step_together` can take; None for none."""
        loop, call = self.loop, self.call
        if loop is None or call.finished or self.plan.cache != "device":
            return None
        kind = call.schedule.kinds[call.steps_done]
        if loop.values.solver is not None or loop.values.mask is not None or not kind.computed:
            return None
        if loop.values.kinds[kind].shared is not None:
            return None  # exchanges are laid out for the groups of one call
        size = tuple(loop.values.latents.shape[2:])
        return size, self.plan.branches_per_pass, self.plan.mlp_rows


def left_by_steps(call: Call, values: StepValues) -> list[Tensor]:
    """What a step reads of the ones before it, beside the latents."""
    solver, reuse = values.solver, values.reuse
    found = [solver.history] if solver is not None and call.schedule.solver in MULTISTEP else []
    return found if reuse is None else [*found, reuse.kept]
