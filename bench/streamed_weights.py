"""Time of a step whose layers are streamed from a file that does not stay in memory, by form.

    python -m bench.streamed_weights --layers 4 --size 256

Random weights of the full width are written as a checkpoint and converted. All layers are streamed
on the CPU, and the system drops the pages of the file before each step, as it does when the file is
larger than the memory. Forms take turns, so that what else runs disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from omnigen_fast import conversion
from omnigen_fast.forms import FORMS
from omnigen_fast.memory.plan import MemoryPlan
from omnigen_fast.pipeline import OmniGenPipeline

from .common import full_config, random_weights
from .models import Model, write_checkpoint

_STREAMED = MemoryPlan.plain(layers=0)


def drop_pages(folder: Path) -> None:
    """The next read of the weights comes from the disk."""
    with open(folder / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def folders(root: Path, layers: int) -> dict[str, Path]:
    """A checkpoint of random weights in each form."""
    config = replace(full_config(), num_layers=layers)
    weights = random_weights(config, torch.bfloat16)
    plain = root / "bfloat16"
    plain.mkdir()
    write_checkpoint(Model("", config, weights, None, None), plain)
    found = {"bfloat16": plain}
    for form in FORMS:
        found[form] = root / form
        conversion.convert(str(plain), str(found[form]), weights=form)
    return found


def step_seconds(pipe: OmniGenPipeline, folder: Path, size: int, steps: int) -> list[float]:
    """Of each step but the first."""
    ends: list[float] = []

    def after_step(*_: object) -> None:
        ends.append(time.perf_counter())
        drop_pages(folder)

    pipe(
        "a cat",
        height=size,
        width=size,
        num_inference_steps=steps,
        seed=0,
        progress=False,
        output_type="latent",
        callback_on_step_end=after_step,
    )
    return [stop - start for start, stop in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; not in memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        found = folders(Path(root), options.layers)
        pipes = {
            form: OmniGenPipeline.from_pretrained(folder, device="cpu", memory=_STREAMED)
            for form, folder in found.items()
        }
        seconds: dict[str, list[float]] = {form: [] for form in found}
        for _ in range(options.rounds):
            for form, pipe in pipes.items():
                seconds[form] += step_seconds(pipe, found[form], options.size, options.steps)
    plain = statistics.median(seconds["bfloat16"])
    for form, some in seconds.items():
        took = statistics.median(some)
        print(f"{form:9} {took:8.3f} s a step, {plain / took:.2f} times as fast as bfloat16")


if __name__ == "__main__":
    main()
