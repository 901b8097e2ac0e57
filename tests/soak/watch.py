"""What a process holds, and whether that grows."""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

# Per request, of what the C library has handed out. safetensors loses 64 bytes for each tensor that
# it reads: 14 KB for a pipeline that is loaded, one or none per request. A leak of ours would lose
# at least the condition of the smallest request, some 200 KB: one in twelve requests is seen.
MOST_BYTES_PER_REQUEST = 16 << 10
# Of a window, however short: a point moves by so much with what the request before it has left in
# the allocators of Python and PyTorch; the system counts the holes between what is used, too.
NOISE_BYTES = {"in_use": 2 << 20, "anonymous": 16 << 20}
COUNTS = ("tensors", "threads", "files", "processes", "temporary")


def measure(held: Iterable[Tensor]) -> dict[str, int]:
    """What this process has, once what nobody refers to is gone.

    Args:
        held: tensors that are kept on purpose: weights and caches.
    """
    process = psutil.Process()
    before = process.memory_info().rss
    gc.collect()
    in_use = _trim()
    kept = {one.untyped_storage()._cdata for one in held}
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    dense = (one for one in tensors if one.device.type != "meta" and one.layout is torch.strided)
    others = {one.untyped_storage()._cdata for one in dense} - kept
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    anonymous = int(status["RssAnon"].split()[0]) << 10
    return {
        "rss_before": before,
        "rss": process.memory_info().rss,
        "anonymous": anonymous,
        "in_use": anonymous if in_use is None else in_use,
        "mapped": int(status["RssFile"].split()[0]) << 10,
        "tensors": len(others),
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "processes": len(process.children(recursive=True)),
        "temporary": len(os.listdir(tempfile.gettempdir())),
    }


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _trim() -> int | None:
    """Gives free memory back to the system; returns how many bytes are handed out.

    None with another C library than GNU's.
    """
    library = ctypes.CDLL(None)
    try:
        library.malloc_trim(0)
        library.mallinfo2.restype = _Mallinfo
        info = library.mallinfo2()
    except AttributeError:
        return None
    return info.uordblks + info.hblkhd


def growth(curve: Sequence[dict[str, Any]]) -> list[str]:
    """What grows over the last third of a curve; empty if nothing does.

    Counts may not exceed what they were before the last third. For memory, the median of the slopes
    between all pairs of points (Theil and Sen) is compared with a limit: neither a single peak nor
    a single step shifts it.
    """
    early, late = curve[: -_last_third(curve)], curve[-_last_third(curve) :]
    faults = []
    for name in COUNTS:
        before, after = max(one[name] for one in early), min(one[name] for one in late)
        if after > before:
            faults.append(f"{name}: {before} at most, then {after} at least")
    requests = late[-1]["request"] - late[0]["request"]
    for name, noise in NOISE_BYTES.items():
        slope = bytes_per_request(curve, name)
        if slope * requests > max(MOST_BYTES_PER_REQUEST * requests, noise):
            faults.append(f"memory, {name}: {slope:.0f} bytes per request")
    return faults


def _last_third(curve: Sequence[Any]) -> int:
    return max(2, len(curve) // 3)


def bytes_per_request(curve: Sequence[dict[str, Any]], name: str) -> float:
    """The slope of memory over the last third of a curve."""
    late = curve[-_last_third(curve) :]
    return median(
        (b[name] - a[name]) / (b["request"] - a["request"]) for a, b in combinations(late, 2)
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors' storages, each counted once."""
    storages = {
        one.untyped_storage()._cdata: one.untyped_storage().nbytes()
        for one in tensors
        if one.device != torch.device("meta")
    }
    return sum(storages.values())
