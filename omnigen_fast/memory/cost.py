"""What a request costs under a plan: bytes of each phase, and where the seconds go."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig
from ..precision import Precision
from ..profiles import Profile
from .autoencoder import VaeShape
from .estimate import ByteEstimate
from .plan import MemoryPlan, Workload
from .seconds import SecondsEstimate
from .terms import Duration, Term, total_bytes, total_seconds


@dataclass(frozen=True)
class Cost:
    """Bytes of each phase, and where the seconds go."""

    encode: tuple[Term, ...]  # none without input images
    prefill: tuple[Term, ...]  # none where the condition is recomputed
    denoise: tuple[Term, ...]
    decode: tuple[Term, ...]
    durations: tuple[Duration, ...]

    @property
    def phases(self) -> dict[str, tuple[Term, ...]]:
        """Terms of the phases that the request has, in their order."""
        names = ("encode", "prefill", "denoise", "decode")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: total_bytes(self.phases[name]))

    @property
    def peak_bytes(self) -> int:
        return max(map(total_bytes, self.phases.values()))

    @property
    def seconds(self) -> float:
        return total_seconds(self.durations)


class Estimate:
    """Costs of one request on one device under any plan.

    Args:
        config: sizes of the transformer.
        vae: those of the autoencoder, which is always float32.
        precision: of weights, arithmetic and cache.
        workload: sizes of the request.
        profile: of the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        vae: VaeShape,
        precision: Precision,
        workload: Workload,
        profile: Profile,
    ) -> None:
        self.config = config
        self.precision = precision
        self.workload = workload
        self.on_host = profile.on_host
        self.bytes = ByteEstimate(config, vae, precision, workload, profile)
        self.seconds = SecondsEstimate(self.bytes)

    def cost(self, plan: MemoryPlan, current: MemoryPlan | None = None) -> Cost:
        """See `cost`."""
        return Cost(
            encode=tuple(self.bytes.encode(plan)),
            prefill=tuple(self.bytes.prefill(plan)),
            denoise=tuple(self.bytes.denoise(plan)),
            decode=tuple(self.bytes.decode(plan)),
            durations=tuple(self.seconds.durations(plan, current)),
        )


def cost(
    config: ModelConfig,
    vae: VaeShape,
    precision: Precision,
    workload: Workload,
    plan: MemoryPlan,
    profile: Profile,
    current: MemoryPlan | None = None,
) -> Cost:
    """Cost of a request of which nothing is kept from earlier ones.

    Args:
        config: sizes of the transformer.
        vae: those of the autoencoder, which is always float32.
        precision: of weights, arithmetic and cache.
        workload: sizes of the request.
        plan: how it is carried out.
        profile: of the device.
        current: the plan by which weights lie now; None where they lie as `plan` wants them.
    """
    return Estimate(config, vae, precision, workload, profile).cost(plan, current)
