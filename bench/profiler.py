"""Where the time of a step goes and how much could be gained: a trace and a table.

Steps are not captured, so that operations can be told apart. An operation's limit is a roofline
with the copy bandwidth and product rate measured in the same run; what could be gained is the time
above it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from .cases import COLUMNS, Size, Task
from .common import machine
from .contenders import make_start
from .counts import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    NORMS,
    OURS,
    PRODUCTS,
    Operation,
    count,
    wrapped_operations,
)
from .kernels.workload import Limits, measure_limits
from .models import Model
from .record import write_whole
from .report import aligned

LAUNCHES = "launches"  # time between operations, while the device waits for the host
_STEP, _OURS = "omnigen_fast::step", "omnigen_fast::"
_STEPS = 3
_PRODUCT_EVENTS = {"linear", "mm", "addmm", "matmul", "bmm", "conv2d"}
_COPY_EVENTS = {"to", "copy_", "clone", "contiguous", "index_select", "index_copy_", "index"}
_COPY_EVENTS |= {"_to_copy", "cat", "reshape", "flatten"}
# Parts of GPU kernels' names; the first match wins.
_KERNELS = (
    ("memcpy", COPIES),
    ("memset", COPIES),
    ("attention", ATTENTION),
    ("flash", ATTENTION),
    ("fmha", ATTENTION),
    ("norm", NORMS),
    ("scaled_mm", PRODUCTS),
    ("modulate", NORMS),
    ("rope", ELEMENTWISE),
    ("swiglu", ELEMENTWISE),
    ("quantise", ELEMENTWISE),
    ("guidance", ELEMENTWISE),
    ("gemm", PRODUCTS),
    ("nvjet", PRODUCTS),
    ("cutlass", PRODUCTS),
    ("splitk", PRODUCTS),
    ("cublas", PRODUCTS),
    ("copy", COPIES),
    ("index", COPIES),
    ("gather", COPIES),
    ("scatter", COPIES),
)


def family_of_event(name: str) -> str:
    """The family of a host event: one of our operations or of PyTorch's."""
    if name.startswith(_OURS):
        return OURS[name.removeprefix(_OURS)]
    short = name.rpartition("::")[2]
    if short in _PRODUCT_EVENTS:
        return PRODUCTS
    return COPIES if short in _COPY_EVENTS else ELEMENTWISE


def family_of_kernel(name: str) -> str:
    """The family of a GPU's kernel."""
    lower = name.lower()
    return next((family for part, family in _KERNELS if part in lower), ELEMENTWISE)


def profile(
    model: Model,
    size: Size,
    steps: int,
    command: tuple[str, ...],
    columns: tuple[str, ...] = COLUMNS,
) -> dict[str, Any]:
    """Profiles steps of some columns.

    Returns a result for JSON; `traces` maps each column to its Chrome trace, for `write`.
    """
    device = model.ours.pipe.device
    limits = measure_limits(device, torch.bfloat16)
    result: dict[str, Any] = {
        "machine": machine(),
        "command": list(command),
        "model": model.name,
        "size": str(size),
        "copy_bytes_per_second": limits.bytes_per_second,
        "product_flops_per_second": limits.flops_per_second,
        "columns": {},
        "traces": {},
    }
    for column in columns:
        images = COLUMNS.index(column)
        task = Task(size, images, max(steps, _STEPS + 1))
        spent, seconds, traced = _measure(model, task)
        counted = count(model.config, task).step
        result["columns"][column] = {
            "step_seconds": seconds,
            "families": _families(spent, seconds, counted.operations, limits),
            "operations": _operations(spent, counted.operations, limits),
        }
        result["traces"][column] = traced
    return result


@torch.no_grad()
def _measure(model: Model, task: Task) -> tuple[list[tuple[str, str, float]], float, Any]:
    """(family, name, seconds) of each event in a step, the step's seconds, and the trace."""
    pipe, engine = model.ours.pipe, model.ours.pipe.engine
    arguments = task.arguments() | {"latents": make_start(pipe, task).noise}
    on_gpu = pipe.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    profiler = torch_profile(activities=activities)
    seconds: list[float] = []

    def named(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **more: Any) -> Any:
            with record_function(_OURS + name):
                return run(*args, **more)

        return recorded

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize(pipe.device)
        return time.perf_counter()

    plan = replace(pipe.plan(**arguments).plan, capture=False)
    running = engine.start(pipe.make_call(**arguments), plan)
    try:
        engine.step(running)  # compiles, and warms up
        wait()
        with wrapped_operations(named), profiler:
            for _ in range(_STEPS):
                before = wait()
                with record_function(_STEP):
                    engine.step(running)
                seconds.append(wait() - before)
    finally:
        engine.drop(running)
    events = profiler.events()
    spent = _kernels(events) if on_gpu else _events(events)
    return [(*one, time / _STEPS) for *one, time in spent], sum(seconds) / _STEPS, profiler


def _events(events: Iterable[Any]) -> list[tuple[str, str, float]]:
    """Host: the outermost events of the steps."""
    return [
        (family_of_event(event.name), event.name.removeprefix(_OURS), event.cpu_time_total / 1e6)
        for event in events
        if event.cpu_parent is not None and event.cpu_parent.name == _STEP
    ]


def _kernels(events: Iterable[Any]) -> list[tuple[str, str, float]]:
    """GPU: every kernel and copy."""
    return [
        (family_of_kernel(event.name), event.name, event.time_range.elapsed_us() / 1e6)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name != _STEP
    ]


def _row(name: str, seconds: float, operations: list[Operation], limits: Limits) -> dict[str, Any]:
    """A line of a table; calls, bytes and FLOPs come from `counts`."""
    floor = sum(
        max(one.bytes / limits.bytes_per_second, one.flops / limits.flops_per_second)
        for one in operations
    )
    launches = len(operations)
    return {
        "name": name,
        "seconds": seconds,
        "calls": launches,
        "bytes_per_call": sum(one.bytes for one in operations) / max(1, launches),
        "flops_per_call": sum(one.flops for one in operations) / max(1, launches),
        "limit_seconds": floor,
        "to_gain_seconds": seconds - floor,
    }


def _families(
    spent: list[tuple[str, str, float]],
    seconds: float,
    operations: Iterable[Operation],
    limits: Limits,
) -> list[dict[str, Any]]:
    """Time, work and limit of each family in a step, the largest gain first."""
    rows = []
    for family in (PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, COPIES):
        mine = [one for one in operations if one.family == family]
        times = [time for kind, _, time in spent if kind == family]
        name = "transfers" if family == COPIES else family
        rows.append(_row(name, sum(times), mine, limits))
    between = max(0.0, seconds - sum(time for _, _, time in spent))
    launches = _row(LAUNCHES, between, [], limits)
    rows.append(launches | {"calls": sum(row["calls"] for row in rows)})
    return sorted(rows, key=lambda row: -row["to_gain_seconds"])


def _operations(
    spent: list[tuple[str, str, float]], operations: Iterable[Operation], limits: Limits
) -> list[dict[str, Any]]:
    """The same for each operation by its name."""
    operations = list(operations)
    rows = []
    for name in dict.fromkeys(name for _, name, _ in spent):
        times = [time for _, one, time in spent if one == name]
        short = name.rpartition("::")[2].removesuffix("_kernel")
        mine = [one for one in operations if one.name == short]
        rows.append(_row(short, sum(times), mine, limits))
    return sorted(rows, key=lambda row: -row["to_gain_seconds"])


def lines(result: dict[str, Any]) -> list[str]:
    """The tables."""
    said = [
        f"{result['model']}, {result['size']}, a step, not captured; limits: "
        f"{result['copy_bytes_per_second'] / 1e9:.3g} GB/s copied, "
        f"{result['product_flops_per_second'] / 1e12:.3g} TFLOP/s in a product"
    ]
    for column, found in result["columns"].items():
        rows = [
            ["family", "ms", "of the step", "calls", "MB/call", "GFLOP/call", "limit ms", "to gain"]
        ]
        for row in found["families"]:
            rows.append(
                [
                    row["name"],
                    f"{row['seconds'] * 1e3:.2f}",
                    f"{row['seconds'] / found['step_seconds']:.0%}",
                    str(row["calls"]),
                    f"{row['bytes_per_call'] / 1e6:.2f}",
                    f"{row['flops_per_call'] / 1e9:.2f}",
                    f"{row['limit_seconds'] * 1e3:.2f}",
                    f"{row['to_gain_seconds'] * 1e3:.2f} ms",
                ]
            )
        said += ["", f"{column}: {found['step_seconds'] * 1e3:.2f} ms a step", *aligned(rows)]
        if len(found["operations"]) > 0:
            top = ", ".join(
                f"{row['name']} {row['to_gain_seconds'] * 1e3:.2f} ms"
                for row in found["operations"][:4]
            )
            said.append(f"most to gain in: {top}")
    return said


def write(result: dict[str, Any], path: Path) -> list[str]:
    """Writes the result and a Chrome trace of each column beside it; returns what to print.

    Raises OSError where a file can't be written.
    """
    said = lines(result)
    traces = result.pop("traces")
    result["traces"] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for column, traced in traces.items():
        file = path.with_suffix(f".{column.replace(' ', '-')}.trace.json.gz")
        traced.export_chrome_trace(str(file))
        result["traces"][column] = file.name
        said.append(f"wrote {file}")
    write_whole(path, json.dumps(result, indent=1) + "\n")
    return [*said, f"wrote {path}"]
