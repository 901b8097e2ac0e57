"""Who makes the pictures that are timed: all contenders behind one method, `picture`.

A picture here is everything from tokens and image latents to the final latents. The VAE is the same
code on all sides; its time is a row of its own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omnigen_fast.guidance import guidance_branches
from omnigen_fast.images import InputImage
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.pipeline import OmniGenPipeline
from omnigen_fast.sequence import EncodedBranch
from omnigen_fast.vae.vae import Vae, content_noise

from .cases import GUIDANCE, Task
from .gpu.measure import Clock
from .tracker import MemoryTracker


@dataclass
class Taken:
    """A picture that was made, or its first steps; times in seconds."""

    latents: Tensor  # float32, on the CPU
    steps: list[float]
    total: float
    peak_bytes: int | None = None  # weights included; None where it was not counted

    @property
    def prepare(self) -> float:
        """All before the first step."""
        return max(0.0, self.total - sum(self.steps))


@dataclass(frozen=True)
class Start:
    """What all contenders start from: the same tokens, latents and noise."""

    task: Task
    branches: list[tuple[EncodedBranch, float]]
    images: Mapping[str, Tensor]  # [4, height / 8, width / 8] by digest
    noise: Tensor  # [1, 4, height / 8, width / 8], values that bfloat16 can hold


class Contender(Protocol):
    """One way to make a picture."""

    name: str

    def picture(
        self, start: Start, most: int | None = None, restart: bool = False, track: bool = False
    ) -> Taken:
        """Makes a picture.

        Args:
            start: what to make.
            most: take no more steps than these.
            restart: put the noise back after the first step, so that what the first step computed
                does not count, but what it kept does.
            track: count the peak memory; takes longer.
        """

    def close(self) -> None:
        """Frees what it holds."""


class KeptVae:
    """What an engine uses of a `Vae`, encoding each image once.

    Without a VAE of its own it draws latents by the image's content, and there are no pictures.
    """

    def __init__(self, device: torch.device, vae: Vae | None = None) -> None:
        self.device, self.vae = device, vae
        self.autoencoder: nn.Module = nn.Module() if vae is None else vae.autoencoder
        self._latents: dict[str, Tensor] = {}

    def encode(self, image: InputImage, *how: Any, **more: Any) -> Tensor:
        """[4, height / 8, width / 8]; as `Vae.encode`."""
        if image.digest not in self._latents:
            self._latents[image.digest] = self._encoded(image, *how, **more)
        return self._latents[image.digest]

    def _encoded(self, image: InputImage, *how: Any, **more: Any) -> Tensor:
        if self.vae is not None:
            with self.vae.loaded():
                return self.vae.encode(image, *how, **more)
        shape = (4, *(side // 8 for side in image.size))
        return content_noise(image.digest, shape).to(self.device)

    def decode(self, *given: Any, **more: Any) -> Tensor:
        """As `Vae.decode`."""
        assert self.vae is not None
        return self.vae.decode(*given, **more)

    @property
    def shape(self) -> VaeShape:
        """As `Vae.shape`."""
        return VaeShape() if self.vae is None else self.vae.shape

    @property
    def resident(self) -> bool:
        """As `Vae.resident`."""
        return self.vae is None or self.vae.resident

    def place(self, resident: bool) -> None:
        """As `Vae.place`."""
        if self.vae is not None:
            self.vae.place(resident)

    def loaded(self) -> AbstractContextManager[None]:
        """As `Vae.loaded`."""
        return nullcontext() if self.vae is None else self.vae.loaded()


def make_start(pipe: OmniGenPipeline, task: Task) -> Start:
    """Tokens, image latents and noise of a task."""
    branches = [
        (pipe.processor.encode(branch, task.noise_tokens, task.steps), coefficient)
        for branch, coefficient in guidance_branches(task.prompt(), GUIDANCE)
    ]
    pictures = {image.digest: image for one, _ in branches for _, _, image in one.spans}
    latents = {digest: pipe.vae.encode(image) for digest, image in pictures.items()}
    generator = torch.Generator().manual_seed(task.variant)
    noise = torch.randn(task.latent_shape, generator=generator).bfloat16().float()
    return Start(task, branches, latents, noise)


def weight_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass
class Peak:
    """Bytes at the peak of a block, without what lived before it."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device, track: bool) -> Iterator[Peak]:
    """The peak inside the block: the allocator's on a GPU, else the tensors' counted one by one."""
    found = Peak()
    if not track:
        yield found
    elif device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        with MemoryTracker(device=device.type) as tracker:
            yield found
        found.bytes = tracker.peak_bytes


@dataclass
class Ours:
    """The runtime, called as a user calls it."""

    pipe: OmniGenPipeline
    name: str = field(default="omnigen_fast", init=False)

    @torch.no_grad()
    def picture(
        self, start: Start, most: int | None = None, restart: bool = False, track: bool = False
    ) -> Taken:
        pipe, task = self.pipe, start.task
        clock, marks = Clock(pipe.device), []
        last = task.steps if most is None else min(most, task.steps)
        noise = start.noise.to(pipe.device)

        def after_step(pipe: OmniGenPipeline, step: int, _time: float, _given: Any) -> Any:
            marks.append(clock.mark())
            pipe._interrupt = step + 1 == last
            return {"latents": noise} if restart and step == 0 else None

        if track:
            pipe.clear_cache()
        with peak_memory(pipe.device, track) as peak:
            clock.wait()
            begin = clock.mark()
            latents = pipe(**task.arguments(), latents=noise, callback_on_step_end=after_step)
            end = clock.mark()
        clock.wait()
        between = [clock.between(*pair) for pair in pairwise(marks)]
        total = clock.between(begin, end)
        # the first step ends at the first mark; how long it took itself is that of the others
        first = sorted(between)[len(between) // 2] if between else 0.0
        weights = weight_bytes(pipe.model.state_dict()) + pipe.model.pos_embed.nbytes
        peak_bytes = None if peak.bytes is None else peak.bytes + weights
        return Taken(latents.float().cpu(), [first, *between], total, peak_bytes)

    def close(self) -> None:
        self.pipe.clear_cache()


def threads() -> int:
    """Of the CPU, for contenders that run in a process of their own."""
    return torch.get_num_threads() or os.cpu_count() or 1
