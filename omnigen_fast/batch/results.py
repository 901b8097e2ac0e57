"""results.jsonl: what became of each line, appended as it happens and read to go on."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

from ..errors import OmniGenError, RequestError
from ..request import MAX_IMAGES
from ..whole_files import write_whole

NAME = "results.jsonl"
_MAX_BYTES = 64 << 10  # of a line; what is longer we did not write


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of a line."""

    line: int
    id: str | None  # None if the line has none that could name a file
    status: Literal["done", "failed"]
    digest: str  # of what the line asked for
    file: str | None = None  # name of the first file, beside the results
    files: int = 0  # several are named NAME-1, NAME-2 and so on
    seed: int | None = None  # that was given or drawn
    seconds: float | None = None  # of the call, divided by the lines that shared it
    error: str | None = None

    def names(self) -> list[str]:
        """Names of all files."""
        if self.file is None or self.files == 1:
            return [] if self.file is None else [self.file]
        first = Path(self.file)
        stem = first.stem.removesuffix("-1")
        return [f"{stem}-{i + 1}{first.suffix}" for i in range(self.files)]

    @property
    def key(self) -> str | int:
        """What later runs find the line by: its id, or its number if it has none."""
        return self.line if self.id is None else self.id


class Earlier:
    """What became of the lines of a folder so far.

    Args:
        folder: of the files.
        latest: the last entry of each line, by `Entry.key`.
    """

    def __init__(self, folder: Path, latest: dict[str | int, Entry]) -> None:
        self.folder = folder
        self._latest = latest

    def latest(self, key: str | int) -> Entry | None:
        """What became of a line when it last ran, by `Entry.key`."""
        return self._latest.get(key)

    def is_done(self, entry: Entry) -> bool:
        """Whether an entry's files are there."""
        names = entry.names()
        return bool(names) and all(os.path.isfile(self.folder / name) for name in names)


class Results(Earlier):
    """The results of a folder, locked while they are open.

    Args:
        folder: that exists.

    Raises:
        OmniGenError: another process has the folder open.
        OSError: the file can't be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        try:
            self._file = os.open(self.path, flags, 0o666)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                os.close(self._file)
                raise OSError("it is not a regular file")
        except OSError as error:
            raise OSError(f"{self.path} can't be opened: {error.strerror or error}") from error
        try:
            _lock(self._file, folder)
            super().__init__(folder, self._read())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, which unlocks the folder."""
        os.close(self._file)

    def earlier(self) -> Earlier:
        """The results so far, as another process can read them."""
        return Earlier(self.folder.absolute(), dict(self._latest))

    def entries(self) -> list[Entry]:
        """The last entry of each line, in the order of the lines."""
        return sorted(self._latest.values(), key=lambda entry: entry.line)

    def append(self, entry: Entry) -> None:
        """Writes an entry to the disk, whole or not at all; raises OSError if that fails."""
        data = json.dumps(asdict(entry)).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            while data:  # a full disk takes a part, and then raises
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise OSError(f"{self.path} can't be written: {error.strerror}") from error
        self._latest[entry.key] = entry

    def _read(self) -> dict[str | int, Entry]:
        """The last entry of each line; mends an end that was cut off."""
        latest: dict[str | int, Entry] = {}
        whole = 0  # bytes up to the end of the last whole line
        entry = None
        with open(self.path, "rb") as file:
            while text := _next_line(file):
                entry = _parsed(text)
                if entry is not None:
                    latest[entry.key] = entry
                if not text.endswith(b"\n"):
                    break
                whole = file.tell()
        if text and entry is not None:
            os.write(self._file, b"\n")
        elif text:
            os.ftruncate(self._file, whole)
        return latest


def check_table(path: Path) -> None:
    """Raises OmniGenError now if `write_table` could not write such a file."""
    if path.suffix.lower() != ".parquet":
        raise RequestError(f"--results {path} must end in .parquet; results.jsonl is always there")
    if importlib.util.find_spec("pyarrow") is None:
        raise OmniGenError("--results needs pyarrow; install it with: pip install pyarrow")


def write_table(entries: Iterable[Entry], path: Path) -> None:
    """Writes entries as a Parquet file, whole or not at all; raises OSError if that fails."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"int": pa.int64(), "float": pa.float64()}
    columns = [
        (one.name, types.get(str(one.type).split()[0], pa.string())) for one in fields(Entry)
    ]
    table = pa.Table.from_pylist([asdict(entry) for entry in entries], pa.schema(columns))
    write_whole(path, partial(pq.write_table, table))


def _next_line(file: BinaryIO) -> bytes:
    """A line; of one that is too long, its end."""
    text = file.readline(_MAX_BYTES)
    while len(text) == _MAX_BYTES and not text.endswith(b"\n"):
        more = file.readline(_MAX_BYTES)
        if not more:
            break
        text = more
    return text


def _parsed(text: bytes) -> Entry | None:
    """The entry in a line; None if there is none that we wrote."""
    try:
        fields = json.loads(text)
        entry = Entry(**fields)
    except (ValueError, TypeError, RecursionError):
        return None
    right = (
        type(entry.line) is int
        and isinstance(entry.id, str | None)
        and entry.status in ("done", "failed")
        and isinstance(entry.digest, str)
        and isinstance(entry.file, str | None)
        and type(entry.files) is int
        and 0 <= entry.files <= MAX_IMAGES
    )
    return entry if right else None


def _lock(file: int, folder: Path) -> None:
    """Locks an open file until it is closed or the process ends, however it ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 40, os.SEEK_SET)  # locked bytes can't be read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OmniGenError(
            f"another batch is writing to {folder}; wait for its end, or give another folder"
        ) from error
    except OSError as error:
        raise OSError(f"{folder} can't be locked: {error.strerror}") from error
