"""A kind whose inputs misbehave by number, to see that each misbehaviour is found."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

from omnigen_fast import RequestError

from . import oracle
from .kinds import Kind

FAULTS = [  # (what the input does, what the report must say)
    ("is fine", ""),
    ("is refused", ""),
    ("raises", "ValueError"),
    ("panics", "Panic"),
    ("babbles", "400 characters"),
    ("breaks the line", "not printable"),
    ("says nothing", "an empty message"),
    ("sleeps", " s are allowed"),
    ("eats", "MB, at most 100 are allowed"),
    ("connects", "socket."),
    ("starts a program", "subprocess.Popen"),
    ("unpickles", "pickle.find_class"),
    ("swallows", "os.system"),
    ("aborts", "SIGABRT"),
    ("crashes", "SIGSEGV"),
    ("exits", "exit status 3"),
    ("hangs", "hangs"),
    ("changes bits", "an input after which a request gives other bits"),
    ("is fine", ""),
]


class _Panic(BaseException):
    """As Rust's panics arrive in Python."""


class _Message(RequestError):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.args = (text,)


class Faulty(Kind):
    most_seconds = 0.5
    most_bytes = 100_000_000
    block = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._state = b"as it was"
        oracle.crowding = lambda: 1.0  # however busy the machine is

    def make(self, rng: random.Random, number: int) -> str:
        return FAULTS[number][0]

    def good(self) -> bytes:
        return self._state

    def renew(self) -> None:
        self._state = b"as it was"

    def run(self, prepared: str, number: int) -> None:
        if prepared == "is refused":
            raise RequestError("height must be a multiple of 16, got 1")
        if prepared == "raises":
            raise ValueError("not ours")
        if prepared == "panics":
            raise _Panic("called `Option::unwrap()` on a `None` value")
        if prepared == "babbles":
            raise _Message("x" * 400)
        if prepared == "breaks the line":
            raise _Message("two\nlines")
        if prepared == "says nothing":
            raise _Message("")
        if prepared == "sleeps":
            time.sleep(0.6)
        if prepared == "eats":
            bytearray(os.urandom(1) * 150_000_000)
        if prepared == "connects":
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        if prepared == "starts a program":
            subprocess.run(["true"])
        if prepared == "unpickles":
            pickle.loads(pickle.dumps(Path()))
        if prepared == "swallows":
            with contextlib.suppress(RuntimeError):
                os.system("true")
        if prepared == "aborts":
            os.abort()
        if prepared == "crashes":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        if prepared == "exits":
            os._exit(3)
        if prepared == "hangs":
            time.sleep(600)
        if prepared == "changes bits":
            self._state += b"!"
