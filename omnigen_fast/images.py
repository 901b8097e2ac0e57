"""Input images: from any accepted source to the pixels that the model sees."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import TOKEN_PIXELS, tokens
from .errors import RequestError, printable
from .image_decoder import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    Check,
    ImageFault,
    decode_file,
    decode_image,
    eight_bits,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as PILImage

_KINDS = "a path, bytes, a binary file, a PIL image, a numpy array or a tensor"
_SHOWN = 100  # characters of a path in a message


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


def read_image(
    source: Any, max_size: int, max_side: int, name: str, mask: bool = False
) -> InputImage:
    """Loads an image, and shrinks and crops it as OmniGen does.

    Args:
        source: what `to_rgb` takes.
        max_size: the longer side is shrunk to at most this many pixels.
        max_side: the longest side in pixels that the model's position table covers. A side may be
            max_side / 16 times the other, since the shorter one is widened to 16 pixels.
        name: of the image in error messages.
        mask: see `to_rgb`.

    Raises:
        RequestError: not an image, unreadable, truncated, too large or too narrow, or too costly
            to decode.
    """

    def check(width: int, height: int) -> None:
        _check_size(width, height)
        longest = max(_fitted(width, height, max_size))
        if longest > max_side:
            # a sliver is widened to 16 pixels, which makes it longer too
            way_out = (
                "crop it" if longest > max_size else f"give max_input_image_size={max_side} or less"
            )
            fitted = " x ".join(map(str, _fitted(width, height, max_size)))
            raise ImageFault(
                f"is {fitted} pixels after resizing; the model takes at most {max_side} a side; "
                f"{way_out}"
            )
        ratio = max_side // TOKEN_PIXELS
        if max(width, height) > ratio * min(width, height):
            raise ImageFault(
                f"is {width} x {height} pixels; one side may be {ratio} times the other, crop it"
            )

    return InputImage(np.array(fit(to_rgb(source, name, check, mask), max_size)))


def _check_size(width: int, height: int) -> None:
    if not width * height:
        raise ImageFault(f"is {width} x {height} pixels; an image needs some")
    if width * height > MAX_PIXELS:
        raise ImageFault(
            f"is {width} x {height} pixels; the limit is {MAX_PIXELS:,} pixels, shrink it first"
        )


def to_rgb(
    source: Any, name: str = "image", check: Check = _check_size, mask: bool = False
) -> PILImage:
    """Any accepted image as 8-bit RGB: turned upright (EXIF), with alpha on white.

    Args:
        source: a path; bytes of an image file, or a binary file open for reading, which is read
            from its start and left where it was; a PIL image; a numpy array [height, width] or
            [height, width, 1, 3 or 4]; or a tensor like that or with channels first. A first
            dimension of 1 in front of these is dropped. Arrays and tensors are uint8, uint16, bool,
            or float in [0, 1].
        name: of the image in error messages.
        check: of its (width, height) before pixels are decoded; raises ImageFault.
        mask: what is transparent becomes white and all else black, if anything is transparent.

    Raises:
        RequestError: not an image, unreadable, truncated, too large, or too costly to decode.
    """
    from PIL import Image

    torch = sys.modules.get("torch")  # without it there are no tensors
    try:
        if torch is not None and isinstance(source, torch.Tensor):
            return _from_array(_tensor_values(source, check), check, mask)
        if isinstance(source, np.ndarray):
            return _from_array(_without_batch(source), check, mask)
        if isinstance(source, Image.Image):
            return decode_image(source, check, mask)
        if isinstance(source, bytes | bytearray | memoryview):
            # bytes and what is laid out like them need no copy
            return decode_file(io.BytesIO(bytes(source)), check, mask)
        if isinstance(source, str | os.PathLike):
            path = os.fspath(source)
            path = os.fsdecode(path) if isinstance(path, bytes) else path
            _check_path(path, name)
            name = f"{name} ({printable(path, _SHOWN)})"
            with open(path, "rb") as file:
                return decode_file(file, check, mask)
        if callable(getattr(source, "read", None)):
            with _readable(source) as file:
                return decode_file(file, check, mask)
    except (ImageFault, OSError) as fault:
        raise RequestError(f"{name} {_words(fault)}") from fault
    raise RequestError(f"{name} must be {_KINDS}, got {type(source).__name__}")


def fit(image: PILImage, max_size: int) -> PILImage:
    """The original's resizing: box halvings, bicubic to the limit, crop to multiples of 16.

    The returned sides are multiples of 16 pixels, at least 16.
    """
    from PIL import Image

    *sizes, ((width, height), _) = _sizes(image.width, image.height, max_size)
    for size, filter in sizes:
        image = image.resize(size, getattr(Image.Resampling, filter))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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


def _sizes(width: int, height: int, max_size: int) -> list[tuple[tuple[int, int], str]]:
    """(size, filter) of every resizing of `fit`; the last is the crop."""
    found = []

    def scale(by: float) -> tuple[int, int]:
        # at least 1: the short side of a sliver would round to 0
        return max(1, round(width * by)), max(1, round(height * by))

    while min(width, height) >= 2 * max_size:
        width, height = width // 2, height // 2
        found.append(((width, height), "BOX"))
    if max(width, height) > max_size:
        width, height = scale(max_size / max(width, height))
        found.append(((width, height), "BICUBIC"))
    if min(width, height) < TOKEN_PIXELS:
        width, height = scale(TOKEN_PIXELS / min(width, height))
        found.append(((width, height), "BICUBIC"))
    found.append(((width - width % TOKEN_PIXELS, height - height % TOKEN_PIXELS), "crop"))
    return found


def _fitted(width: int, height: int, max_size: int) -> tuple[int, int]:
    """(width, height) after `fit`."""
    return _sizes(width, height, max_size)[-1][0]


def _words(fault: Exception) -> str:
    if isinstance(fault, ImageFault):
        return str(fault)
    return f"can't be read: {fault.strerror if isinstance(fault, OSError) else fault}"


def _check_path(path: str, name: str) -> None:
    shown = printable(path, _SHOWN)
    if path.startswith(("http://", "https://")):
        raise RequestError(
            f"{name}: web addresses are not fetched ({shown}); download the file first"
        )
    if path.startswith("data:"):
        raise RequestError(
            f"{name}: data URLs are not read ({shown}); decode what follows its comma with "
            "base64.b64decode and give the bytes"
        )
    if not os.path.isfile(path):
        what = (
            "is a folder"
            if os.path.isdir(path)
            else "is not a regular file"
            if os.path.exists(path)
            else "does not exist"
        )
        raise RequestError(f"{name}: {shown} {what}; give the path of an image file")


@contextlib.contextmanager
def _readable(file: Any) -> Iterator[Any]:
    """A caller's file object as one that can be read from its start, and is left where it was."""
    try:
        if getattr(file, "closed", False):
            raise ImageFault("is a closed file; hand it over open")
        try:
            place = file.tell()
            file.seek(0)
        except (AttributeError, OSError):  # a pipe or a response: read to its end
            place = None
        if isinstance(file.read(0), str):
            raise ImageFault('is a file open for text; open it with mode "rb"')
        if place is not None:
            try:
                yield file
            finally:
                file.seek(place)
            return
        data = io.BytesIO()
        while data.tell() <= MAX_FILE_BYTES and (block := file.read(1 << 20)):
            data.write(block)
        yield data
    except ImageFault:
        raise
    except Exception as error:  # whatever the caller's object raises
        raise ImageFault(f"can't be read: {error}; give the bytes of the file") from error


def _tensor_values(tensor: torch.Tensor, check: Check) -> np.ndarray:
    """A tensor's values with channels last, on the host, of a dtype that numpy has."""
    import torch

    shape = _shape(tensor)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ImageFault(f"must be a dense tensor with values, got {tensor.layout} on meta")
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == 3:
        first, last = tensor.shape[0] in (1, 3, 4), tensor.shape[2] in (1, 3, 4)
        if first and last:
            raise ImageFault(
                f"is a tensor whose channels may be its first or its last dimension, got {shape}; "
                "give a numpy array with channels last"
            )
        if first:
            tensor = tensor.permute(1, 2, 0)
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[2] not in (1, 3, 4)):
        raise ImageFault(
            "must be [height, width], [height, width, 1, 3 or 4] or [1, 3 or 4, height, width] as "
            f"a tensor, got {shape}"
        )
    check(tensor.shape[1], tensor.shape[0])
    try:
        tensor = tensor.detach().to("cpu")
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            tensor = tensor.to(torch.float32)  # numpy has no bfloat16
        return tensor.resolve_conj().resolve_neg().numpy()
    except Exception as error:  # tensors without values, as under tracing
        raise ImageFault(f"can't be read: {error}; give a dense tensor") from error


def _without_batch(array: np.ndarray) -> np.ndarray:
    return array[0] if array.ndim == 4 and array.shape[0] == 1 else array


def _shape(array: Any) -> str:
    return "x".join(map(str, array.shape)) or "a single number"


def _from_array(array: np.ndarray, check: Check, mask: bool) -> PILImage:
    from PIL import Image

    shape = _shape(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageFault(
            "must be [height, width] or [height, width, 1, 3 or 4] as an array, got " + shape
        )
    if not array.size:
        raise ImageFault(f"is an empty array ({shape})")
    check(array.shape[1], array.shape[0])
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = eight_bits(array, 65535)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also NaN
            raise ImageFault(
                "holds floats; pixels given as floats must lie in [0, 1], "
                f"got {float(low):g} to {float(high):g}"
            )
        array = eight_bits(array, 1)
    elif array.dtype != np.uint8:
        raise ImageFault(f"must be uint8, uint16, bool or float as an array, got {array.dtype}")
    return decode_image(Image.fromarray(np.ascontiguousarray(array)), check, mask)
