"""The server of the page: its socket, its connections, and how it ends.

Connections are bounded in number, and in the time that they take to ask and to read. When there
are too many, those that have not asked for anything yet make room.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import OmniGenError

FIRST_PORT, LAST_PORT = 7860, 7959  # tried in order if none is given
MAX_CONNECTIONS = 256
REQUEST_SECONDS = 15.0  # to send the head of a request
STALLED_SECONDS = 30.0  # in which a client must read something
_MAX_HEAD = 32 << 10  # bytes of the head of a request
_CLOSING_SECONDS = 2  # for answers under way when the server ends
_LAST_SECONDS = 6.0  # after which the process ends in any case


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at the port, or at the first free one if it is None.

    Raises OmniGenError if there is none.
    """
    ports = range(FIRST_PORT, LAST_PORT + 1) if port is None else (port,)
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise OmniGenError(f"--host {host} is no address of this machine; give one") from error
    for one in ports:
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, one))
            opened.listen(128)
            return opened
        except OSError as error:
            opened.close()
            if error.errno != errno.EADDRINUSE:
                reason = error.strerror or str(error)
                raise OmniGenError(f"{host} can't listen at port {one}: {reason}") from error
    if port is not None:
        raise OmniGenError(f"port {port} is in use; give another --port, or none for a free one")
    raise OmniGenError(f"the ports {FIRST_PORT} to {LAST_PORT} are in use; give a free --port")


class Server(uvicorn.Server):
    """Serves an ASGI application until a signal comes, and says which one.

    Args:
        app: the application.
        closing: called first when the server ends.
        every_second: called each second until then.
    """

    def __init__(
        self, app: Any, closing: Callable[[], None], every_second: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=_MAX_HEAD,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self._closing, self._every_second = closing, every_second
        self._told: int | None = None
        self._seconds = 0.0

    def serve_until_told(self, opened: socket.socket, last: Callable[[], None]) -> int | None:
        """Serves at a socket; returns the signal that ended it.

        Args:
            opened: the socket.
            last: called before the process is ended by force, because the server does not end.
        """

        def told(number: int, frame: FrameType | None) -> None:
            if self._told is None:
                self._told, self.should_exit = number, True
                timer = threading.Timer(_LAST_SECONDS, _end, (number, last))
                timer.daemon = True
                timer.start()

        numbers = [signal.SIGINT, signal.SIGTERM, *[getattr(signal, "SIGHUP", signal.SIGTERM)]]
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, told)
        self.run(sockets=[opened])
        return self._told

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `serve_until_told`."""
        yield

    def install_signal_handlers(self) -> None:
        """The same, for older versions of uvicorn."""

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        now = time.monotonic()
        if now - self._seconds >= 1:
            self._seconds = now
            self._every_second()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what runs, then the connections."""
        self._closing()
        await super().shutdown(sockets)


def _end(number: int, last: Callable[[], None]) -> None:
    last()
    os._exit(128 + number)


class _Connection(H11Protocol):
    """A connection with bounded times, one of a bounded number."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()
        self._limit(REQUEST_SECONDS)
        self.made = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        asking = self._asks()
        super().handle_events()
        if asking and not self._asks():
            self._limit(None)

    def on_response_complete(self) -> None:
        self._limit(REQUEST_SECONDS)
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._limit(STALLED_SECONDS)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._limit(None)
        super().resume_writing()

    def _asks(self) -> bool:
        """Whether the head of a request is to come."""
        return self.cycle is None or self.cycle.response_complete

    def _limit(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._abort)

    def _abort(self) -> None:
        self.transport.abort()

    def _make_room(self) -> None:
        """Ends the oldest connection that has not sent its request yet, or this one."""
        others = [one for one in self.connections if one is not self and one._unsent()]
        (min(others, key=lambda one: one.made) if others else self)._abort()

    def _unsent(self) -> bool:
        return self._asks() or self.cycle.more_body
