"""Latents to small pictures while they are denoised, by one matrix instead of the VAE.

Each pixel stands for 8 x 8 of the output and is an affine function of its four latents. Its
coefficients are fitted to the VAE at hand when it is made, on an encoded picture of coloured
patches: that fits any checkpoint's VAE, costs one small encode, and then a product of [pixels, 4]
by [4, 3] a step, where decoding takes about as long as a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..config import LATENT_CHANNELS, VAE_SCALE
from ..images import InputImage

if TYPE_CHECKING:
    from PIL.Image import Image

    from .vae import Vae

_SIDE = 256  # pixels of the picture that is fitted to
_PATCH = 32  # pixels of one colour: the VAE's latents see beyond their own 8 x 8
_LONGEST = 512  # pixels of a preview


@dataclass(frozen=True)
class Preview:
    """Latents to RGB."""

    matrix: Tensor  # [4, 3], float32, on the CPU
    offset: Tensor  # [3]

    @classmethod
    def fit(cls, vae: Vae) -> Preview:
        """The least squares fit to a VAE's own latents of a picture."""
        image = _patches()
        with vae.loaded():
            latents = vae.encode(image).cpu()
        pixels = torch.from_numpy(image.pixels).float() / 255
        side = _SIDE // VAE_SCALE
        # the mean of the 8 x 8 pixels of each latent
        colours = pixels.reshape(side, VAE_SCALE, side, VAE_SCALE, 3).mean((1, 3)).reshape(-1, 3)
        known = latents.reshape(LATENT_CHANNELS, -1).T
        known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
        fitted = torch.linalg.lstsq(known.double(), colours.double()).solution.float()
        return cls(fitted[:-1], fitted[-1])

    def pixels(self, latents: Tensor) -> Tensor:
        """[height, width, 3] in [0, 1] of latents [4, height, width]."""
        return (latents.float().cpu().permute(1, 2, 0) @ self.matrix + self.offset).clamp(0, 1)

    def image(self, latents: Tensor) -> Image:
        """Enlarged to at most 512 pixels a side, or the output's own size if that is less."""
        from PIL import Image

        small = Image.fromarray((self.pixels(latents) * 255).to(torch.uint8).numpy())
        scale = min(VAE_SCALE, _LONGEST / max(small.size))
        size = tuple(max(1, round(side * scale)) for side in small.size)
        return small.resize(size, Image.Resampling.BICUBIC)


def expected(before: Tensor, latents: Tensor, step: int, steps: int) -> Tensor:
    """Where the last step's velocity would lead at time 1.

    The latents themselves are mostly noise for the better part of the steps; on the straight way
    from noise to picture (rectified flow) this is the picture.

    Args:
        before, latents: before and after a step.
        step: which one, from 0.
        steps: how many there are, of equal length.
    """
    return latents + (latents - before) * (steps - step - 1)


def _patches() -> InputImage:
    count = _SIDE // _PATCH
    colours = np.random.default_rng(0).integers(0, 256, (count, count, 3), np.uint8)
    return InputImage(colours.repeat(_PATCH, axis=0).repeat(_PATCH, axis=1))
