"""What the original's guide documents for a device, and what the runtime is predicted to need."""

from __future__ import annotations

from typing import Any

from omnigen_fast import profiles
from omnigen_fast.config import released_sizes
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.device import less_margin
from omnigen_fast.memory.plan import Switches, typical_workload
from omnigen_fast.memory.planner import plan
from omnigen_fast.precision import Precision

from .cases import Task

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


def picture_seconds(profile: profiles.Profile, task: Task) -> float:
    """PREDICTED: a whole picture with the autoencoder, under the original's default switches."""
    workload = typical_workload(
        task.size.output,
        task.size.output,
        images=task.images,
        max_input_image_size=task.size.image,
        steps=task.steps,
    )
    switches = Switches(**_ORIGINALS | task.setting.arguments)
    budget = less_margin(profile.memory_bytes)
    precision = Precision.of("bfloat16")
    found = plan(
        *(released_sizes(), VaeShape(), precision, workload, profile, budget, switches),
        kept_bytes=0,
    )
    return found.cost.seconds
