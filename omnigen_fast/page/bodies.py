"""Bodies of requests to the page, checked as they come and when they are there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from ..errors import printable
from ..web.bodies import Message, Receive, Refusal

MAX_CALL_BYTES = 4 << 20  # of a call; two texts of the longest length in any script
MAX_UPLOAD_BYTES = 64 << 20  # of a file
_MAX_FRAME_BYTES = 64 << 10  # around a file: the header of its part, and boundaries
_MAX_PART_HEADER = 8 << 10
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LARGEST = 1e300
_MAX_PATH = 4096


class OneFile:
    """Checks that a form holds one file and nothing else, as it comes.

    Gradio keeps other fields in memory, and copies them for every part that comes.
    """

    def __init__(self, content_type: str) -> None:
        from python_multipart.multipart import parse_options_header

        self._options = parse_options_header
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
            raise Refusal(400, "an upload must be multipart/form-data with a boundary")
        self._first, self._next = b"--" + boundary + b"\r\n", b"\r\n--" + boundary
        self._seen = b""  # the header of the part, then as much as a boundary may begin in
        self._in_file = False
        self._ends = 0

    def __call__(self, part: bytes) -> None:
        """Raises Refusal as soon as it is clear that it does not."""
        self._seen += part
        if not self._in_file:
            head, found, rest = self._seen.partition(b"\r\n\r\n")
            if len(head) > _MAX_PART_HEADER:
                raise Refusal(400, "an upload's header is too long; give the file a shorter name")
            if not found:
                return
            self._check_header(head)
            self._in_file, self._seen = True, b"\r\n" + rest
        self._ends += self._seen.count(self._next)
        self._seen = self._seen[-len(self._next) + 1 :]
        if self._ends > 1:
            raise Refusal(400, "one file at a time can be uploaded; send them one by one")

    def finish(self) -> None:
        """Raises Refusal if the form has not come to its end."""
        if self._ends != 1:
            raise Refusal(400, "the upload is cut short; send it again")

    def _check_header(self, head: bytes) -> None:
        problem = Refusal(400, "an upload must be one file with a name")
        if not head.startswith(self._first):
            raise problem
        lines = [line.partition(b":") for line in head[len(self._first) :].split(b"\r\n")]
        named = [value for name, _, value in lines if name.lower() == b"content-disposition"]
        if len(named) != 1:
            raise problem
        options = self._options(named[0].strip())[1]
        file = options.get(b"filename", b"").decode("utf-8", "replace")
        if b"name" not in options or not _is_path(file) or not file.strip("./\\ "):
            raise problem


@dataclass(frozen=True)
class Kind:
    """What a field of a call may hold."""

    what: str
    is_right: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST < value < _LARGEST


def _is_image(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and isinstance(value.get("path"), str)


TEXT = Kind("a text", lambda value: value is None or isinstance(value, str))
NUMBER = Kind("a number", _is_number)
SWITCH = Kind("true or false", lambda value: value is None or isinstance(value, bool))
IMAGE = Kind("an uploaded file", _is_image)


def choice(number: int) -> Kind:
    """A choice from a list."""

    def is_right(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < number

    return Kind(f"an integer from 0 to {number - 1}", is_right)


@dataclass(frozen=True)
class Call:
    """What a button of the page may send."""

    queued: bool
    fields: Mapping[str, Kind]


def parse_call(
    body: bytes, calls: Mapping[int, Call], queued: bool
) -> tuple[str, bytes, list[str]]:
    """The session of a call, the call as Gradio may see it, and the files that it names.

    Gradio sees known fields alone.

    Raises Refusal for anything that the page itself does not send.
    """
    try:
        sent = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # JSON's own errors are ValueErrors
        raise Refusal(400, "the request is not valid JSON; reload the page") from error
    if not isinstance(sent, dict):
        raise Refusal(400, "the request must be a JSON object; reload the page")
    session, index, data = (sent.get(name) for name in ("session_hash", "fn_index", "data"))
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise Refusal(400, "session_hash must be 1 to 64 letters and digits; reload the page")
    call = calls.get(index) if type(index) is int else None  # not a bool
    if call is None or call.queued != queued:
        raise Refusal(404, f"fn_index {_shown(index)} is no action of this page; reload it")
    fields = call.fields
    if not isinstance(data, list) or len(data) != len(fields):
        number = len(data) if isinstance(data, list) else "none"
        raise Refusal(400, f"data must be a list of {len(fields)} fields, got {number}")
    for value, (name, kind) in zip(data, fields.items()):
        if not kind.is_right(value):
            raise Refusal(400, f"{name} must be {kind.what}, got {_shown(value)}")
    alone = list(map(_file_alone, data))
    files = [value["path"] for value in alone if isinstance(value, dict)]
    known = {"data": alone, "fn_index": index, "session_hash": session}
    return session, json.dumps(known).encode(), files


def _file_alone(value: Any) -> Any:
    """A file's path, without what else is said about it, such as where to fetch it from."""
    if not isinstance(value, dict):
        return value
    path = value["path"]
    if not _is_path(path) or "://" in path:
        raise Refusal(400, "an input image must be uploaded; a path or an address does not do")
    path = path or "/"  # Gradio would take an empty one for no file
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def _is_path(text: str) -> bool:
    control = any(one < " " or one == "\x7f" or "\ud800" <= one <= "\udfff" for one in text)
    return len(text) <= _MAX_PATH and not control


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and value.bit_length() > 1024:
        return "a number of more than 300 digits"
    return printable(repr(value if not isinstance(value, str) else value[:80]), 80)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def upload_limit() -> int:
    """Bytes of the body of an upload."""
    return MAX_UPLOAD_BYTES + _MAX_FRAME_BYTES


def replay(body: Sequence[bytes] | IO[bytes], receive: Receive) -> Receive:
    """ASGI's `receive` of a request whose body was received before."""
    parts = iter(body if isinstance(body, Sequence) else iter(lambda: body.read(1 << 16), b""))
    ended = False

    async def again() -> Message:
        nonlocal ended
        if ended:
            return await receive()  # the client hangs up, some day
        part = next(parts, b"")
        ended = not part
        return {"type": "http.request", "body": part, "more_body": not ended}

    return again
