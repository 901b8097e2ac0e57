"""Image files decoded to 8-bit RGB, in bounded time and memory.

Usual photos are decoded here: their headers bound the work. Everything else is decoded by another
Python process, which may take `_MOST_MEMORY` bytes and is killed after `DEADLINE` seconds by the
wall clock. Where the system says how long other programs kept it from running (Linux), up to
`_MOST_WAITING` seconds of that come on top: else a busy machine would refuse what an idle one
reads. Starting it takes 0.2 to 0.4 seconds.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import UnidentifiedImageError

from .image_files import Header, Parts, inspect, orientation

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

# 9,459 x 9,459 pixels; larger images are treated as decompression bombs.
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 512 << 20
MAX_WEBP_PIXELS = 50_000_000  # of which Pillow holds four copies with alpha
DEADLINE = 3.5  # seconds of the other process, its start included; converting comes on top
_MOST_WAITING = 5.0  # seconds that it may wait for a processor
_MOST_MEMORY = 1_000_000_000  # bytes that the other process may take to decode
_BAND = 1 << 22  # pixels whose values are converted at once

# Whatever Pillow, or a plugin that the caller registered, can open is read, except:
_REFUSED = {
    "EPS",  # starts Ghostscript
    "WMF",  # drawn by the operating system
    "BUFR",  # hands the file to whatever handler is registered, as do the next two
    "GRIB",
    "HDF5",
    "IPTC",  # opens a file inside it in any format, also those refused here
    "MPEG",  # no pixels
    "FITS",  # measurements, whose black and white the file does not state, as do the next two
    "MCIDAS",
    "SPIDER",
    "IM",  # without a signature, as are the next two: anything can look like one
    "IMT",
    "PCD",
}
_UNREADABLE = "is not an image this build can read; use PNG, JPEG, WebP, BMP, GIF or TIFF"
# Plugins for formats that Pillow lacks: what registers them in another process.
_PLUGINS = {"pillow_heif": "register_heif_opener"}
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")

Check = Callable[[int, int], None]  # raises ImageFault if width x height is of no use


class ImageFault(Exception):
    """What is wrong with an image; the text follows its name."""


def decode_file(file: Any, check: Check, mask: bool = False) -> PILImage:
    """The image that a binary file holds, as 8-bit RGB: upright, with alpha on white.

    Of a `mask` with transparent pixels, what is transparent becomes white and the rest black.

    Raises ImageFault, also whatever `check(width, height)` raises before pixels are decoded.
    """
    length = _length(file)
    if length > MAX_FILE_BYTES:
        raise ImageFault(f"has {length:,} bytes; at most {MAX_FILE_BYTES:,} are read, shrink it")
    header = inspect(file, length)
    if header is not None:
        _check_webp(header.format, *header.size)
    if header is not None and not header.heavy:
        return _decode(file, header, (header.format,), check, mask)
    if header is not None:
        if all(header.size):
            check(*header.size)
    elif foreign := _foreign(file):
        try:
            return _decode(file, Header(""), foreign, check, mask)
        except ImageFault as error:
            if not isinstance(error.__cause__, UnidentifiedImageError):
                raise
    return _decode_elsewhere(file, check, mask)


def decode_image(image: PILImage, check: Check, mask: bool = False) -> PILImage:
    """A PIL image as 8-bit RGB: upright, with alpha on white; for `mask` see `decode_file`."""
    check(image.width, image.height)
    with _faults():
        if (file := _unread(image)) is not None:
            if image.format in _REFUSED:
                raise ImageFault(_UNREADABLE)
            _check_webp(image.format, image.width, image.height)
            place = file.tell()
            try:
                header = inspect(file, _length(file))
                if header is None or header.heavy:
                    return _decode_elsewhere(file, check, mask)
            finally:
                file.seek(place)
        image.load()
        loaded = getattr(image, "_exif", None)  # the caller may have changed it
        if loaded is not None and getattr(loaded, "_data", None):
            turn = loaded.get(0x0112, 1)
        else:
            turn = orientation(image.info.get("exif"), _bytes(image.info.get("xmp")))
        return _to_rgb(image, turn, mask)


def eight_bits(values: np.ndarray, top: float) -> np.ndarray:
    """Values from 0 to `top` as uint8 from 0 to 255, rounded; a band of rows at a time."""
    found = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND // max(1, math.prod(values.shape[1:])))
    for row in range(0, len(values), rows):
        band = values[row : row + rows]
        if values.dtype == np.uint16 and top == 65535:
            found[row : row + rows] = (band.astype(np.uint32) + 128) // 257
        else:
            band = band.astype(np.float64)
            band *= 255 / top
            found[row : row + rows] = np.rint(band, out=band)
    return found


def _check_webp(format: str | None, width: int, height: int) -> None:
    if format == "WEBP" and width * height > MAX_WEBP_PIXELS:
        raise ImageFault(
            f"is a WebP of {width} x {height} pixels; the limit for WebP is "
            f"{MAX_WEBP_PIXELS:,} pixels, shrink it or save it as PNG"
        )


def _unread(image: PILImage) -> Any:
    """The file of an image that Pillow has opened but not decoded yet, at its first frame."""
    from PIL import ImageFile

    if not isinstance(image, ImageFile.ImageFile) or not _is_pillows(type(image)):
        return None
    if getattr(image, "_im", None) is not None or image.tell():
        return None
    file = getattr(image, "fp", None)
    return file if hasattr(file, "seek") else None


def _is_pillows(kind: Any) -> bool:
    return (getattr(kind, "__module__", None) or "").partition(".")[0] == "PIL"


def _bytes(value: Any) -> bytes:
    return value.encode(errors="replace") if isinstance(value, str) else value or b""


def _foreign(file: Any) -> tuple[str, ...]:
    """Formats that plugins in this process may read: not Pillow's own, nor one of `_PLUGINS`.

    They can't be found from another process. Whoever registered them trusts them.
    """
    from PIL import Image

    file.seek(0)
    prefix = file.read(16)
    found = []
    for name, (factory, accept) in list(Image.OPEN.items()):
        module = (getattr(factory, "__module__", None) or "").partition(".")[0]
        if _is_pillows(factory) or module in _PLUGINS or name in _REFUSED:
            continue
        with contextlib.suppress(Exception):
            answer = accept is None or accept(prefix)
            if answer and not isinstance(answer, str):  # a string says what is missing
                found.append(name)
    return tuple(found)


def _length(file: Any) -> int:
    file.seek(0, os.SEEK_END)  # of a spooled file returns nothing in Python 3.10
    return file.tell()


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Turns whatever a decoder raises into an ImageFault."""
    try:
        yield
    except ImageFault:
        raise
    except MemoryError as error:
        raise ImageFault(
            "needs too much memory to decode; shrink it first, or save it as PNG"
        ) from error
    except Exception as error:  # decoders raise almost anything on malformed files
        if isinstance(error, ValueError) and "closed" in str(error):
            raise ImageFault("is closed; hand it over open, or as a path") from error
        raise ImageFault(f"is damaged or cut short ({error}); save or download it again") from error


def _decode(
    file: Any, header: Header, formats: tuple[str, ...], check: Check, mask: bool
) -> PILImage:
    from PIL import Image

    if all(header.size):
        check(*header.size)
    file.seek(0)
    source: Any = file
    if header.parts:
        source = io.BufferedReader(Parts(file, header.parts), 1 << 16)
    with warnings.catch_warnings():
        # the size is checked here, with a clearer message
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(source, formats=formats)
        except UnidentifiedImageError as error:
            raise ImageFault(_UNREADABLE) from error
        except Image.DecompressionBombError as error:
            raise ImageFault(
                "is enormous according to its header; "
                f"the limit is {MAX_PIXELS:,} pixels, shrink it first"
            ) from error
        except Exception as error:
            raise ImageFault(f"can't be read: {error}; save it again as PNG") from error
        with image, _faults():
            check(image.width, image.height)
            if all(header.size) and math.prod(image.size) > math.prod(header.size):
                raise ImageFault("states two sizes; save it again as PNG")
            image.load()
            turn = header.orientation
            if not header.parts and turn == 1:
                turn = orientation(image.info.get("exif"), _bytes(image.info.get("xmp")))
            return _to_rgb(image, turn, mask)


def _to_rgb(image: PILImage, turn: Any, mask: bool) -> PILImage:
    """A loaded image as 8-bit RGB, turned as EXIF's orientation says, with alpha on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = _from_deep(image)
    if image.mode == "LAB":
        image = _from_lab(image)
    transposes = Image.Transpose
    transpose = {
        2: transposes.FLIP_LEFT_RIGHT,
        3: transposes.ROTATE_180,
        4: transposes.FLIP_TOP_BOTTOM,
        5: transposes.TRANSPOSE,
        6: transposes.ROTATE_270,
        7: transposes.TRANSVERSE,
        8: transposes.ROTATE_90,
    }.get(turn)
    if transpose is not None:
        image = image.transpose(transpose)
    if image.mode in ("La", "RGBa") or image.has_transparency_data:
        return (_see_through(image) if mask else None) or _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: PILImage) -> PILImage:
    """Alpha laid on white, a band of rows at a time: whole copies would take a gigabyte."""
    from PIL import Image

    found, top = Image.new("RGB", image.size), 0
    for band in _bands(image):
        if band.mode == "La":
            band = band.convert("LA")
        band = band.convert("RGBA")
        if band.getchannel("A").getextrema() != (255, 255):  # else it takes time for nothing
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        found.paste(band.convert("RGB"), (0, top))
        top += band.height
    return found


def _see_through(image: PILImage) -> PILImage | None:
    """White where an image is transparent; None where it is so nowhere."""
    from PIL import Image

    found, clear, top = Image.new("L", image.size), False, 0
    for band in _bands(image):
        if band.mode == "La":
            band = band.convert("LA")
        alpha = band.convert("RGBA").getchannel("A")
        clear = clear or np.asarray(alpha).min() < 255
        found.paste(alpha.point(list(range(255, -1, -1))), (0, top))
        top += band.height
    return found.convert("RGB") if clear else None


def _bands(image: PILImage) -> Iterator[PILImage]:
    """An image in pieces of some rows, from top to bottom."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(image.height, top + rows)))


def _from_deep(image: PILImage) -> PILImage:
    """Modes I, I;16 and F as 8-bit grey, by the range that their values have."""
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or image.format == "PPM":
        top = 65535.0  # 16 bits by definition; Pillow scales a PPM's to that
    elif image.mode == "F":
        top = 1.0 if high <= 1 else 255.0
        if not (low >= 0 and high <= top):  # also NaN
            raise ImageFault(
                f"is of mode F with values from {low:g} to {high:g}; "
                "scale them to [0, 1] or [0, 255]"
            )
    else:
        top = 255.0 if high <= 255 else 65535.0
        if low < 0 or high > top:
            raise ImageFault(
                f"is of mode {image.mode} with values from {low} to {high}; "
                "scale them to 0 to 255, or 0 to 65535"
            )
    grey = eight_bits(values, top)
    clear = image.info.get("transparency")
    if isinstance(clear, int) and image.mode.startswith("I;16"):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _from_lab(image: PILImage) -> PILImage:
    try:
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        found = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    except ImportError as error:
        raise ImageFault(
            "is of mode LAB, which this build of Pillow can't convert; save it as RGB"
        ) from error
    assert found is not None
    return found


def _decode_elsewhere(file: Any, check: Check, mask: bool) -> PILImage:
    """Decodes in another process, which can be stopped."""
    from PIL import Image

    file.seek(0)
    brand = file.read(12)
    process = _decoder(mask)
    assert process.stdin is not None and process.stdout is not None
    late, done = threading.Event(), threading.Event()

    def watch() -> None:
        left = DEADLINE
        while left > 0 and not done.wait(left):
            waited = min(_waited(process.pid), _MOST_WAITING)
            left = start + DEADLINE + waited - time.monotonic()
        if not done.is_set():
            late.set()
            process.kill()

    start = time.monotonic()
    watcher = threading.Thread(target=watch, daemon=True)
    feeder = threading.Thread(target=_feed, args=(file, process.stdin), daemon=True)
    watcher.start()
    feeder.start()
    try:
        while True:
            line = process.stdout.readline(2000).decode(errors="replace")
            word, _, text = line.rstrip("\n").partition(" ")
            if word not in ("size", "pixels"):
                break
            width, height = map(int, text.split())
            check(width, height)  # if it raises, the process ends before it has decoded
            if word == "pixels":
                data = process.stdout.read(3 * width * height)
                if len(data) < 3 * width * height:
                    break
                return Image.frombytes("RGB", (width, height), data)
    finally:
        done.set()
        watcher.join()  # so that it kills no other process of the same number
        process.kill()
        process.wait()
        process.stdout.close()
        feeder.join()
    if late.is_set():
        raise ImageFault(f"takes more than {DEADLINE} s to decode; save it again as PNG")
    if word == "fault":
        raise ImageFault(_missing(brand) or text)
    raise ImageFault("is damaged or cut short (its decoder failed); save or download it again")


def _decoder(mask: bool) -> subprocess.Popen[bytes]:
    """Starts the other process, which runs `serve`."""
    if not sys.executable:
        raise ImageFault("needs a Python interpreter to decode it; save it as PNG or JPEG")
    code = (
        "import sys; sys.path[:] = sys.argv[1:]; "
        f"from omnigen_fast.image_decoder import serve; serve({mask})"
    )
    return subprocess.Popen(
        [sys.executable, "-I", "-c", code, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _waited(pid: int | str) -> float:
    """Seconds that a process was ready to run while others ran, where the system says so."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _missing(start: bytes) -> str | None:
    """The package to install if a file is of a format that nothing here reads."""
    from PIL import features

    if start[4:8] != b"ftyp":
        return None
    if start[8:12] in _AVIF and not features.check("avif"):
        return "is an AVIF file, which this Pillow can't read; run `pip install --upgrade pillow`"
    if start[8:12] in _HEIC:
        import importlib.util

        if importlib.util.find_spec("pillow_heif") is None:
            return "is a HEIC file, which Pillow can't read alone; run `pip install pillow-heif`"
    return None


def _feed(file: Any, pipe: BinaryIO) -> None:
    """Writes a whole file into a pipe; it ends early where the process no longer reads."""
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        while data := file.read(1 << 20):
            pipe.write(data)
    with contextlib.suppress(OSError):
        pipe.close()


def serve(mask: bool) -> None:
    """The other process: an image file on stdin; its size, then its pixels, on stdout.

    For `mask` see `decode_file`.
    Lines are `size W H`, `pixels W H` with 3 * W * H bytes after it, or `fault TEXT`.
    """
    out = os.fdopen(os.dup(1), "wb")
    sys.stdout = sys.stderr

    def say(text: str) -> None:
        out.write(" ".join(text.split())[:1500].encode(errors="replace") + b"\n")
        out.flush()

    file = io.BytesIO(sys.stdin.buffer.read(MAX_FILE_BYTES))
    import importlib

    from PIL import Image

    Image.init()
    if file.getvalue()[4:8] == b"ftyp":
        for package, register in _PLUGINS.items():
            with contextlib.suppress(ImportError, AttributeError):
                getattr(importlib.import_module(package), register)()
    _bound_memory()

    def announce(width: int, height: int) -> None:
        say(f"size {width} {height}")
        if not 0 < width * height <= MAX_PIXELS:
            raise ImageFault("has a size that the other process refuses")

    try:
        header = inspect(file, len(file.getvalue()))
        formats = (header.format,) if header else tuple(set(Image.OPEN) - _REFUSED)
        image = _decode(file, header or Header(""), formats, announce, mask)
        say(f"pixels {image.width} {image.height}")
        for band in _bands(image):  # all at once would be another copy
            out.write(band.tobytes())
        out.flush()
    except MemoryError:
        say(f"fault takes more than {_MOST_MEMORY:,} bytes to decode; shrink it, save it as PNG")
    except ImageFault as error:
        say(f"fault {error}")


def _bound_memory() -> None:
    """Where the system can, no more than `_MOST_MEMORY` bytes above what is taken now."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MOST_MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
