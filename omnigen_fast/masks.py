"""Masked edits: what of an input image may change, and what stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import VAE_SCALE
from .errors import RequestError
from .images import InputImage, read_image

if TYPE_CHECKING:
    from torch import Tensor

_WHITE = 128  # of 255: as bright as this, a pixel of a mask is edited


@dataclass(frozen=True, eq=False)
class Mask:
    """Which pixels are edited."""

    opacity: np.ndarray  # [height, width], float32: the edit's share of a pixel; 0 outside

    @property
    def latents(self) -> np.ndarray:
        """[height / 8, width / 8], bool: latents that are edited, of which any pixel is."""
        height, width = (side // VAE_SCALE for side in self.opacity.shape)
        cells = self.opacity.reshape(height, VAE_SCALE, width, VAE_SCALE)
        return cells.max(axis=(1, 3)) > 0


@dataclass(frozen=True, eq=False)
class Edit:
    """A picture that starts from an input image of its size, or keeps part of it."""

    image: InputImage
    mask: Mask | None  # None where everything may change

    def compose_(self, pictures: Tensor) -> Tensor:
        """Puts the input image's own pixels back outside the mask, exactly.

        Args:
            pictures: [pictures, 3, height, width] in [0, 1], overwritten and returned.
        """
        if self.mask is None:
            return pictures
        import torch  # takes seconds, and requests need none of it

        # divided on the host: a GPU multiplies by 1 / 255, which is not the same
        known = torch.from_numpy(self.image.pixels).permute(2, 0, 1).to(torch.float32) / 255
        opacity = torch.from_numpy(self.mask.opacity)
        kept = known * (1 - opacity)
        return pictures.mul_(opacity.to(pictures.device)).add_(kept.to(pictures.device))


def read_mask(source: Any, image: InputImage, max_size: int, max_side: int, blur: int) -> Mask:
    """Reads the mask of an input image: white is edited.

    Of a mask with transparent pixels the alpha is taken instead: those are edited.

    Args:
        source: what `images.to_rgb` takes; shrunk and cropped as the input image was.
        image: the input image.
        max_size: see `read_image`.
        max_side: likewise.
        blur: width in pixels of the seam, which lies inside the mask.

    Raises:
        RequestError: not an image, of another size, or nothing of it is white.
    """
    pixels = read_image(source, max_size, max_side, "mask_image", mask=True).pixels
    if pixels.shape != image.pixels.shape:
        (height, width), (rows, columns) = pixels.shape[:2], image.size
        raise RequestError(
            f"mask_image is {width} x {height} pixels after resizing, the input image is "
            f"{columns} x {rows}; give a mask of the input image's size"
        )
    # ITU-R BT.601, as Pillow converts to grey
    edited = pixels @ np.array([0.299, 0.587, 0.114], np.float32) >= _WHITE - 0.5
    if not edited.any():
        raise RequestError(
            "mask_image marks nothing to edit; make what may change white, or transparent"
        )
    return Mask(feathered(edited, blur))


def feathered(edited: np.ndarray, blur: int) -> np.ndarray:
    """The opacity of a mask with a seam.

    It rises from the mask's border inwards, in equal parts over `blur` pixels, counted along rows
    and columns. The picture's own border is none of the mask's.

    Args:
        edited: [height, width], bool.
        blur: pixels.

    Returns:
        [height, width], float32 in [0, 1]: 0 exactly where nothing is edited.
    """
    far = np.float32(blur + 1)
    distance = np.where(edited, far, np.float32(0))
    for axis in (0, 1):  # to the nearest pixel outside, first along columns, then on from there
        place = np.arange(distance.shape[axis], dtype=np.float32)
        place = place[:, None] if axis == 0 else place
        ahead = np.minimum.accumulate(distance - place, axis=axis) + place
        turned = np.flip(distance + place, axis)
        behind = np.flip(np.minimum.accumulate(turned, axis=axis), axis) - place
        distance = np.minimum(ahead, behind)
    return np.minimum(distance / far, 1)
