"""Sockets and connections, bounded in number and in the time that they take to ask and to read.

When there are too many, those that have not asked for anything yet make room.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Iterable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import OmniGenError

MAX_CONNECTIONS = 256
REQUEST_SECONDS = 15.0  # to send the head of a request
STALLED_SECONDS = 30.0  # in which a client must read something
_MAX_HEAD = 32 << 10  # bytes of the head of a request


def listen(host: str, ports: Iterable[int], taken: str) -> socket.socket:
    """A socket at the first of some ports that is free.

    Args:
        host: an address of this machine.
        ports: to try in their order.
        taken: what to say if all of them are in use.

    Raises OmniGenError if there is none.
    """
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
    raise OmniGenError(taken)


def settings(app: Any, closing_seconds: int) -> uvicorn.Config:
    """Of a server with bounded connections.

    Args:
        app: an ASGI application.
        closing_seconds: for answers under way when the server ends.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=_MAX_HEAD,
        timeout_graceful_shutdown=closing_seconds,
    )


class Connection(H11Protocol):
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
