"""Measures launch configurations on this machine's GPU and rewrites its part of the table.

    python bench/kernels/tune.py [--kernel attention_step [--head-dim 96]] [--dry-run]

Every candidate must give the reference's result before it is timed; the fastest of each kernel
takes the place of the one in `kernels/launch.py`, if it beats that by more than the noise between
two measurements of the same configuration. Then a step's attention is raced against PyTorch's
libraries, and `kernels/winners.py` keeps who won on this card. Entries of other generations are
left as they are, and so are the float32 attention's, which are for checks. Run `pytest
tests/kernels` afterwards: what compiles for this GPU must also pass its limits there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import workload
from omnigen_fast.kernels import launch
from omnigen_fast.kernels.launch import Launch

HEAD_DIMS = (64, 96, 128)
_BEGIN, _END = "# table: begin\n", "# table: end\n"
_AMD_BEGIN, _AMD_END = "# amd: begin\n", "# amd: end\n"


def candidates(kernel: str, capability: int | str) -> Iterator[Launch]:
    """Configurations worth a try on a generation, or on AMD's architecture."""
    amd = isinstance(capability, str)
    if kernel.startswith("attention"):
        for block_m, block_n, num_warps, num_stages in product(
            (64, 128, 256), (32, 64, 128), (4, 8), (1, 2) if amd else (2, 3, 4)
        ):
            if 16 <= block_m // num_warps <= 32:  # rows of the accumulator that a warp holds
                yield Launch(num_warps, num_stages, block_m, block_n)
                if kernel == "attention_step" and not amd and capability >= 90:
                    yield Launch(num_warps, num_stages, block_m, block_n, tensor_maps=True)
                if kernel == "attention_prefill" and not amd and capability >= 90:
                    yield Launch(num_warps, num_stages, block_m, block_n, one_loop=True)
    elif kernel == "join_segments":
        for num_warps, block in product((2, 4, 8), (16, 32, 64)):
            yield Launch(num_warps, block=block)
    elif kernel == "guidance_step_":
        for num_warps, block in product((1, 2, 4), (32, 64, 128)):
            yield Launch(num_warps, block=block)
    elif kernel == "scaled_mm_":
        for block_m, block_n, block_k, num_warps, num_stages in product(
            (64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (1, 2) if amd else (3, 4)
        ):
            if block_m * block_n // num_warps <= 128 * 32:  # sums that a thread holds
                yield Launch(num_warps, num_stages, block_m, block_n, block_k)
    elif kernel in ("swiglu", "quantise_cache_") or kernel.startswith(("rope_", "dequantise_")):
        for num_warps, block in product((2, 4, 8), (512, 1024, 2048, 4096)):
            yield Launch(num_warps, block=block)
    else:
        for num_warps in (2, 4, 8, 16):
            yield Launch(num_warps)


def size_of(head_dim: int) -> workload.Size:
    """The full size with heads of another width, hidden size and work about the same."""
    heads = workload.FULL.hidden // head_dim
    return replace(workload.FULL, heads=heads, hidden=heads * head_dim)


def measure(case: workload.Case, chosen: Launch, device: torch.device) -> float | None:
    """Seconds of a configuration; None where it asks for more than the GPU has."""
    from triton.runtime.errors import OutOfResources, PTXASError

    with mock.patch.object(launch, "choose", return_value=chosen):
        try:
            workload.check(case, workload.KERNELS)
        except (OutOfResources, PTXASError):
            return None
        case.reset()
        return workload.seconds(case.contenders[workload.KERNELS], device)


def tune(kernel: str, head_dim: int, now: Launch, device: torch.device) -> Launch:
    """The fastest configuration of a kernel, or the one it has."""
    case = workload.build(kernel, device, size_of(head_dim) if head_dim else None)
    first, again = (measure(case, now, device) for _ in range(2))
    label = f"{kernel}{f', head_dim {head_dim}' if head_dim else ''}"
    best, best_seconds = now, float("inf")
    if first is not None and again is not None:
        best_seconds = min(first, again) - abs(first - again)
        print(f"{label}: {now} {first * 1e6:.1f} us, again {again * 1e6:.1f} us")
    for candidate in candidates(kernel, launch.capability_of(device.index)):
        if candidate == now:
            continue
        took = measure(case, candidate, device)
        if took is not None and took < best_seconds:
            best, best_seconds = candidate, took
            print(f"{label}: {candidate} {took * 1e6:.1f} us")
    return best


def raced(
    head_dims: Iterable[int], entries: dict[str, Launch], device: torch.device
) -> dict[int, str]:
    """Who computes a step's attention fastest, by head_dim; Triton with these configurations."""
    found: dict[int, str] = {}
    for head_dim in head_dims:
        with mock.patch.object(launch, "choose", partial(_configuration, entries)):
            result = workload.race(device, size_of(head_dim))
        for name, one in result.items():
            took = f"{one.best * 1e6:.1f} us" if one.seconds else f"not measured: {one.why}"
            print(f"attention_step, head_dim {head_dim}, by {name}: {took}")
        fastest = workload.fastest(result)
        if fastest is not None:
            found[head_dim] = fastest
        torch.cuda.empty_cache()
    return found


def _configuration(entries: dict[str, Launch], kernel: str, x: object, head_dim: int = 0) -> Launch:
    return entries[f"{kernel}/{head_dim}/16" if head_dim else kernel]


def written(chosen: Launch) -> str:
    """A configuration as the table has it: what differs from the defaults, by name."""
    parts = [
        f"{field.name}={getattr(chosen, field.name)}"
        for field in fields(Launch)
        if field.name == "num_warps" or getattr(chosen, field.name) != field.default
    ]
    return f"Launch({', '.join(parts)})"


def _entry(key: str, chosen: Launch) -> list[str]:
    """Its lines, as ruff formats them."""
    line = f'        "{key}": {written(chosen)},'
    if len(line) <= 100:
        return [line]
    before, _, arguments = line.partition("Launch(")
    return [f"{before}Launch(", f"            {arguments.removesuffix('),')}", "        ),"]


def rewritten(text: str, table: dict[int, dict[str, Launch]]) -> str:
    """The text of `launch.py` with another table."""
    return _between(text, _BEGIN, _END, "TABLE: dict[int, dict[str, Launch]]", table)


def rewritten_amd(text: str, table: dict[str, dict[str, Launch]]) -> str:
    """The text of `launch.py` with another table of AMD's GPUs."""
    return _between(text, _AMD_BEGIN, _AMD_END, "AMD: dict[str, dict[str, Launch]]", table)


def _between(text: str, begin: str, end: str, name: str, table: Mapping) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    lines = [f"{name} = {{"]
    for generation, entries in table.items():
        lines.append(f"    {json.dumps(generation)}: {{")
        lines += [line for key, chosen in entries.items() for line in _entry(key, chosen)]
        lines.append("    },")
    lines.append("}\n")
    return before + begin + "\n".join(lines) + end + after


def _generation() -> int | str | None:
    """That of the current GPU; None where there is none that has kernels."""
    if not torch.cuda.is_available():
        return None
    found = launch.capability_of(torch.cuda.current_device())
    if isinstance(found, str):
        return found if launch.entry_of(found) else None
    return found if found >= min(launch.TABLE) else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", choices=sorted(workload.CASES), help="this one only")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, help="this one only")
    parser.add_argument("--dry-run", action="store_true", help="print, do not write")
    options = parser.parse_args(arguments)
    capability = _generation()
    if capability is None:
        print(
            "tune.py needs an AMD GPU of gfx90a, gfx94x, gfx95x, gfx11 or gfx12, or needs an "
            "NVIDIA GPU of compute capability 8.0 or later",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if isinstance(capability, str):
        entries = dict(launch.AMD[launch.entry_of(capability)])
    else:
        known = max(one for one in launch.TABLE if one <= max(capability, min(launch.TABLE)))
        entries = dict(launch.TABLE.get(capability, launch.TABLE[known]))
    print(f"{torch.cuda.get_device_name(device)}, {capability}")
    for key, now in list(entries.items()):
        kernel, _, rest = key.partition("/")
        head_dim, bits = map(int, rest.split("/")) if rest else (0, 16)
        if bits != 16 or options.kernel not in (None, kernel):
            continue
        if options.head_dim in (None, head_dim):
            entries[key] = tune(kernel, head_dim, now, device)
            torch.cuda.empty_cache()
    fastest: dict[int, str] = {}
    if options.kernel in (None, "attention_step"):
        dims = [one for one in HEAD_DIMS if options.head_dim in (None, one)]
        fastest = raced(dims, entries, device)
    if options.dry_run:
        for key, chosen in entries.items():
            print(f"{key}: {written(chosen)}")
        for head_dim, name in fastest.items():
            print(f"attention_step, head_dim {head_dim}: {name}")
    else:
        if fastest:
            card = torch.cuda.get_device_name(device)
            print(f"wrote {workload.keep_winners(card, fastest)}")
        path = Path(launch.__file__)
        if isinstance(capability, str):
            text = rewritten_amd(path.read_text(), launch.AMD | {capability: entries})
        else:
            table = dict(sorted((launch.TABLE | {capability: entries}).items()))
            text = rewritten(path.read_text(), table)
        path.write_text(text)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
