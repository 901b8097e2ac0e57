"""The command line: python -m fuzz."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .kinds import KINDS, generator, load, shares
from .runner import Found, fuzz

_SAVED = 100  # failing inputs of a kind that are written at most


def main() -> int:
    options = _options()
    first = options.first
    if options.kind:
        numbers = dict.fromkeys(options.kind, (first, first + options.number))
    else:
        numbers = {kind: (first, first + n) for kind, n in shares(options.number).items()}
    start = time.monotonic()
    found = fuzz(numbers, options.seed, options.jobs, _show if sys.stderr.isatty() else _silent)
    seconds = time.monotonic() - start
    print(_table(found))
    print(f"{sum(one.inputs for one in found.values()):,} inputs in {seconds:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    for kind, one in found.items():
        _save(kind, options.seed, one, options.out)
    result = options.result or options.out / "results.json"
    result.write_text(json.dumps(_result(found, options, seconds), indent=1) + "\n")
    faults = sum(len(one.faults) for one in found.values())
    if faults:
        print(f"{faults:,} faults; the inputs are in {options.out}")
    return min(faults, 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument(
        "--kind", action="append", help=f"may be repeated; all without it: {', '.join(KINDS)}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument(
        "--number", type=int, default=2200, help="of inputs: of each --kind, or of all together"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("fuzz-output"), help="for failing inputs")
    parser.add_argument("--result", type=Path, help="a JSON file; by default one in --out")
    return parser.parse_args()


def _show(kind: str, found: Found) -> None:
    print(f"\r{kind}: {found.inputs:,}, {len(found.faults)} faults  ", end="", file=sys.stderr)


def _silent(kind: str, found: Found) -> None:
    pass


def _table(found: dict[str, Found]) -> str:
    lines = [
        f"{'kind':<12}{'inputs':>9}{'taken':>9}{'refused':>9}{'faults':>8}"
        f"{'ms each':>9}{'slowest':>22}{'most memory':>22}"
    ]
    for kind, one in found.items():
        slowest = f"{one.slowest[0]:.2f} s ({one.slowest[1]})"
        largest = f"{one.largest[0] / 1e6:.0f} MB ({one.largest[1]})"
        each = 1e3 * one.seconds / max(1, one.inputs)
        lines.append(
            f"{kind:<12}{one.inputs:>9,}{one.taken:>9,}{one.refused:>9,}{len(one.faults):>8,}"
            f"{each:>9.1f}{slowest:>22}{largest:>22}"
        )
        seen: dict[str, list[int]] = {}
        for fault in one.faults:
            seen.setdefault(f"{fault['what'][:110]} [{fault['where']}]", []).append(fault["number"])
        ordered = sorted(seen.items(), key=lambda item: -len(item[1]))
        lines += [f"    {len(rows)} x {what}, as {rows[0]}" for what, rows in ordered[:20]]
    return "\n".join(lines)


def _save(kind: str, seed: int, found: Found, out: Path) -> None:
    """Writes failing inputs to folders KIND-SEED-NUMBER."""
    if not found.faults:
        return
    with tempfile.TemporaryDirectory() as scratch:
        maker = load(kind, Path(scratch))
        for fault in found.faults[:_SAVED]:
            number = fault["number"]
            folder = out / f"{kind.replace(':', '-')}-{seed}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "fault.txt").write_text(f"{fault['what']}\n{fault['where']}\n")
            maker.save(maker.make(generator(kind, seed, number), number), folder)


def _result(found: dict[str, Found], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    import PIL
    import safetensors
    import tokenizers
    import torch

    import omnigen_fast

    return {
        "date": datetime.date.today().isoformat(),
        "version": omnigen_fast.__version__,
        "seed": options.seed,
        "jobs": options.jobs,
        "seconds": round(seconds),
        "processor": _processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "safetensors": safetensors.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "kinds": {kind: asdict(one) for kind, one in found.items()},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
