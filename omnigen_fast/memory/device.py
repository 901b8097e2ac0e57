"""What memory a device and its host have: total, free, and what plans may use."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..profiles import Profile, by_device_name, nearest
from ..profiles import load as load_profile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MARGIN_SHARE, _MARGIN_BYTES = 0.03, 256 << 20  # of a device, left to others
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_LEAST_BYTES = 1 << 20  # a smaller number without a unit was meant in GiB
# What /proc/cpuinfo calls instructions for bfloat16, the fastest first.
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-bf16"}
# Mapped "files" that are memory: devices, shared memory, huge pages.
_NO_FILES = (b"/dev/", b"/memfd:", b"/SYSV", b"/anon_hugepage")
# Addresses and path of a line of /proc/self/maps.
_FILE_MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)$", re.MULTILINE)
_ABSENT = bytes(range(128))  # highest bytes of /proc/self/pagemap's entries without a page


def on_host(device: torch.device) -> bool:
    """Whether a device computes in the host's memory: a CPU, or Apple's GPU."""
    return device.type in ("cpu", "mps")


def parse_memory(amount: str | int, name: str = "memory") -> int | None:
    """Bytes of an amount of memory, such as "8GiB", "7.5 GB" or a number; None for "auto".

    Raises RequestError for anything else, and for numbers too small to be bytes.
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return _enough(amount, str(amount), name)
    if isinstance(amount, str):
        if amount.strip().lower() == "auto":
            return None
        found = _AMOUNT.fullmatch(amount)
        if found and found[2].lower() in _UNITS:
            size = float(found[1]) * _UNITS[found[2].lower()]
            if 0.5 < size < math.inf:
                return round(size) if found[2] else _enough(round(size), found[1], name)
    raise RequestError(
        f'{name} must be "auto", or an amount such as "8GiB" or a number of bytes, got {amount!r}'
    )


def _enough(size: int, number: str, name: str) -> int:
    """Refuses a number that has no unit and can't have been meant as bytes."""
    if size < _LEAST_BYTES:
        raise RequestError(
            f"{name} must be at least 1 MiB, got {number} bytes; for {number} GiB write "
            f'"{number}GiB"'
        )
    return size


def free_bytes(device: torch.device, profile: Profile, held: int = 0) -> int:
    """What a plan may use of a device: what is free or the pipeline's own, less a margin.

    Whatever else the process holds, another model or the caller's arrays, is not free.

    Args:
        device: a `torch.device`.
        profile: of the device. Its `context_bytes` are added: a plan counts them, and the context
            is in place.
        held: bytes of the pipeline's own that a plan counts again: weights and what is kept for
            later calls; see `held_bytes`. What a plan does not count, such as latents of earlier
            calls' images, must not be in it.
    """
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # cached blocks that PyTorch reuses
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        # pages of mapped files, of checkpoints among them, are available already
        free, total = free_host_bytes(), _host_bytes()
    usable = less_margin(total)
    ours = held + round(profile.context_bytes)
    return max(0, min(free + ours - (total - usable), usable))


def held_bytes(
    tensors: Iterable[Tensor], device: torch.device | None = None, weights: Iterable[Tensor] = ()
) -> int:
    """Bytes that tensors take of their devices; a storage that several share counts once.

    On the host, only pages in use count, and none of mapped files: the system can drop those, so
    they are available as they are. Where the system does not tell (there is no /proc), all count.

    Args:
        tensors: on any devices; meta tensors take nothing.
        device: count only tensors on it; all unless given.
        weights: more tensors. They were written as a whole, so all their pages are in use: to look
            at them would take 16 ms a GiB.
    """
    # the storages themselves are kept meanwhile, so that no address is used twice
    written = {one._cdata: one for one in _storages(weights, device)}
    storages = {one._cdata: one for one in _storages(tensors, device)} | written
    on_cpu = any(storage.device.type == "cpu" for storage in storages.values())
    starts, stops = _file_mappings() if on_cpu else ([], [])
    total = 0
    for key, storage in storages.items():
        size = storage.nbytes()
        if storage.device.type == "cpu" and size:
            address = storage.data_ptr()
            place = bisect_right(starts, address) - 1
            if place >= 0 and address < stops[place]:
                continue
            if key not in written:
                size = _present_bytes(address, size)
        total += size
    return total


def _storages(
    tensors: Iterable[Tensor], device: torch.device | None
) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        if not tensor.is_meta and _is_on(tensor, device):
            yield tensor.untyped_storage()


def _is_on(tensor: Tensor, device: torch.device | None) -> bool:
    """Whether a tensor is on a device; one without an index is any of its type."""
    if device is None:
        return True
    there = tensor.device
    return there.type == device.type and device.index in (None, there.index)


def _file_mappings() -> tuple[list[int], list[int]]:
    """First addresses of mapped files in ascending order, and the addresses after their last."""
    try:
        maps = Path("/proc/self/maps").read_bytes()
    except OSError:
        return [], []
    found = [one for one in _FILE_MAPPING.findall(maps) if not one[2].startswith(_NO_FILES)]
    return [int(start, 16) for start, *_ in found], [int(stop, 16) for _, stop, _ in found]


def _present_bytes(address: int, size: int) -> int:
    """Bytes of a storage on the host whose pages are in use."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        first, last = address // page, -(-(address + size) // page)
        with open("/proc/self/pagemap", "rb") as pages:
            pages.seek(8 * first)
            entries = pages.read(8 * (last - first))
    except (AttributeError, OSError, ValueError):
        return size
    # the highest bit of an entry (64 bits, little-endian) says that the page is in memory
    present = len(entries[7::8].translate(None, _ABSENT))
    return min(size, present * page)


def less_margin(memory_bytes: float) -> int:
    """What plans may use of a device that nothing else uses."""
    return round(memory_bytes - max(_MARGIN_BYTES, _MARGIN_SHARE * memory_bytes))


def process_peak_bytes(root: Path = Path("/")) -> int | None:
    """The most that this process has had in memory so far; None where the system does not tell."""
    try:
        text = (root / "proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def free_host_bytes(root: Path = Path("/")) -> int:
    """What can still be allocated on the host, within the limits of the process's groups."""
    available = _meminfo(root).get("MemAvailable")
    if available is None:
        available = _pages("SC_AVPHYS_PAGES")
    return max(0, min([available, *(most - used for most, used in _cgroups(root))]))


def host_profile(root: Path = Path("/")) -> Profile:
    """The profile that ships for CPUs, named after this processor's own instructions."""
    found = load_profile("cpu")
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        text = ""
    flags = {
        flag for line in re.findall(r"^flags\s*:(.*)", text, re.MULTILINE) for flag in line.split()
    }
    fastest = next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), None)
    name = f"CPU with {fastest}" if fastest else "CPU"
    return replace(found, name=f"{name} (rates of {found.name})")


def capability_of(device: torch.device) -> str:
    """Compute capability of a GPU, such as "8.9", or AMD's architecture, such as "gfx942"."""
    import torch

    from ..kernels import launch

    found = launch.architecture_of(device.index)
    if found is None:
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return found


def launch_entry(architecture: str) -> str | None:
    """Whose launch configurations an AMD architecture takes; None where it has no kernels."""
    from ..kernels import launch

    return launch.entry_of(architecture)


def profile_of(device: torch.device) -> Profile:
    """The profile that ships for a device, or the nearest one, with the device's own memory."""
    if device.type != "cuda":
        return replace(host_profile(), memory_bytes=float(_host_bytes()))
    import torch

    properties = torch.cuda.get_device_properties(device)
    found = by_device_name(properties.name)
    if found is None:
        # Choices depend more on how rates compare with the link's than on the rates themselves.
        capability = capability_of(device)
        found = nearest(capability, properties.total_memory)
        found = replace(
            found,
            name=f"{properties.name} (rates of {found.name}, the nearest profile)",
            capability=capability,
            documented=(),
        )
    return replace(found, memory_bytes=float(properties.total_memory))


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes of each line of /proc/meminfo; empty where there is no such file."""
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return {}
    return {name: int(kb) << 10 for name, kb in re.findall(r"(\w+):\s+(\d+) kB", text)}


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group that this process is in; version 2, then 1."""
    try:
        names = (root / "proc/self/cgroup").read_text()
    except OSError:
        names = ""
    for limit, used, stat in _cgroup_files(root, names):
        try:
            most, now, pages = int(_read(limit)), int(_read(used)), _read(stat)
        except (OSError, ValueError):  # "max" where there is none
            continue
        # pages that can be dropped; version 1 lists those of child groups too, as the total
        inactive = re.findall(r"^(?:total_)?inactive_file (\d+)$", pages, re.MULTILINE)
        yield most, now - max(map(int, inactive), default=0)


@lru_cache(maxsize=16)
def _cgroup_files(root: Path, names: str) -> tuple[tuple[str, str, str], ...]:
    """Files of limit, use and statistics of the groups in the text of /proc/self/cgroup."""
    found = []
    for mount, controller, limit, used in (
        ("sys/fs/cgroup", "", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        groups = {PurePosixPath("/")}  # a container's own group is where its mount begins
        for line in names.splitlines():
            _, controllers, name = line.split(":", 2)
            group = PurePosixPath("/", name)
            if controller in controllers.split(",") and ".." not in group.parts:
                groups |= {group, *group.parents}  # the limit of each counts
        for group in groups:
            place = root / mount / group.relative_to("/")
            found.append((str(place / limit), str(place / used), str(place / "memory.stat")))
    return tuple(found)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _host_bytes(root: Path = Path("/")) -> int:
    """The host's memory, or what the process's control groups allow of it."""
    total = _meminfo(root).get("MemTotal") or _pages("SC_PHYS_PAGES")
    return min([total, *(most for most, _ in _cgroups(root))])


def _pages(name: str) -> int:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has none of it
        return 8 << 30
