"""Tables of what a request needs on a device, made without weights, prompts or the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..config import ModelConfig, released_sizes
from ..errors import MemoryBudgetError
from ..forms import FORMS
from ..parameters import parameter_shapes
from ..precision import Precision
from ..profiles import DocumentedCell, Profile, lowest, spread
from .autoencoder import VaeShape, weight_bytes
from .cost import Cost, Estimate
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
    process_bytes: int | None = None  # on a CPU: the process's peak since its start
    measured_seconds: float | None = None  # without earlier attempts that ran out of memory

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
            peak = gigabytes(cost.peak_bytes - cost.kept_bytes)
            kept = f", and {gigabytes(cost.kept_bytes)} for later calls" * bool(cost.kept_bytes)
            lines.append(
                f"predicted: peak {peak} ({cost.peak_phase}, including the device's "
                f"context){kept}, {cost.seconds:.1f} s"
            )
        if self.measured_bytes is not None:
            lines.append(f"measured peak: {gigabytes(self.measured_bytes)}, without the context")
        elif self.process_bytes is not None:
            peak = gigabytes(self.process_bytes)
            lines.append(f"measured peak: {peak}, of the whole process since its start")
        else:
            lines.append("measured peak: not measured on this device")
        if self.measured_seconds is not None:
            lines.append(f"measured: {self.measured_seconds:.1f} s{self._against_predicted()}")
        return "\n".join(lines)

    def _against_predicted(self) -> str:
        if self.predicted is None or not self.measured_seconds or not self.predicted.seconds:
            return ""
        ratio = self.measured_seconds / self.predicted.seconds
        if not 0.5 < ratio < 2:
            return f", {ratio:.2g} times the prediction"
        return f", {abs(ratio - 1):.0%} {'more' if ratio > 1 else 'less'} than predicted"


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
    lines += _plans(profile, decision)
    lines += ["", "by how weights are stored, within the same memory", ""]
    lines.append("      GB        s  weights")
    stored = by_storage(profile, workload, budget, precision, config, vae)
    for storage, found in stored:
        lines.append(f"  {_cost(found)}  {storage}: {_resident(found, config)}")
    lines += ["", "other formats than the first change pictures a little: docs/precision.md"]
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
    lines += ["", "documented: GB and time in the original's own guide; OOM: out of memory there"]
    if explain:
        lines += ["", decision.explain()]
    return "\n".join(lines)


def _plans(profile: Profile, decision: Decision) -> Iterator[str]:
    """The table of plans, and what its columns mean."""
    estimate, bounds = decision.estimate, spread(profile)
    bounding = [
        Estimate(estimate.config, estimate.vae, estimate.precision, estimate.workload, one)
        for one in bounds or ()
    ]
    host = "" if profile.on_host else "    host"
    columns = f"      GB{host}        s{'   from     to' * bool(bounding)}"
    yield f"{columns}  plan (predicted; * chosen, - does not fit)"
    for one in _selection(decision):
        mark = "-" if not decision.fits(one) else " "
        if one == decision.chosen:
            mark = "*"
        line = f"{mark} {one.peak_bytes / 1e9:6.2f}"
        if host:
            line += f"  {estimate.bytes.host_bytes(one.plan) / 1e9:6.2f}"
        line += f" {one.seconds:8.1f}"
        line += "".join(f" {bound.seconds.of(one.plan):6.1f}" for bound in bounding)
        yield f"{line}  {decision.describe(one.plan)}"
    yield ""
    yield "GB: peak on the device, with its context"
    if host:
        yield "host: GB of the host's memory, without the process itself"
    yield "s: seconds at the rates that programs attain on the device (its profile has the sources)"
    if bounding:
        least = lowest(profile).name.removeprefix("NVIDIA ")
        yield "from, to: at the limits of its data sheet; at the shares of them that the"
        yield f"{least} attains, or its own if lower, over half the link. Nothing here is measured"
    else:
        yield "no range is known: the rates are stand-ins, and other processors differ by far"
    released, converted = (_on_disk(estimate, dtype) / 1e9 for dtype in ("float32", "bfloat16"))
    yield (
        f"disk: {released:.1f} GB as released (float32), {converted:.1f} GB after omnigen-fast "
        "convert (bfloat16)"
    )


def _on_disk(estimate: Estimate, dtype: str) -> int:
    """Bytes of a model folder: the weights in a dtype, and the autoencoder in float32."""
    elements = sum(math.prod(shape) for shape in parameter_shapes(estimate.config).values())
    value_bytes = Precision.of(dtype).arithmetic_bytes
    return elements * value_bytes + weight_bytes(VaeShape())


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
