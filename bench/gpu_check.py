"""Everything that a GPU decides, in one command: is it right, how fast is it, what memory it takes.

    python -m bench.gpu_check [--budget 460] [--parts kernels,pictures] [--out FOLDER]

Checks every kernel and a model of the real width against higher precision, captured steps against
eager ones; times the kernels, races libraries for a step's attention, and times whole pictures by a
random model of full size, beside diffusers where that is installed. Writes
bench/results/<device>-<date>.json as it goes, prints a summary, and last the headline as one line
of JSON. Ends with 1 if a result was wrong. Nothing is extrapolated: what the time did not suffice
for is "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from datetime import date
from pathlib import Path

import torch

from .common import RESULTS
from .gpu import exact, operations, pictures, race, summary
from .gpu.measure import environment
from .gpu.run import CUT_OFF, FAILED, Part, Run, execute
from .kernels import workload

PARTS: dict[str, Part] = {
    "environment": environment,
    "kernels": exact.kernels,
    "model": exact.model,
    "pictures": pictures.pictures,
    "peer": pictures.peer,
    "operations": operations.operations,
    "attention": race.race,
}
CORRECTNESS = ("kernels", "model")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=460.0, help="seconds; 460")
    parser.add_argument("--parts", default=",".join(PARTS), help="names, with commas between")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the check itself")
    parser.add_argument(
        "--keep-winners",
        action="store_true",
        help="write who won the attention into kernels/winners.py, which attention=auto follows",
    )
    options = parser.parse_args(given)
    options.parts = options.parts.split(",")
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("on a CPU only --tiny makes sense")
    return options


def _device(name: str) -> torch.device | None:
    """The device, made the current one; None where it is not there."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


def main(given: list[str] | None = None, started: float | None = None) -> int:
    """Runs the check; returns the exit status.

    Args:
        given: arguments of the command line; None for the process's own.
        started: when the time began to count, on `time.monotonic`'s clock.
    """
    started = time.monotonic() if started is None else started
    options = _arguments(given)
    device = _device(options.device)
    if device is None:
        print("gpu_check needs an NVIDIA GPU; --device cpu --tiny tests itself", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # float32 is what others are compared with
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-tiny" if options.tiny else "")
    path = options.out / f"{slug}-{date.today().isoformat()}.json"
    run = Run(device, options.tiny, path, started + options.budget)
    run.result |= {"device": name, "date": date.today().isoformat()}
    run.result |= {"budget_seconds": options.budget, "command": sys.argv[1:]}
    execute(run, PARTS, options.parts)
    run.result["seconds"] = time.monotonic() - started
    run.result["headline"] = summary.headline(run.result)
    run.save()
    print("\n".join(summary.lines(run.result)))
    print(f"wrote {path}")
    won = run.parts.get("attention", {}).get("winners", {})
    if options.keep_winners and won:
        print(f"wrote {workload.keep_winners(name, won)}")
    print(json.dumps(run.result["headline"]))
    if run.result["state"] == "interrupted":
        return 130
    # a failed check counts even where the time was up before all were made
    wrong = [
        part
        for part in CORRECTNESS
        if run.parts[part]["status"] == FAILED
        or (
            run.parts[part]["status"] == CUT_OFF
            and any(row["status"] == FAILED for row in run.parts[part].get("rows", []))
        )
    ]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
