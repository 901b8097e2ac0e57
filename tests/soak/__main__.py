"""The soak: `make soak N=1000`; see docs/reliability.md.

Everything follows from the seed. Ends with status 1 at the first wrong bit, and where a count or
memory grows.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .failures import exhaustive, faults, sites
from .interrupts import NOT_REACHED, interrupt_fault, interruptible
from .mixed import DTYPES, Mixed
from .repeated import repeat
from .scenarios import Models, Scenarios
from .watch import bytes_per_request, growth

POINTS = 40  # of the curve
INTERRUPTED = ("resident", "streamed", "recomputed", "dtype", "lora")


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "seed": arguments.seed,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
    }
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        models, files = Path(folder) / "models", Path(folder) / "files"
        tempfile.tempdir = str(files)  # all that is left there is ours
        files.mkdir()
        for name, part in (
            ("mixed", lambda: mixed(arguments.requests, arguments.seed, Path(folder) / "theirs")),
            ("repeated", lambda: repeated(arguments.rounds, arguments.seed)),
            ("failures", lambda: failures(models)),
            ("interrupts", lambda: interrupts(Path(folder) / "others")),
        ):
            if name in arguments.parts:
                start = time.monotonic()
                result[name] = part()
                result[name]["seconds"] = round(time.monotonic() - start)
                bad += [f"{name}: {fault}" for fault in result[name]["faults"]]
    result["ok"] = not bad
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    for fault in bad:
        print(fault, file=sys.stderr)
    print(f"{'ok' if not bad else 'FAILED'}: {arguments.out}")
    return bool(bad)


def mixed(requests: int, seed: int, folder: Path) -> dict[str, Any]:
    """Mixed requests, and the curve of what the process holds."""
    folder.mkdir()
    soak = Mixed(random.Random(seed), folder)
    every = max(1, requests // POINTS)
    curve = []
    for request in range(1, requests + 1):
        try:
            soak.step()
        except BaseException:
            print(f"request {request} of seed {seed}", file=sys.stderr)
            raise
        if request % every == 0:
            curve.append(soak.measure(request))
            _say(f"{request} requests, {curve[-1]['rss'] / 1e6:.0f} MB")
    return {
        "requests": requests,
        "kinds": dict(soak.done),
        "references": len(soak.references),
        "bytes_per_request": round(bytes_per_request(curve, "in_use")),
        "curve": curve,
        "faults": growth(curve),
    }


def repeated(rounds: int, seed: int) -> dict[str, Any]:
    """Six requests in two dtypes."""
    calls = {}
    for dtype in DTYPES:
        calls[dtype] = repeat(random.Random(seed), dtype, rounds, _every(60, f"calls in {dtype}"))
    return {"rounds": rounds, "calls": calls, "faults": []}


def failures(folder: Path) -> dict[str, Any]:
    """Memory that runs out at every single allocation."""
    scenarios = Scenarios(Models(folder))
    tried, bad = {}, []
    for name in scenarios.names:
        scenario = scenarios.make(name)
        found = exhaustive(sites(scenario))
        bad += [f"{name}: {failure}: {text}" for failure, text in faults(scenario, found)]
        tried[name] = len(found)
        _say(f"{name}: {len(found)} failures")
    return {"tried": tried, "faults": bad}


def interrupts(folder: Path) -> dict[str, Any]:
    """Ctrl-C at every line, the first and the last time that it runs."""
    scenarios = Scenarios(Models(folder))
    tried, bad = {}, []
    for name in INTERRUPTED:
        scenario = scenarios.make(name)
        found = interruptible(scenario)
        numbers = sorted({number for some in found.values() for number in (some[0], some[-1])})
        lines = {number: line for line, some in found.items() for number in some}
        for number in numbers:
            text = interrupt_fault(scenario, number)
            if text == NOT_REACHED:  # what the line does was kept by then: as it was at first
                scenario = scenarios.make(name)
                text = interrupt_fault(scenario, number)
            if text is not None:
                bad.append(f"{name}: {lines[number]}: {text}")
                scenario = scenarios.make(name)
        tried[name] = len(numbers)
        _say(f"{name}: {len(numbers)} interrupts")
    return {"tried": tried, "faults": bad}


def _every(count: int, what: str) -> Callable[[], None]:
    done = 0

    def count_one() -> None:
        nonlocal done
        done += 1
        if done % count == 0:
            _say(f"{done} {what}")

    return count_one


def _say(text: str) -> None:
    print(text, flush=True)


def _processor() -> str:
    lines: Iterable[str] = ()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="mixed ones")
    parser.add_argument("--rounds", type=int, default=100, help="of each of the six requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="soak.json", help="where the curve and counts go")
    parser.add_argument(
        "--parts", nargs="+", default=["mixed", "repeated", "failures", "interrupts"]
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
