"""Tables of what a request needs on a device, made without weights, prompts or the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..config import ModelConfig, released_sizes
from ..errors import MemoryBudgetError
from ..forms import FORMS
from ..precision import Precision
from ..profiles import DocumentedCell, Profile
from .autoencoder import VaeShape
from .cost import Cost
from .device import less_margin
from .plan import MemoryPlan, Switches, Workload, typical_workload
from .planner import Candidate, Decision, describe, gigabytes, plan
from .seconds import steps_flops


@dataclass(frozen=True)
class StepCounts:
    """How many evaluations of the model a call's steps took."""

    computed: int
    extrapolated: int
    saved_share: float  # of the operations that computing all would take

    @classmethod
    def of(cls, config: ModelConfig, workload: Workload) -> StepCounts:
        schedule = workload.schedule
        saved = steps_flops(config, workload, computed=False)
        return cls(
            computed=schedule.computed,
            extrapolated=schedule.evaluations - schedule.computed,
            saved_share=saved / steps_flops(config, workload, computed=None),
        )

    def __str__(self) -> str:
        if not self.extrapolated:
            return f"steps: all {self.computed} computed"
        return (
            f"steps: {self.computed} of {self.computed + self.extrapolated} computed; reuse saved "
            f"{self.saved_share:.0%} of their operations"
        )


@dataclass(frozen=True)
class Report:
    """How a call ran."""

    plan: MemoryPlan
    predicted: Cost | None  # None if the caller gave the plan
    cached_share: float  # of the rows that a run without a cache computes, those saved
    steps: StepCounts | None = None  # None where another program decides about steps
    measured_bytes: int | None = None  # peak that the allocator reserved; None if unknown

    def text(self, config: ModelConfig) -> str:
        """A few lines for printing."""
        lines = [describe(self.plan, config)]
        lines.append(
            f"kept between steps: {self.cached_share:.0%} of the rows of a run without cache"
        )
        if self.steps is not None:
            lines.append(str(self.steps))
        if self.predicted is not None:
            cost = self.predicted
            lines.append(
                f"predicted: peak {gigabytes(cost.peak_bytes)} ({cost.peak_phase}, including the "
                f"device's context), {cost.seconds:.1f} s"
            )
        if self.measured_bytes is None:
            lines.append("measured peak: not measured on this device")
        else:
            lines.append(f"measured peak: {gigabytes(self.measured_bytes)}, without the context")
        return "\n".join(lines)


_SHOWN = 12  # plans in a table
# The settings of the original's second table.
_SETTINGS = {
    "kv": Switches(True, False, False, False),
    "kv, offload_kv": Switches(True, True, False, False),
    "kv, offload_kv, separate_cfg": Switches(True, True, False, True),
    "kv, offload_kv, offload_model": Switches(True, True, True, False),
    "all four": Switches(True, True, True, True),
}
# Those that differ where the host is the device.
_HOST_SETTINGS = {
    "kv": Switches(use_kv_cache=True, separate_cfg_infer=False),
    "kv, separate_cfg": Switches(use_kv_cache=True, separate_cfg_infer=True),
}


@dataclass(frozen=True)
class Setting:
    """One of the original's settings: our plan under it, and what the original documents."""

    name: str
    decision: Decision | MemoryBudgetError
    documented: DocumentedCell | None


def settings(
    profile: Profile,
    workload: Workload,
    budget_bytes: int,
    precision: Precision,
    config: ModelConfig | None = None,
    vae: VaeShape | None = None,
) -> Iterator[Setting]:
    """Our plans under the original's settings, within the memory that it is documented to need."""
    config = config or released_sizes()
    vae = vae or VaeShape()
    every = _HOST_SETTINGS if profile.on_host else _SETTINGS
    for name, switches in every.items():
        cell = _documented(profile, workload, switches)
        most = budget_bytes
        if cell and cell.gigabytes is not None:
            most = min(most, cell.gigabytes * 10**9)
        decision: Decision | MemoryBudgetError
        try:
            decision = plan(
                config,
                vae,
                precision,
                workload,
                profile,
                most,
                switches,
                kept_bytes=0,
            )
        except MemoryBudgetError as error:
            decision = error
        yield Setting(name, decision, cell)


def report(
    profile: Profile, workload: Workload, decision: Decision, precision: Precision, explain: bool
) -> str:
    """The table that `omnigen-fast plan` prints."""
    config, vae = decision.estimate.config, decision.estimate.bytes.vae
    budget = decision.budget_bytes
    lines = [_headline(profile, workload, decision.budget_bytes), ""]
    lines.append("      GB        s  plan (predicted; * chosen, - does not fit)")
    for one in _selection(decision):
        mark = "-" if not decision.fits(one) else " "
        if one == decision.chosen:
            mark = "*"
        lines.append(
            f"{mark} {one.peak_bytes / 1e9:6.2f} {one.seconds:8.1f}  {decision.describe(one.plan)}"
        )
    lines += ["", "by how weights are stored, within the same memory", ""]
    lines.append("      GB        s  weights")
    stored = by_storage(profile, workload, budget, precision, config, vae)
    for storage, found in stored:
        lines.append(f"  {_cost(found)}  {storage}: {_resident(found, config)}")
    lines += [
        "",
        "under the original's settings, within the memory that it documents (ours predicted)",
        "",
    ]
    lines.append("      GB        s   documented       settings")
    for setting in settings(profile, workload, budget, precision, config, vae):
        cell = setting.documented
        lines.append(
            f"  {_cost(setting.decision)}   {cell.text if cell else '-':<15}  {setting.name}"
        )
    if explain:
        lines += ["", decision.explain()]
    return "\n".join(lines)


def by_storage(
    profile: Profile,
    workload: Workload,
    budget_bytes: int,
    precision: Precision,
    config: ModelConfig,
    vae: VaeShape | None = None,
) -> Iterator[tuple[str, Decision | MemoryBudgetError]]:
    """The fastest plan that fits for each way to store weights, the dtype's own first."""
    for storage in (precision.arithmetic, *FORMS):
        stored = replace(precision, storage=storage)
        decision: Decision | MemoryBudgetError
        try:
            decision = plan(
                config, vae or VaeShape(), stored, workload, profile, budget_bytes, kept_bytes=0
            )
        except MemoryBudgetError as error:
            decision = error
        yield storage, decision


def cards(profile: Profile, sizes: Sequence[int]) -> str:
    """What fits on cards with these many GB, for pictures of 1024 px: a Markdown table.

    Peak and streamed layers of the fastest plan of each storage.
    """
    config, precision = released_sizes(), Precision.of("bfloat16")
    names = (precision.storage, *FORMS)
    lines = [f"| card | {' | '.join(names)} |", f"| ---{' | ---' * len(names)} |"]
    for images, asked in enumerate(("text", "one image")):
        workload = typical_workload(1024, 1024, images=images)
        for size in sizes:
            budget = less_margin(size * 10**9)
            found = by_storage(profile, workload, budget, precision, config)
            cells = [f"{_cost(one).split()[0]} GB, {_resident(one, config)}" for _, one in found]
            lines.append(f"| {size} GB, {asked} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cost(decision: Decision | MemoryBudgetError) -> str:
    """Gigabytes and seconds."""
    if isinstance(decision, MemoryBudgetError):
        return "  does not fit "
    cost = decision.cost
    return f"{cost.peak_bytes / 1e9:6.2f} {cost.seconds:8.1f}"


def _resident(decision: Decision | MemoryBudgetError, config: ModelConfig) -> str:
    """Where the layers are, in a few words."""
    if isinstance(decision, MemoryBudgetError):
        return f"needs {gigabytes(decision.least_bytes)}"
    streamed = config.num_layers - decision.plan.resident_layers
    return f"{streamed} layers streamed" if streamed else "all layers on the device"


def _headline(profile: Profile, workload: Workload, budget_bytes: int) -> str:
    pictures, images = len(workload.branches), len(workload.images)
    words = [f"{workload.width} x {workload.height} px", f"{workload.steps} steps"]
    words.append(f"{pictures} pictures" if pictures > 1 else "one picture")
    if images:
        sides = sorted({f"{width} x {height}" for height, width in workload.images})
        words.append(f"{images} input image{'s' * (images > 1)} of {', '.join(sides)} px")
    return f"{profile.name}, {budget_bytes / 1e9:.2f} GB usable: {', '.join(words)}"


def _documented(profile: Profile, workload: Workload, switches: Switches) -> DocumentedCell | None:
    """The cell of the original's tables for the same request and switches."""
    if len(workload.branches) != 1 or workload.steps != 50:
        return None
    for cell in profile.documented:
        same_size = (cell.height, cell.width) == (workload.height, workload.width)
        side = cell.max_input_image_size
        same_images = workload.images == ((side, side),) * cell.images
        same_switches = switches == Switches(
            use_kv_cache=cell.use_kv_cache,
            offload_kv_cache=cell.offload_kv_cache,
            offload_model=cell.offload_model,
            separate_cfg_infer=cell.separate_cfg_infer,
        )
        if same_size and same_images and same_switches:
            return cell
    return None


def _selection(decision: Decision) -> Sequence[Candidate]:
    """The chosen candidate and some others, spread evenly from the largest to the smallest."""
    every = decision.candidates
    largest, smallest = every[0].peak_bytes, every[-1].peak_bytes
    shown = {every.index(decision.chosen), 0, len(every) - 1}
    for i in range(1, _SHOWN - 1):
        wanted = largest + (smallest - largest) * i / (_SHOWN - 1)
        shown.add(min(range(len(every)), key=lambda k: abs(every[k].peak_bytes - wanted)))
    return [every[place] for place in sorted(shown)]
