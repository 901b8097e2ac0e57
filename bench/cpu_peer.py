"""A picture on the CPU, against diffusers' transformer doing the same work.

    python -m bench.cpu_peer [--steps 50] [--pictures 3]

Three cells of the table that `omnigen-fast bench` makes, with the ratios they are to reach (hidden
768, 8 heads of 96, 8 layers, MLP 2048, bfloat16, random weights). The time that operations take to
compile, once on a machine, is in no picture; it stands first.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import date

import torch
from omnigen_fast.kernels import cpu

from omnigen_fast.compilation import compiler

from .cases import Size
from .common import RESULTS, small_config
from .record import Record
from .suite import OK, Plan, run

# size, column, how many times faster a picture is to be
TARGETS = (
    (Size(512, 512), 0, 2.0),
    (Size(512, 512), 1, 4.0),
    (Size(256, 512), 1, 6.5),
)


def build_seconds() -> float | None:
    """What compiling takes where nothing is kept; None where nothing is compiled."""
    command = compiler()
    if command is None or cpu.why_not() is not None:
        return None
    start = time.perf_counter()
    cpu.Builder.of_this_cpu(command, None).library(small_config().head_dim)
    return time.perf_counter() - start


def main() -> int:
    """Measures; returns the exit status: 1 where outputs differ or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of a picture")
    parser.add_argument("--pictures", type=int, default=3, help="timed pictures of each side")
    arguments = parser.parse_args()
    plan = Plan(
        model="random:small",
        device=torch.device("cpu"),
        cells=tuple((size, column) for size, column, _ in TARGETS),
        steps=arguments.steps,
        peers=("diffusers",),
        repeat=arguments.pictures,
        cold_start=False,
        command=("python", "-m", "bench.cpu_peer", *sys.argv[1:]),
    )
    built = build_seconds()
    record = Record(RESULTS / f"cpu-peer-{date.today().isoformat()}.json", {"build_seconds": built})
    run(plan, record, print)
    print("nothing is compiled here" if built is None else f"compiling takes {built:.1f} s, once")
    status = 0
    for cell, (_, _, target) in zip(record.result["cells"], TARGETS):
        row = cell["contenders"]["diffusers"]
        if row["status"] != OK:
            print(f"{cell['size']}, {cell['column']}: {row['status']}: {row['why']}")
            status = 1
            continue
        missed = row["picture_ratio"] < target
        status = status or int(missed)
        print(
            f"{cell['size']}, {cell['column']}: picture {row['picture_ratio']:.2f}x (target "
            f"{target}x{', missed' if missed else ''}), step {row['step_ratio']:.2f}x"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
