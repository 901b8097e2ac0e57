"""Progress bars that are safe beside other threads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from tqdm import tqdm


class Progress(Protocol):
    """What is told of each step."""

    def update(self) -> Any:
        """A step is over."""


class Bar(tqdm):
    """tqdm's bar, which lets go of the lock of all bars where writing fails.

    tqdm's own keeps it: after an interrupt or a full disk in the middle of a line, every bar of
    another thread waits for ever, one that shows nothing included.
    """

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> Any:
        """See tqdm."""
        if self.disable or nolock:
            return super().refresh(nolock=True)
        if lock_args and not self.get_lock().acquire(*lock_args):
            return False
        if not lock_args:
            self.get_lock().acquire()
        try:
            return super().refresh(nolock=True)
        finally:
            self.get_lock().release()

    def clear(self, nolock: bool = False) -> None:
        """See tqdm."""
        if self.disable or nolock:
            super().clear(nolock=True)
            return
        with self.get_lock():
            super().clear(nolock=True)


class _Hidden:
    """Shows nothing, and takes no lock."""

    def update(self) -> None:
        """A step is over."""


def progress_bar(show: bool, config: Mapping[str, Any]) -> AbstractContextManager[Progress]:
    """A bar, or what takes its place where none is shown.

    Args:
        show: whether there is one; `disable` of `config` has a say, too.
        config: arguments of tqdm.
    """
    if not show or config.get("disable"):
        return nullcontext(_Hidden())
    return Bar(**config)
