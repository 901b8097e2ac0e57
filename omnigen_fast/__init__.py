"""omnigen_fast: the OmniGen image generation model, fast and exact.

`from omnigen_fast import OmniGenPipeline` is the whole public interface, with the errors it raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, OmniGenError, RequestError

if TYPE_CHECKING:
    from .pipeline import OmniGenPipeline

__version__ = "0.1.0"
__all__ = ["CheckpointError", "OmniGenError", "OmniGenPipeline", "RequestError", "__version__"]


def __getattr__(name: str) -> Any:
    # the pipeline needs torch, which takes seconds; the command line's help does not
    if name == "OmniGenPipeline":
        from .pipeline import OmniGenPipeline

        return OmniGenPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
