"""Small files of a model folder: regular ones, of a bounded size, read at once."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from .errors import CheckpointError

MAX_JSON_BYTES = 4 << 20  # a config has 4 KB, an index of the released model 30 KB


def check_regular(path: str | os.PathLike[str], kind: str, max_bytes: int | None = None) -> None:
    """Raises CheckpointError unless a file is there, is a regular one and is not too large.

    Opening anything else, such as a pipe, may wait forever.

    Args:
        path: of the file.
        kind: what it is to be read as, for messages.
        max_bytes: of its size; None for any.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} does not exist; the model folder is not complete") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path} can't be read as {kind}: {_reason(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a device or a socket"
        raise CheckpointError(f"{path} can't be read as {kind}: it is {what}, not a regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise _too_large(path, kind, found.st_size, max_bytes)


def read_regular(path: str | os.PathLike[str], kind: str, max_bytes: int) -> bytes:
    """The contents of a regular file.

    Args:
        path, kind, max_bytes: as of `check_regular`.

    Raises:
        CheckpointError: it is missing, not a regular file, or has more than `max_bytes`.
    """
    check_regular(path, kind, max_bytes)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            data = file.read(max_bytes + 1) or b""  # None where there is nothing to read yet
    except OSError as error:
        raise CheckpointError(f"{path} can't be read as {kind}: {_reason(error)}") from error
    if len(data) > max_bytes:  # its size says nothing in /proc
        raise _too_large(path, kind, len(data), max_bytes)
    return data


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises CheckpointError if it is missing, not a regular file, too large, malformed or not an
    object.
    """
    data = read_regular(path, "JSON", max_bytes)
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _too_large(
    path: str | os.PathLike[str], kind: str, size: int, max_bytes: int
) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be read as {kind}: it has {size} bytes, at most {max_bytes} are read"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
