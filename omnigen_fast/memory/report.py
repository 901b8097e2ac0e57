"""What ran: the plan of a call, with predicted and measured peak."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig
from .estimate import Cost
from .plan import MemoryPlan
from .planner import describe, gigabytes


@dataclass(frozen=True)
class Report:
    """The plan by which a call ran."""

    plan: MemoryPlan
    predicted: Cost | None  # None for a plan that the caller gave
    cached_share: float  # of the rows of a run without a cache, those that were kept
    measured_bytes: int | None = None  # peak that the allocator reserved; None where it can't tell

    def text(self, config: ModelConfig) -> str:
        """A few lines for people."""
        lines = [describe(self.plan, config)]
        lines.append(
            f"kept between steps: {self.cached_share:.0%} of the rows of a run without cache"
        )
        if self.predicted is not None:
            cost = self.predicted
            lines.append(
                f"predicted: peak {gigabytes(cost.peak_bytes)} ({cost.peak_phase}, the device's "
                f"context included), {cost.seconds:.1f} s"
            )
        if self.measured_bytes is None:
            lines.append("measured peak: not measured on this device")
        else:
            lines.append(f"measured peak: {gigabytes(self.measured_bytes)}, without the context")
        return "\n".join(lines)
