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

# Of memory, per request. The least that a leak of the palette would lose is the condition of its
# smallest request, some 200 KB, in one request of fifty; what the allocators leave behind moves by
# about as much, up and down.
MOST_BYTES_PER_REQUEST = 4 << 10
NOISE_BYTES = 2 << 20  # of a window, however short
COUNTS = ("tensors", "threads", "files", "processes", "temporary")


def measure(held: Iterable[Tensor]) -> dict[str, int]:
    """What this process has, once what nobody refers to is gone.

    Args:
        held: tensors that are kept on purpose: weights and caches.
    """
    process = psutil.Process()
    before = process.memory_info().rss
    gc.collect()
    _trim()
    kept = {one.untyped_storage()._cdata for one in held}
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    others = {one.untyped_storage()._cdata for one in tensors if one.device.type != "meta"} - kept
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return {
        "rss_before": before,
        "rss": process.memory_info().rss,
        "anonymous": int(status["RssAnon"].split()[0]) << 10,
        "mapped": int(status["RssFile"].split()[0]) << 10,
        "tensors": len(others),
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "processes": len(process.children(recursive=True)),
        "temporary": len(os.listdir(tempfile.gettempdir())),
    }


def _trim() -> None:
    """Gives free memory back to the system: what is left is in use, or between what is."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library than GNU's
        return


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
    slope = bytes_per_request(curve)
    requests = late[-1]["request"] - late[0]["request"]
    if slope * requests > max(MOST_BYTES_PER_REQUEST * requests, NOISE_BYTES):
        faults.append(f"memory: {slope:.0f} bytes per request")
    return faults


def _last_third(curve: Sequence[Any]) -> int:
    return max(2, len(curve) // 3)


def bytes_per_request(curve: Sequence[dict[str, Any]]) -> float:
    """The slope of memory over the last third of a curve."""
    late = curve[-_last_third(curve) :]
    return median(
        (b["anonymous"] - a["anonymous"]) / (b["request"] - a["request"])
        for a, b in combinations(late, 2)
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors' storages, each counted once."""
    storages = {
        one.untyped_storage()._cdata: one.untyped_storage().nbytes()
        for one in tensors
        if one.device != torch.device("meta")
    }
    return sum(storages.values())
