"""Counts how close attention and products in 8 bits can come to the matrix units' rate, by GPU.

    python -m bench.kernels.bounds            # compiles, counts, compares with pipes.json
    python -m bench.kernels.bounds --write    # accepts the counts, spills in loops aside

Counted from machine code with the model in `pipes.py`; nothing is run, and no GPU is needed. Fails
where a bound has fallen by more than a point, fewer CTAs share a multiprocessor, or a loop spills.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ahead, pipes

COMMITTED = Path(__file__).with_name("pipes.json")
BEGIN, END = "<!-- bounds: begin -->", "<!-- bounds: end -->"
_SLACK = 0.01
_BOUNDS = ("overlapped", "separate")


def cases() -> Iterator[ahead.Case]:
    """What multiplies on matrix units."""
    return (case for case in ahead.cases() if case.is_bounded)


def count(case: ahead.Case, code: ahead.Compiled) -> dict[str, Any]:
    """What `pipes.json` keeps of a case."""
    assert code.turn
    tile = _tile(case, code)
    cycles = pipes.cycles(case.capability, code.turn, tile)
    bounds = pipes.bounds(case.capability, code.turn, tile, code.ctas)
    return {
        "config": code.config,
        "registers": code.registers,
        "ctas": code.ctas,
        "loop_spills": code.loop_spills,
        "cycles": {pipe: round(value) for pipe, value in cycles.items()},
        **{name: round(getattr(bounds, name), 4) for name in _BOUNDS},
    }


def _tile(case: ahead.Case, code: ahead.Compiled) -> pipes.Tile | pipes.ProductTile:
    if case.is_attention:
        return pipes.Tile(code.block_m, code.block_n, case.head_dim, code.warps)
    return pipes.ProductTile(code.block_m, code.block_n, code.block_k, code.warps, case.form)


def read_committed() -> dict[str, Any]:
    """The version of Triton that compiled, and the counts of each case by its id."""
    return json.loads(COMMITTED.read_text())


def worse(found: dict[str, Any], committed: dict[str, Any] | None) -> list[str]:
    """How a case's counts are worse than the committed ones; empty where they are not."""
    lines = []
    if found["loop_spills"]:
        lines.append(f"{found['loop_spills']} accesses to spilled registers in loops")
    if committed is None:
        return [*lines, "no committed counts"]
    for name in _BOUNDS:
        if found[name] < committed[name] - _SLACK:
            lines.append(f"{name}: {found[name]:.1%}, committed {committed[name]:.1%}")
    if found["ctas"] < committed["ctas"]:
        lines.append(f"CTAs: {found['ctas']}, committed {committed['ctas']}")
    return lines


_SIZES = ("block_m", "block_n", "block_k")
_HEAD = ("kernel", "head", "GPU", "tile", "CTAs", *pipes.PIPES, *_BOUNDS)


def rows(counts: dict[str, Any], head_dim: int = 0) -> list[tuple[str, ...]]:
    """A table with its head: cycles of each pipe for a turn, and the bounds.

    Args:
        counts: `cases` of `pipes.json`.
        head_dim: of the rows that have one; 0 for all.
    """
    found = [_HEAD]
    for case in cases():
        if case.id in counts and (not head_dim or case.head_dim in (0, head_dim)):
            one = counts[case.id]
            settings = dict(part.split("=") for part in one["config"].split())
            sizes = " x ".join(settings[key] for key in _SIZES if key in settings)
            tile = sizes + ", {num_warps} warps, {num_stages} stages"
            found.append(
                (
                    _label(case),
                    str(case.head_dim or "-"),
                    f"sm_{case.capability}",
                    tile.format(**settings),
                    str(one["ctas"]),
                    *(f"{one['cycles'][pipe]:,}" for pipe in pipes.PIPES),
                    *(f"{one[name]:.1%}" for name in _BOUNDS),
                )
            )
    return found


def _label(case: ahead.Case) -> str:
    name = case.kernel.removeprefix("attention_") + f", {case.form}" * bool(case.form)
    return f"{name}, maps" if case.tensor_maps else name


def markdown() -> str:
    """The committed counts of the released model's heads, and of products in 8 bits."""
    committed = read_committed()
    head, *rest = rows(committed["cases"], ahead.HEAD_DIM)
    lines = [
        f"Attention with heads of {ahead.HEAD_DIM} in bfloat16 and products in 8 bits, *counted* "
        f"from what Triton {committed['triton']} compiles: cycles of a multiprocessor's pipes for "
        "one turn of a CTA's main loop, and the share of the matrix units' rate that is left.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rest),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compares or writes the counts; returns the exit status."""
    if sys.argv[1:] not in ([], ["--write"]):
        print("usage: python -m bench.kernels.bounds [--write]", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # a process that interprets can't compile
    import triton

    found = {case.id: count(case, ahead.compile_case(case)) for case in cases()}
    table = rows(found)
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    writing = bool(sys.argv[1:])
    committed = {"triton": triton.__version__, "cases": found} if writing else read_committed()
    lines = [
        f"{name}: {line}"
        for name, one in found.items()
        for line in worse(one, committed["cases"].get(name))
    ]
    for line in lines:
        print(f"worse: {line}", file=sys.stderr)
    if writing and not lines:
        COMMITTED.write_text(json.dumps(committed, indent=1) + "\n")
        print(f"wrote {COMMITTED}; python -m bench.docs takes it into the documents")
    elif lines and not writing:
        print(
            f"committed with Triton {committed['triton']}, this is {triton.__version__}; "
            "python -m bench.kernels.bounds --write accepts all but spills in loops",
            file=sys.stderr,
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
