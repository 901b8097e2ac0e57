"""Measured peaks against the planner's estimate, under each of the original's settings.

    python -m bench.memory_check FOLDER [--side 1024] [--steps 3] [--settings kv,...]

FOLDER holds a checkpoint with its VAE; `python -m bench.full_size FOLDER --keep` writes a random
one of full size. Each setting makes a picture from text, from one image and from two, as a user
would, in one process. A peak is what the allocator reserved at most plus the device's context; the
estimate must be within 10 % of it. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch

from omnigen_fast import OmniGenPipeline
from omnigen_fast.errors import OmniGenError

from .cases import COLUMNS, ORIGINAL_SETTINGS, Size, Task, parse_settings
from .common import machine, write_result

ALLOWED = 0.10


def context_bytes() -> int:
    """What the process holds on the device beside the allocator: context, libraries, kernels."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure(pipe: OmniGenPipeline, task: Task) -> dict[str, Any]:
    """One picture; its measured and its predicted peak."""
    on_gpu = pipe.device.type == "cuda"
    row: dict[str, Any] = {"setting": task.setting.name, "column": COLUMNS[task.images]}
    pipe.clear_cache()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    try:
        pipe(**task.arguments() | {"output_type": "pt"})
    except OmniGenError as error:
        return row | {"status": "failed", "why": str(error)}
    report = pipe.last_report
    assert report is not None and report.predicted is not None
    predicted = report.predicted
    row |= {"plan": pipe.summary().splitlines()[0], "predicted_gb": predicted.peak_bytes / 1e9}
    if report.measured_bytes is None:
        return row | {"status": "not measured"}
    measured = report.measured_bytes + context_bytes()
    error = predicted.peak_bytes / measured - 1
    row |= {"measured_gb": measured / 1e9, "error": error}
    return row | {"status": "ok" if abs(error) <= ALLOWED else "missed"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=1024, help="pixels of picture and images")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--settings", default=",".join(ORIGINAL_SETTINGS))
    given = parser.parse_args(arguments)
    pipe = OmniGenPipeline.from_pretrained(given.folder)
    size, rows = Size(given.side, given.side), []
    for setting in parse_settings(given.settings):
        for images in range(3):
            row = measure(pipe, Task(size, images, given.steps, setting=setting))
            rows.append(row)
            print(row, flush=True)
    result = {"machine": machine(), "side": given.side, "steps": given.steps, "rows": rows}
    if any(row["status"] != "not measured" for row in rows):
        write_result("memory-check", result)
    return int(any(row["status"] in ("failed", "missed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
