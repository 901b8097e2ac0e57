"""The server as a process: its socket, its log, and how it drains and ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from ..serving.scheduler import Scheduler
from ..web import connections

_CLOSING_SECONDS = 5  # for answers under way once every request is over
_JOIN_SECONDS = 10.0  # for the step in progress


class Server(uvicorn.Server):
    """Serves until a signal comes; then drains, and ends.

    Args:
        app: the application.
        scheduler: of the requests.
        drain_seconds: for the requests that were accepted.
    """

    def __init__(self, app: Any, scheduler: Scheduler, drain_seconds: float) -> None:
        super().__init__(connections.settings(app, _CLOSING_SECONDS))
        self._scheduler, self._drain_seconds = scheduler, drain_seconds
        self._told = False

    def serve_until_told(self, opened: socket.socket) -> None:
        """Serves at a socket; a second signal ends the process at once."""

        def told(number: int, frame: FrameType | None) -> None:
            if self._told:
                os._exit(128 + number)
            self._told = True
            threading.Thread(target=self._drain, name="omnigen-drain", daemon=True).start()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, told)
        self.run(sockets=[opened])

    def _drain(self) -> None:
        """Lets accepted requests end while others are refused; the socket stays open for that."""
        _note("draining", seconds=self._drain_seconds)
        ended = self._scheduler.close(self._drain_seconds, _JOIN_SECONDS)
        self.should_exit = True
        time.sleep(_CLOSING_SECONDS + _JOIN_SECONDS)  # a daemon: the process ends meanwhile
        _note("ended by force", engine_ended=ended)
        os._exit(0 if ended else 1)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; a server whose model can't be used ends."""
        if self._scheduler.state().failure:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `serve_until_told`."""
        yield

    def install_signal_handlers(self) -> None:
        """The same, for older versions of uvicorn."""


class JsonLines(logging.Formatter):
    """A JSON object a line; messages that are one are taken apart."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
        }
        text = record.getMessage()
        try:
            given = json.loads(text) if text.startswith("{") else None
        except ValueError:
            given = None
        found |= given if isinstance(given, dict) else {"message": text}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def log_to_stderr() -> None:
    """Sends this package's log to standard error; one that can't be written is no failure."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("omnigen_fast")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # a parser's own words about each byte that it does not expect: the client gets a sentence
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def _note(event: str, **more: Any) -> None:
    logging.getLogger("omnigen_fast.server").info("%s", json.dumps({"event": event, **more}))
