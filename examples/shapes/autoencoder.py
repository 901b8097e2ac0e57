"""The small VAE: its training, and latents of many pictures."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .scenes import SIDE, Scene, random_scene, random_thing, render
from .tasks import mask_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

KL_WEIGHT = 1e-5  # per latent value, against a mean absolute error per colour value
NOISE = 0.15  # of the latents' deviation, added before decoding: the transformer errs, too
SHAPE_WEIGHT = 4.0  # what a pixel of a shape counts beyond one of the background
PARTS_END = 0.6  # of the time: then whole pictures
CROP = 64  # pixels a side of the parts; without attention, a part is coded as in its whole
RATE = 3e-3
_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 128,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}


def new_autoencoder() -> AutoencoderKL:
    """An untrained one."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**_CONFIG)


def pixels_of(scenes: Sequence[Scene]) -> Tensor:  # [scenes, 3, SIDE, SIDE] in [-1, 1]
    """Pictures as the encoder takes them."""
    pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def _batches(
    rng: random.Random, size: int, crop: int, things: Sequence[int], masks: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random scenes without end, cut to `crop` pixels a side, and what each pixel counts.

    A share of them are `masks`.

    Shapes cover little of a picture, and all that is hard about it: they count more.
    """
    while True:
        scenes = [
            mask_of(random_thing(rng))
            if rng.random() < masks
            else random_scene(rng, rng.choice(things))
            for _ in range(size)
        ]
        pixels = pixels_of(scenes)
        empty = pixels_of([Scene((), scene.background) for scene in scenes])
        weights = 1 + SHAPE_WEIGHT * ((pixels - empty).abs().amax(1, keepdim=True) > 0.02)
        # whole latent pixels, so that the grid of the latents stays where it is
        top, left = (8 * rng.randrange((SIDE - crop) // 8 + 1) for _ in range(2))
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        yield pixels[:, :, rows, columns], weights[:, :, rows, columns]


def train_autoencoder(
    steps: int, seed: int = 0, batch: int = 16, threads: int = 1
) -> AutoencoderKL:
    """Trains an AutoencoderKL, then whitens its latents.

    L1, squared error and a small KL term; the learning rate warms up and falls to zero.

    Args:
        steps: updates. Those up to `PARTS_END` see parts of pictures, which is cheaper and shows
            more shapes, the rest whole pictures.
        seed: of weights, scenes and noise.
        batch: parts in a step; of whole pictures a quarter.
        threads: parts of a step that are computed at the same time, one core each.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_autoencoder()
    parts = _batches(rng, batch // threads, CROP, (1, 2, 3, 4))
    wholes = _batches(rng, max(1, batch // threads // 4), SIDE, (1, 1, 2, 3))
    _train(
        model,
        lambda used: next(parts if used < PARTS_END else wholes),
        steps=steps,
        rate=RATE,
        threads=threads,
        code=_sampled,
    )
    _whiten(model, rng)
    return model


def train_decoder(
    model: AutoencoderKL, steps: int, seed: int = 1, batch: int = 8, threads: int = 1
) -> None:
    """Trains the decoder alone, on whole pictures and masks: what latents mean stays as it is.

    Args:
        model: changed in place.
        steps: updates.
        seed: of scenes and noise.
        batch: pictures in a step.
        threads: as in `train_autoencoder`.
    """
    torch.manual_seed(seed)
    wholes = _batches(random.Random(seed), batch // threads, SIDE, (0, 1, 1, 2, 2), masks=0.15)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
    _train(
        model,
        lambda used: next(wholes),
        steps=steps,
        rate=RATE / 2,
        threads=threads,
        code=_means,
    )


def _train(
    model: AutoencoderKL,
    batch_at: Callable[[float], tuple[Tensor, Tensor]],  # of a share of the steps
    *,
    steps: int,
    rate: float,
    threads: int,
    code: Callable[[AutoencoderKL, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Trains the parameters that ask for gradients; none does afterwards."""
    model.to(memory_format=torch.channels_last).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0)
    began = time.monotonic()
    with ThreadPoolExecutor(threads) as workers:
        for step in range(steps):
            used = step / steps
            optimizer.zero_grad(set_to_none=True)
            some = [batch_at(used) for _ in range(threads)]
            results = list(workers.map(partial(_backward, model, code, 1 / threads), *zip(*some)))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 50) * (1 - used) ** 0.8
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if step % 50 == 49:
                elapsed = time.monotonic() - began
                error, kl = (sum(values) / threads for values in zip(*results))
                print(
                    f"vae step {step + 1}, {elapsed:.0f} s: reconstruction {error:.4f} kl {kl:.2f}",
                    flush=True,
                )
    model.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _sampled(model: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Sampled latents and their divergence from the standard normal distribution."""
    posterior = model.encode(pixels).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return posterior.mean + posterior.std * torch.randn_like(posterior.mean), kl


def _means(model: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The latents that the transformer is trained on."""
    with torch.no_grad():
        return model.encode(pixels).latent_dist.mean, torch.zeros(())


def _backward(
    model: AutoencoderKL,
    code: Callable[[AutoencoderKL, Tensor], tuple[Tensor, Tensor]],
    share: float,
    pixels: Tensor,
    weights: Tensor,
) -> tuple[float, float]:
    """Adds the gradients of some pictures' loss, times `share`; returns its two parts."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        latents, kl = code(model, pixels)
        decoded = model.decode(latents + _noise_like(latents)).sample.float()
    error = decoded - pixels
    loss = ((error.abs() + error.square()) * weights).mean()
    ((loss + KL_WEIGHT * kl) * share).backward()
    return loss.item(), kl.item()


def _noise_like(latents: Tensor) -> Tensor:
    """Noise for the decoder to bear, from none to the most in each picture."""
    strength = NOISE * torch.rand(len(latents), 1, 1, 1) * latents.detach().float().std()
    return (strength * torch.randn_like(latents, dtype=torch.float32)).to(latents.dtype)


def _whiten(model: AutoencoderKL, rng: random.Random) -> None:
    """Gives every latent channel mean 0 and deviation 1, within the layers around the latents."""
    scenes = [random_scene(rng, rng.choice([1, 2])) for _ in range(256)]
    means = torch.cat([model.encode(one).latent_dist.mean for one in pixels_of(scenes).split(32)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    # decode: the old latents are std * new + mean
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    # encode: means are shifted and scaled, log variances shifted
    quant.bias[:channels] -= mean
    quant.bias[:channels] /= std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def encode_scenes(model: AutoencoderKL, scenes: Sequence[Scene], batch: int = 32) -> Tensor:
    """Means of the latents, [scenes, 4, SIDE / 8, SIDE / 8]."""
    parts = []
    with torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(scenes), batch):
            pixels = pixels_of(scenes[first : first + batch])
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            parts.append(model.encode(pixels).latent_dist.mean.to(torch.float32))
    return torch.cat(parts)


def save_autoencoder(model: AutoencoderKL, folder: Path) -> None:
    """Writes `config.json` and the weights in bfloat16."""
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
