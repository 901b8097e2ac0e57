"""Input images: from any accepted source to the pixels that the model sees."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import TOKEN_PIXELS, tokens
from .errors import RequestError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as PILImage

# 9,459 x 9,459 pixels; larger images are treated as decompression bombs.
MAX_PIXELS = 89_478_485
# Pillow decodes these itself (EPS, for example, would start Ghostscript). MPO files open as JPEG.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")
_KINDS = "a path, bytes, a PIL image or a numpy array"


@dataclass(frozen=True, eq=False)
class InputImage:
    """An input image as the model sees it: RGB, both sides multiples of 16 pixels."""

    pixels: np.ndarray  # [height, width, 3], uint8

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def tokens(self) -> int:
        height, width = self.size
        return tokens(height, width)

    @cached_property
    def digest(self) -> str:
        """Identifies the content: equal pixels have equal digests."""
        return content_digest(self.pixels)


def content_digest(array: np.ndarray) -> str:
    """Identifies an array by its shape and values."""
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def read_image(source: Any, max_size: int, max_side: int, name: str) -> InputImage:
    """Loads an image, and shrinks and crops it as OmniGen does.

    Args:
        source: a path, bytes of an image file, a PIL image, or a numpy array [height, width] or
            [height, width, 1, 3 or 4] of uint8, uint16, bool, or float in [0, 1].
        max_size: the longer side is shrunk to at most this many pixels.
        max_side: the longest side in pixels that the model's position table covers.
        name: of the image in error messages.

    Raises:
        RequestError: not an image, unreadable, truncated, too large or too narrow.
    """
    pixels = np.array(fit(to_rgb(source, name), max_size))
    height, width = pixels.shape[:2]
    if max(height, width) > max_side:
        # a sliver is widened to 16 pixels, which makes it longer too
        sliver = max(height, width) > max_size
        way_out = "crop it" if sliver else f"give max_input_image_size={max_side} or less"
        raise RequestError(
            f"{name} is {width} x {height} pixels after resizing; the model takes at most "
            f"{max_side} a side; {way_out}"
        )
    return InputImage(pixels)


def to_rgb(source: Any, name: str = "image") -> PILImage:
    """Any accepted image as 8-bit RGB: turned upright (EXIF), with alpha on white."""
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(io.BytesIO(bytes(source)), name)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if path.startswith(("http://", "https://")):
            raise RequestError(
                f"{name}: web addresses are not fetched ({path}); download the file first"
            )
        if not os.path.isfile(path):
            what = "is a folder" if os.path.isdir(path) else "does not exist"
            raise RequestError(f"{name}: {path} {what}; give the path of an image file")
        return _open(path, f"{name} ({path})")
    raise RequestError(f"{name} must be {_KINDS}, got {type(source).__name__}")


def fit(image: PILImage, max_size: int) -> PILImage:
    """The original's resizing: box halvings, bicubic to the limit, crop to multiples of 16.

    The returned sides are multiples of 16 pixels, at least 16.
    """
    from PIL import Image

    while min(image.size) >= 2 * max_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) > max_size:
        image = _scale(image, max_size / max(image.size))
    if min(image.size) < TOKEN_PIXELS:
        image = _scale(image, TOKEN_PIXELS / min(image.size))
    (left, right), (top, bottom) = (
        (extra // 2, extra - extra // 2) for extra in (side % TOKEN_PIXELS for side in image.size)
    )
    return image.crop((left, top, image.width - right, image.height - bottom))


def normalized(pixels: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Pixels as the autoencoder takes them.

    Args:
        pixels: [height, width, 3], uint8.
        device: where to put them.

    Returns:
        [3, height, width], float32 in [-1, 1].
    """
    import torch

    return torch.from_numpy(pixels).to(device, torch.float32).permute(2, 0, 1) / 255 * 2 - 1


def _scale(image: PILImage, scale: float) -> PILImage:
    from PIL import Image

    # at least 1: the short side of a sliver would round to 0
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _open(file: Any, name: str) -> PILImage:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # the size is checked below, with a clearer message
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except Image.UnidentifiedImageError as error:
        raise RequestError(
            f"{name} is not an image this build can read; use PNG, JPEG, WebP, BMP, GIF or TIFF"
        ) from error
    except Exception as error:  # decoders raise almost anything on malformed files
        raise RequestError(f"{name} can't be read: {error}; save it again as PNG") from error
    with image:
        return _decode(image, name)


def _decode(image: PILImage, name: str) -> PILImage:
    from PIL import Image, ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, image.width, image.height)
    if not image.width * image.height:
        raise RequestError(f"{name} is {image.width} x {image.height} pixels; an image needs some")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            deep = np.asarray(image)
            deep = deep if image.mode == "F" else np.clip(deep, 0, 65535).astype(np.uint16)
            return _from_array(deep, name)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except RequestError:
        raise
    except Exception as error:  # decoders raise almost anything on malformed files
        raise RequestError(
            f"{name} is damaged or cut short ({error}); save or download it again"
        ) from error


def _from_array(array: np.ndarray, name: str) -> PILImage:
    from PIL import Image

    shape = "x".join(map(str, array.shape)) or "a single number"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise RequestError(
            f"{name}: an array must be [height, width] or [height, width, 1, 3 or 4], got {shape}"
        )
    if not array.size:
        raise RequestError(f"{name}: the array is empty ({shape})")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large(name, array.shape[1], array.shape[0])
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        wide = array.astype(np.uint32)  # array / 257, rounded, in half the memory of float64
        wide += 128
        wide //= 257
        array = wide.astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise RequestError(f"{name}: pixels given as floats must lie in [0, 1]")
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise RequestError(
            f"{name}: an array must be uint8, uint16, bool or float, got {array.dtype}"
        )
    return _decode(Image.fromarray(np.ascontiguousarray(array)), name)


def _too_large(name: str, width: int = 0, height: int = 0) -> RequestError:
    size = f"{width} x {height} pixels" if width else "enormous according to its header"
    return RequestError(f"{name} is {size}; the limit is {MAX_PIXELS:,} pixels, shrink it first")
