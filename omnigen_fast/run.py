"""One call from its plan to its images: which plan, and the next one where memory runs out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .call import Call, Memory
from .engine import Engine
from .errors import MemoryBudgetError, OmniGenError, OutOfMemoryError, first_line
from .memory.cost import Cost, Estimate
from .memory.device import free_bytes, on_host, parse_memory, process_peak_bytes, profile_of
from .memory.overview import Report, StepCounts
from .memory.plan import MemoryPlan, Switches, Workload, first_workload, typical_workload
from .memory.planner import Candidate, Decision, describe, front, least_change
from .memory.planner import plan as fastest_plan
from .parallel.group import Group
from .parallel.layout import Layout
from .parallel.planner import choose_layout
from .precision import Precision
from .streaming import is_out_of_memory
from .vae.vae import Vae
from .weights.checkpoint import Checkpoint

_log = logging.getLogger("omnigen_fast")

SMALLER = "make height and width smaller, or ask for fewer pictures per call"
LESS_MEMORY = "give a smaller amount as memory, by which all ranks plan"
LESS_RESIDENT = "free some, or give a memory plan with fewer layers on the device"

# Called after each step with its index and the latents, which it may change in place; returns
# whether to go on.
AfterStep = Callable[[int, Tensor], bool]


@contextmanager
def naming_memory(place: str, remedy: str) -> Iterator[None]:
    """Raises OutOfMemoryError where memory runs out inside: what failed, and what helps."""
    try:
        yield
        return
    except Exception as error:
        if isinstance(error, OmniGenError) or not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Here, not in the handler: the traceback holds tensors.
    raise OutOfMemoryError(f"out of memory {place} ({reason}); {remedy}")


def generate(
    engine: Engine,
    call: Call,
    memory: Memory,
    after_step: AfterStep,
    started: Callable[[Report], None],
) -> Tensor:
    """Carries out a call; where memory runs out, goes on from the last finished step.

    Args:
        engine: which nothing else drives meanwhile.
        call: to carry out.
        memory: an amount or a plan.
        after_step: see `AfterStep`.
        started: called with each plan once everything is where it wants it, and again with what
            was measured.

    Returns:
        Images [pictures, 3, height, width] in [0, 1], or latents where the request wants them.

    Raises:
        OmniGenError: no plan has enough memory, or the result is no picture.
    """
    for plan, predicted in _plans(engine, call, memory):
        try:
            return _carry_out(engine, call, plan, predicted, after_step, started)
        except BaseException as error:  # an interrupt from the keyboard too
            engine.recover()
            if call.calling_back or not is_out_of_memory(error):
                raise
            call.failures.append(first_line(error))
        # Here, not in the handler: the traceback holds the step's tensors.
        engine.free()
        if engine.placement.group is not None:  # the others are in the middle of a step
            raise OmniGenError(f"out of memory ({call.failures[-1]}); {SMALLER}, or {LESS_MEMORY}")
    raise AssertionError("the last plan fails with its own error")


def _carry_out(
    engine: Engine,
    call: Call,
    plan: MemoryPlan,
    predicted: Cost | None,
    after_step: AfterStep,
    started: Callable[[Report], None],
) -> Tensor:
    cached_share = 0.0 if plan.cache == "none" else call.workload().cached_share()
    report = Report(plan, predicted, cached_share, StepCounts.of(engine.config, call.workload()))
    on_gpu = engine.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(engine.device)
    begun = call.steps_done
    start = time.perf_counter()
    try:
        running = engine.start(call, plan)
        started(report)
        while not running.finished:
            engine.step(running)
            call.calling_back = True
            goes_on = after_step(call.steps_done - 1, running.latents)
            call.calling_back = False
            running.save()
            call.finished |= not goes_on
        result = engine.finish(running)
    finally:
        engine.end(call)
    if call.request.output_type == "latent":
        result = result.clone()
    else:
        result = engine.decode(result, plan)
        if call.request.edit is not None:
            result = call.request.edit.compose_(result)
    if on_gpu:
        torch.cuda.current_stream(engine.device).synchronize()
        report = replace(report, measured_bytes=torch.cuda.max_memory_reserved(engine.device))
    elif engine.device.type == "cpu":
        report = replace(report, process_bytes=process_peak_bytes())
    if not begun:
        report = replace(report, measured_seconds=time.perf_counter() - start)
    started(report)
    return result


def _plans(engine: Engine, call: Call, memory: Memory) -> Iterator[tuple[MemoryPlan, Cost | None]]:
    """What to try, one after the other as memory runs out; ends with one line that says so."""
    if isinstance(memory, MemoryPlan):
        plan = _given(memory, call.request.switches, engine)
        yield replace(plan, precision=call.precision), None
        raise OmniGenError(
            f"out of memory with the plan that was given ({call.failures[-1]}); give "
            'memory="auto" or a plan that needs less'
        )
    group = engine.placement.group
    if group is not None:
        memory = group.least(budget_of(engine, memory))  # so that all ranks decide alike
    decision = decide(engine, call.workload(), call.request.switches, memory, call.precision)
    following: MemoryPlan | None = decision.plan
    failed: list[MemoryPlan] = []
    while following is not None:
        yield replace(following, precision=call.precision), decision.estimate.cost(following)
        failed.append(following)
        candidate = decision.after(failed)
        following = None if candidate is None else candidate.plan
        if following is not None:
            _log.warning(
                "out of memory in spite of the plan (%s); it goes on with: %s",
                call.failures[-1],
                describe(following, engine.config),
            )
    raise OmniGenError(
        f"out of memory with every plan for this request ({call.failures[-1]}); {SMALLER}"
    )


def budget_of(engine: Engine, memory: str | int = "auto") -> int:
    """Bytes that a plan may use."""
    budget = parse_memory(memory)
    if budget is None:
        budget = free_bytes(engine.device, profile_of(engine.device), engine.held_bytes())
    return budget


def _given(plan: MemoryPlan, switches: Switches, engine: Engine) -> MemoryPlan:
    """The plan that the caller gave, with the call's own switches.

    Raises RequestError if the model can't run so.
    """
    layers = engine.config.num_layers
    plan = switches.for_device(on_host(engine.device)).applied_to(plan, layers)
    plan.check(layers)
    return plan


def decide(
    engine: Engine,
    workload: Workload,
    switches: Switches,
    memory: Memory,
    precision: Precision,
) -> Decision:
    """What would carry out a request on this engine, and what else there was to choose from.

    Raises:
        RequestError: `memory` is no amount.
        MemoryBudgetError: no plan fits.
    """
    profile = profile_of(engine.device)
    budget = budget_of(engine, "auto" if isinstance(memory, MemoryPlan) else memory)
    if isinstance(memory, MemoryPlan):
        plan = _given(memory, switches, engine)
        estimate = Estimate(engine.config, engine.vae.shape, precision, workload, profile)
        cost = estimate.cost(plan, engine.arrangement)
        candidate = Candidate(plan, cost.peak_bytes, cost.seconds)
        return Decision(plan, cost, budget, (candidate,), (), estimate)
    return fastest_plan(
        engine.config,
        engine.vae.shape,
        precision,
        workload,
        profile,
        budget,
        switches,
        current=engine.arrangement,
        kept_bytes=engine.cache_bytes,
        capture=engine.graphs.possible(),
    )


def common_memory(memory: Memory, device: torch.device, group: Group | None) -> Memory:
    """`memory` as all ranks take it: the amount of the one that has the least."""
    if group is None or isinstance(memory, MemoryPlan):
        return memory
    budget = parse_memory(memory)
    return group.least(free_bytes(device, profile_of(device)) if budget is None else budget)


def fastest_layout(
    group: Group, checkpoint: Checkpoint, vae: Vae, precision: Precision, plan: MemoryPlan
) -> None:
    """Divides the work of a group as is predicted to be fastest, by rank 0's device.

    One picture of 1024 px from text and one with an input image are to take least together: a
    layout is kept as long as the model, whatever is asked of it.
    """
    config, profile = checkpoint.config, profile_of(group.device)
    side = first_workload(config).height
    estimates = [
        Estimate(
            config,
            vae.shape,
            precision,
            typical_workload(side, side, images=images, config=config),
            profile,
        )
        for images in (0, 1)
    ]
    chosen = choose_layout(estimates, plan, group.size)
    (branches,) = group.agree(chosen.branches if group.leads else 0)
    group.use(Layout(branches, group.size // branches))


def first_plan(
    checkpoint: Checkpoint,
    vae: Vae,
    precision: Precision,
    device: torch.device,
    memory: Memory,
) -> MemoryPlan:
    """Where weights are loaded to, before there is a request: as for one picture of 1024 px."""
    config = checkpoint.config
    if isinstance(memory, MemoryPlan):
        memory.check(config.num_layers)
        return memory
    workload = first_workload(config)
    profile = profile_of(device)
    budget = parse_memory(memory)
    budget = free_bytes(device, profile) if budget is None else budget
    try:
        return fastest_plan(config, vae.shape, precision, workload, profile, budget).plan
    except MemoryBudgetError:  # a smaller picture may fit
        estimate = Estimate(config, vae.shape, precision, workload, profile)
        return front(estimate, capture=False)[-1].plan


def auto_precision(
    checkpoint: Checkpoint, vae: Vae, own: Precision, device: torch.device, memory: Memory
) -> Precision:
    """What `weights="auto"` means; see `planner.least_change`.

    A plan that the caller gave has as many layers on the device as it says, whatever they take.

    Args:
        own: with the weights as the checkpoint has them.
    """
    if isinstance(memory, MemoryPlan):
        return own
    config, profile = checkpoint.config, profile_of(device)
    budget = parse_memory(memory)
    budget = free_bytes(device, profile) if budget is None else budget
    found = least_change(config, vae.shape, own, first_workload(config), profile, budget)
    if found != own:
        _log.warning(
            "weights are stored in %s, so that all layers fit on the device", found.storage
        )
    return found
