"""diffusers' OmniGen: its transformer, called as its pipeline calls it.

The transformer is fed directly, since the pipeline's processor needs torchvision and adds nothing
to a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from omnigen_fast.config import PATCH, ModelConfig
from omnigen_fast.schedule import StepSchedule
from omnigen_fast.sequence import EncodedBranch

from ..contenders import Start, Taken, peak_memory, weight_bytes
from ..gpu.measure import Clock
from .model_files import Weights, diffusers_tensors


class DiffusersTransformer:
    """All branches in one padded batch, all of it computed in every step.

    Args:
        config: sizes.
        weights: by our names; kept as they are where they have the dtype.
        dtype: to compute in.
    """

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype) -> None:
        from diffusers import OmniGenTransformer2DModel

        with torch.device("meta"):
            self.model = OmniGenTransformer2DModel(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                intermediate_size=config.intermediate_size,
                num_layers=config.num_layers,
                vocab_size=config.vocab_size,
                pad_token_id=3,
                rope_scaling={
                    "short_factor": list(config.short_factor),
                    "long_factor": list(config.long_factor),
                },
                pos_embed_max_size=config.pos_embed_size,
            )
        self.model.load_state_dict(diffusers_tensors(config, weights, dtype), assign=True)
        # a buffer that the checkpoint does not hold, and that its rotary code renews itself
        self.model.rope.inv_freq = torch.empty(config.head_dim // 2)
        self.model.eval()
        self.dtype = dtype

    def start(
        self,
        branches: Sequence[tuple[EncodedBranch, float]],
        images: Mapping[str, Tensor],
        noise: Tensor,
        times: Tensor,
    ) -> None:
        """Builds ids, mask and positions of a request; nothing is computed."""
        # Its rotary positions are those of row 0 for every row. That is harmless only where row 0
        # has no padding, so the longest branch goes first.
        ordered = sorted(branches, key=lambda pair: -pair[0].length)
        longest, noise_tokens = ordered[0][0].length, noise[0, 0].numel() // PATCH**2
        total = longest + 1 + noise_tokens
        device = noise.device
        self.coefficient = torch.tensor([c for _, c in ordered], device=device).view(-1, 1, 1, 1)
        ids = torch.full((len(ordered), longest), 3)
        mask = torch.zeros(len(ordered), total, total)
        positions = torch.zeros(len(ordered), total, dtype=torch.int64)
        self.sizes: dict[int, list[list[int]]] = {}
        self.latents = []
        for row, (branch, _) in enumerate(ordered):
            pad, length = longest - branch.length, branch.length
            ids[row, pad:] = torch.from_numpy(branch.token_ids)
            positions[row, pad:] = torch.arange(total - pad)
            ends = np.concatenate([branch.kv_end, [length + 1], [total - pad] * noise_tokens])
            own = torch.arange(total - pad)[None] < torch.from_numpy(ends.astype(np.int64))[:, None]
            mask[row, pad:, pad:] = own.float()
            mask[row, :pad] = 1  # a padding row must see something
            for first, stop, image in branch.spans:
                self.sizes.setdefault(row, []).append([pad + first, pad + stop])
                self.latents.append(images[image.digest][None].to(self.dtype))
        self.ids, self.mask, self.positions = (x.to(device) for x in (ids, mask, positions))
        self.times = times.to(device)
        self.noisy = noise.clone()

    def velocity(self, latents: Tensor, index: int) -> Tensor:
        """The guided velocity at a step's time."""
        rows = len(self.ids)
        predicted = self.model(
            hidden_states=latents.to(self.dtype).expand(rows, -1, -1, -1),
            timestep=self.times[index].expand(rows),
            input_ids=self.ids,
            input_img_latents=self.latents,
            input_image_sizes=self.sizes,
            attention_mask=self.mask,
            position_ids=self.positions,
            return_dict=False,
        )[0]
        return (self.coefficient * predicted.float()).sum(0, keepdim=True)

    def run_step(self, index: int = 0) -> Tensor:
        """An Euler step from where the last one ended."""
        length = self.times[index + 1] - self.times[index]
        self.noisy += length * self.velocity(self.noisy, index)
        return self.noisy


class Diffusers:
    """diffusers' transformer as a contender, eager or through torch.compile."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool,
    ) -> None:
        self.name = "diffusers-compile" if compiled else "diffusers"
        self._transformer = DiffusersTransformer(config, weights, dtype)
        self._transformer.model.to(device)
        self._eager = self._transformer.model
        self._compiled, self._device = compiled, device
        self._task = None

    @torch.no_grad()
    def picture(
        self, start: Start, most: int | None = None, restart: bool = False, track: bool = False
    ) -> Taken:
        """See `Contender.picture`. Compiled for the shapes of each cell anew."""
        transformer, clock = self._transformer, Clock(self._device)
        task = start.task
        last = task.steps if most is None else min(most, task.steps)
        if self._compiled and self._task != (task.size, task.images):
            # shapes that change would be compiled as unknown ones, which are slower
            torch.compiler.reset()
            transformer.model = torch.compile(self._eager, dynamic=False)
            self._task = (task.size, task.images)
        # a compiled program can't be counted tensor by tensor
        tracked = track and not (self._compiled and self._device.type != "cuda")
        with peak_memory(self._device, tracked) as peak:
            begin = clock.wait()
            noise = start.noise.to(self._device)
            times = StepSchedule.euler(task.steps).tensor()
            transformer.start(start.branches, start.images, noise, times)
            marks = [clock.wait()]
            for index in range(last):
                transformer.run_step(index)
                if restart and index == 0:
                    transformer.noisy.copy_(noise)
                marks.append(clock.wait())
        seconds = [after - before for before, after in pairwise(marks)]
        weights = weight_bytes(self._eager.state_dict())
        peak_bytes = None if peak.bytes is None else peak.bytes + weights
        latents = transformer.noisy.float().cpu()
        return Taken(latents, seconds, marks[-1] - begin, peak_bytes)

    def close(self) -> None:
        """Frees the model."""
        if self._compiled:
            torch.compiler.reset()
        del self._transformer, self._eager
