"""Every kind of image becomes the exact pixels that it shows, resized as OmniGen does."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from omnigen_fast import RequestError
from omnigen_fast.images import InputImage, fit, read_image, to_rgb

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


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, ARRAY),
        (2, ARRAY[:, ::-1]),
        (3, ARRAY[::-1, ::-1]),
        (4, ARRAY[::-1]),
        (5, ARRAY.transpose(1, 0, 2)),
        (6, np.rot90(ARRAY, -1)),
        (7, ARRAY[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(ARRAY, 1)),
        (0, ARRAY),
        (9, ARRAY),
    ],
)
def test_exif_orientation(orientation, shown):
    np.testing.assert_array_equal(pixels(with_orientation(orientation)), shown)


def test_exif_orientation_of_an_open_image():
    image = Image.open(io.BytesIO(with_orientation(6)))
    np.testing.assert_array_equal(pixels(image), np.rot90(ARRAY, -1))
    assert image.size == (5, 3)  # the caller's image is as it was


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"Exif\0\0garbage", id="garbage"),
        pytest.param(b"Exif\0\0II*\0\x08\0\0\0\xff\xff", id="cut-short"),
        pytest.param(b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\0\0", id="lies"),
        pytest.param(
            b"Exif\0\0II*\0\x08\0\0\0\x02\0"
            b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # orientation 6
            b"\x69\x87\x04\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0",  # a block far outside
            id="turned-with-a-broken-block",
        ),
    ],
)
def test_a_damaged_exif_block_harms_no_pixel(exif):
    image = to_rgb(encoded(Image.new("RGB", (8, 4), (90, 90, 90)), "JPEG", exif=exif))
    np.testing.assert_array_equal(np.array(image), np.full((*image.size[::-1], 3), 90))


def palette(transparency) -> bytes:
    """Two pixels of a palette: red, then blue."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return encoded(image, transparency=transparency)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(
            Image.fromarray(np.array([[[200, 0, 0, 255], [9, 9, 9, 0]]], np.uint8)),
            [(200, 0, 0), WHITE],
            id="RGBA",
        ),
        pytest.param(
            # half of black and half of white: 255 * (1 - 102 / 255)
            Image.fromarray(np.array([[[0, 0, 0, 102], [0, 100, 200, 51]]], np.uint8)),
            [(153, 153, 153), (204, 224, 244)],
            id="RGBA-partly",
        ),
        pytest.param(
            Image.merge("LA", [Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 0)]),
            [WHITE],
            id="LA",
        ),
        pytest.param(
            Image.merge("LA", [Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 51)]).convert(
                "La"
            ),
            [(212, 212, 212)],
            id="La",
        ),
        pytest.param(
            Image.new("RGBA", (1, 1), (0, 0, 0, 102)).convert("RGBa"), [(153,) * 3], id="RGBa"
        ),
        pytest.param(Image.new("PA", (1, 1), (0, 0)), [WHITE], id="PA"),
        pytest.param(
            encoded(Image.fromarray(np.array([[700, 0]], np.uint16)), transparency=700),
            [WHITE, (0, 0, 0)],
            id="16-bit-one-colour",
        ),
        pytest.param(palette(b"\xff\x00"), [(255, 0, 0), WHITE], id="P-alpha-table"),
        pytest.param(palette(0), [WHITE, (0, 0, 255)], id="P-one-colour"),
        pytest.param(
            encoded(Image.new("RGB", (1, 1), (7, 8, 9)), transparency=(7, 8, 9)),
            [WHITE],
            id="RGB-one-colour",
        ),
        pytest.param(
            encoded(Image.new("L", (1, 1), 7), transparency=7), [WHITE], id="L-one-colour"
        ),
    ],
)
def test_alpha_is_laid_on_white(source, expected):
    np.testing.assert_array_equal(pixels(source)[0], expected)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(Image.new("L", (1, 1), 77), 77, id="L"),
        pytest.param(Image.new("1", (1, 1), 1), 255, id="1-white"),
        pytest.param(Image.new("1", (1, 1), 0), 0, id="1-black"),
        pytest.param(
            encoded(Image.fromarray(np.array([[77 * 257]], np.uint16))), 77, id="16-bit-PNG"
        ),
        pytest.param(
            encoded(Image.fromarray(np.array([[77 * 257]], np.uint16)), "TIFF"),
            77,
            id="16-bit-TIFF",
        ),
        pytest.param(
            encoded(Image.fromarray(np.array([[65535]], np.uint16))), 255, id="16-bit-white"
        ),
        pytest.param(Image.fromarray(np.array([[77 * 257]], np.int32)), 77, id="I"),
        pytest.param(Image.new("I", (1, 1), 77), 77, id="I-of-8-bits"),
        pytest.param(Image.new("I;16", (1, 1), 77 * 257), 77, id="I;16"),
        pytest.param(Image.new("I;16B", (1, 1), 77 * 257), 77, id="I;16B"),
        pytest.param(Image.new("I;16", (1, 1), 128), 0, id="I;16-dark"),
        pytest.param(Image.new("F", (1, 1), 77.0), 77, id="F-of-8-bits"),
        pytest.param(b"P5 1 1 65535 " + bytes([0, 128]), 0, id="16-bit-PGM-dark"),
        pytest.param(b"P5 1 1 65535 " + bytes([77, 77]), 77, id="16-bit-PGM"),
        pytest.param(Image.fromarray(np.array([[0.2]], np.float32)), 51, id="F"),
        pytest.param(np.full((1, 1), 0.2), 51, id="float64"),
        pytest.param(np.full((1, 1, 3), 0.2, np.float32), 51, id="float32"),
        pytest.param(np.full((1, 1), 1, np.float16), 255, id="float16"),
        pytest.param(np.full((1, 1), 0.5), 128, id="float-rounds"),
        pytest.param(np.full((1, 1), 77 * 257, np.uint16), 77, id="uint16"),
        pytest.param(np.full((1, 1), 77 * 257 + 129, np.uint16), 78, id="uint16-rounds"),
        pytest.param(np.full((1, 1), 77 * 257, ">u2"), 77, id="uint16-big-endian"),
        pytest.param(np.full((1, 1), True), 255, id="bool"),
        pytest.param(np.full((1, 1, 1), 77, np.uint8), 77, id="one-channel"),
    ],
)
def test_grey_and_deep_images(source, expected):
    np.testing.assert_array_equal(pixels(source), np.full((1, 1, 3), expected))


def test_array_with_alpha():
    array = np.zeros((1, 2, 4), np.uint8)
    array[0, 0] = (1, 2, 3, 255)
    np.testing.assert_array_equal(pixels(array), [[(1, 2, 3), WHITE]])


def test_array_in_any_memory_order():
    wide = np.zeros((6, 10, 3), np.uint8)
    wide[::2, ::2] = ARRAY
    np.testing.assert_array_equal(pixels(wide[::2, ::2]), ARRAY)
    np.testing.assert_array_equal(pixels(np.asfortranarray(ARRAY)), ARRAY)
    np.testing.assert_array_equal(pixels(ARRAY[:, ::-1]), ARRAY[:, ::-1])


def test_cmyk_jpeg():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    found = pixels(encoded(image, "JPEG", quality=100))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 2


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(file), np.array(frames[0]))


def test_every_source_gives_the_same_pixels(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(ARRAY).save(path)
    data = path.read_bytes()
    sources = [str(path), path, data, bytearray(data), memoryview(data)]
    for source in [*sources, Image.open(path), Image.fromarray(ARRAY), ARRAY]:
        np.testing.assert_array_equal(pixels(source), ARRAY)


def test_what_the_caller_gave_is_not_changed():
    image = Image.fromarray(np.full((40, 40, 4), 100, np.uint8))
    array = np.full((40, 40, 4), 100, np.uint8)
    for source in (image, array):
        read_image(source, 16, 768, "image")
    assert (image.size, image.mode) == ((40, 40), "RGBA")
    np.testing.assert_array_equal(np.array(image), array)
    assert (array == 100).all()


# Worked by hand: halve while the shorter side is at least twice the limit, scale the longer side
# to the limit, scale the shorter side up to 16, crop to multiples of 16.
@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        pytest.param((64, 64), 64, (64, 64), id="as-it-is"),
        pytest.param((65, 79), 128, (64, 64), id="crop-alone"),
        pytest.param((16, 16), 1024, (16, 16), id="least"),
        pytest.param((256, 128), 64, (64, 32), id="halve-then-scale"),  # 128 x 64, 64 x 32
        pytest.param((128, 128), 64, (64, 64), id="halve-once"),
        pytest.param((127, 127), 64, (64, 64), id="scale-not-halve"),
        pytest.param((300, 260), 64, (64, 48), id="halve-twice"),  # 150 x 130, 75 x 65, 64 x 55
        pytest.param((1000, 500), 256, (256, 128), id="scale"),
        pytest.param((400, 300), 200, (192, 144), id="scale-and-crop"),  # 200 x 150
        pytest.param((8, 8), 64, (16, 16), id="enlarge"),
        pytest.param((8, 20), 64, (16, 32), id="enlarge-keeping-shape"),  # 16 x 40
        pytest.param((1, 1), 64, (16, 16), id="one-pixel"),
        pytest.param((400, 10), 64, (512, 16), id="shrink-then-enlarge"),  # 64 x 2, 512 x 16
        pytest.param((3000, 1), 16, (256, 16), id="line"),  # 16 x 1 (0.005), 256 x 16
    ],
)
def test_sizes(size, limit, expected):
    assert fit(Image.new("RGB", size), limit).size == expected
    assert fit(Image.new("RGB", size[::-1]), limit).size == expected[::-1]


def test_crop_leaves_the_odd_pixel_on_the_far_side():
    rows, columns = np.mgrid[:16, :35].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, columns], 2))
    # 35 = 32 + 3: one pixel off the near side, two off the far side
    np.testing.assert_array_equal(np.array(fit(image, 64))[0, :, 1], np.arange(1, 33))
    np.testing.assert_array_equal(
        np.array(fit(image.transpose(Image.Transpose.TRANSPOSE), 64))[:, 0, 1], np.arange(1, 33)
    )


def test_halving_is_a_box_and_scaling_bicubic():
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(array)
    means = array.reshape(32, 2, 32, 2, 3).mean((1, 3))
    # Pillow rounds twice, after rows and after columns
    assert np.abs(np.array(fit(image, 32)) - means).max() <= 1
    bicubic = image.resize((48, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.array(fit(image, 48)), np.array(bicubic))


def test_digest_names_the_content():
    array = np.arange(32 * 16 * 3, dtype=np.uint8).reshape(32, 16, 3)
    image = read_image(array, 64, 768, "image")
    assert image.size == (32, 16)
    assert image.tokens == 2
    assert image.digest == read_image(encoded(Image.fromarray(array)), 64, 768, "other").digest
    other = array.copy()
    other[31, 15, 2] ^= 1
    assert image.digest != read_image(other, 64, 768, "image").digest
    # the same bytes in another shape
    assert image.digest != InputImage(array.reshape(16, 32, 3)).digest
    # in another order in memory
    assert image.digest == InputImage(np.asfortranarray(array)).digest


def test_error_names_the_file(tmp_path):
    path = tmp_path / "note.png"
    path.write_text("no image")
    with pytest.raises(RequestError, match=r"input_images\[3\] \(.*note.png\) is not an image"):
        read_image(path, 64, 768, "input_images[3]")


IN_PROCESS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "ICO", "TGA"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_are_read_or_refused_in_a_line(kind):
    random = np.random.default_rng(0)
    whole = encoded(Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)), kind)
    refused = 0
    for _ in range(60 if kind in IN_PROCESS else 8):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 200), 3):
            damaged[place] = random.integers(256)
        del damaged[random.integers(len(whole) // 2, 2 * len(whole)) :]
        try:
            image = read_image(damaged, 64, 768, "image")
            assert image.pixels.shape[2] == 3
        except RequestError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused or kind not in IN_PROCESS


def test_every_16_bit_value_becomes_the_nearest_of_8():
    deep = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(np.array(to_rgb(deep))[:, :, 0], np.round(deep / 257))


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "CMYK", "LAB"])
def test_other_colour_spaces(mode):
    colour = {"HSV": (0, 255, 255), "YCbCr": (76, 85, 255), "CMYK": (0, 255, 255, 0)}
    image = Image.new(mode, (1, 1), colour.get(mode, (137, 208, 195)))  # red in each
    assert np.abs(pixels(image)[0, 0].astype(int) - (255, 0, 0)).max() <= 12


class Plain:
    """An object that can be read, and nothing else."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF"])
def test_files_are_read_from_their_start_and_left_as_they_were(kind, tmp_path):
    data = encoded(Image.fromarray(ARRAY), kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    expected = pixels(data)
    with path.open("rb") as opened, tempfile.SpooledTemporaryFile(max_size=1 << 20) as spooled:
        spooled.write(data)
        for file in (opened, spooled, io.BytesIO(data)):
            for place in (0, 3, len(data)):
                file.seek(place)
                np.testing.assert_array_equal(pixels(file), expected)
                assert file.tell() == place
                assert not file.closed
    np.testing.assert_array_equal(pixels(Plain(data)), expected)
    np.testing.assert_array_equal(pixels(os.fsencode(path).decode()), expected)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        pytest.param(lambda path: path.open("r"), 'mode "rb"', id="text"),
        pytest.param(lambda path: path.open("ab"), "can't be read", id="write-only"),
        pytest.param(lambda path: io.StringIO("text"), 'mode "rb"', id="StringIO"),
        pytest.param(lambda path: (file := path.open("rb")).close() or file, "closed", id="closed"),
        pytest.param(lambda path: Plain(b""), "is not an image", id="empty"),
    ],
)
def test_files_that_cannot_be_read(make, part, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(Image.fromarray(ARRAY)))
    with pytest.raises(RequestError, match=r"^image ") as caught:
        to_rgb(make(path))
    assert part in str(caught.value)


TWO_ROWS = ARRAY[:2]  # a first side of 3 could be channels
FLOATS = torch.from_numpy(TWO_ROWS).float() / 255


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(TWO_ROWS[None], id="numpy-1HWC"),
        pytest.param(TWO_ROWS / 255, id="numpy-float"),
        pytest.param(torch.from_numpy(TWO_ROWS), id="HWC"),
        pytest.param(torch.from_numpy(TWO_ROWS)[None], id="1HWC"),
        pytest.param(FLOATS, id="HWC-float"),
        pytest.param(FLOATS.double(), id="HWC-double"),
        pytest.param(FLOATS.clone().requires_grad_(), id="HWC-grad"),
    ],
)
def test_arrays_and_tensors_of_one_image(source):
    np.testing.assert_array_equal(pixels(source), TWO_ROWS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_layouts_of_tensors(channels, dtype):
    bits = torch.arange(6 * 5 * channels).reshape(6, 5, channels) % 7 % 2
    if channels == 4:
        bits[..., 3] = 1
    tensor = bits.to(dtype) * 255 if dtype == torch.uint8 else bits.to(dtype)
    first = tensor.permute(2, 0, 1)
    expected = np.broadcast_to(255 * bits[..., :3].numpy(), (6, 5, 3))
    for source in (tensor, tensor[None], first, first[None]):
        np.testing.assert_array_equal(pixels(source), expected)
    if channels == 1:
        np.testing.assert_array_equal(pixels(tensor[..., 0]), expected)


def test_a_plugin_reads_what_pillow_lacks(monkeypatch):
    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode, self.tile = (5, 3), "RGB", []
            self.im = Image.fromarray(ARRAY).im

    data = b"\0\0\0\x18ftypheic" + bytes(32)
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    if importlib.util.find_spec("pillow_heif") is None:
        with pytest.raises(RequestError, match=r"HEIC file.*pip install pillow-heif"):
            to_rgb(data)
    Image.register_open("HEIF", Plugin, lambda start: start[4:8] == b"ftyp")
    np.testing.assert_array_equal(pixels(data), ARRAY)
    np.testing.assert_array_equal(pixels(io.BytesIO(data)), ARRAY)


def test_avif():
    image = Image.new("RGB", (32, 32), (120, 60, 200))
    assert np.abs(pixels(encoded(image, "AVIF")).astype(int) - np.array(image)).max() <= 4


def test_a_usual_photo_costs_no_other_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    image = Image.fromarray(np.zeros((3000, 4000, 3), np.uint8))
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {})):
        assert to_rgb(encoded(image, kind, **options)).size == (4000, 3000)


def test_the_ratio_of_sides_is_bounded_before_anything_is_resized():
    with pytest.raises(RequestError, match="one side may be 48 times the other, crop it"):
        read_image(np.zeros((1, 3000), np.uint8), 16, 768, "image")
    assert read_image(np.zeros((1, 48), np.uint8), 768, 768, "image").size == (16, 768)
