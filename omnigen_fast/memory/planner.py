"""The fastest plan that fits: candidates, their costs, the choice and its reasons.

No budget chooses a candidate that another one beats in both bytes and seconds. The others, the
front, are sorted from the fastest to the smallest: the first that fits is chosen, and later ones
are tried after an out-of-memory error. Of candidates that differ only in how the autoencoder works
on the device, and by less than a hundredth of the time, the smallest is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import inf

from ..config import ModelConfig
from ..errors import MAX_MESSAGE, MemoryBudgetError
from ..forms import FORMS
from ..precision import Precision
from ..profiles import Profile
from .autoencoder import VaeShape
from .cost import Cost, Estimate
from .plan import MLP_ROWS, RING, CachePlace, MemoryPlan, Switches, Workload
from .terms import table, total_bytes

ANY = Switches()
KEPT_BYTES = 2 << 30  # for conditions of earlier requests, where there is room
_KEPT_UNIT = 256 << 20  # small changes of free memory must not move the cache
# Rows that the MLP processes at once; for the autoencoder (latent rows, kept on the host).
_MLP_CHOICES = (MLP_ROWS, 1024)
_STRIP_CHOICES = ((None, False), (16, False), (16, True), (4, True))
_LESS = 0.95  # the next attempt must need clearly less than what failed
# Of the seconds: what the autoencoder may take longer, where that needs clearly less memory.
_LONGER = 1.01


@dataclass(frozen=True)
class Candidate:
    """A plan with its predicted peak and time."""

    plan: MemoryPlan
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Decision:
    """The plan for a request, and the candidates it was chosen from."""

    plan: MemoryPlan
    cost: Cost
    budget_bytes: int
    candidates: tuple[Candidate, ...]  # each needs less and takes longer than the one before
    fixed: tuple[str, ...]  # the caller's switches that count
    estimate: Estimate

    def fits(self, candidate: Candidate) -> bool:
        return candidate.peak_bytes <= self.budget_bytes

    @property
    def chosen(self) -> Candidate:
        """The candidate that became `plan`; a plan that the caller gave need not fit."""
        return next(filter(self.fits, self.candidates), self.candidates[-1])

    def after(self, failed: Sequence[MemoryPlan]) -> Candidate | None:
        """The next candidate after these plans ran out of memory; it needs less than each of them.

        None if there is none.
        """
        limit = min(
            (self.estimate.cost(plan).peak_bytes for plan in failed), default=self.budget_bytes + 1
        )
        for candidate in self.candidates:
            if candidate.peak_bytes <= _LESS * limit:
                return candidate
        last = self.candidates[-1]
        return last if last.peak_bytes < limit else None

    def describe(self, plan: MemoryPlan) -> str:
        """One of its plans in a few words, with how the weights are stored."""
        stored = replace(plan, precision=self.estimate.precision)
        return describe(stored, self.estimate.config)

    def explain(self) -> str:
        """The choice in words, with the terms of its peak and of its time."""
        cost = self.cost
        lines = [
            f"{self.describe(self.plan)}: predicted {gigabytes(cost.peak_bytes)} "
            f"of {gigabytes(self.budget_bytes)}, {cost.seconds:.1f} s"
        ]
        if self.fixed:
            lines.append(f"as requested: {', '.join(self.fixed)}")
        faster = [one for one in self.candidates if one.peak_bytes > self.budget_bytes]
        if faster:
            one = faster[0]
            lines.append(
                f"with {gigabytes(one.peak_bytes)} it would take {one.seconds:.1f} s "
                f"({self.describe(one.plan)})"
            )
        for name, terms in cost.phases.items():
            peak = ", the peak" if name == cost.peak_phase else ""
            lines.append(f"\n{name}{peak}, GB predicted\n{table(terms)}")
        lines.append(f"\nseconds predicted\n{table(cost.durations)}")
        return "\n".join(lines)


def plan(
    config: ModelConfig,
    vae: VaeShape,
    precision: Precision,
    workload: Workload,
    profile: Profile,
    budget_bytes: int,
    switches: Switches = ANY,
    current: MemoryPlan | None = None,
    kept_bytes: int = KEPT_BYTES,
    capture: bool | None = None,
) -> Decision:
    """The fastest plan that fits; of equally fast ones the smallest.

    Args:
        config: sizes of the transformer.
        vae: of the autoencoder.
        precision: of weights, arithmetic and cache.
        workload: sizes of the request.
        profile: of the device.
        budget_bytes: what may be used at most, the device's context included.
        switches: what the caller has set; never overridden, but offloading does nothing where the
            host is the device.
        current: the plan that weights are placed by now; moving them costs time.
        kept_bytes: how much to keep for the conditions of earlier requests, where there is room.
        capture: whether a step can be recorded as a CUDA graph; None for the profile's answer.

    Raises:
        MemoryBudgetError: nothing fits; says what would, and what to change.
    """
    switches = switches.for_device(profile.on_host)
    estimate = _estimate(config, vae, precision, workload, profile)
    if current is not None:
        current = replace(current, kept_bytes=0)  # moves no weights
    candidates = front(estimate, switches, current, capture)
    chosen = next((one.plan for one in candidates if one.peak_bytes <= budget_bytes), None)
    if chosen is None:
        raise _nothing_fits(estimate, switches, candidates[-1].peak_bytes, budget_bytes)
    chosen = replace(chosen, kept_bytes=_kept(estimate, chosen, budget_bytes, kept_bytes))
    return Decision(
        plan=chosen,
        cost=estimate.cost(chosen, current),
        budget_bytes=budget_bytes,
        candidates=candidates,
        fixed=tuple(f"{name}={value}" for name, value in switches.given.items()),
        estimate=estimate,
    )


@lru_cache(maxsize=64)
def front(
    estimate: Estimate,
    switches: Switches = ANY,
    current: MemoryPlan | None = None,
    capture: bool | None = None,
) -> tuple[Candidate, ...]:
    """The candidates that some budget would choose, from the fastest to the smallest.

    Arguments as for `plan`, with switches that count on the device (`Switches.for_device`).
    """
    candidates = sorted(
        _candidates(estimate, switches, current, capture), key=lambda one: (one[1], one[0])
    )
    best: list[Candidate] = []
    for peak, seconds, transformer, layers, vae in candidates:
        if not best or peak < best[-1].peak_bytes:
            best.append(Candidate(_joined(transformer, layers, vae), peak, seconds))
    return tuple(best)


def least_change(
    config: ModelConfig,
    vae: VaeShape,
    precision: Precision,
    workload: Workload,
    profile: Profile,
    budget_bytes: int,
    switches: Switches = ANY,
) -> Precision:
    """The storage that changes weights least of those whose layers can all be on the device.

    Where none can, weights stay as they are, and layers are streamed.

    Args:
        precision: with the storage that changes nothing; the others are as for `plan`.
    """
    forms = tuple(FORMS)
    if precision.quantised:
        forms = forms[forms.index(precision.storage) + 1 :]
    if switches.offload_model is None:
        switches = replace(switches, offload_model=False)
    for storage in (precision.storage, *forms):
        stored = replace(precision, storage=storage)
        with suppress(MemoryBudgetError):
            found = plan(config, vae, stored, workload, profile, budget_bytes, switches)
            if found.plan.resident_layers == config.num_layers:
                return stored
    return precision


def describe(plan: MemoryPlan, config: ModelConfig) -> str:
    """A plan in a few words."""
    layers = config.num_layers
    if plan.resident_layers == layers:
        words = ["all layers on the device"]
    else:
        streamed = layers - plan.resident_layers
        words = ["all layers streamed" if streamed == layers else f"{streamed} layers streamed"]
    if plan.precision is not None and plan.precision.quantised:
        words[0] += f" in {plan.precision.storage}"
    if plan.precision is not None and plan.precision.compute is not None:
        words[0] += f", products in {plan.precision.compute}"
    words.append(
        {
            "device": "KV cache on device",
            "ring": "KV cache streamed",
            "none": "no KV cache",
        }[plan.cache]
    )
    if plan.precision is not None and plan.precision.quantised_cache is not None:
        words[-1] += f" in {plan.precision.cache}" * (plan.cache != "none")
    if plan.branches_per_pass is not None:
        words.append(f"passes of {plan.branches_per_pass}")
    if plan.mlp_rows != MLP_ROWS:
        words.append(f"MLP {plan.mlp_rows}")
    if not plan.vae_resident:
        words.append("VAE offloaded")
    if plan.strip_rows is not None:
        words.append(f"strips of {plan.strip_rows}{' on host' * plan.strips_on_host}")
    if plan.capture:
        words.append("captured")
    return ", ".join(words)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


# Requests often have the sizes of the one before.
_estimate = lru_cache(maxsize=16)(Estimate)


def _joined(transformer: MemoryPlan, layers: int, vae: MemoryPlan) -> MemoryPlan:
    return replace(
        transformer,
        resident_layers=layers,
        vae_resident=vae.vae_resident,
        strip_rows=vae.strip_rows,
        strips_on_host=vae.strips_on_host,
    )


def _candidates(
    estimate: Estimate, switches: Switches, current: MemoryPlan | None, capture: bool | None
) -> Iterator[tuple[int, float, MemoryPlan, int, MemoryPlan]]:
    """(peak bytes, seconds, plan of the transformer, resident layers, plan of the VAE) of each.

    Bytes and seconds are sums of parts that many candidates share: thousands of sums rather than
    thousands of estimates. Those are left out whose autoencoder could work in clearly less memory
    in about the time.
    """
    layers = _layer_choices(estimate, switches)
    autoencoders = [_VaeParts(estimate, one, current) for one in _vae_plans(estimate)]
    fastest = min(vae.seconds for vae in autoencoders)
    for transformer in _transformer_plans(estimate, switches, capture):
        parts = _TransformerParts(estimate, transformer)
        for resident in layers:
            if transformer.capture and resident < estimate.config.num_layers:
                continue  # a CUDA graph can't record copies that run ahead on another stream
            weights = resident * estimate.bytes.layer_bytes
            ring = min(RING, estimate.config.num_layers - resident) * estimate.bytes.slot_bytes
            # with all resident it is there in the decode too, and counted in `parts`
            freed = estimate.bytes.expanded_bytes if ring else 0
            seconds = estimate.seconds.of_transformer(
                replace(transformer, resident_layers=resident), current
            )
            costs = []
            for vae in autoencoders:
                before = max(
                    parts.encode + vae.encode if vae.encode else 0,
                    parts.prefill + vae.resident,
                    parts.denoise + vae.resident,
                )
                peak = weights + max(before + ring, parts.decode + vae.decode - freed)
                costs.append((peak, seconds + vae.seconds))
            longest = _LONGER * (seconds + fastest)
            # strips on the device: what crosses the link takes as long as the link lets it
            near = (
                peak
                for vae, (peak, total) in zip(autoencoders, costs)
                if total <= longest and vae.stays
            )
            least = min(near, default=inf) / _LESS
            for vae, (peak, total) in zip(autoencoders, costs):
                if peak < least or total > longest:
                    yield peak, total, transformer, resident, vae.plan


class _TransformerParts:
    """Bytes of each phase without layers and VAE."""

    def __init__(self, estimate: Estimate, plan: MemoryPlan) -> None:
        # with all layers resident there is no ring; the caller adds the layers' own bytes
        plan = replace(plan, resident_layers=estimate.config.num_layers, vae_resident=False)
        layers = estimate.config.num_layers * estimate.bytes.layer_bytes
        held = total_bytes(estimate.bytes.held(plan)) - layers
        rings = total_bytes(estimate.bytes.rings(plan))
        captured = total_bytes(estimate.bytes.captured(plan))
        self.encode = held + rings + captured + estimate.bytes.times().bytes
        self.prefill = (
            total_bytes(estimate.bytes.prefill(plan)) - layers if plan.cache != "none" else 0
        )
        self.denoise = total_bytes(estimate.bytes.denoise(plan)) - layers
        self.decode = held + captured


class _VaeParts:
    """Bytes that a plan's VAE adds to each phase, and its seconds."""

    def __init__(self, estimate: Estimate, plan: MemoryPlan, current: MemoryPlan | None) -> None:
        self.plan = plan
        self.stays = plan.vae_resident and not plan.strips_on_host
        self.resident = estimate.bytes.vae_bytes * plan.vae_resident
        maps = sum(estimate.bytes.encode_maps(plan))
        self.encode = estimate.bytes.vae_bytes + maps if maps else 0
        self.decode = estimate.bytes.vae_bytes + sum(estimate.bytes.decode_maps(plan))
        self.seconds = estimate.seconds.of_vae(plan, current)


_PLAIN = MemoryPlan.plain(layers=0)  # candidates replace its values


def _layer_choices(estimate: Estimate, switches: Switches) -> Sequence[int]:
    layers = estimate.config.num_layers
    if switches.offload_model is not None:
        return (0,) if switches.offload_model else (layers,)
    return range(layers + 1)


def _transformer_plans(
    estimate: Estimate, switches: Switches, capture: bool | None
) -> Iterator[MemoryPlan]:
    most = max(map(len, estimate.workload.branches))
    passes: tuple[int | None, ...] = (None, 1) if most > 1 else (None,)
    if switches.separate_cfg_infer is not None:
        passes = (1,) if switches.separate_cfg_infer else (None,)
    if capture is None:
        capture = not estimate.on_host
    for cache, branches, rows, captured in product(
        _cache_choices(estimate, switches), passes, _MLP_CHOICES, (True, False)
    ):
        if not captured or (capture and cache == "device"):
            yield replace(
                _PLAIN, cache=cache, branches_per_pass=branches, mlp_rows=rows, capture=captured
            )


def _cache_choices(estimate: Estimate, switches: Switches) -> Sequence[CachePlace]:
    use, offload = switches.use_kv_cache, switches.offload_kv_cache
    if use is False:
        return ("none",)
    if offload is not None:
        return ("ring",) if offload else ("device",) if use else ("device", "none")
    # on the host, a ring would only add to the cache's own memory
    kept: tuple[CachePlace, ...] = ("device",) if estimate.on_host else ("device", "ring")
    return kept if use else (*kept, "none")


def _vae_plans(estimate: Estimate) -> Iterator[MemoryPlan]:
    for resident in (True,) if estimate.on_host else (True, False):
        for rows, host in _STRIP_CHOICES:
            if not host or not estimate.on_host:
                yield replace(_PLAIN, vae_resident=resident, strip_rows=rows, strips_on_host=host)


def _kept(estimate: Estimate, plan: MemoryPlan, budget_bytes: int, kept_bytes: int) -> int:
    """How much may be kept for later requests, besides what this one needs."""
    if plan.cache == "none":
        return 0
    if plan.cache == "ring":  # on the host
        return 0 if estimate.on_host else kept_bytes
    room = budget_bytes - estimate.cost(plan).peak_bytes + estimate.bytes.arena_bytes(plan)
    return min(kept_bytes, room // _KEPT_UNIT * _KEPT_UNIT)


def _nothing_fits(
    estimate: Estimate, switches: Switches, least: int, budget_bytes: int
) -> MemoryBudgetError:
    """Says how much is enough, and which switches to leave to the planner."""
    message = (
        f"this request needs at least {gigabytes(least)} of memory and "
        f"{gigabytes(budget_bytes)} can be used"
    )
    given = switches.given
    left_out = [(name,) for name in given] + ([tuple(given)] if len(given) > 1 else [])
    switched = []
    for names in left_out:
        needed = front(estimate, switches.without(*names), capture=False)[-1].peak_bytes
        if needed < _LESS * least:
            values = "all" if len(names) > 1 else f"{names[0]}={given[names[0]]}"
            switched.append(f"{values} (then {gigabytes(needed)} is enough)")
    sizes = ["height", "width"] + ["max_input_image_size"] * bool(estimate.workload.images)
    ways = [f"leave out {' or '.join(switched)}"] if switched else []
    ways.append(f"make {', '.join(sizes[:-1])} or {sizes[-1]} smaller")
    if len(estimate.workload.branches) > 1:
        ways.append("ask for fewer pictures")
    message = f"{message}; {', or '.join(ways)}"
    if len(message) > MAX_MESSAGE:
        message = message.replace(" is enough)", ")")
    return MemoryBudgetError(message, least, budget_bytes)
