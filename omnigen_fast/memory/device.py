"""What memory a device and its host have: total, free, and what plans may use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .. import profiles
from ..errors import RequestError
from ..profiles import Profile

if TYPE_CHECKING:
    import torch

_MARGIN_SHARE, _MARGIN_BYTES = 0.03, 256 << 20  # of a device, left to others
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def on_host(device: torch.device) -> bool:
    """Whether a device computes in the host's memory: a CPU, or Apple's GPU."""
    return device.type in ("cpu", "mps")


def parse_memory(amount: str | int) -> int | None:
    """Bytes of an amount of memory, such as "8GiB", "7.5 GB" or a number; None for "auto".

    Raises RequestError for anything else.
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    if isinstance(amount, str):
        if amount.strip().lower() == "auto":
            return None
        found = _AMOUNT.fullmatch(amount)
        if found and found[2].lower() in _UNITS:
            size = float(found[1]) * _UNITS[found[2].lower()]
            if 0.5 < size < math.inf:
                return round(size)
    raise RequestError(
        f'memory must be "auto", or an amount such as "8GiB" or a number of bytes, got {amount!r}'
    )


def free_bytes(device: torch.device, profile: Profile) -> int:
    """What a plan may use of a device: what is free or held by this process, less a margin.

    Args:
        device: a `torch.device`.
        profile: whose `context_bytes` count as held, since a plan's bytes include them.
    """
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device) + round(profile.context_bytes)
    else:
        free, total, ours = free_host_bytes(), _host_bytes(), _own_bytes()
    return max(free + ours - total + less_margin(total), 0)


def less_margin(memory_bytes: float) -> int:
    """What plans may use of a device of which nothing else is used."""
    return round(memory_bytes - max(_MARGIN_BYTES, _MARGIN_SHARE * memory_bytes))


def free_host_bytes(root: Path = Path("/")) -> int:
    """What can still be allocated on the host: what is available, within its groups' limits."""
    available = _meminfo(root).get("MemAvailable")
    if available is None:
        available = _pages("SC_AVPHYS_PAGES")
    return max(0, min([available, *(most - used for most, used in _cgroups(root))]))


def profile_of(device: torch.device) -> Profile:
    """The profile that ships for a `torch.device`, or the nearest stand-in, with its own memory."""
    if on_host(device):
        return replace(profiles.load("cpu"), memory_bytes=float(_host_bytes()))
    import torch

    properties = torch.cuda.get_device_properties(device)
    found = profiles.by_device_name(properties.name)
    if found is None:
        # Choices depend on how rates compare with the link's more than on the rates themselves.
        found = profiles.load("a100-40gb" if properties.total_memory > 33e9 else "rtx3090")
        found = replace(found, name=f"{properties.name} (rates of {found.name})", documented=())
    return replace(found, memory_bytes=float(properties.total_memory))


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes of each line of /proc/meminfo; nothing where there is no such file."""
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return {}
    return {name: int(kb) << 10 for name, kb in re.findall(r"(\w+):\s+(\d+) kB", text)}


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group that this process is in; version 2, then 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for mount, controller, limit, used in (
        ("sys/fs/cgroup", "", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        groups = {PurePosixPath("/")}  # a container's own group is where its mount begins
        for line in lines:
            _, controllers, name = line.split(":", 2)
            group = PurePosixPath("/", name)
            if controller in controllers.split(",") and ".." not in group.parts:
                groups |= {group, *group.parents}  # the limit of each counts
        for group in groups:
            place = root / mount / group.relative_to("/")
            try:
                most, now = (int((place / name).read_text()) for name in (limit, used))
                stat = dict(
                    line.split() for line in (place / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # "max" where there is none
                continue
            # pages that can be dropped; version 1 counts those of groups below apart
            pages = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            yield most, now - int(pages)


def _host_bytes(root: Path = Path("/")) -> int:
    """The host's memory, or what the process's control groups allow of it."""
    total = _meminfo(root).get("MemTotal") or _pages("SC_PHYS_PAGES")
    return min([total, *(most for most, _ in _cgroups(root))])


def _own_bytes() -> int:
    """What this process holds beside mapped files."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


def _pages(name: str) -> int:
    import os

    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has none of it
        return 8 << 30
