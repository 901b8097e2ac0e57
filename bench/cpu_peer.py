"""A step and a picture on the CPU, against diffusers' transformer doing the same work.

    python -m bench.cpu_peer [--steps 50] [--pictures 3]

Three cells of the table that `omnigen-fast bench` makes, with the ratios they are to reach (hidden
768, 8 heads of 96, 8 layers, MLP 2048, bfloat16, random weights).
"""

from __future__ import annotations

import argparse
import sys
from datetime import date

import torch

from .cases import Size
from .common import RESULTS
from .record import Record
from .suite import OK, Plan, run

# size, column, how many times faster a step is to be
TARGETS = (
    (Size(512, 512), 0, 1.3),
    (Size(512, 512), 1, 3.0),
    (Size(256, 512), 1, 5.0),
)


def main() -> int:
    """Measures; returns the exit status."""
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
    record = Record(RESULTS / f"cpu-peer-{date.today().isoformat()}.json", {})
    run(plan, record, print)
    for cell, (_, _, target) in zip(record.result["cells"], TARGETS):
        row = cell["contenders"]["diffusers"]
        if row["status"] != OK:
            print(f"{cell['size']}, {cell['column']}: {row['status']}: {row['why']}")
            return 1
        print(
            f"{cell['size']}, {cell['column']}: step {row['step_ratio']:.2f}x (target {target}x), "
            f"picture {row['picture_ratio']:.2f}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
