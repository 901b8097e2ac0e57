"""Which requests may be under way at once, by the planner's bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..memory.cost import Cost, Estimate
from ..memory.plan import MemoryPlan
from ..memory.terms import total_bytes

# Terms of what is there once, however many requests are under way.
_SHARED = {
    "context",
    "layers",
    "other weights",
    "VAE",
    "cache",
    "ring of layers",
    "ring of caches",
    "captured step",
}
_LOOP = "loop"


@dataclass(frozen=True)
class Footprint:
    """The bytes of a request beside others."""

    shared: int  # weights, autoencoder, keys and values
    kept: int  # from its start to its end
    passing: int  # more, while it encodes, prefills or decodes: one request at a time does
    loop: int  # of `kept`; steps that run together need as much again

    @classmethod
    def of(cls, cost: Cost) -> Footprint:
        """From the terms of a plan's cost."""
        phases = cost.phases.values()
        shared = min(sum(term.bytes for term in terms if term.name in _SHARED) for terms in phases)
        kept = max(0, total_bytes(cost.denoise) - shared)
        passing = max(0, cost.peak_bytes - shared - kept)
        loop = sum(term.bytes for term in cost.denoise if term.name == _LOOP)
        return cls(shared, kept, passing, loop)


def needed_bytes(under_way: Iterable[Footprint], together: Iterable[Footprint] = ()) -> int:
    """The peak of some requests at once.

    Args:
        under_way: all of them.
        together: those whose steps run in one pass.
    """
    every = list(under_way)
    if not every:
        return 0
    pack = list(together)
    joint = sum(one.loop for one in pack) if len(pack) > 1 else 0
    peak = max(one.shared for one in every) + sum(one.kept for one in every)
    return peak + joint + max(one.passing for one in every)


def beside(plan: MemoryPlan, here: MemoryPlan, estimate: Estimate, budget: int) -> MemoryPlan:
    """A plan that leaves weights where they are, if that fits; else the same plan.

    Args:
        plan: the fastest one for a request alone.
        here: where weights are.
        estimate: of the request.
        budget: bytes.
    """
    if plan.cache != "device":
        return plan
    stays = replace(
        plan,
        resident_layers=here.resident_layers,
        vae_resident=here.vae_resident,
        capture=plan.capture and here.resident_layers == plan.resident_layers,
    )
    return stays if estimate.cost(stays).peak_bytes <= budget else plan


def moves_weights(plan: MemoryPlan, here: MemoryPlan) -> bool:
    """Whether a plan can't be carried out beside others."""
    same = (plan.resident_layers, plan.vae_resident) == (here.resident_layers, here.vae_resident)
    return not same or plan.cache != "device"
