"""A step and a picture on the CPU, against diffusers' transformer doing the same work.

One process, interleaved, random weights of a small model (hidden 768, 8 heads of 96, 8 layers, MLP
2048) in bfloat16. A picture is everything between tokens and final latents: the VAE is the same
code on both sides and is left out. Both must agree in float32 before any time is printed.

    python -m bench.cpu_peer [--steps 50] [--rounds 15] [--pictures 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omnigen_fast.cache import ConditionCache
from omnigen_fast.checkpoint import _DIFFUSERS, _sources
from omnigen_fast.config import PATCH, ModelConfig
from omnigen_fast.denoise import (
    GuidancePlan,
    Loop,
    Velocity,
    cached_velocity,
    denoise,
    schedule,
)
from omnigen_fast.images import InputImage
from omnigen_fast.model import Transformer
from omnigen_fast.processor import (
    EncodedBranch,
    Processor,
    cache_entries,
    guidance_branches,
    lay_out_all,
)
from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT, Guidance, Prompt

from .common import (
    TOKENIZER,
    interleave,
    machine,
    random_weights,
    small_config,
    spread,
    write_result,
)

PROMPT = "A curly-haired man in a red shirt is drinking tea."
EDIT = "<img><|image_1|></img> Make it a winter evening, with snow on the roofs."
GUIDANCE = Guidance(text=2.5, image=1.6, use_image=True)


@dataclass(frozen=True)
class Case:
    name: str
    side: int  # pixels of the picture
    image_side: int  # pixels of the input image, 0 for none
    target: float


CASES = (
    Case("512 px, text", 512, 0, 1.3),
    Case("512 px, one 512 px image", 512, 512, 3.0),
    Case("256 px, one 512 px image", 256, 512, 5.0),
)


class Ours:
    """The runtime from encoded branches to latents."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.model = Transformer(config, weights)

    def start(
        self,
        branches: Sequence[tuple[EncodedBranch, float]],
        images: dict[str, Tensor],
        noise: Tensor,
        times: Tensor,
    ) -> None:
        """Prefill, and all that a loop needs."""
        model, steps = self.model, len(times) - 1
        self.cache = ConditionCache(model.config, model.dtype, model.device, 0)
        entries = cache_entries([[branch for branch, _ in branches]], steps)
        self.cache.reserve(list(entries))
        embedded = model.embed_times(times[:-1])
        sequences = lay_out_all(entries, self.cache, model.device)
        rows = [model.embed_condition(one, images, embedded.tokens) for one in sequences]
        model.prefill(sequences, rows, self.cache)
        velocities = Velocity.of([branches], entries, self.cache)
        self.loop = Loop(
            latents=noise.clone(),
            index=torch.zeros(1, dtype=torch.int64),
            lengths=times.diff(),
            times=embedded,
            plan=GuidancePlan.make(model, velocities, noise[0, 0].numel() // PATCH**2, None),
            velocity=cached_velocity(model, self.cache, embedded),
        )

    def run_step(self) -> Tensor:
        """The first step, each time from where the last one ended."""
        self.loop.index.zero_()
        self.loop.step()
        return self.loop.latents

    def run_picture(self) -> Tensor:
        denoise(self.loop, self.loop.step, lambda *_: True)
        return self.loop.latents


class Peer:
    """diffusers' transformer, all branches in one padded batch, as its pipeline calls it."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
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
        tensors = {
            part.name: weights[name][part.start : part.start + part.shape[0]].to(dtype)
            for name, parts in _sources(config, _DIFFUSERS).items()
            for part in parts
        }
        self.model.load_state_dict(tensors, assign=True)
        # a buffer that the checkpoint does not hold, and that its rotary code renews itself
        self.model.rope.inv_freq = torch.empty(config.head_dim // 2)
        self.model.eval()
        self.dtype = dtype

    def start(
        self,
        branches: Sequence[tuple[EncodedBranch, float]],
        images: dict[str, Tensor],
        noise: Tensor,
        times: Tensor,
    ) -> None:
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
        length = self.times[index + 1] - self.times[index]
        self.noisy += length * self.velocity(self.noisy, index)
        return self.noisy

    def run_picture(self) -> Tensor:
        for index in range(len(self.times) - 1):
            self.run_step(index)
        return self.noisy


def encode(case: Case, config: ModelConfig, steps: int) -> tuple[list, dict[str, Tensor]]:
    """Branches with their coefficients, and latents of the images."""
    processor = Processor.from_file(TOKENIZER, config)
    images, latents = (), {}
    if case.image_side:
        side = case.image_side
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        images = (InputImage(pixels),)
        generator = torch.Generator().manual_seed(5)
        shape = (4, side // 8, side // 8)
        latents[images[0].digest] = torch.randn(shape, generator=generator)
    prompt = Prompt(EDIT if images else PROMPT, images, DEFAULT_NEGATIVE_PROMPT)
    noise_tokens = (case.side // 16) ** 2
    branches = [
        (processor.encode(branch, noise_tokens, steps), coefficient)
        for branch, coefficient in guidance_branches(prompt, GUIDANCE)
    ]
    return branches, latents


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def measure(case: Case, config: ModelConfig, steps: int, rounds: int, pictures: int) -> dict:
    """One case: agreement, then times."""
    weights = {dtype: random_weights(config, dtype) for dtype in (torch.float32, torch.bfloat16)}
    branches, images = encode(case, config, steps)
    shape = (1, 4, case.side // 8, case.side // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    times = schedule(steps)

    def first_velocity(side: Ours | Peer) -> Tensor:
        side.start(branches, images, noise, times)
        return (side.run_step() - noise) / times[1]

    exact = first_velocity(Ours(config, weights[torch.float32]))
    peer_exact = first_velocity(Peer(config, weights[torch.float32], torch.float32))
    agreement = relative(exact, peer_exact)
    ours = Ours(config, weights[torch.bfloat16])
    peer = Peer(config, weights[torch.bfloat16], torch.bfloat16)
    # bfloat16 against its own weights in float32
    rounded = {name: value.float() for name, value in weights[torch.bfloat16].items()}
    exact = first_velocity(Ours(config, rounded))
    errors = {
        "ours": relative(first_velocity(ours), exact),
        "peer": relative(first_velocity(peer), exact),
    }
    if agreement > 1e-4 or errors["ours"] > 1.5 * errors["peer"]:
        sys.exit(f"{case.name}: results differ ({agreement:.1e}, {errors}); no times are reported")

    step_seconds = interleave(
        {"ours": lambda: ours.run_step(), "peer": lambda: peer.run_step()}, rounds, warm_up=2
    )

    def picture(side: Ours | Peer) -> None:
        side.start(branches, images, noise, times)
        side.run_picture()

    picture_seconds = interleave(
        {"ours": lambda: picture(ours), "peer": lambda: picture(peer)},
        pictures,
        warm_up=0,
    )
    result = {
        "case": case.name,
        "condition_tokens": [branch.length for branch, _ in branches],
        "noise_tokens": (case.side // 16) ** 2,
        "steps_of_a_picture": steps,
        "float32_difference": agreement,
        "bfloat16_error": errors,
        "target": case.target,
    }
    for what, seconds in (("step", step_seconds), ("picture", picture_seconds)):
        ratio = statistics.median(seconds["peer"]) / statistics.median(seconds["ours"])
        result[f"{what}_seconds"] = seconds
        result[f"{what}_ratio"] = ratio
        print(
            f"{case.name:<26} {what:<8} ours {spread(seconds['ours'])}  "
            f"diffusers {spread(seconds['peer'])}  {ratio:.2f}x (target {case.target}x)"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of a picture")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--pictures", type=int, default=3, help="timed pictures of each side")
    arguments = parser.parse_args()
    world = machine()
    print(world)
    config = small_config()
    counts = (arguments.steps, arguments.rounds, arguments.pictures)
    results = [measure(case, config, *counts) for case in CASES]
    write_result("cpu-peer", {"machine": world, "results": results})


if __name__ == "__main__":
    main()
