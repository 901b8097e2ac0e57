"""Text inside a picture file: where PNG, JPEG and WebP hold it, read in bounds from any file.

PNG holds it in an uncompressed tEXt chunk under our name, JPEG and WebP in the UserComment of their
EXIF data, after our name. Nothing is decoded, and no more than a fixed number of parts is looked
through.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..errors import RequestError

KEY = "omnigen_fast"
MAX_BYTES = 1 << 20  # of the text; enough for the longest prompt that the model accepts
# A JPEG segment has at most 65,533 bytes; the rest is for what surrounds the text in it.
MAX_JPEG_BYTES = 65_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MAX_CHUNKS = 100_000  # looked through; a large picture has one for each 8 KiB to 64 KiB
_MAX_SEGMENTS = 4096  # of a JPEG before its pixels; a colour profile takes up to 255
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286  # tags (EXIF 2.32, 4.6.3 and 4.6.5)
_ASCII, _UNDEFINED, _LONG = b"ASCII\0\0\0", 7, 4  # the comment's character code; types of values
_MAX_TAGS = 512  # of a directory that are looked at
_MARK = _ASCII + KEY.encode() + b" "


def check_length(text: str, suffix: str) -> None:
    """Raises RequestError for a text that a file with this suffix can't hold."""
    limit = MAX_JPEG_BYTES if suffix.lower() in (".jpg", ".jpeg") else MAX_BYTES
    if len(text) > limit:
        raise RequestError(
            f"a {suffix.lower().lstrip('.').upper()} file carries at most {limit:,} bytes of "
            f"request, this one has {len(text):,}; shorten the prompt, or choose another format"
        )


def saving(text: str, suffix: str) -> dict[str, Any]:
    """What Pillow's `save` takes to put an ASCII text into a file with this suffix.

    Raises RequestError for a text that is too long to be read back.
    """
    check_length(text, suffix)
    if suffix.lower() == ".png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text(KEY, text)
        return {"pnginfo": info}
    return {"exif": b"Exif\0\0" + _tiff(_MARK + text.encode("ascii"))}


def read_text(file: BinaryIO, name: str) -> bytes:
    """The text in a picture file.

    Args:
        file: opened at its start.
        name: of the file, for messages.

    Raises RequestError: of another format, without such a text, or with a damaged one.
    """
    start = file.read(12)
    if start.startswith(_PNG):
        file.seek(len(_PNG))
        found = _from_png(file, name)
    elif start.startswith(_JPEG):
        file.seek(len(_JPEG))
        found = _from_exif(_jpeg_exif(file))
    elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
        found = _from_exif(_webp_exif(file))
    else:
        raise RequestError(
            f"{name} is not a PNG file, and neither JPEG nor WebP; only these carry their request"
        )
    if found is None:
        raise RequestError(
            f"{name} carries no request; give a file that omnigen-fast wrote and no other program "
            "has saved again"
        )
    if len(found) > MAX_BYTES:
        raise _too_long(name, len(found))
    return found


def _too_long(name: str, size: int) -> RequestError:
    return RequestError(
        f"{name}: the request in it has {size:,} bytes, at most {MAX_BYTES:,} are read; give the "
        "options without --from"
    )


def _from_png(file: BinaryIO, name: str) -> bytes | None:
    """The text of our chunk (PNG specification, 2nd edition, chapters 5 and 11.3.4)."""
    prefix = KEY.encode() + b"\0"
    for _ in range(_MAX_CHUNKS):
        if len(header := file.read(8)) < 8:
            break
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        start = file.read(min(length, len(prefix))) if kind == b"tEXt" else b""
        if start != prefix:
            file.seek(length - len(start) + 4, os.SEEK_CUR)
            continue
        if length - len(prefix) > MAX_BYTES:
            raise _too_long(name, length - len(prefix))
        text, checksum = file.read(length - len(prefix)), file.read(4)
        if zlib.crc32(kind + start + text).to_bytes(4, "big") != checksum:
            raise RequestError(
                f"{name}: the request in it is damaged (checksum); copy the file again"
            )
        return text
    return None


def _jpeg_exif(file: BinaryIO) -> bytes:
    """The first EXIF segment in front of the pixels (ITU T.81, B.1.1; EXIF 2.32, 4.7.2)."""
    for _ in range(_MAX_SEGMENTS):
        header = file.read(4)
        if len(header) < 4 or header[0] != 0xFF or header[1] in (0xD9, 0xDA):
            break  # damaged, or the pixels begin
        length = int.from_bytes(header[2:], "big") - 2
        if length < 0:
            break
        if header[1] == 0xE1 and length >= 6:
            if file.read(6) == b"Exif\0\0":
                return file.read(length - 6)
            length -= 6
        file.seek(length, os.SEEK_CUR)
    return b""


def _webp_exif(file: BinaryIO) -> bytes:
    """The EXIF chunk of a WebP file (RFC 9649, 2.7.1.5); `file` stands after the RIFF header."""
    for _ in range(_MAX_CHUNKS):
        if len(header := file.read(8)) < 8:
            break
        length = int.from_bytes(header[4:], "little")
        if header[:4] == b"EXIF":
            return file.read(min(length, MAX_BYTES + 1024)).removeprefix(b"Exif\0\0")
        file.seek(length + length % 2, os.SEEK_CUR)
    return b""


def _tiff(comment: bytes) -> bytes:
    """EXIF data with nothing but a UserComment: a directory that points to a second one."""

    def directory(tag: int, kind: int, count: int, value: int) -> bytes:
        entry = tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little")
        return b"\1\0" + entry + value.to_bytes(4, "little") + bytes(4)  # no further directory

    first, second = 8, 8 + 18
    return (
        b"II*\0"
        + first.to_bytes(4, "little")
        + directory(_EXIF_IFD, _LONG, 1, second)
        + directory(_USER_COMMENT, _UNDEFINED, len(comment), second + 18)
        + comment
    )


def _from_exif(data: bytes) -> bytes | None:
    """The UserComment in EXIF data (a TIFF file), if it is ours."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(data[:4])
    if order is None:
        return None
    for tag, _, place in _tags(data, _number(data, 4, 4, order), order):
        if tag != _EXIF_IFD:
            continue
        for inner, count, start in _tags(data, place, order):
            comment = data[start : start + count] if inner == _USER_COMMENT else b""
            if comment.startswith(_MARK) and len(comment) == count:
                return comment.removeprefix(_MARK)
    return None


def _tags(data: bytes, start: int, order: str) -> Iterator[tuple[int, int, int]]:
    """(tag, count, value or place) of the entries of a directory."""
    for i in range(min(_number(data, start, 2, order), _MAX_TAGS)):
        entry = start + 2 + 12 * i
        if entry + 12 > len(data):
            return
        sizes = (0, 2), (4, 4), (8, 4)
        tag, count, place = (_number(data, entry + at, size, order) for at, size in sizes)
        yield tag, count, place


def _number(data: bytes, start: int, size: int, order: Any) -> int:
    """0 behind the end of the data."""
    return int.from_bytes(data[start : start + size], order)
