"""Files that are written whole or not at all, and never seen half written."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LEFT = re.compile(r"\.[0-9a-f]{16}-\w{8}\.\w+")  # names of temporary files


def write_whole(out: Path, write: Callable[[str], object], *, replace: bool = True) -> None:
    """Writes a file under a temporary name in its folder, then puts it in place.

    Args:
        out: the file.
        write: writes the file whose name it is given.
        replace: whether to replace an earlier file.

    Raises:
        FileExistsError: there is an earlier file, and `replace` is false.
        OSError: it can't be written; an earlier file then stays as it is.
    """
    from safetensors import SafetensorError

    # known before the file exists, so that a signal in between leaves nothing behind; see _LEFT
    prefix, temporary = f".{secrets.token_hex(8)}-", None
    try:
        handle, temporary = tempfile.mkstemp(suffix=out.suffix, prefix=prefix, dir=out.parent)
        os.close(handle)
        write(temporary)
        _to_disk(temporary)
        os.chmod(temporary, 0o666 & ~_UMASK)
        if replace:
            os.replace(temporary, out)
        else:
            _put_new(temporary, out)
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{out} can't be written: {reason}") from error
    finally:
        if temporary is None:
            _remove(out.parent, prefix)
        else:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def temporary_folder(out: str) -> Iterator[str]:
    """A folder beside `out`, to be put in its place; what is left of it goes in the end."""
    parent, name = os.path.split(os.path.abspath(out))
    # named before it is made, so that a signal in between leaves nothing behind
    folder = os.path.join(parent, f".{name}-{secrets.token_hex(8)}")
    try:
        os.mkdir(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(folder: Path) -> None:
    """Removes temporary files that killed processes left in a folder that no other writes to."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _LEFT.fullmatch(name):
                (folder / name).unlink(missing_ok=True)


def _to_disk(path: str) -> None:
    """A crash of the machine must not leave a file's name without its content."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _put_new(temporary: str, out: Path) -> None:
    """Names a file, unless there is one of that name: then it raises FileExistsError."""
    try:
        os.link(temporary, out)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        open(out, "xb").close()
        os.replace(temporary, out)


def _remove(folder: Path, prefix: str) -> None:
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefix):
                (folder / name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # read once: reading it changes it for a moment, for all threads
