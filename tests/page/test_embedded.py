"""A request in JPEG and WebP files: found among other parts, and bounded whatever the file says."""

from __future__ import annotations

import io
import random
import time

import pytest
from PIL import Image

from omnigen_fast.errors import RequestError
from omnigen_fast.page import embedded

TEXT = '{"prompt": "\\u732b"}'


def picture(suffix: str, **options) -> bytes:
    written = io.BytesIO()
    kind = {".jpg": "JPEG", ".webp": "WEBP", ".png": "PNG"}[suffix]
    image = Image.linear_gradient("L").convert("RGB").resize((40, 30))
    image.save(written, kind, **options)
    return written.getvalue()


def read(data: bytes) -> str:
    return embedded.read_text(io.BytesIO(data), "x").decode(errors="replace")


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".png"])
def test_it_comes_back(suffix):
    data = picture(suffix, **embedded.saving(TEXT, suffix))
    assert read(data) == TEXT
    image = Image.open(io.BytesIO(data))
    image.load()
    if suffix != ".png":  # as other programs read it
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"ASCII\0\0\0omnigen_fast " + TEXT.encode()
    with pytest.raises(RequestError, match="carries no request"):
        read(picture(suffix))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_longest_one(suffix):
    limit = embedded.MAX_JPEG_BYTES if suffix == ".jpg" else embedded.MAX_BYTES
    assert read(picture(suffix, **embedded.saving("x" * limit, suffix))) == "x" * limit
    with pytest.raises(RequestError, match="carries at most"):
        embedded.saving("x" * (limit + 1), suffix)


def test_among_other_segments():
    data = picture(
        ".jpg", **embedded.saving(TEXT, ".jpg"), icc_profile=b"p" * 100_000, comment=b"c"
    )
    assert read(data) == TEXT
    others = b"\xff\xe1\x00\x06http" + b"\xff\xe2\x00\x02"
    assert read(data[:2] + others + data[2:]) == TEXT


def test_other_exif_is_none_of_ours():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0of somebody else"
    for suffix in (".jpg", ".webp"):
        with pytest.raises(RequestError, match="carries no request"):
            read(picture(suffix, exif=exif))


def test_big_endian_exif_of_others_is_read():
    mark = b"ASCII\0\0\0omnigen_fast {}"
    comment = b"\x92\x86\0\x07" + len(mark).to_bytes(4, "big") + (44).to_bytes(4, "big")
    tiff = b"MM\0*\0\0\0\x08" + b"\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x1a\0\0\0\0"
    tiff += b"\0\x01" + comment + b"\0\0\0\0" + mark
    assert read(picture(".webp", exif=tiff)) == "{}"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe1\x00\x00",
        b"\xff\xd8\xff\xe1\xff\xffExif\0\0",
        b"\xff\xd8" + b"\xff\xe0\x00\x02" * 100_000,
        b"\xff\xd8\xff\xe1\x00\x20Exif\0\0II*\0\xff\xff\xff\xff",
        b"\xff\xd8\xff\xe1\x00\x20Exif\0\0II*\0\x00\x00\x00\x00\xff\xff",
        b"RIFF\0\0\0\0WEBP",
        b"RIFF\0\0\0\0WEBPEXIF\xff\xff\xff\xff",
        b"RIFF\0\0\0\0WEBPEXIF\x00\x00\x00\x00",
        b"RIFF\0\0\0\0WEBP" + b"VP8 \x00\x00\x00\x00" * 200_000,
        b"GIF89a" + bytes(20),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_malformed_files_end_in_one_line(data):
    start = time.process_time()
    with pytest.raises(RequestError, match=r"carries no request|is not a PNG file"):
        read(data)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_mutated_files_are_read_or_refused(suffix):
    good = picture(suffix, **embedded.saving(TEXT, suffix))
    chance = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        try:
            outcomes.add(read(bytes(data[: chance.randint(0, len(data))])) == TEXT)
        except RequestError as error:
            assert str(error).isprintable()
            outcomes.add(None)
    assert outcomes >= {True, None}
