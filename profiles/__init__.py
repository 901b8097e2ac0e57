"""What the runtime knows of each device: a JSON file each, beside this one or the user's own."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Profile:
    """A device's limits, and what well-written programs attain on it."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_second: float  # of the device's memory
    bf16_flops_per_second: float  # peak, dense, accumulated in float32
    attained_product_flops_per_second: float  # large matrix products
    attained_attention_flops_per_second: float
    attained_bandwidth_share: float  # of the bandwidth, by elementwise kernels
    source: str

    def seconds(self, bytes_moved: float, flops: float = 0, attention: bool = False) -> float:
        """Roofline (Williams et al., 2009) with attained rates: the larger of both times."""
        rate = (
            self.attained_attention_flops_per_second
            if attention
            else self.attained_product_flops_per_second
        )
        bandwidth = self.bandwidth_bytes_per_second * self.attained_bandwidth_share
        return max(bytes_moved / bandwidth, flops / rate)


def names() -> list[str]:
    """The devices that ship."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load(name: str | Path) -> Profile:
    """A profile by the name of a device that ships, or from a JSON file with `Profile`'s fields.

    Raises:
        ValueError: there is no such device or file, or it lacks a field or has a wrong one.
    """
    path = _FOLDER / f"{name}.json"
    if str(name) not in names():
        path = Path(name)
        if not path.is_file():
            raise ValueError(
                f"no profile {str(name)!r}: give a file, or one of {', '.join(names())}"
            )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    wanted = {field.name: field.type for field in fields(Profile)}
    if not isinstance(values, dict) or values.keys() != wanted.keys():
        raise ValueError(f"{path} must have exactly the fields {', '.join(wanted)}")
    for field, kind in wanted.items():
        value = values[field]
        good = isinstance(value, str) if kind == "str" else _positive(value)
        if not good:
            raise ValueError(f"{path}: {field} can't be {value!r}")
    return Profile(**values)


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
