"""What a shell sees of a command: its output, and how it ends when it is told to.

Standard output may be closed or full, and signals may come at any time. Neither prints a traceback
or leaves a temporary file behind.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

import click

from ..errors import first_line

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_CLEANING_SECONDS = 2  # in which another signal changes nothing: `timeout` sends each twice


class _Ended(BaseException):
    """A signal told the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def as_a_process() -> Iterator[None]:
    """Runs a command: guards its output, and lets it clean up when a signal ends it.

    The process then still dies of the signal, as its parent expects.
    """
    outputs = sys.stdout, sys.stderr
    sys.stdout = _Output(sys.stdout, _lost) if sys.stdout else sys.stdout
    sys.stderr = _Output(sys.stderr, _ignored) if sys.stderr else sys.stderr
    handlers = _handle(_ENDING) if threading.current_thread() is threading.main_thread() else {}
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream:
                    stream.flush()
    except _Ended as end:
        die_of(end.number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.stdout, sys.stderr = outputs


def die_of(number: int) -> None:
    """Ends the process as the signal would have."""
    with suppress(OSError, AttributeError):
        sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _handle(numbers: list[signal.Signals]) -> dict[int, Any]:
    """Handles those signals that would end the process; returns the earlier handlers."""

    told: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        told.append(time.monotonic())
        if len(told) == 1:
            raise _Ended(number)
        if told[-1] - told[0] > _CLEANING_SECONDS:
            die_of(number)

    # nohup ignores one, and a program that calls this one may handle them itself
    handlers: dict[int, Any] = {
        one: signal.SIG_DFL for one in numbers if signal.getsignal(one) == signal.SIG_DFL
    }
    for one in handlers:
        signal.signal(one, end)
    return handlers


class _Output:
    """A text stream whose failures are dealt with in one place."""

    def __init__(self, stream: TextIO, failed: Any) -> None:
        self._stream, self._failed = stream, failed

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        with suppress(OSError, ValueError):  # what is buffered still would fail at the end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lost(error: OSError) -> None:
    """Standard output is the result: without it the command ends."""
    if error.errno != errno.EPIPE:  # else the reader has all that it wants
        reason = error.strerror or first_line(error)
        click.echo(f"Error: standard output can't be written: {reason}", err=True)
    raise SystemExit(1)


def _ignored(error: OSError) -> None:
    """Messages and progress are not worth ending for."""
