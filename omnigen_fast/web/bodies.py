"""Bodies of requests, received in bounded size, memory and time."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import IO, Any

from ..errors import printable

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]

_IN_MEMORY = 64 << 10  # bytes of a body that stay in memory
_FIRST_SECONDS = 20.0  # for a body that is as slow as can be
_LEAST_RATE = 16 << 10  # bytes per second, of a longer one
_DRAINED_BYTES, _DRAINED_SECONDS = 1 << 30, 5.0  # after a refusal, so that it can be read


class Refusal(Exception):
    """A request that is answered with a sentence and a status of 4xx or 503."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(printable(sentence))
        self.status = status


class Gone(Exception):
    """The client hung up."""


class Body:
    """ASGI's `receive` of a request, which knows whether the body has come to its end."""

    def __init__(self, receive: Receive, empty: bool = False) -> None:
        self._receive, self._ended = receive, empty

    @property
    def ended(self) -> bool:
        """Whether all of it has come, or the client hung up."""
        return self._ended

    async def __call__(self) -> Message:
        """The next message."""
        message = await self._receive()
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Reads what a refused client still sends, for a while: only then it reads its answer."""
        end, read = time.monotonic() + _DRAINED_SECONDS, 0
        while not self._ended and read < _DRAINED_BYTES and time.monotonic() < end:
            try:
                message = await asyncio.wait_for(self(), end - time.monotonic())
            except (TimeoutError, asyncio.TimeoutError):
                return
            read += len(message.get("body", b""))


async def receive_parts(receive: Receive, length: str | None, limit: int) -> AsyncIterator[bytes]:
    """The body, part by part.

    Args:
        receive: ASGI's.
        length: the Content-Length header.
        limit: bytes.

    Raises:
        Refusal: it is too long or too slow.
        Gone: the client hung up.
    """
    if length is not None and length.isdigit() and int(length[:20]) > limit:
        raise _too_long(limit)
    start, received, more = time.monotonic(), 0, True
    while more:
        left = start + _FIRST_SECONDS + received / _LEAST_RATE - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(left, 0))
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal(408, "the request came too slowly; send it again") from None
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        received += len(part)
        if received > limit:
            raise _too_long(limit)
        yield part
        more = message.get("more_body", False)


async def receive_body(
    receive: Receive, length: str | None, limit: int, check: Callable[[bytes], None] | None = None
) -> IO[bytes]:
    """The whole body, in a file that is gone when it is closed.

    Args:
        receive: see `receive_parts`.
        length: likewise.
        limit: likewise.
        check: called with each part as it comes.

    Raises:
        Refusal: it is too long or too slow, or `check` refuses it.
        Gone: the client hung up.
    """
    body = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - the caller's
    try:
        async for part in receive_parts(receive, length, limit):
            if check is not None:
                check(part)
            body.write(part)
        body.seek(0)
    except BaseException:
        body.close()
        raise
    return body


def _too_long(limit: int) -> Refusal:
    return Refusal(413, f"a request may have {limit:,} bytes at most; send less")
