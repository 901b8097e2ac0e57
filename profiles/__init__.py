"""Device profiles: one JSON file per device, bundled in this folder or the user's own.

A file must have `name`, `memory_bytes`, `bandwidth_bytes_per_second`, `bf16_flops_per_second` and
`source` (a text, or an object with a text for each figure). The other fields of `Profile` are
optional; conservative defaults are marked as such in `Profile.source`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import ProfileError

_FOLDER = Path(__file__).parent
_GENERATION = re.compile(r"\d+\.\d|gfx\d+[0-9a-f]{2}")
_CELL = re.compile(r"OOM|(?P<gigabytes>\d+)G, ?(?:(?P<minutes>\d+)m)?(?:(?P<seconds>\d+)s)?")


@dataclass(frozen=True)
class DocumentedCell:
    """One cell of the original's tables: documented memory and time on a device, at 50 steps."""

    table: str  # its title
    settings: str  # the row's text
    column: str
    images: int  # input images, each of `max_input_image_size` on both sides
    max_input_image_size: int
    height: int
    width: int
    use_kv_cache: bool
    offload_kv_cache: bool
    separate_cfg_infer: bool
    offload_model: bool
    text: str  # "12G, 1m6s", or "OOM"

    @property
    def gigabytes(self) -> int | None:
        """None where the original ran out of memory. Whether G is 10^9 or 2^30 isn't documented."""
        found = self._parse()["gigabytes"]
        return None if found is None else int(found)

    @property
    def seconds(self) -> int | None:
        """None where the original ran out of memory."""
        found = self._parse()
        if found["gigabytes"] is None:
            return None
        return 60 * int(found["minutes"] or 0) + int(found["seconds"] or 0)

    def _parse(self) -> dict[str, str | None]:
        found = _CELL.fullmatch(self.text)
        assert found, self.text  # checked on reading
        return found.groupdict()


@dataclass(frozen=True)
class Profile:
    """A device's limits, and the rates that well-written programs attain on it."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_second: float  # of the device's memory
    bf16_flops_per_second: float  # peak, dense, accumulated in float32
    attained_product_flops_per_second: float  # large matrix products
    attained_attention_flops_per_second: float
    attained_bandwidth_share: float  # of the bandwidth, by elementwise kernels
    fp32_flops_per_second: float  # attained by products without TF32, such as the VAE's
    # attained by copies from pinned host memory; on a CPU, by reading mapped weights
    link_bytes_per_second: float
    context_bytes: float  # used before the first tensor: driver context, libraries' workspaces
    # attained by large products in 8 bits
    attained_int8_flops_per_second: float
    attained_fp8_flops_per_second: float
    # of a collective between devices of one machine: what each receives, and its least time
    peer_bytes_per_second: float
    peer_latency_seconds: float
    source: Mapping[str, str] = field(compare=False)  # of each figure
    capability: str | None = None  # of CUDA, such as "8.0", or AMD's architecture: "gfx942"
    on_host: bool = False  # the device computes in the host's memory
    peer_link: str = "PCIe"  # what connects such devices: NVLink, PCIe
    device_names: tuple[str, ...] = ()  # what `torch.cuda.get_device_name` calls the device
    documented: tuple[DocumentedCell, ...] = ()  # of the original on this device

    def seconds(self, bytes_moved: float, flops: float = 0, attention: bool = False) -> float:
        """Roofline (Williams et al., 2009) with attained rates: the longer of the two times."""
        rate = (
            self.attained_attention_flops_per_second
            if attention
            else self.attained_product_flops_per_second
        )
        bandwidth = self.bandwidth_bytes_per_second * self.attained_bandwidth_share
        return max(bytes_moved / bandwidth, flops / rate)


_LIMITS = ("memory_bytes", "bandwidth_bytes_per_second", "bf16_flops_per_second")
_REQUIRED = ("name", *_LIMITS, "source")
# Default of each optional figure, and its source.
_DEFAULTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "attained_product_flops_per_second": (
        "80 % of the peak, as on an A100",
        lambda given: 0.8 * given["bf16_flops_per_second"],
    ),
    "attained_int8_flops_per_second": (
        "1.2 times the products in bfloat16, the least gain that libraries report for an A100",
        lambda given: 1.2 * given["attained_product_flops_per_second"],
    ),
    "attained_fp8_flops_per_second": (
        "that of the products in bfloat16; nothing is assumed to be gained",
        lambda given: given["attained_product_flops_per_second"],
    ),
    "attained_attention_flops_per_second": (
        "46 % of the peak, as on an H100",
        lambda given: 0.46 * given["bf16_flops_per_second"],
    ),
    "attained_bandwidth_share": ("0.85, as on an H100", lambda given: 0.85),
    "fp32_flops_per_second": (
        "3 % of the bfloat16 peak, less than any bundled device",
        lambda given: 0.03 * given["bf16_flops_per_second"],
    ),
    "link_bytes_per_second": ("12e9, as over PCIe 4.0 x8 or 3.0 x16", lambda given: 12e9),
    "context_bytes": ("0.6e9, as on an H200", lambda given: 0.6e9),
    "peer_bytes_per_second": (
        "40 % of the link's, as for cards without peer access",
        lambda given: 0.4 * given["link_bytes_per_second"],
    ),
    "peer_latency_seconds": ("42e-6, as over PCIe", lambda given: 42e-6),
}

_OTHERS = ("capability", "on_host", "peer_link", "device_names", "documented")
_SIZES = ("max_input_image_size", "height", "width")
_SWITCHES = ("use_kv_cache", "offload_kv_cache", "separate_cfg_infer", "offload_model")


def names() -> list[str]:
    """The bundled devices."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def by_device_name(name: str) -> Profile | None:
    """The bundled profile of a device by its `torch.cuda.get_device_name`, or None."""
    # drivers before 2021 omit the vendor
    key = name.strip().removeprefix("NVIDIA ")
    for device in names():
        profile = load(device)
        if key in (known.removeprefix("NVIDIA ") for known in profile.device_names):
            return profile
    return None


def load(name: str | Path) -> Profile:
    """A bundled device's profile by name, or a profile from a JSON file.

    Raises:
        ProfileError: there is no such device or file, or a figure is missing or invalid.
    """
    if str(name) in names():
        return _shipped(str(name))
    path = Path(name)
    if not path.is_file():
        near = get_close_matches(re.sub(r"[^a-z0-9]", "", str(name).lower())[:60], names(), 1, 0.5)
        way = f"{near[0]}, whose name is nearest, or " if near else ""
        raise ProfileError(
            f"no profile {str(name)!r}: give a file, or {way}one of {', '.join(names())}"
        )
    return _read(path)


def nearest(capability: str, memory_bytes: float) -> Profile:
    """The bundled profile for a GPU that has none: of its generation, with about its memory.

    Where none is of its generation, both count. Only profiles of the same vendor are compared.

    Args:
        capability: of CUDA, such as "8.9", or AMD's architecture, such as "gfx1101".
        memory_bytes: of the GPU.
    """
    number = _generation(capability)
    every = [
        one
        for one in map(load, names())
        if one.capability is not None and _is_amd(one.capability) == _is_amd(capability)
    ]

    def distance(one: Profile) -> tuple[bool, float]:
        assert one.capability is not None
        memory = abs(math.log(one.memory_bytes / memory_bytes))
        generations = abs(_generation(one.capability) - number)
        return one.capability != capability, memory + generations

    return min(every, key=distance)


def _is_amd(capability: str) -> bool:
    return capability.startswith("gfx")


def _generation(capability: str) -> float:
    """A number that is near for GPUs that are alike: 8.9, or 11.0 of "gfx1100"."""
    if not _is_amd(capability):
        return float(capability)
    # the last two digits, which may be letters, are the minor version and the stepping
    return int(capability[3:-2]) + int(capability[-2], 16) / 10


def spread(profile: Profile) -> tuple[Profile, Profile] | None:
    """The same GPU at the rates that bound a prediction; None where no range is known.

    Returns:
        At the limits of its data sheet, which no program exceeds; and over half the link, with the
        shares of these limits that are published for `lowest`, or its own where they are lower.
        Both leave `fp32_flops_per_second` as it is.
    """
    if profile.on_host:
        return None
    peak, least = profile.bf16_flops_per_second, lowest(profile)
    products, attention = (
        rate / least.bf16_flops_per_second
        for rate in (
            least.attained_product_flops_per_second,
            least.attained_attention_flops_per_second,
        )
    )
    fastest = replace(
        profile,
        attained_product_flops_per_second=peak,
        attained_attention_flops_per_second=peak,
        attained_bandwidth_share=1.0,
    )
    slowest = replace(
        profile,
        attained_product_flops_per_second=min(
            profile.attained_product_flops_per_second, products * peak
        ),
        attained_attention_flops_per_second=min(
            profile.attained_attention_flops_per_second, attention * peak
        ),
        link_bytes_per_second=profile.link_bytes_per_second / 2,
    )
    return fastest, slowest


def lowest(profile: Profile) -> Profile:
    """The GPU of the same vendor for which programs are known to attain little of its limits."""
    return load("mi300x" if _is_amd(profile.capability or "") else "h100")


@cache
def _shipped(name: str) -> Profile:
    return _read(_FOLDER / f"{name}.json")


def _read(path: Path) -> Profile:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is not JSON: {error}") from error
    try:
        return _profile(values)
    except _Wrong as error:
        raise ProfileError(f"{path}: {error}") from error


class _Wrong(Exception):
    """An invalid value; the caller adds the file's name."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _profile(values: Any) -> Profile:
    if not isinstance(values, dict):
        raise _Wrong(f"a profile is an object with {', '.join(_REQUIRED)}")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise _Wrong(f"{', '.join(missing)} must be given")
    known = (*_REQUIRED, *_DEFAULTS, *_OTHERS)
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise _Wrong(f"there is no {', '.join(unknown)}; a profile has {', '.join(known)}")
    _require(_is_text(values["name"]), values, "name", "a text")
    figures: dict[str, float] = {
        key: values[key] for key in (*_LIMITS, *_DEFAULTS) if key in values
    }
    for key in figures:
        _require(_is_positive(figures[key]), figures, key, "a positive number")
    source = _source(values, figures.keys() | values.keys() & {"documented"})
    for key, (why, default) in _DEFAULTS.items():
        if key not in figures:
            figures[key] = default(figures)
            source[key] = f"not given: {why}"
    share = "attained_bandwidth_share"
    _require(figures[share] <= 1, figures, share, "at most 1")
    peak = figures["bf16_flops_per_second"]
    for key in ("attained_product_flops_per_second", "attained_attention_flops_per_second"):
        _require(figures[key] <= peak, figures, key, f"at most the peak of {peak:g}")
    capability = values.get("capability")
    good = capability is None or (_is_text(capability) and _GENERATION.fullmatch(capability))
    _require(good, values, "capability", 'null or a text like "8.0" or "gfx942"')
    on_host = values.get("on_host", False)
    _require(isinstance(on_host, bool), values, "on_host", "true or false")
    link = values.get("peer_link", "PCIe")
    _require(_is_text(link), values, "peer_link", "a text such as NVLink or PCIe")
    devices = values.get("device_names", [])
    _require(_are_texts(devices), values, "device_names", "a list of texts")
    return Profile(
        name=values["name"],
        memory_bytes=figures["memory_bytes"],
        bandwidth_bytes_per_second=figures["bandwidth_bytes_per_second"],
        bf16_flops_per_second=figures["bf16_flops_per_second"],
        attained_product_flops_per_second=figures["attained_product_flops_per_second"],
        attained_attention_flops_per_second=figures["attained_attention_flops_per_second"],
        attained_bandwidth_share=figures["attained_bandwidth_share"],
        fp32_flops_per_second=figures["fp32_flops_per_second"],
        link_bytes_per_second=figures["link_bytes_per_second"],
        context_bytes=figures["context_bytes"],
        attained_int8_flops_per_second=figures["attained_int8_flops_per_second"],
        attained_fp8_flops_per_second=figures["attained_fp8_flops_per_second"],
        peer_bytes_per_second=figures["peer_bytes_per_second"],
        peer_latency_seconds=figures["peer_latency_seconds"],
        source=source,
        capability=capability,
        on_host=on_host,
        peer_link=link,
        device_names=tuple(devices),
        documented=_documented(values["documented"]) if "documented" in values else (),
    )


def _source(values: dict[str, Any], figures: set[str]) -> dict[str, str]:
    """The source of each given figure."""
    source = values["source"]
    if _is_text(source):
        return dict.fromkeys(figures, source)
    good = isinstance(source, dict) and all(map(_is_text, source.values()))
    _require(good, values, "source", "a text, or an object of texts")
    if source.keys() != figures:
        raise _Wrong(f"source must have a text for each of {', '.join(sorted(figures))}")
    return dict(source)


def _documented(values: Any) -> tuple[DocumentedCell, ...]:
    """All cells of a file's `documented`: {columns, tables: [{title, rows}]}."""
    _keys(values, "documented", ("columns", "tables"))
    columns, tables = values["columns"], values["tables"]
    _require(_are_texts(columns), values, "columns", "a list of texts")
    _require(isinstance(tables, list), values, "tables", "a list of objects")
    cells: list[DocumentedCell] = []
    for table in tables:
        _keys(table, "a table", ("title", "rows"))
        _require(_is_text(table["title"]), table, "title", "a text")
        _require(isinstance(table["rows"], list), table, "rows", "a list of objects")
        for row in table["rows"]:
            cells += _row(table["title"], columns, row)
    return tuple(cells)


def _row(table: str, columns: list[str], row: Any) -> list[DocumentedCell]:
    _keys(row, "a row", ("settings", *_SIZES, *_SWITCHES, "cells"))
    _require(_is_text(row["settings"]), row, "settings", "a text")
    for key in _SIZES:
        good = isinstance(row[key], int) and row[key] > 0 and row[key] % 16 == 0
        _require(good, row, key, "a positive multiple of 16")
    for key in _SWITCHES:
        _require(isinstance(row[key], bool), row, key, "true or false")
    texts = row["cells"]
    good = _are_texts(texts) and len(texts) == len(columns) and all(map(_CELL.fullmatch, texts))
    _require(good, row, "cells", f'{len(columns)} texts like "12G, 1m6s" or "OOM"')
    return [
        DocumentedCell(
            table=table,
            settings=row["settings"],
            column=column,
            images=images,
            max_input_image_size=row["max_input_image_size"],
            height=row["height"],
            width=row["width"],
            use_kv_cache=row["use_kv_cache"],
            offload_kv_cache=row["offload_kv_cache"],
            separate_cfg_infer=row["separate_cfg_infer"],
            offload_model=row["offload_model"],
            text=text,
        )
        for images, (column, text) in enumerate(zip(columns, texts, strict=True))
    ]


def _keys(value: Any, what: str, keys: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or value.keys() != set(keys):
        raise _Wrong(f"{what} must be an object with exactly {', '.join(keys)}")


def _require(good: object, values: Mapping[str, Any], key: str, allowed: str) -> None:
    if not good:
        raise _Wrong(f"{key} can't be {values[key]!r}: it must be {allowed}")


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max
