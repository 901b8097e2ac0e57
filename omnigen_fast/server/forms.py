"""Forms with files, parsed as they come: bounded in number and size, in memory or unnamed files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..errors import brief
from .errors import error

MAX_IMAGES = 16
MAX_FILE_BYTES = 50 << 20
MAX_FIELD_BYTES = 4 << 20  # of all texts together
_MAX_FIELDS = 64
_MAX_HEADER = 2 << 10  # bytes of the header of a part
_IN_MEMORY = 1 << 20  # bytes of a file that stay in memory
_LISTS = {"timesteps", "guidance_interval", "image_guidance_interval"}


@dataclass
class Form:
    """The fields and files of an edit; `close` it."""

    fields: dict[str, Any] = field(default_factory=dict)
    images: list[IO[bytes]] = field(default_factory=list)
    mask: IO[bytes] | None = None

    def close(self) -> None:
        """Files are gone then."""
        for file in (*self.images, *([self.mask] if self.mask else [])):
            file.close()


async def read_form(content_type: str, parts: AsyncIterator[bytes]) -> Form:
    """Parses multipart/form-data.

    Args:
        content_type: the header.
        parts: of the body, bounded in size and time.

    Raises:
        ApiError: it is something else, cut short, or more than allowed.
        OSError: there is no room for a file.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
        raise error(
            "invalid_body", "an edit must be sent as multipart/form-data, with its images as files"
        )
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        async for part in parts:
            parser.write(part)
        reader.finish()
    except FormParserError:
        reader.form.close()
        raise error("invalid_body", "the form can't be read; is it multipart/form-data?") from None
    except BaseException:
        reader.form.close()
        raise
    return reader.form


class _Reader:
    """What the parser calls."""

    def __init__(self) -> None:
        self.form = Form()
        self._header: list[bytearray] = [bytearray(), bytearray()]
        self._header_bytes = self._text_bytes = self._number = 0
        self._disposition = b""
        self._name, self._text, self._file = "", bytearray(), None
        self._size, self._ended = 0, False

    _file: IO[bytes] | None

    def callbacks(self) -> Any:
        def part(handle: Callable[[bytes], None]) -> Callable[[bytes, int, int], None]:
            return lambda data, start, end: handle(data[start:end])

        return {
            "on_part_begin": self._begin,
            "on_header_field": part(lambda data: self._add_header(0, data)),
            "on_header_value": part(lambda data: self._add_header(1, data)),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": part(self._add),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def finish(self) -> None:
        if not self._ended:
            raise error("invalid_body", "the form is cut short; send it again")
        for file in (*self.form.images, *([self.form.mask] if self.form.mask else [])):
            file.seek(0)

    def _begin(self) -> None:
        self._number += 1
        if self._number > _MAX_FIELDS + MAX_IMAGES + 1:
            raise error(
                "too_large", f"a form may have {_MAX_FIELDS} fields and {MAX_IMAGES} images"
            )
        self._disposition, self._header_bytes = b"", 0
        self._name, self._text, self._file, self._size = "", bytearray(), None, 0

    def _add_header(self, which: int, data: bytes) -> None:
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_HEADER:
            raise error("too_large", "the header of a part is too long; give files shorter names")
        self._header[which] += data

    def _end_header(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"")
        self._name = name.decode("utf-8", "replace")
        if not self._name:
            raise error("invalid_body", "a part of the form has no name")
        if b"filename" in options:
            self._file = self._new_file()

    def _new_file(self) -> IO[bytes]:
        file: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - the form's
        if self._name in ("image", "image[]") or self._name.startswith("image["):
            if len(self.form.images) >= MAX_IMAGES:
                text = f"image: at most {MAX_IMAGES} images are read; send fewer"
                raise error("invalid_value", text, param="image")
            self.form.images.append(file)
        elif self._name == "mask" and self.form.mask is None:
            self.form.mask = file
        else:
            file.close()
            name = brief(self._name)
            raise error(
                "unknown_parameter", f"a file can be an image or one mask, not {name}", param=None
            )
        return file

    def _add(self, data: bytes) -> None:
        if self._file is None:
            self._text_bytes += len(data)
            if self._text_bytes > MAX_FIELD_BYTES:
                text = f"the texts of a form may have {MAX_FIELD_BYTES:,} bytes; send less"
                raise error("too_large", text)
            self._text += data
            return
        self._size += len(data)
        if self._size > MAX_FILE_BYTES:
            text = f"a file may have {MAX_FILE_BYTES:,} bytes; shrink the image"
            raise error("too_large", text, param="mask" if self._name == "mask" else "image")
        self._file.write(data)

    def _end_part(self) -> None:
        if self._file is not None:
            return
        name = self._name.removesuffix("[]")
        try:
            text = self._text.decode()
        except UnicodeDecodeError:
            raise error("invalid_value", f"{brief(name)} is not UTF-8") from None
        if name in ("image", "mask", "image_url"):
            raise error(
                "invalid_value",
                f"{name} must be a file: nothing is fetched for callers, so send the image itself",
                param=name,
            )
        if name in _LISTS:
            if self._name != name:
                self.form.fields.setdefault(name, []).append(text)
            else:
                self.form.fields[name] = _list(text)
        elif name in self.form.fields:
            raise error("invalid_value", f"{brief(name)} is given twice", param=None)
        else:
            self.form.fields[name] = text

    def _end(self) -> None:
        self._ended = True


def _list(text: str) -> Any:
    """A list as JSON or with commas; what is neither stays, to be refused."""
    try:
        return json.loads(text) if text.lstrip().startswith("[") else text.split(",")
    except (ValueError, RecursionError):
        return text
