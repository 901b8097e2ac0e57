"""Every kind of image becomes the exact pixels that it shows, resized as OmniGen does."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from omnigen_fast.images import to_rgb

# 3 x 5 pixels, all different, so that no turn or flip goes unseen
ARRAY = np.arange(45, dtype=np.uint8).reshape(3, 5, 3) * 5
WHITE = (255, 255, 255)


def pixels(source) -> np.ndarray:
    image = to_rgb(source)
    assert image.mode == "RGB"
    return np.array(image)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(ARRAY), exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO", "TGA"])
def test_lossless_formats(kind):
    image = Image.new("RGB", (32, 32), (10, 200, 30))
    image.paste((250, 0, 90), (0, 0, 16, 8))
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "ICO":
        options = {"sizes": [(32, 32)]}
    np.testing.assert_array_equal(pixels(encoded(image, kind, **options)), np.array(image))


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "JPEG2000"])
def test_lossy_formats(kind):
    image = Image.new("RGB", (32, 32), (120, 60, 200))
    assert np.abs(pixels(encoded(image, kind)).astype(int) - np.array(image)).max() <= 3
