"""Image files of every format that is read or refused, and arrays."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import image_attacks
import numpy as np
from PIL import Image

from omnigen_fast import image_decoder
from omnigen_fast.images import read_image

from .. import mutate
from ..oracle import CHILDREN, waiting
from . import Kind

_REAL = 400  # every so many inputs the decoder is started as it is for users
_MASK = 10  # every so many inputs is read as a mask
_HEAVY = 4000  # and every so many an attack of many megabytes is mutated
_LIGHT = (  # attacks that take no time to make
    image_attacks.exif_of_one_block,
    image_attacks.exif_in_webp,
    image_attacks.two_sizes,
    image_attacks.jpeg_2000,
    image_attacks.mpo_of_frames,
)
_ATTACKS = [
    make
    for make in (*image_attacks.READ, *image_attacks.REFUSED, *image_attacks.EITHER)
    if make not in _LIGHT
]
_MAX_FILE = 64 << 20


class Input(NamedTuple):
    """A file's bytes or an array, and how it is handed over."""

    source: Any
    door: str


class Images(Kind):
    most_bytes = 1_000_000_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        Image.init()
        self._seeds = _seeds()

    def make(self, rng: random.Random, number: int) -> Input:
        if number % _HEAVY == _HEAVY - 1:
            data = rng.choice(_ATTACKS)()
            # in front, where the header is: the rest stays as costly as it was
            start = mutate.octets(rng, data[:256]) if rng.random() < 0.7 else data[:256]
            return Input((start + data[256:])[:_MAX_FILE], "bytes")
        if rng.random() < 0.04:
            return Input(_array(rng), "array")
        name = rng.choice(sorted(self._seeds))
        data, other = self._seeds[name], self._seeds[rng.choice(sorted(self._seeds))]
        if rng.random() < 0.5 and (change := _STRUCTURES.get(_signature(data))):
            data = change(rng, data)
        if rng.random() < 0.6:
            start, data = data[:4], mutate.octets(rng, data, other)
            if rng.random() < 0.8:  # else most are no image at all
                data = start + data[4:]
        if rng.random() < 0.02:
            data = other[: rng.choice((2, 4, 8, 12, 16))] + data
        return Input(data[:_MAX_FILE], rng.choice(("bytes", "path", "file", "opened")))

    def size(self, case: Input) -> int:
        return case.source.nbytes if case.door == "array" else len(case.source)

    def prepare(self, case: Input) -> Any:
        if case.door == "path":
            path = self.folder / "input"
            path.write_bytes(case.source)
            return path
        if case.door == "file":
            return io.BytesIO(case.source)
        if case.door == "opened":
            try:
                return Image.open(io.BytesIO(case.source))
            except Exception:  # the caller's own error
                return case.source
        return case.source

    def run(self, prepared: Any, number: int) -> None:
        with _forks() if number % _REAL else contextlib.nullcontext():
            found = read_image(prepared, 1024, 3072, "image", number % _MASK == 1).pixels
        height, width, channels = found.shape
        assert found.dtype == np.uint8 and channels == 3, (found.dtype, found.shape)
        assert height % 16 == width % 16 == 0 < height * width, found.shape

    def good(self) -> bytes:
        names = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "JPEG2000")
        with _forks():
            found = [read_image(self._seeds[name], 1024, 3072, "image").pixels for name in names]
        return b"".join(pixels.tobytes() for pixels in found)

    def save(self, case: Input, folder: Path) -> None:
        if case.door == "array":
            super().save((case.source.dtype, case.source.shape, case.source.ravel()[:100]), folder)
        else:
            (folder / f"image-as-{case.door}").write_bytes(case.source)


@contextlib.contextmanager
def _forks() -> Iterator[None]:
    """Has images decoded in forked children."""
    real = image_decoder._decoder
    image_decoder._decoder = _Forked  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        image_decoder._decoder = real


class _Forked:
    """`serve` in a forked child: what the decoder's process does, without starting Python."""

    def __init__(self, mask: bool) -> None:
        self._status: int | None = None
        theirs, ours = os.pipe()
        answers, said = os.pipe()
        self._before = _resident()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(theirs, 0)
                os.dup2(said, 1)
                os.closerange(3, 256)
                sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the process's life
                image_decoder.serve(mask)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(theirs)
        os.close(said)
        self.stdin, self.stdout = os.fdopen(ours, "wb"), os.fdopen(answers, "rb")

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, 9)

    def wait(self) -> None:
        CHILDREN.waited += waiting(self.pid)
        _, self._status, usage = os.wait4(self.pid, 0)
        taken = 1024 * usage.ru_maxrss - self._before
        CHILDREN.largest = max(CHILDREN.largest, taken)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _picture(mode: str = "RGB", width: int = 24, height: int = 20) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([rows * 11 % 256, columns * 9 % 256, (rows + columns) * 5 % 256], -1)
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def _seeds() -> dict[str, bytes]:
    """Small files of every format that Pillow here can write, and some that it only reads."""
    found = {}
    colour = _picture()

    def add(name: str, image: Image.Image, kind: str = "", **options: Any) -> None:
        file = io.BytesIO()
        try:
            image.save(file, kind or name, **options)
        except (OSError, KeyError, ValueError):  # this build lacks it
            return
        found[name] = file.getvalue()

    for kind in sorted(Image.SAVE):
        # no writers, no images, or about to be removed
        if kind not in ("PDF", "HDF5", "BUFR", "GRIB", "WMF", "FITS", "IM"):
            mode = {"XBM": "1", "MSP": "1", "PALM": "P", "BLP": "P", "SPIDER": "F"}.get(kind, "RGB")
            add(kind, colour.convert(mode))
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "I"):
        image = _deep(mode) if mode.startswith("I") else colour.convert(mode)
        add(f"PNG {mode}", image, "PNG")
        add(f"TIFF {mode}", image, "TIFF")
    for mode in ("L", "CMYK"):
        add(f"JPEG {mode}", colour.convert(mode), "JPEG")
    add("JPEG progressive", colour, "JPEG", progressive=True)
    add("JPEG restarts", colour, "JPEG", restart_marker_blocks=1)
    add("JPEG metadata", colour, "JPEG", exif=_exif(), xmp=_XMP, comment=b"words", dpi=(72, 72))
    add("PNG metadata", colour, "PNG", exif=_exif(), transparency=(1, 2, 3), dpi=(72, 72))
    add("WEBP metadata", colour, "WEBP", exif=_exif(), xmp=_XMP)
    add("WEBP lossless", colour.convert("RGBA"), "WEBP", lossless=True)
    for packing in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate"):
        add(f"TIFF {packing}", colour, "TIFF", compression=packing)
    for packing in ("group3", "group4", "tiff_ccitt"):
        add(f"TIFF {packing}", colour.convert("1"), "TIFF", compression=packing)
    add("TIFF pages", colour, "TIFF", save_all=True, append_images=[colour] * 3)
    frames = {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}
    for kind in ("GIF", "WEBP", "PNG", "MPO", "AVIF"):
        add(f"{kind} frames", colour, kind, **frames)
    add("TGA packed", colour, "TGA", compression="tga_rle")
    add("SGI grey", colour.convert("L"), "SGI")
    add("ICO sizes", _picture("RGBA", 64, 64), "ICO", sizes=[(16, 16), (32, 32), (64, 64)])
    add("ICO bitmap", _picture("RGBA", 32, 32), "ICO", bitmap_format="bmp")
    add("ICNS", _picture("RGBA", 128, 128))
    add("JPEG2000 stream", colour, "JPEG2000", no_jp2=True)
    add("JPEG2000 tiles", _picture("RGB", 64, 64), "JPEG2000", tile_size=(16, 16))
    for fourcc in ("DXT1", "DXT3", "DXT5", "BC5"):
        add(f"DDS {fourcc}", _picture("RGBA", 16, 16), "DDS", pixel_format=fourcc)
    add("BMP palette", colour.convert("P"), "BMP")
    found |= {make.__name__: make() for make in _LIGHT}
    return found | _handmade()


def _deep(mode: str) -> Image.Image:
    values = np.arange(24 * 20).reshape(20, 24)
    return Image.fromarray((values * 100).astype(np.uint16 if mode == "I;16" else np.int32))


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "words"
    return exif.tobytes()


_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'


def _handmade() -> dict[str, bytes]:
    """Formats that Pillow reads but does not write, and some that must be refused."""
    runs = b"\4\7\4\x63\0\0" * 8 + b"\0\1"
    palette = bytes(range(256)) * 4
    head = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(runs), 0, 0, 256, 0)
    offset = 14 + 40 + 1024
    tile = bytes(range(192))
    cursor = struct.pack("<IiiHHIIiiII", 40, 8, 16, 1, 24, 0, 0, 0, 0, 0, 0) + tile + bytes(32)
    return {
        "BMP runs": b"BM"
        + struct.pack("<IHHI", offset + len(runs), 0, 0, offset)
        + head
        + palette
        + runs,
        "BMP old": b"BM" + struct.pack("<IHHIIHHHH", 26 + 192, 0, 0, 26, 12, 8, 8, 1, 24) + tile,
        "CUR": struct.pack("<HHHBBBBHHII", 0, 2, 1, 8, 8, 0, 0, 1, 1, len(cursor), 22) + cursor,
        "PSD": b"8BPS\0\1"
        + bytes(6)
        + struct.pack(">HIIHH", 3, 8, 8, 8, 3)
        + bytes(12)
        + b"\0\0"
        + tile,
        "PSD runs": b"8BPS\0\1"
        + bytes(6)
        + struct.pack(">HIIHH", 1, 8, 8, 8, 1)
        + bytes(12)
        + b"\0\1"
        + struct.pack(">8H", *[2] * 8)
        + b"\xf9\7" * 8,
        "PPM plain": b"P3 # words\n4 4 255\n" + b"1 2 3 " * 16,
        "PGM plain": b"P2\n4 4\n15\n" + b"9 " * 16,
        "PBM plain": b"P1\n4 4\n" + b"1 0 " * 8,
        "PGM deep": b"P5 4 4 65535\n" + bytes(range(32)),
        "PAM": b"P7\nWIDTH 4\nHEIGHT 4\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n" + tile[:48],
        "PFM": b"Pf\n4 4\n-1.0\n" + struct.pack("<16f", *[0.5] * 16),
        "XPM": b'/* XPM */\nstatic char *x[] = {\n"4 2 2 1",\n"a c #ff0000",\n"b c None",\n'
        b'"abab",\n"baba"\n};\n',
        "QOI": b"qoif" + struct.pack(">IIBB", 4, 4, 4, 0) + b"\xfe\1\2\3\xcf" + bytes(7) + b"\1",
        "GBR": struct.pack(">6I", 32, 2, 8, 8, 1, 0) + b"GIMP" + bytes(4) + bytes(64),
        "FLI": struct.pack("<IHHHHHHI", 150, 0xAF12, 1, 8, 8, 8, 3, 70)
        + bytes(108)
        + struct.pack("<IHH", 22, 0xF1FA, 1)
        + bytes(8)
        + struct.pack("<IH", 6, 13),
        "DCX": struct.pack("<III", 987654321, 12, 0) + b"\n\5\1\x08" + bytes(200),
        "PCD": bytes(2048) + b"PCD_" + bytes(4096),
        "PIXAR": b"\x80\xe8\0\0"
        + bytes(412)
        + struct.pack("<HHHHHH", 8, 8, 8, 8, 14, 0)
        + bytes(600),
        "SUN": struct.pack(">8I", 0x59A66A95, 8, 8, 24, 192, 1, 0, 0) + tile,
        "SUN runs": struct.pack(">8I", 0x59A66A95, 8, 8, 8, 20, 2, 0, 0) + b"\x80\x3f\7" * 5,
        "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n8 8 255\n" + bytes(64),
        "FTEX": b"FTEX" + struct.pack("<iiiiiiii", 1, 8, 8, 1, 1, 1, 32, 256) + bytes(260),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        "EPS binary": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, 60, 0, 0, 0, 0, 0xFFFF)
        + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
        "WMF": struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 8, 8, 96, 0, 0)
        + b"\1\0\x09\0"
        + bytes(40),
        "GRIB": b"GRIB\0\0\0\1" + bytes(40),
        "BUFR": b"BUFR\0\0\0\1" + bytes(40),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(80),
        "FITS": b"SIMPLE  =                    T".ljust(80)
        + b"BITPIX  = 8".ljust(80)
        + b"NAXIS   = 2".ljust(80)
        + b"NAXIS1  = 8".ljust(80)
        + b"NAXIS2  = 8".ljust(80)
        + b"END".ljust(2480)
        + bytes(64),
        "MPEG": b"\0\0\1\xb3\x01\0\x10" + bytes(40),
        "IPTC": b"\x1c\3\0\0\1\2" + bytes(40),
        "IM": b"Image type: RGB image\r\nImage size (x*y): 8*8\r\n".ljust(511, b"\0")
        + b"\x1a"
        + tile,
        "MCIDAS": b"\0\0\0\0\0\0\0\4" + bytes(300),
        "HEIC": struct.pack(">I4s4sI4s", 20, b"ftyp", b"heic", 0, b"mif1") + bytes(64),
        "SVG": b'<?xml version="1.0"?><svg width="8" height="8" xmlns:x="file:///dev/zero"/>',
        "empty": b"",
        "zeros": bytes(64),
        "text": b"this is no image at all\n" * 4,
        "pickle": b"\x80\4\x95\x1d\0\0\0\0\0\0\0\x8c\5posix\x94\x8c\6system\x94\x93.",
        "zip": b"PK\3\4" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(30),
    }


def _array(rng: random.Random) -> np.ndarray:
    """An array of some dtype and shape, with some values."""
    dtypes = ("u1", "u2", ">u2", "i1", "i4", "u8", "?", "f2", "f4", ">f4", "f8", "c8", "S1", "O")
    dtype = np.dtype(rng.choice((*dtypes[:2], *dtypes)))
    sides = (0, 1, 2, 3, 4, 7, 16, 17, 100)
    shape = [rng.choice(sides) for _ in range(rng.choice((0, 1, 2, 3, 3, 3, 4, 5)))]
    if shape and rng.random() < 0.5:
        shape[-1] = rng.choice((1, 3, 4))
    values = np.frombuffer(rng.randbytes(64), np.uint8)
    flat = np.resize(values, int(np.prod(shape, dtype=np.int64))) if 0 not in shape else values[:0]
    if dtype.kind in "fc":
        flat = flat / 255 * rng.choice((1, 1, 1, 2, -1, np.nan, np.inf))
    found = flat.astype(dtype).reshape(shape)
    if found.ndim > 1 and rng.random() < 0.3:
        found = rng.choice((found[::-1], found.T, found[:, ::2]))
    return found


# Changes that know the format, so that the rest of it stays valid


def _signature(data: bytes) -> str:
    for start, name in _SIGNATURES:
        if data.startswith(start):
            return name
    return "boxes" if data[4:8] in (b"ftyp", b"jP  ") else ""


_SIGNATURES = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8", "jpeg"),
    (b"RIFF", "riff"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"GIF8", "gif"),
    (b"BM", "fixed"),
    (b"P", "numbers"),
    (b"#define", "numbers"),
    (b"/* XPM", "numbers"),
    (b"\0\0\1\0", "fixed"),
    (b"\0\0\2\0", "fixed"),
    (b"8BPS", "fixed"),
    (b"DDS ", "fixed"),
    (b"icns", "fixed"),
    (b"\xff\x4f", "fixed"),
    (b"qoif", "fixed"),
    (b"BLP", "fixed"),
    (b"\x01\xda", "fixed"),
    (b"\n", "fixed"),
    (b"\x59\xa6", "fixed"),
)


def _shuffled(rng: random.Random, parts: list[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Some parts of a file changed, dropped, repeated or moved."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not parts:
            break
        index, kind = rng.randrange(len(parts)), rng.randrange(8)
        if kind <= 4:
            parts[index] = change(parts[index])
        elif kind == 5:
            parts[index : index + 1] = [parts[index]] * rng.choice((0, 2, 3, 300))
        elif kind == 6:
            other = rng.randrange(len(parts))
            parts[index], parts[other] = parts[other], parts[index]
        else:
            del parts[index:]
    return parts


def _png(rng: random.Random, data: bytes) -> bytes:
    chunks, place = [], 8
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size

    def change(chunk: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        kind, body = chunk
        if kind == b"IHDR":
            return kind, _numbers(rng, body, ">")
        if kind in (b"IDAT", b"fdAT") and rng.random() < 0.7:
            try:
                rows = zlib.decompress(body)
            except zlib.error:
                return kind, mutate.octets(rng, body)
            level = rng.choice((0, 1, 9))
            return kind, zlib.compress(mutate.octets(rng, rows + bytes(1000)), level)
        if rng.random() < 0.3:
            names = (
                b"eXIf",
                b"iCCP",
                b"zTXt",
                b"tRNS",
                b"PLTE",
                b"acTL",
                b"fcTL",
                b"gAMA",
                b"IEND",
            )
            kind = rng.choice(names)
        return kind, mutate.octets(rng, body or b"\0")

    found = b"\x89PNG\r\n\x1a\n"
    for kind, body in _shuffled(rng, chunks, change):
        check = zlib.crc32(kind + body)
        found += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
    return found


def _jpeg(rng: random.Random, data: bytes) -> bytes:
    segments, place = [], 2
    while data[place : place + 1] == b"\xff" and data[place + 1] != 0xDA:
        (size,) = struct.unpack_from(">H", data, place + 2)
        segments.append(data[place : place + 2 + size])
        place += 2 + size

    def change(segment: bytes) -> bytes:
        kind = rng.randrange(4)
        if kind == 0:
            marker = rng.choice((*range(0xC0, 0xD0), 0xDB, 0xDD, 0xE1, 0xEE, 0xFE, 0x01, 0xD3))
            return segment[:1] + bytes([marker]) + segment[2:]
        if kind == 1:
            return segment[:2] + mutate.integer(rng, 2, ">") + segment[4:]
        return segment[:4] + _numbers(rng, segment[4:], ">")

    rest = data[place:]
    if rng.random() < 0.2:
        rest = rest[:-2] * rng.choice((1, 3, 40)) + rest[-2:]
    if rng.random() < 0.3:
        rest = mutate.octets(rng, rest)
    return data[:2] + b"".join(_shuffled(rng, segments, change)) + rest


def _riff(rng: random.Random, data: bytes) -> bytes:
    chunks, place = [], 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        chunks.append((data[place : place + 4], data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2

    def change(chunk: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        kind, body = chunk
        if rng.random() < 0.2:
            kind = rng.choice(
                (b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"XMP ")
            )
        return kind, _numbers(rng, body, "<")

    found = b""
    for kind, body in _shuffled(rng, chunks, change):
        found += kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(found) + 4) + data[8:12] + found


def _tiff(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    order = "<" if data[:2] == b"II" else ">"
    (place,) = struct.unpack_from(order + "I", data, 4)
    if place + 2 > len(data):
        return mutate.octets(rng, data)
    (count,) = struct.unpack_from(order + "H", data, place)
    for _ in range(rng.choice((1, 1, 2, 4))):
        entry = place + 2 + 12 * rng.randrange(max(1, count))
        if entry + 12 > len(found):
            break
        what = rng.randrange(5)
        if what == 0:
            tags = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 338)
            struct.pack_into(order + "H", found, entry, rng.choice(tags))
        elif what == 1:
            struct.pack_into(order + "H", found, entry + 2, rng.randrange(20))
        elif what == 2:
            found[entry + 4 : entry + 8] = mutate.integer(rng, 4, order)
        elif what == 3:
            found[entry + 8 : entry + 12] = mutate.integer(rng, 4, order)
        else:
            small = rng.choice((1, 2, 3, 4, 8, 16, 32, 32773, 34712, 50000, 50001))
            struct.pack_into(order + "H", found, entry + 8, small)
    return bytes(found)


def _gif(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    places = [6, 8, 10, 11]
    first = data.find(b"\x2c")
    places += [first + offset for offset in (1, 3, 5, 7, 9, 10)]
    for _ in range(rng.choice((1, 2, 3))):
        place = rng.choice(places)
        found[place : place + 2] = mutate.integer(rng, 2, "<")
    if rng.random() < 0.2:
        comment = b"\x21\xfe" + (b"\xff" + bytes(255)) * rng.choice((1, 50)) + b"\0"
        found[first:first] = comment * rng.choice((1, 2, 100))
    return bytes(found)


def _boxes(rng: random.Random, data: bytes) -> bytes:
    """JPEG 2000, AVIF and HEIC: boxes of a size, a name and what is inside."""
    boxes, place = [], 0
    while place + 8 <= len(data):
        size = struct.unpack_from(">I", data, place)[0] or len(data) - place
        size = max(size, 8)
        boxes.append(data[place : place + size])
        place += size

    def change(box: bytes) -> bytes:
        if rng.random() < 0.2:
            return mutate.integer(rng, 4, ">") + box[4:]
        return box[:8] + _numbers(rng, box[8:], ">")

    return b"".join(_shuffled(rng, boxes, change))


def _fixed(rng: random.Random, data: bytes) -> bytes:
    """Formats whose header has its numbers at fixed places."""
    order = ">" if data[:1] in (b"8", b"\xff", b"q", b"i", b"\x01", b"\x59") else "<"
    return _numbers(rng, data[:130], order) + data[130:]


def _text_numbers(rng: random.Random, data: bytes) -> bytes:
    """Formats whose header is text: some of its first numbers changed."""
    head, rest = data[:200], data[200:]
    found = list(re.finditer(rb"\d+", head))
    for match in reversed(rng.sample(found, min(len(found), rng.choice((1, 1, 2))))):
        number = str(rng.choice(mutate.INTEGERS)).encode()
        if rng.random() < 0.1:
            number = b"9" * rng.choice((30, 5000))
        head = head[: match.start()] + number + head[match.end() :]
    return head + rest


def _numbers(rng: random.Random, body: bytes, order: str) -> bytes:
    """Bytes with some integers at even places changed."""
    found = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if len(found) < 2:
            return mutate.octets(rng, bytes(found) or b"\0")
        size = rng.choice((1, 2, 2, 4, 4))
        place = rng.randrange(min(len(found), 40)) // size * size
        found[place : place + size] = mutate.integer(rng, size, order)
    return bytes(found)


_STRUCTURES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "png": _png,
    "jpeg": _jpeg,
    "riff": _riff,
    "tiff": _tiff,
    "gif": _gif,
    "boxes": _boxes,
    "fixed": _fixed,
    "numbers": _text_numbers,
}
