"""Clocks, samples, and the machine in words."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from omnigen_fast.graph import capture_cuda
from omnigen_fast.memory.device import capability_of

from ..common import ROOT
from .run import Run, first_line

# bfloat16, dense, operations a second, from the vendors' datasheets; by a part of the device's name
_DATASHEET = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A800": 312e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "RX 7900 XTX": 122.8e12,
    "RX 9070 XT": 195e12,
}


class Clock:
    """Times between marks in the device's stream, by CUDA events where there are some."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """A place in the stream of work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Seconds from one mark to another; waits for the second."""
        if self.device.type != "cuda":
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def wait(self) -> float:
        """Waits for all work, and tells the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def described(samples: Sequence[float]) -> dict[str, Any]:
    """Seconds in numbers: median, quartile distance, extremes."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [0.0, 0.0, 0.0]
    return {
        "seconds": statistics.median(samples),
        "spread": quartiles[2] - quartiles[0],
        "lowest": min(samples),
        "highest": max(samples),
        "samples": len(samples),
    }


def sample(
    work: Callable[[], object], clock: Clock, budget: float, capture: bool
) -> tuple[dict[str, Any], str]:
    """Times of `work`, and how it was launched.

    On a GPU several runs are captured in one graph where that is possible, as a step is: launched
    one by one, short kernels would be as slow as Python.
    """
    work()
    start = clock.wait()
    work()
    once = clock.wait() - start
    repeats = max(1, min(50, int(0.01 / max(1e-7, once))))

    def several() -> None:
        for _ in range(repeats):
            work()

    run, how = several, "launched one by one"
    if capture and clock.device.type == "cuda":
        try:
            run, how = capture_cuda(several, clock.device), "captured"
        except RuntimeError as error:
            how += f" ({first_line(error)})"
    run()
    samples: list[float] = []
    begin = clock.wait()
    while len(samples) < 5 or (time.perf_counter() - begin < budget and len(samples) < 200):
        first = clock.mark()
        run()
        samples.append(clock.between(first, clock.mark()) / repeats)
    return described(samples), how


def datasheet_rate(device: torch.device) -> float | None:
    """Operations a second in bfloat16 that the vendor names; None where it is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _DATASHEET.items() if part in name), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """What a program prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_SMI = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and temperature now, as nvidia-smi has them."""
    if device.type != "cuda":
        return None
    query = (f"--query-gpu={_SMI}", "--format=csv,noheader", f"--id={device.index or 0}")
    said = _said("nvidia-smi", *query)
    return dict(zip(_SMI.split(","), said.split(", "))) if said else None


def environment(run: Run, found: dict[str, Any]) -> None:
    """What the numbers come from, and the two limits that they are compared with."""
    device = run.device
    found.update(
        python=platform.python_version(),
        platform=platform.platform(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        versions={
            name: _version(name) for name in ("torch", "triton", "numpy", "tokenizers", "diffusers")
        },
        commit=_said("git", "rev-parse", "HEAD"),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
    )
    if run.on_gpu:
        properties = torch.cuda.get_device_properties(device)
        found.update(
            device=properties.name,
            capability=capability_of(device),
            multiprocessors=properties.multi_processor_count,
            memory_gb=properties.total_memory / 1e9,
            free_gb=torch.cuda.mem_get_info(device)[0] / 1e9,
            cudnn=torch.backends.cudnn.version(),
            driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            clocks_before=clocks(device),
        )
    else:
        found["device"] = f"CPU, {platform.machine()}"
    run.save()
    limits = run.limits
    found.update(
        copy_bytes_per_second=limits.bytes_per_second,
        product_flops_per_second=limits.flops_per_second,
        datasheet_flops_per_second=datasheet_rate(device),
        clocks_after=clocks(device),
    )
