"""Previews: small pictures of the latents while they are denoised, by one matrix product.

Each preview pixel covers 8 x 8 pixels of the output and is an affine function of the four latents
there. The coefficients are fitted to the checkpoint's VAE, on an encoded picture of coloured
patches. That costs one small encode, then a product of [pixels, 4] by [4, 3] per preview; decoding
would take about as long as a step.
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

_SIDE = 256  # pixels of the picture to fit to
_PATCH = 32  # pixels of one colour: a latent depends on more than its own 8 x 8
_LONGEST = 512  # pixels of a preview


@dataclass(frozen=True)
class Preview:
    """Latents to RGB."""

    matrix: Tensor  # [4, 3], float32, on the CPU
    offset: Tensor  # [3]

    @classmethod
    def fit(cls, vae: Vae) -> Preview:
        """Fits a VAE by least squares."""
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
        """Latents as an image, enlarged to 512 pixels a side, or the output's size if smaller."""
        from PIL import Image

        small = Image.fromarray((self.pixels(latents) * 255).to(torch.uint8).numpy())
        scale = min(VAE_SCALE, _LONGEST / max(small.size))
        width, height = (max(1, round(side * scale)) for side in small.size)
        return small.resize((width, height), Image.Resampling.BICUBIC)


def expected(before: Tensor, latents: Tensor, step: float, steps: float) -> Tensor:
    """The latents at time 1 if the last step's velocity stayed the same.

    During most steps the latents themselves are mostly noise. Rectified flow goes straight from
    noise to picture, so extrapolating shows the picture.

    Args:
        before, latents: before and after the step.
        step: when it began, in its own lengths: its index, from 0, if all steps are equal.
        steps: all of the time in lengths of the step.
    """
    return latents + (latents - before) * (steps - step - 1)


def _patches() -> InputImage:
    count = _SIDE // _PATCH
    colours = np.random.default_rng(0).integers(0, 256, (count, count, 3), np.uint8)
    return InputImage(colours.repeat(_PATCH, axis=0).repeat(_PATCH, axis=1))
