"""The server of the page: its socket, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from ..web import connections

FIRST_PORT, LAST_PORT = 7860, 7959  # tried in order if none is given
_CLOSING_SECONDS = 2  # for answers under way when the server ends
_LAST_SECONDS = 6.0  # after which the process ends in any case


def listen(host: str, port: int | None) -> socket.socket:
    """A socket at the port, or at the first free one if it is None.

    Raises OmniGenError if there is none.
    """
    if port is not None:
        taken = f"port {port} is in use; give another --port, or none for a free one"
        return connections.listen(host, [port], taken)
    taken = f"the ports {FIRST_PORT} to {LAST_PORT} are in use; give a free --port"
    return connections.listen(host, range(FIRST_PORT, LAST_PORT + 1), taken)


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
        super().__init__(connections.settings(app, _CLOSING_SECONDS))
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
