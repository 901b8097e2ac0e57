"""A result on disk that grows as it is measured, and outlives what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replaces a file; a reader sees this text or the one before, whole.

    Raises OSError, and leaves nothing behind, where that is not possible.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


class Record:
    """A result and its file.

    Once the file can't be written it says so and goes on in memory: what is measured can still be
    shown.

    Attributes:
        result: what was found; saved as it stands.
        lost: why the file does not hold all of it; None where it does.
    """

    def __init__(self, path: Path | None, result: dict[str, Any]) -> None:
        self.path, self.result = path, result
        self.lost: str | None = None

    def save(self) -> None:
        """Writes the result as it stands."""
        if self.path is None:
            return
        try:
            write_whole(self.path, json.dumps(self.result, indent=1) + "\n")
        except OSError as error:
            if self.lost is None:
                self.lost = f"{self.path} can't be written: {error.strerror or error}"
                print(f"{self.lost}; going on, results are shown only", file=sys.stderr)
        else:
            self.lost = None


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the block as SIGINT does, by KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
