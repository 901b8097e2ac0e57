"""What the header of an image file says, read before anything is decoded.

Photos come as PNG, JPEG, WebP, BMP or GIF. The headers of these bound what decoding costs, so they
are decoded in this process, without their metadata: the orientation is all that is read of it.
Whatever a header can't bound is `heavy`, and so is every other format.
"""

from __future__ import annotations

import io
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_MOST_BLOCKS = 100_000  # of a header, or chunks of a PNG; each costs about a microsecond
_MOST_METADATA = 1 << 20  # bytes read of an EXIF or XMP block
_MOST_SCANNED = 300_000_000  # pixels times scans of a JPEG: about a second
_MOST_COEFFICIENTS = 700_000_000  # bytes that a JPEG of several scans takes while it is decoded
_MOST_RAW = 200_000_000  # bytes of a PNG's rows: about a second
_MOST_WEBP = 30_000_000  # pixels, of which Pillow holds four copies
_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])[\"<]")
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


@dataclass
class Header:
    """What is known of an image file before it is decoded."""

    format: str  # Pillow's name
    size: tuple[int, int] = (0, 0)  # (width, height) in pixels; zeros if the header lacks them
    orientation: int = 1  # EXIF's, 1 to 8
    heavy: bool = False  # decode it where it can be stopped
    parts: list[tuple[int, int]] = field(default_factory=list)  # bytes to decode; none means all


class Parts(io.RawIOBase):
    """Byte ranges of a file, read as one file without what lies between them."""

    def __init__(self, file: Any, parts: list[tuple[int, int]]) -> None:
        self._file, self._at, self._parts = file, 0, parts
        self._starts = [0]
        for start, stop in parts:
            self._starts.append(self._starts[-1] + stop - start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._starts[-1])[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._starts[-1]:
            return 0
        index = bisect_right(self._starts, self._at) - 1
        start, stop = self._parts[index]
        place = start + self._at - self._starts[index]
        self._file.seek(place)
        data = self._file.read(min(len(buffer), stop - place))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def inspect(file: Any, length: int) -> Header | None:
    """Reads the header of a PNG, JPEG, WebP, BMP or GIF file of `length` bytes, else None."""
    file.seek(0)
    start = file.read(16)
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(file, length)
    if start.startswith(b"\xff\xd8\xff"):
        return _jpeg(file, length)
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return _webp(file, length)
    if start.startswith(b"BM"):
        return _bmp(file)
    if start.startswith((b"GIF87a", b"GIF89a")):
        return _gif(file, length)
    return None


def orientation(exif: bytes | None, xmp: bytes | None = None) -> int:
    """The orientation, 1 to 8, that an EXIF block states, or else an XMP block; 1 by default."""
    exif = (exif or b"")[:_MOST_METADATA].removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order and len(exif) >= 10:
        (place,) = struct.unpack_from(order + "I", exif, 4)
        count = struct.unpack_from(order + "H", exif, place)[0] if place + 2 <= len(exif) else 0
        entries = exif[place + 2 : place + 2 + 12 * count]
        entries = entries[: len(entries) // 12 * 12]
        for tag, kind, values, value in struct.iter_unpack(order + "HHI4s", entries):
            if tag == _ORIENTATION and values == 1 and kind in (1, 3, 4):
                (number,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], value)
                return number if 1 <= number <= 8 else 1
    found = _XMP_ORIENTATION.search((xmp or b"")[:_MOST_METADATA])
    return int(found[1]) if found else 1


def _read(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _keep(parts: list[tuple[int, int]], start: int, stop: int) -> None:
    """Adds a byte range, joined to the one before it where they touch."""
    if parts and parts[-1][1] == start:
        parts[-1] = (parts[-1][0], stop)
    else:
        parts.append((start, stop))


def _png(file: Any, length: int) -> Header:
    header = Header("PNG", parts=[(0, 8)])
    place, exif, xmp = 8, b"", b""
    for _ in range(_MOST_BLOCKS):
        head = _read(file, place, 8)
        if len(head) < 8:
            break
        size, kind = struct.unpack(">I4s", head)
        stop = min(place + 12 + size, length)
        if kind in _PNG_CHUNKS:
            _keep(header.parts, place, stop)
        if kind == b"IHDR" and len(data := file.read(13)) == 13:
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data)
            header.size = width, height
            raw = width * height * {2: 3, 4: 2, 6: 4}.get(colour, 1) * depth // 8
            header.heavy = raw > (_MOST_RAW // 2 if interlaced else _MOST_RAW)
        elif kind == b"eXIf":
            exif = exif or file.read(min(size, _MOST_METADATA))
        elif kind == b"iTXt" and not xmp:
            data = file.read(min(size, _MOST_METADATA))
            xmp = data if data.startswith(b"XML:com.adobe.xmp\0\0") else b""
        place = stop
        if kind == b"IEND":
            break
    else:
        header.heavy = True
        header.parts = []
    header.orientation = orientation(exif, xmp)
    return header


def _segments(file: Any, length: int) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of each segment of a JPEG before its first scan, and of that."""
    place = 2
    for _ in range(_MOST_BLOCKS):
        head = _read(file, place, 4)
        if len(head) < 4 or head[0] != 0xFF:
            return
        if head[1] == 0xFF:  # filled up
            place += 1
            continue
        if head[1] in (0x01, *range(0xD0, 0xD9)):  # without a length
            place += 2
            continue
        stop = min(place + 2 + max(2, head[2] * 256 + head[3]), length)
        yield head[1], place, stop
        if head[1] in (0xDA, 0xD9):
            return
        place = stop
    yield 0, place, length


def _jpeg(file: Any, length: int) -> Header:
    header = Header("JPEG", parts=[(0, 2)])
    exif, xmp, components, progressive = b"", b"", 0, False
    for marker, start, stop in _segments(file, length):
        if marker == 0:
            header.heavy = True
            header.parts = []
            break
        if marker == 0xDA:
            _keep(header.parts, start, length)
            width, height = header.size
            together = _read(file, start + 4, 1) == bytes([components])
            if progressive or not together:  # else decoded in one pass, which stops at its end
                scans = _scans(file, start, length)
                header.heavy |= scans * width * height > _MOST_SCANNED
                header.heavy |= (2 * components + 4) * width * height > _MOST_COEFFICIENTS
        elif marker in (0xE1, 0xFE) or 0xE2 <= marker <= 0xEF:
            # metadata, but for Adobe's segment, which states the colours
            if marker == 0xEE and stop - start <= 64:
                _keep(header.parts, start, stop)
            elif marker == 0xE1:
                data = _read(file, start + 4, stop - start - 4)
                if data.startswith(b"Exif\0\0"):
                    exif = exif or data
                elif data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                    xmp = xmp or data
        else:
            _keep(header.parts, start, stop)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                data = _read(file, start + 4, 6)
                if len(data) == 6:
                    height, width, components = struct.unpack(">xHHB", data)
                    header.size = width, height
                progressive = marker not in (0xC0, 0xC1, 0xC3)
    header.orientation = orientation(exif, xmp)
    return header


def _scans(file: Any, start: int, length: int) -> int:
    """Scans of a JPEG from its first on; in coded data 0xFF is followed by 0 or a restart."""
    count, size = 0, 1 << 18
    for place in range(start, length, size):
        data = np.frombuffer(_read(file, place, size + 2), np.uint8)
        if len(data) > 2:
            found = (data[:-2] == 0xFF) & (data[1:-1] == 0xDA) & (data[2:] == 0)
            count += int(np.count_nonzero(found))
    return count


def _webp(file: Any, length: int) -> Header:
    header = Header("WEBP")
    place, exif, xmp = 12, b"", b""
    for _ in range(_MOST_BLOCKS):
        head = _read(file, place, 18)
        if len(head) < 8:
            break
        kind, (size,) = head[:4], struct.unpack_from("<I", head, 4)
        if kind == b"VP8X" and len(head) == 18:
            data = _read(file, place + 12, 6)
            header.size = (
                int.from_bytes(data[:3], "little") + 1,
                int.from_bytes(data[3:], "little") + 1,
            )
        elif kind == b"VP8 " and header.size == (0, 0) and len(head) == 18:
            width, height = struct.unpack("<HH", _read(file, place + 14, 4).ljust(4, b"\0"))
            header.size = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L" and header.size == (0, 0) and len(head) == 18:
            bits = int.from_bytes(head[9:13], "little")
            header.size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind == b"EXIF" and not exif:
            exif = _read(file, place + 8, min(size, _MOST_METADATA))
        elif kind == b"XMP " and not xmp:
            xmp = _read(file, place + 8, min(size, _MOST_METADATA))
        place += 8 + size + size % 2
        if place >= length:
            break
    else:
        header.heavy = True
    header.orientation = orientation(exif, xmp)
    header.heavy |= header.size[0] * header.size[1] > _MOST_WEBP
    return header


def _bmp(file: Any) -> Header:
    head = _read(file, 14, 20)
    header = Header("BMP", heavy=True)
    if len(head) == 20 and struct.unpack_from("<I", head)[0] >= 40:
        _, width, height, _, _, compression = struct.unpack("<IiiHHI", head)
        header.size = abs(width), abs(height)
        header.heavy = compression in (1, 2)  # run lengths, which Pillow reads in Python
    elif len(head) == 20 and struct.unpack_from("<I", head)[0] == 12:
        header.size = struct.unpack_from("<HH", head, 4)
        header.heavy = False
    return header


def _gif(file: Any, length: int) -> Header:
    """All from the first picture on, without the comments and other blocks in front of it."""
    head = _read(file, 6, 7)
    if len(head) < 7:
        return Header("GIF")
    width, height, flags = struct.unpack("<HHBxx", head)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    header = Header("GIF", (width, height), parts=[(0, min(place, length))])
    for _ in range(_MOST_BLOCKS):
        kind = _read(file, place, 3)
        if len(kind) < 3 or kind[0] != 0x21:
            _keep(header.parts, place, length)
            if kind[:1] == b"\x2c" and len(frame := _read(file, place + 1, 8)) == 8:
                left, top, across, down = struct.unpack("<HHHH", frame)
                header.size = max(width, left + across), max(height, top + down)
            return header
        start, place = place, place + 2
        while (block := _read(file, place, 1)) not in (b"", b"\0"):
            place += 1 + block[0]
            if place - start > _MOST_METADATA:  # a comment that long; skip no more of it
                header.heavy = True
                header.parts = []
                return header
        place += 1
        if kind[1] == 0xF9:  # transparency
            _keep(header.parts, start, place)
    header.heavy = True
    header.parts = []
    return header
