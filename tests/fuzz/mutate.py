"""Mutations: each is a function of its random generator and its seed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

# Around powers of two, limits of this project and of the formats, and negative numbers.
INTEGERS = (
    *range(5),
    *(2**n + d for n in (3, 4, 5, 6, 7, 8, 9, 12, 14, 15, 16, 20, 24, 31, 32) for d in (-1, 0, 1)),
    9_459,
    89_478_485,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -1,
    -2,
    -(2**31),
    -(2**63),
)
_ENORMOUS = 5000  # digits; Python itself reads and prints at most 4300

TEXTS = (
    "",
    " ",
    "\0",
    "\x1b[31mred\x1b[0m",
    "\u202eright to left",
    "two\nlines",
    "\ud800",
    "../../../etc/passwd",
    "/dev/zero",
    "{}{}%s%n",
    "é" * 40,
    "x" * 10_000,
    "null",
    "1e999",
    "NaN",
    "https://127.0.0.1:9/x",
    "\U0010ffff",
    "日本語",
)


class Raw(str):
    """JSON text to be written as it is."""


def number(rng: random.Random) -> Any:
    """A number that a careless reader gets wrong."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(INTEGERS)
    if kind == 1:
        return float(rng.choice(INTEGERS))
    if kind == 2:
        return rng.choice((1e308, -1e308, 1e-320, -0.0, 0.5, 1e12, -1e12, 1.5))
    if kind == 3:
        return rng.choice((float("nan"), float("inf"), float("-inf")))
    if kind == 4:
        return Raw("9" * rng.choice((20, 400, _ENORMOUS)))
    return Raw(
        rng.choice(("1e400", "-1e400", "1E+99999999", "0.1e-99999", "1" + "0" * 4000 + ".5"))
    )


def value(rng: random.Random, known: Sequence[Any] = ()) -> Any:
    """A JSON value of any type; `known` are values that mean something to the reader."""
    if known and rng.random() < 0.4:
        return copy.deepcopy(rng.choice(known))  # it may be changed in its turn
    kind = rng.randrange(9)
    if kind <= 2:
        return number(rng)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind == 4:
        return rng.choice(TEXTS)
    if kind == 5:
        return [value(rng) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind == 6:
        return {rng.choice(TEXTS): value(rng) for _ in range(rng.choice((0, 1, 3)))}
    if kind == 7:
        depth = rng.choice((2, 50, 2_000, 100_000))
        return Raw(rng.choice(("[", '{"a":')) * depth)
    return [rng.choice(INTEGERS)] * rng.choice((10, 1000, 20_000))


def _place(rng: random.Random, tree: Any) -> tuple[Any, Any] | None:
    """A container inside a JSON value and one of its keys; upper levels more often than lower."""
    found = None
    while isinstance(tree, dict | list) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        found = tree, key
        if rng.random() < 0.35:
            break
        tree = tree[key]
    return found


def tree(
    rng: random.Random, root: Any, known: Sequence[Any] = (), names: Sequence[str] = ()
) -> Any:
    """A JSON value with one to three changes; `root` is the caller's own copy.

    Args:
        known: values that mean something to the reader.
        names: keys that mean something to it.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.02:
            return value(rng, known)
        place = _place(rng, root)
        if place is None:
            return value(rng, known)
        inside, key = place
        kind = rng.randrange(10)
        if kind <= 3:
            inside[key] = value(rng, known)
        elif kind == 4:
            del inside[key]
        elif kind == 5 and isinstance(inside[key], int | float):
            inside[key] = inside[key] * rng.choice((-1, 2, 0.5, 1e9)) + rng.choice((0, 1, -1))
        elif kind == 6:
            inside[key] = [inside[key]] if rng.random() < 0.5 else {"a": inside[key]}
        elif kind == 7:
            other = _place(rng, root)
            if other is not None:
                inside[key] = json.loads(_plain(other[0][other[1]]))
        elif isinstance(inside, dict):
            name = rng.choice(names) if names and rng.random() < 0.7 else rng.choice(TEXTS)
            inside[name] = value(rng, known) if kind == 8 else inside.pop(key)
        else:
            inside.insert(rng.randrange(len(inside) + 1), value(rng, known))
    return root


def _plain(one: Any) -> str:
    return json.dumps(one, default=str) if not _holds_raw(one) else "null"


def _holds_raw(one: Any) -> bool:
    if isinstance(one, Raw):
        return True
    parts = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return any(map(_holds_raw, parts))


def json_bytes(rng: random.Random, root: Any) -> bytes:
    """A JSON value as text, now and then no longer valid."""
    raw: list[str] = []

    def marked(one: Any) -> Any:
        if isinstance(one, Raw):
            raw.append(one)
            return f"@raw{len(raw) - 1}@"
        if isinstance(one, dict):
            return {name: marked(inner) for name, inner in one.items()}
        return list(map(marked, one)) if isinstance(one, list) else one

    text = json.dumps(marked(root), ensure_ascii=rng.random() < 0.8)
    for index, one in enumerate(raw):
        text = text.replace(f'"@raw{index}@"', one)
    data = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(40)
    if kind == 0:
        return octets(rng, data)
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 2:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")), "replace")
    if kind == 3:
        return b" " * rng.choice((1, 100_000)) + data + rng.choice((b"\0", b"}", data))
    return data


def octets(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes with one to four changes; `other` lends parts."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not found:
            return bytes(found)
        rng.choice(_CHANGES)(rng, found, other or data)
    return bytes(found)


def integer(rng: random.Random, size: int, order: str) -> bytes:
    """An integer of 1, 2, 4 or 8 bytes."""
    code = {1: "B", 2: "H", 4: "I", 8: "Q"}[size]
    return struct.pack(order + code, rng.choice(INTEGERS) % (1 << 8 * size))


def _at(rng: random.Random, found: bytearray) -> int:
    """A place; more often in the first bytes, where headers are."""
    return rng.randrange(min(len(found), rng.choice((16, 64, 512, 1 << 30))))


def _flip(rng: random.Random, found: bytearray, other: bytes) -> None:
    found[_at(rng, found)] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, found: bytearray, other: bytes) -> None:
    found[_at(rng, found)] = rng.choice((0, 1, 127, 128, 254, 255, rng.randrange(256)))


def _number(rng: random.Random, found: bytearray, other: bytes) -> None:
    size, place = rng.choice((1, 2, 2, 4, 4, 8)), _at(rng, found)
    found[place : place + size] = integer(rng, size, rng.choice("<>"))


def _cut(rng: random.Random, found: bytearray, other: bytes) -> None:
    del found[_at(rng, found) :]


def _remove(rng: random.Random, found: bytearray, other: bytes) -> None:
    place = _at(rng, found)
    del found[place : place + rng.choice((1, 2, 4, 17, 100, 1000))]


def _repeat(rng: random.Random, found: bytearray, other: bytes) -> None:
    place = _at(rng, found)
    part = found[place : place + rng.choice((1, 2, 4, 17, 100, 1000))]
    found[place:place] = part * rng.choice((1, 2, 10, 500))


def _insert(rng: random.Random, found: bytearray, other: bytes) -> None:
    place = _at(rng, found)
    found[place:place] = rng.randbytes(rng.choice((1, 4, 64)))


def _borrow(rng: random.Random, found: bytearray, other: bytes) -> None:
    start, place = rng.randrange(len(other)), _at(rng, found)
    size = rng.choice((4, 32, 300, 1 << 20))
    found[place : place + size] = other[start : start + size]


_CHANGES: tuple[Callable[[random.Random, bytearray, bytes], None], ...] = (
    _flip,
    _flip,
    _set,
    _set,
    _number,
    _number,
    _number,
    _cut,
    _remove,
    _repeat,
    _insert,
    _borrow,
)
