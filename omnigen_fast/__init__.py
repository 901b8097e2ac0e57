"""omnigen_fast: the OmniGen image generation model, fast and exact.

`from omnigen_fast import OmniGenPipeline` is the public interface, with the errors that it raises
and the `MemoryPlan` that it can be given; `enable`, `disable` and `summary` are for those who have
a diffusers pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, MemoryBudgetError, OmniGenError, ProfileError, RequestError
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
    "ProfileError",
    "RequestError",
    "__version__",
    "disable",
    "enable",
    "summary",
]


def __getattr__(name: str) -> Any:
    # the pipeline needs torch, which takes seconds; the command line's help does not
    if name == "OmniGenPipeline":
        from .pipeline import OmniGenPipeline

        return OmniGenPipeline
    if name in ("enable", "disable", "summary"):
        from .for_diffusers import enable

        return getattr(enable, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
