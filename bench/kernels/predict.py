"""Predicts every kernel's time at full size on the devices of `omnigen_fast.profiles`.

    python bench/kernels/predict.py [DEVICE ...]

A prediction is a roofline with the rates that others attained on the device, not a measurement: it
says what a kernel is to be held to. Nothing is run; inputs have shapes only.
"""

from __future__ import annotations

import sys

import torch
import workload

from omnigen_fast import profiles


def predictions(devices: list[profiles.Profile]) -> list[tuple[str, list[float]]]:
    """Every operation with its predicted seconds on each device."""
    rows = []
    for name in workload.CASES:
        case = workload.build(name, torch.device("meta"), workload.FULL)
        attention = name.startswith("attention")
        rows.append((name, [one.seconds(case.bytes, case.flops, attention) for one in devices]))
    return rows


def main() -> None:
    try:
        devices = [profiles.load(name) for name in sys.argv[1:] or profiles.names()]
    except ValueError as error:
        sys.exit(str(error))
    size = workload.FULL
    print(
        f"PREDICTED, not measured: microseconds a call in bfloat16, {len(size.cached)} branches of "
        f"{size.noise} noise tokens on {', '.join(map(str, size.cached))} cached ones"
    )
    print(f"{'operation':<20}" + "".join(f"{one.name:>26}" for one in devices))
    for name, seconds in predictions(devices):
        print(f"{name:<20}" + "".join(f"{one * 1e6:>26.1f}" for one in seconds))


if __name__ == "__main__":
    main()
