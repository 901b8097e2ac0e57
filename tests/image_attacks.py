"""Small image files that cost a careless reader seconds or gigabytes, made in code."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, colour: int = 0, depth=1, lace=0, rows=None):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, lace)
    if rows is None:
        bits = {0: 1, 2: 3, 4: 2, 6: 4}[colour] * depth
        rows = zlib.compress(bytes(height * (1 + 2 * lace + (width * bits + 7) // 8)), 1)
    parts = [_chunk(b"IHDR", head), *chunks, _chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _exif(tags: int = 3000, size: int = 20_000) -> bytes:
    """An EXIF block whose tags all name the same bytes."""
    entries = [struct.pack("<HHII", 0x0112, 3, 1, 6)]
    place = 8 + 2 + 12 * (tags + 1) + 4
    entries += [struct.pack("<HHII", 0x9000 + i, 1, size, place) for i in range(tags)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(entries) + bytes(4) + bytes(size)


def exif_of_one_block() -> bytes:
    return _png(32, 32, _chunk(b"eXIf", _exif()))


def exif_in_webp() -> bytes:
    return _saved(Image.new("RGB", (32, 32)), "WEBP", exif=b"Exif\0\0" + _exif())


def jpeg_of_200_scans() -> bytes:
    image = Image.new("RGB", (4000, 4000), (9, 99, 199))
    data = _saved(image, "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    # refines one coefficient without a change, again and again
    return data[:-2] + data[last:-2] * 200 + data[-2:]


def jpeg_of_segments() -> bytes:
    data = _saved(Image.new("RGB", (32, 32)), "JPEG")
    return data[:2] + b"\xff\xfe\0\2" * 4_000_000 + data[2:]


def jpeg_filled_up() -> bytes:
    data = _saved(Image.new("RGB", (32, 32)), "JPEG")
    return data[:2] + b"\xff" * 20_000_000 + data[2:]


def white_ppm() -> bytes:
    return b"P6 " + b" " * (63 << 20) + b"4 4 255\n" + bytes(48)


def plain_ppm() -> bytes:
    return b"P3 4000 4000 255\n" + b"1 " * (30 << 20)


def run_length_bmp() -> bytes:
    side = 9000
    runs = (b"\xff\1" * (side // 255) + bytes([side % 255, 1]) + b"\0\0") * side + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    offset = 14 + 40 + 1024
    return (
        b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + head + bytes(1024) + runs
    )


def _tiff(width: int, height: int, entries: list[tuple[int, int, int, int]], data: bytes):
    place = 8 + 2 + 12 * (len(entries) + 4) + 4
    every = sorted(
        [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1)]
        + [(tag, kind, n, place if value < 0 else value) for tag, kind, n, value in entries]
    )
    body = b"".join(struct.pack("<HHII", *entry) for entry in every)
    return b"II*\0" + struct.pack("<IH", 8, len(every)) + body + bytes(4) + data


def tiff_of_strips() -> bytes:
    n = 1_000_000
    return _tiff(1, n, [(273, 4, n, -1), (278, 4, 1, 1), (279, 4, n, -1)], bytes(4 * n))


def tiff_of_huge_tags() -> bytes:
    tags = [(60_000 + i, 7, 50_000_000, -1) for i in range(2000)]
    strip = [(273, 4, 1, 8), (278, 4, 1, 4), (279, 4, 1, 16)]
    return _tiff(4, 4, strip + tags, bytes(50_000_000))


def jpeg_2000() -> bytes:
    """A codestream of 162 bytes or so, whose header promises many tiles and no data."""
    data = bytearray(_saved(Image.new("L", (8, 8)), "JPEG2000", no_jp2=True))
    place = data.index(b"\xff\x51")
    side = 9400
    struct.pack_into(">IIIIIIII", data, place + 6, side, side, 0, 0, 3, 3, 0, 0)
    return bytes(data)


def gif_of_frames() -> bytes:
    frames = [Image.new("L", (8, 8), i % 256) for i in range(3000)]
    return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def gif_of_comments() -> bytes:
    data = _saved(Image.new("L", (8, 8)), "GIF")
    place = data.index(b"\x2c\0\0")
    return data[:place] + (b"\x21\xfe" + b"\xff" * 256 * 4000 + b"\0") * 50 + data[place:]


def webp_of_frames() -> bytes:
    frames = [Image.new("RGB", (8, 8), (i % 256, i // 256, 9)) for i in range(2000)]
    return _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], method=0)


def apng_of_frames() -> bytes:
    frames = [Image.new("L", (8, 8), i % 256) for i in range(2000)]
    return _saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


def mpo_of_frames() -> bytes:
    frames = [Image.new("RGB", (8, 8), (i % 256, 0, 0)) for i in range(500)]
    return _saved(frames[0], "MPO", save_all=True, append_images=frames[1:])


def png_of_texts() -> bytes:
    bomb = zlib.compress(bytes(200_000_000), 9)
    chunks = [
        _chunk(b"iCCP", b"name\0\0" + bomb),
        *[_chunk(b"zTXt", b"key\0\0" + bomb)] * 20,
        *[_chunk(b"iTXt", b"key\0\1\0\0\0" + bomb)] * 20,
        *[_chunk(b"tEXt", b"key\0" + bytes(1 << 20))] * 20,
    ]
    return _png(32, 32, *chunks)


def png_of_pieces() -> bytes:
    rows = zlib.compress(bytes(32 * 5))
    return _png(32, 32, *[_chunk(b"IDAT", b"")] * 4_000_000, rows=rows)


def interlaced_png() -> bytes:
    return _png(9400, 9400, colour=6, depth=16, lace=1)


def deep_png() -> bytes:
    return _png(9400, 9400, colour=6, depth=16)


def large_alpha_png() -> bytes:
    return _png(9400, 9400, colour=6, depth=8)


def sliver() -> bytes:
    return _png(1, 89_478_485)


def large_webp() -> bytes:
    return _saved(Image.new("RGB", (9000, 9000)), "WEBP", method=0, quality=1)


def large_jpeg() -> bytes:
    return _saved(Image.new("L", (9000, 9000)), "JPEG", progressive=True)


def large_grey() -> bytes:
    return _saved(Image.fromarray(np.zeros((9400, 9400), np.uint16)), "PNG", compress_level=1)


def two_sizes() -> bytes:
    """A GIF of one pixel whose picture has 65,535 a side."""
    data = bytearray(_saved(Image.new("L", (1, 1)), "GIF"))
    place = data.index(b"\x2c\0\0")
    struct.pack_into("<HH", data, place + 5, 65_535, 65_535)
    return bytes(data)


READ = [  # read, at the cost of their pixels
    exif_of_one_block,
    exif_in_webp,
    gif_of_frames,
    gif_of_comments,
    webp_of_frames,
    apng_of_frames,
    mpo_of_frames,
    png_of_texts,
    large_grey,
    large_alpha_png,
]
REFUSED = [sliver, two_sizes, tiff_of_strips, large_webp]
EITHER = [  # read or refused, as the machine is fast
    run_length_bmp,
    large_jpeg,
    jpeg_of_200_scans,
    jpeg_of_segments,
    jpeg_filled_up,
    white_ppm,
    plain_ppm,
    tiff_of_huge_tags,
    jpeg_2000,
    png_of_pieces,
    interlaced_png,
    deep_png,
]
