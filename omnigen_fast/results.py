"""What a call returns: images or latents that also have diffusers' `.images`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Images(list[Any]):
    """PIL images; `images` is the list itself, for code written for diffusers."""

    @property
    def images(self) -> Images:
        return self

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, str) and index == "images" else super().__getitem__(index)

    def to_tuple(self) -> tuple[Images]:
        """diffusers' other form of a result."""
        return (self,)


class ImageArray(np.ndarray):
    """An array of images; `images` is the same as a plain array. What is computed is plain."""

    @property
    def images(self) -> np.ndarray:
        return self.view(np.ndarray)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        plain = np.asarray(array)
        return plain[()] if return_scalar else plain


def as_result(images: Tensor, output_type: str) -> Images | ImageArray | Tensor:
    """Images [pictures, 3, height, width] in [0, 1], or latents, as the caller wants them."""
    if output_type in ("pt", "latent"):
        # Not the tensor itself, which would then be freed by the garbage collector only. A subclass
        # could not be loaded by torch.load(weights_only=True).
        images.images = images.detach()  # type: ignore[attr-defined]
        return images
    rows = images.permute(0, 2, 3, 1).cpu()
    if output_type == "np":
        return rows.numpy().view(ImageArray)
    from PIL import Image

    # rounded down, as the original does
    return Images(Image.fromarray(image) for image in (rows * 255).to(torch.uint8).numpy())
