"""What the kinds that damage files of a model folder share."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

from .. import mutate
from . import Kind


class Special(NamedTuple):
    """Something that is no plain file of some bytes."""

    kind: str  # missing, folder, fifo, link or sparse
    detail: Any = None


Files = dict[str, bytes | Special]  # what stands in a folder instead of its own files


class Folders(Kind):
    """Folders in which some files are replaced by others."""

    pristine: Path

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.case_folder = folder / "input"

    def size(self, case: Files) -> int:
        return sum(len(one) for one in case.values() if isinstance(one, bytes))

    def prepare(self, case: Files) -> Path:
        """A folder with these files, and otherwise the pristine folder's."""
        lay_out(self.pristine, self.case_folder, case)
        return self.case_folder

    def save(self, case: Files, folder: Path) -> None:
        lay_out(self.pristine, folder / "input", case)


def lay_out(pristine: Path, folder: Path, case: Files) -> None:
    """Writes a folder: hard links to what is not replaced, and nothing of an earlier input."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in pristine.rglob("*"):
        there = folder / path.relative_to(pristine)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        elif str(path.relative_to(pristine)) not in case:
            there.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, there)
    for name, content in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Special):
            _make_special(path, content)
        else:
            path.write_bytes(content)


def _make_special(path: Path, special: Special) -> None:
    if special.kind == "folder":
        path.mkdir()
    elif special.kind == "fifo":
        os.mkfifo(path)
    elif special.kind == "link":
        path.symlink_to(special.detail)
    elif special.kind == "sparse":
        with open(path, "wb") as file:
            file.write(b"{" if path.suffix == ".json" else b"\x10\0\0\0\0\0\0\0")
            with contextlib.suppress(OSError):
                os.truncate(path, special.detail)


def special(rng: random.Random) -> Special:
    kind = rng.choice(("missing", "missing", "folder", "fifo", "link", "link", "sparse"))
    detail: Any = None
    if kind == "link":
        detail = rng.choice(("/dev/zero", "/dev/null", "nowhere", ".", "config.json", "/proc/kmsg"))
    elif kind == "sparse":
        detail = rng.choice((1 << 16, 1 << 26, 1 << 28, 1 << 34))
    return Special(kind, detail)


def tensors_mutated(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with changes to its header, its length or its values."""
    (size,) = struct.unpack_from("<Q", data)
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = rng.randrange(12)
    if kind == 0:
        return mutate.octets(rng, data)
    if kind == 1:
        return mutate.integer(rng, 8, "<") + data[8:]
    if kind == 2:
        return data[: rng.randrange(len(data))]
    if kind == 3:
        values = mutate.octets(rng, values)
    elif kind == 4:
        special = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1e38, 1e-45)))
        place = rng.randrange(len(values) // 4) * 4
        values = values[:place] + special * rng.choice((1, 8)) + values[place + 4 :]
    elif kind == 5:
        values += bytes(rng.choice((1, 7, 8, 4096)))
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _change_entry(rng, header, len(values))
    text = mutate.json_bytes(rng, header)
    if rng.random() < 0.9:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + values


_DTYPES = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "I64",
    "BOOL",
    "F4",
    "C64",
)
_NAMES = ("__metadata__", "", "\0", "\x1b[2J", "a" * 100_000, "llm.layers.1.x", "lokr_w1", "é\n")


def _change_entry(rng: random.Random, header: dict[str, Any], length: int) -> None:
    """One tensor's entry changed."""
    if not header:
        return
    name = rng.choice(sorted(header))
    entry, kind = header[name], rng.randrange(10)
    if kind == 0:
        header[rng.choice((*_NAMES, *sorted(header)))] = header.pop(name)
    elif kind == 1:
        del header[name]
    elif kind == 2:
        header[rng.choice(_NAMES)] = json.loads(json.dumps(entry))
    elif kind == 3:
        header["__metadata__"] = mutate.value(rng)
    elif kind == 4 or not isinstance(entry, dict) or not {"shape", "data_offsets"} <= entry.keys():
        header[name] = mutate.value(rng)
    elif kind == 5:
        entry["dtype"] = rng.choice(_DTYPES)
    elif kind == 6:
        _change_shape(rng, entry)
    elif kind == 7:
        offsets = [rng.choice((0, 1, 4, length, length + 1, *mutate.INTEGERS)) for _ in range(2)]
        entry["data_offsets"] = offsets[: rng.choice((2, 2, 2, 1, 0))]
    elif kind == 8:
        other = rng.choice(sorted(header))
        if isinstance(header[other], dict):
            header[name], header[other] = header[other], entry
    else:
        mutate.tree(rng, entry, _DTYPES)


def _change_shape(rng: random.Random, entry: dict[str, Any]) -> None:
    """A shape changed; now and then one that holds as many values."""
    shape = entry["shape"]
    kind = rng.randrange(5)
    if not isinstance(shape, list) or not shape or kind == 0:
        entry["shape"] = mutate.value(rng, ([], [0], [1, 1], [2**32, 2**32], [-1]))
    elif kind == 1:
        shape.reverse()
    elif kind == 2:
        shape.insert(rng.randrange(len(shape) + 1), 1)
    elif kind == 3:
        shape[rng.randrange(len(shape))] = rng.choice(mutate.INTEGERS)
    elif all(isinstance(side, int) for side in shape):
        entry["shape"] = [shape[0] * shape[-1], *shape[1:-1]]
