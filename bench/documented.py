"""What the original's guide documents for a device, and what the runtime is predicted to need."""

from __future__ import annotations

from typing import Any

from omnigen_fast import profiles

from .cases import Task
from .counts import ATTENTION, Counted

# Devices whose tables the original documents.
DEVICES = ("a800", "rtx3090")
_ORIGINALS = {  # its own defaults
    "use_kv_cache": True,
    "offload_kv_cache": True,
    "separate_cfg_infer": True,
    "offload_model": False,
}


def documented(device: str, task: Task) -> dict[str, Any] | str | None:
    """GB and seconds of a cell of the original's tables, or "OOM"; None where there is no such."""
    profile = profiles.by_device_name(device)
    return None if profile is None else documented_cell(profile, task)


def documented_cell(profile: profiles.Profile, task: Task) -> dict[str, Any] | str | None:
    """See `documented`."""
    switches = _ORIGINALS | task.setting.arguments
    for cell in profile.documented:
        same = (cell.height, cell.width) == (task.size.output, task.size.output)
        same &= cell.images == task.images and cell.max_input_image_size == task.size.image
        if same and all(getattr(cell, name) == on for name, on in switches.items()):
            if cell.seconds is None:
                return cell.text
            return {"gb": cell.gigabytes, "seconds": cell.seconds}
    return None


def predicted_seconds(counted: Counted, profile: profiles.Profile) -> float:
    """PREDICTED, not measured: each launch by the roofline with rates attained on the device."""
    return sum(
        profile.seconds(one.bytes, one.flops, one.family == ATTENTION) for one in counted.operations
    )
