"""omnigen_fast: the OmniGen image generation model, fast and exact.

The public interface: `OmniGenPipeline` with its errors and `MemoryPlan`; and `enable`, `disable`
and `summary`, which run a diffusers pipeline on this runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    MemoryBudgetError,
    OmniGenError,
    OutOfMemoryError,
    ProfileError,
    RequestError,
)
from .memory.plan import MemoryPlan

if TYPE_CHECKING:
    from .for_diffusers.enable import disable, enable, summary
    from .pipeline import OmniGenPipeline

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "MemoryBudgetError",
    "MemoryPlan",
    "OmniGenError",
    "OmniGenPipeline",
    "OutOfMemoryError",
    "ProfileError",
    "RequestError",
    "__version__",
    "disable",
    "enable",
    "summary",
]


def __getattr__(name: str) -> Any:
    # lazily: importing torch takes seconds, and the command line's help doesn't need it
    if name == "OmniGenPipeline":
        from .pipeline import OmniGenPipeline

        return OmniGenPipeline
    if name in ("enable", "disable", "summary"):
        from .for_diffusers import enable

        return getattr(enable, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
