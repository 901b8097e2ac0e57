"""Compiles the launch configurations of AMD's GPUs, reads their assembly. Needs no GPU.

As `ahead`, with the same arguments of the same launchers:

    python -m bench.kernels.ahead_amd ID...  # the cases of these ids, or all: a JSON line each
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from omnigen_fast.kernels import launch

from . import ahead


@dataclass(frozen=True)
class Limits:
    """Of one compute unit, from AMD's table of GPU specifications for ROCm.

    Attributes:
        shared: bytes of local memory (LDS) that a workgroup may take.
        lanes: of a wavefront.
        has_fp8: whether the matrix units multiply the e4m3 of `torch.float8_e4m3fn`.
        units: what the instructions of the matrix units begin with.
    """

    shared: int
    lanes: int
    has_fp8: bool
    units: str


LIMITS = {
    "gfx942": Limits(64 << 10, 64, False, "v_mfma_"),  # CDNA 3; its e4m3 is another (fnuz)
    "gfx950": Limits(160 << 10, 64, True, "v_mfma_"),  # CDNA 4
    "gfx1100": Limits(64 << 10, 32, False, "v_wmma_"),  # RDNA 3
    "gfx1201": Limits(64 << 10, 32, True, "v_wmma_"),  # RDNA 4
}


@dataclass(frozen=True)
class Case(ahead.Case):
    """As `ahead.Case`; `large`: tensors may be of 2 GiB or more, which takes other loads."""

    large: bool = False

    @property
    def id(self) -> str:
        return super().id + "-large" * self.large


@dataclass(frozen=True)
class Compiled:
    """What the assembly of a case says.

    Attributes:
        registers: vector registers of a lane.
        spills: registers that were moved to memory, vector and scalar ones.
        scratch: bytes of private memory of a lane, and instructions that access such memory.
        shared: bytes of local memory.
        products: instructions of the matrix units in the loop that has the most of them, by name.
        anywhere: all such instructions.
        wide_loads: from memory, of 16 bytes a lane.
    """

    registers: int
    spills: int
    scratch: int
    shared: int
    warps: int
    lanes: int
    products: dict[str, int]
    anywhere: dict[str, int]
    wide_loads: int
    config: str


def cases() -> Iterator[Case]:
    """Every entry of AMD's table, and a step over a large cache."""
    for architecture in launch.AMD:
        for case in ahead.cases_of(architecture, LIMITS[architecture].has_fp8):
            yield Case(**asdict(case))
        yield Case("attention_step", ahead.HEAD_DIM, "bf16", architecture, large=True)


def compile_case(case: Case) -> Compiled:
    """Compiles one case for its architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    architecture = str(case.capability)
    source = ahead.source_of(case)
    attributes = {place: list(known) for place, known in source.attributes.items()}
    if not case.large:  # a launch says so of tensors below 2 GiB
        for place, kind in enumerate(source.signature.values()):
            if kind.startswith("*"):
                attributes.setdefault((place,), []).append(["tt.pointer_range", 32])
    compiled = triton.compile(
        ASTSource(source.kernel, source.signature, source.constants, attributes),
        target=GPUTarget("hip", architecture, LIMITS[architecture].lanes),
        options=source.options,
    )
    found = compiled.metadata
    return read(compiled.asm["amdgcn"], found.num_warps, found.shared, source.config)


def read(assembly: str, warps: int, shared: int, config: str) -> Compiled:
    """What the text of an assembly says.

    Args:
        shared: bytes of local memory; given at the launch, so the assembly doesn't have them.

    Raises:
        ValueError: a figure is missing in it.
    """

    def figure(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)\s*$", assembly, re.M)
        if found is None:
            raise ValueError(f"no {name} in the assembly")
        return int(found[1])

    code, loops = _loops(assembly)
    bodies = [_products(code[first:last]) for first, last in loops]
    spilled = sum(line.startswith("scratch_") for line in code)
    return Compiled(
        registers=figure("vgpr_count"),
        spills=figure("vgpr_spill_count") + figure("sgpr_spill_count"),
        scratch=figure("private_segment_fixed_size") + spilled,
        shared=shared + figure("group_segment_fixed_size"),
        warps=warps,
        lanes=figure("wavefront_size"),
        products=max(bodies, key=lambda one: sum(one.values()), default={}),
        anywhere=_products(code),
        wide_loads=sum(
            bool(re.match(r"(global|buffer)_load_(dwordx4|b128)\b", line)) for line in code
        ),
        config=config,
    )


def _loops(assembly: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a kernel, and from where to where each branch back leads."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, assembly.splitlines()):
        label = re.match(r"(\.?L\w+):", line)
        if label:
            labels[label[1]] = len(code)
        elif re.match(r"[a-z]\w+(\s|$)", line):
            code.append(line)
    loops = []
    for place, line in enumerate(code):
        branch = re.match(r"s_c?branch\w*\s+(\.?L\w+)", line)
        if branch and labels.get(branch[1], place + 1) <= place:
            loops.append((labels[branch[1]], place + 1))
    return code, loops


def _products(code: list[str]) -> dict[str, int]:
    names = (re.match(r"v_(mfma|wmma)_\w+", line) for line in code)
    return dict(Counter(name[0] for name in names if name))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    ahead.report(cases(), compile_case)
