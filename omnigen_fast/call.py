"""A request on its way: what it starts from, and what a plan that fails has finished."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .cache import Entry
from .guidance import guidance_terms, guided_steps
from .kernels import ops
from .memory.plan import MemoryPlan, Workload
from .precision import Precision
from .processor import Processor
from .request import Request
from .schedule import ALL_BRANCHES, StepSchedule
from .sequence import EncodedBranch, cache_entries

Memory: TypeAlias = str | int | MemoryPlan


@dataclass
class Call:
    """A request on its way; what a plan that fails has finished stays."""

    request: Request
    schedule: StepSchedule
    pictures: list[list[tuple[EncodedBranch, float]]]  # branches of each, with coefficients
    precision: Precision
    latents: Tensor  # [pictures, 4, height / 8, width / 8], float32, of the last finished step
    steps_done: int = 0
    finished: bool = False  # all steps, or stopped
    # what solver and reuse keep from that step
    history: list[Tensor] = field(default_factory=list)
    noise: Tensor | None = None  # like latents: what an edit of part of the way starts from
    calling_back: bool = False  # what fails now is the callback's own
    failures: list[str] = field(default_factory=list)
    _workload: Workload | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(
        cls, request: Request, processor: Processor, precision: Precision, device: torch.device
    ) -> Call:
        """Encodes a request's prompts and draws its noise.

        Raises RequestError for prompts longer than the model's positions.
        """
        schedule, pictures = scheduled(request, processor)
        noise = draw_noise(request, precision.arithmetic_dtype, device)
        kept = None if request.edit is None else noise.clone()
        return cls(request, schedule, pictures, precision, noise, noise=kept)

    @property
    def branches(self) -> list[list[EncodedBranch]]:
        """Those of each picture."""
        return [[branch for branch, _ in picture] for picture in self.pictures]

    def entries(
        self, plan: MemoryPlan, here: Collection[Hashable] | None = None
    ) -> dict[Entry, tuple[EncodedBranch, ...]]:
        """What the cache is to hold under a plan, or what each step computes again.

        Args:
            plan: of the call.
            here: the keys of the branches that this rank runs; None for all.
        """
        branches = [
            [one for one in picture if here is None or one.key in here] for picture in self.branches
        ]
        if plan.cache == "none":
            return cache_entries(branches, 1, share=False)
        steps = self.schedule.evaluations
        return cache_entries(branches, steps, form=lambda one: self._form(one, plan))

    def _form(self, branches: Sequence[EncodedBranch], plan: MemoryPlan) -> tuple[Any, ...]:
        """What else decides the bits of some branches' keys and values.

        The rows that the MLP processes at once and the strips of the autoencoder change the order
        of sums; so does the choice of kernels. Time tokens are those of the schedule's times.
        """
        longest = max(branch.length for branch in branches) + self.schedule.evaluations
        chunk = plan.mlp_rows if plan.mlp_rows < longest else None
        strips = plan.strip_rows if any(branch.spans for branch in branches) else None
        return chunk, strips, self.schedule.evaluated, ops.choice()

    def workload(self) -> Workload:
        """The request's sizes, as the planner wants them; found once."""
        if self._workload is None:
            self._workload = workload_of(self.request, self.schedule, self.pictures)
        return self._workload


def scheduled(
    request: Request, processor: Processor
) -> tuple[StepSchedule, list[list[tuple[EncodedBranch, float]]]]:
    """The steps of a request, and the branches of each picture that any of them runs.

    The coefficients are those of the request's own scales, inside the intervals of guidance.

    Raises RequestError for prompts that the model can't read.
    """
    plain = StepSchedule((ALL_BRANCHES,) * request.steps, request.times, request.solver)
    each = request.images_per_prompt
    with_images = [bool(one.images) for one in request.prompts for _ in range(each)]
    schedule, used = guided_steps(plain, request.guidance, with_images, request.reuse)
    pictures = []
    for prompt, places in zip(request.prompts, used[::each]):
        terms = guidance_terms(prompt, request.guidance)
        chosen = [terms[place] for place in places]
        branches = [
            (processor.encode(branch, request.noise_tokens, plain.evaluations), weight)
            for branch, weight in chosen
        ]
        pictures += [branches] * each
    return schedule, pictures


def workload_of(
    request: Request,
    schedule: StepSchedule,
    pictures: list[list[tuple[EncodedBranch, float]]],
) -> Workload:
    """Sizes of a request whose branches are encoded."""
    shared = request.switches.use_kv_cache is not False
    branches = [[branch for branch, _ in picture] for picture in pictures]
    entries = cache_entries(branches, schedule.evaluations if shared else 1, share=shared)
    images = {
        image.digest: image.size
        for kept in entries.values()
        for branch in kept
        for _, _, image in branch.spans
    }
    edit = request.edit
    if edit is not None:
        images[edit.image.digest] = edit.image.size
    return Workload(
        height=request.height,
        width=request.width,
        schedule=schedule,
        branches=tuple(tuple(branch.length for branch in picture) for picture in branches),
        conditions=tuple(entry.condition for entry in entries),
        images=tuple(images.values()),
        kept_latents=0 if edit is None else request.images * (1 if edit.mask is None else 2),
    )


def seeded_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The initial latents of a seed, float32, before they are rounded to the dtype of a call."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)


def draw_noise(request: Request, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Initial latents, float32, with the values that the transformer's dtype can hold.

    That is what the original starts from.
    """
    if request.latents is not None:
        return request.latents.to(device, dtype).to(torch.float32, copy=True)
    generator, shape = request.generator, request.latent_shape
    if request.seed is not None:
        noise = seeded_noise(request.seed, shape, device)
    elif isinstance(generator, list | tuple):
        one = (1, *shape[1:])
        drawn = [
            torch.randn(one, generator=each, dtype=torch.float32, device=each.device)
            for each in generator
        ]
        noise = torch.cat(drawn)
    else:
        where = device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=where)
    return noise.to(device, dtype).to(torch.float32)
