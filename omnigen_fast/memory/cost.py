"""Cost of a request under a plan: the bytes of each phase and the seconds of each part."""

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
    """The bytes of each phase and the seconds of each part."""

    encode: tuple[Term, ...]  # empty without input images
    prefill: tuple[Term, ...]  # empty if every step recomputes the condition
    denoise: tuple[Term, ...]
    decode: tuple[Term, ...]
    durations: tuple[Duration, ...]
    kept_bytes: int = 0  # of each phase: room for conditions of other requests

    @property
    def phases(self) -> dict[str, tuple[Term, ...]]:
        """Terms of the phases that the request has, in order."""
        every = {
            "encode": self.encode,
            "prefill": self.prefill,
            "denoise": self.denoise,
            "decode": self.decode,
        }
        return {name: terms for name, terms in every.items() if terms}

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
        vae: sizes of the autoencoder.
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
        self.vae = vae
        self.precision = precision
        self.workload = workload
        self.profile = profile
        self.on_host = profile.on_host
        self.bytes = ByteEstimate(config, vae, precision, workload, profile)
        self.seconds = SecondsEstimate(self.bytes)

    def of(self, workload: Workload) -> Estimate:
        """Of another request with the same model on the same device."""
        return Estimate(self.config, self.vae, self.precision, workload, self.profile)

    def cost(self, plan: MemoryPlan, current: MemoryPlan | None = None) -> Cost:
        """See `cost`."""
        return Cost(
            encode=tuple(self.bytes.encode(plan)),
            prefill=tuple(self.bytes.prefill(plan)),
            denoise=tuple(self.bytes.denoise(plan)),
            decode=tuple(self.bytes.decode(plan)),
            durations=tuple(self.seconds.durations(plan, current)),
            kept_bytes=self.bytes.spare_bytes(plan),
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
    """Cost of a request that finds nothing kept from earlier ones.

    Args:
        config: sizes of the transformer.
        vae: sizes of the autoencoder.
        precision: of weights, arithmetic and cache.
        workload: sizes of the request.
        plan: that it runs by.
        profile: of the device.
        current: the plan that weights are placed by now; None if that is `plan`.
    """
    return Estimate(config, vae, precision, workload, profile).cost(plan, current)
