"""Whose an uploaded or shown file is: of the browser that sent it, or that it was made for."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

_MAX_FILES = 1 << 16  # whose owners are remembered; those of the oldest must upload them again


class Files:
    """Owners of files, by the token that a browser has in its cookie.

    The same content has the same path, so a file may have several.
    """

    def __init__(self) -> None:
        self._owners: OrderedDict[str, set[str | None]] = OrderedDict()
        self._turn = threading.Lock()

    def give(self, path: str, token: str | None) -> None:
        """Makes a browser an owner."""
        with self._turn:
            self._owners.setdefault(os.path.realpath(path), set()).add(token)
            self._owners.move_to_end(os.path.realpath(path))
            while len(self._owners) > _MAX_FILES:
                self._owners.popitem(last=False)

    def is_of(self, path: str, token: str | None) -> bool:
        """Whether a browser is an owner."""
        with self._turn:
            return token in self._owners.get(os.path.realpath(path), ())
