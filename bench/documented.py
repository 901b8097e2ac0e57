"""What the original's guide documents for a device."""

from __future__ import annotations

from typing import Any

from .cases import Task


def documented(device: str, task: Task) -> dict[str, Any] | None:
    """GB and seconds of a cell of the original's tables; None where they have no such cell."""
    del device, task
    return None
