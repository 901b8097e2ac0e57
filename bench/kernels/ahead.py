"""Compiles the shipped launch configurations for GPUs that are not here, reads the machine code.

Each launcher is called as the runtime calls it, with the kernel replaced by a recorder; what it
passes (dtypes, alignment, constants, warps) is what is compiled. Runs as a program of its own,
since a process that interprets Triton can't compile it:

    python -m bench.kernels.ahead ID...  # the cases of these ids, or all: a JSON line each
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omnigen_fast.kernels import launch
from omnigen_fast.kernels.contract import cache_width

from omnigen_fast.quantised import quantised

from . import pipes

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 32, 32, 96, 3072, 8192
FORMS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CACHES = {"int8": torch.int8, "fp8": torch.uint8}  # e4m3 as bits
# what makes or reads values in 8 bits; fp8 from Ada on
_QUANTISED = (
    "quantise_",
    "rms_norm_quantise_",
    "swiglu_quantise_",
    "scaled_mm_",
)
_OLDEST_FP8 = 89
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor, from NVIDIA's table of compute capabilities."""

    shared_block: int  # bytes
    shared: int  # bytes
    warps: int
    blocks: int


LIMITS = {
    80: Limits(163 * 1024, 164 * 1024, 64, 32),
    86: Limits(99 * 1024, 100 * 1024, 48, 16),
    89: Limits(99 * 1024, 100 * 1024, 48, 24),
    90: Limits(227 * 1024, 228 * 1024, 64, 32),
    100: Limits(227 * 1024, 228 * 1024, 64, 32),
    120: Limits(99 * 1024, 100 * 1024, 48, 24),
}
_REGISTERS, _COLUMNS = 65536, 512


@dataclass(frozen=True)
class Case:
    """One kernel of the table, in one dtype, for one generation."""

    kernel: str
    head_dim: int  # 0 where the kernel has none
    dtype: str
    capability: int | str  # or AMD's architecture
    tensor_maps: bool = False
    form: str = ""  # of values in 8 bits: int8 or fp8
    added: bool = False  # whether a product is added to what is there

    @property
    def id(self) -> str:
        head = f"-d{self.head_dim}" if self.head_dim else ""
        maps = "-maps" if self.tensor_maps else ""
        form = (f"-{self.form}" if self.form else "") + "-added" * self.added
        target = self.capability if isinstance(self.capability, str) else f"sm_{self.capability}"
        return f"{self.kernel}{head}{maps}{form}-{self.dtype}-{target}"

    @property
    def is_attention(self) -> bool:
        return self.kernel.startswith("attention")

    @property
    def uses_matrix_units(self) -> bool:
        """In 32 bits products are exact, which the matrix units' are not."""
        return self.is_attention and self.dtype == "bf16"

    @property
    def is_bounded(self) -> bool:
        """Whether `bounds` counts its main loop."""
        plain_attention = self.uses_matrix_units and not self.form
        return plain_attention or (self.kernel == "scaled_mm_" and not self.added)


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a case says."""

    registers: int
    spills: int  # bytes of local memory
    loop_spills: int  # accesses to it inside loops
    shared: int  # bytes
    warps: int
    ctas: int  # that share a multiprocessor
    occupancy: float  # resident warps over the most that fit
    hmma: int
    hgmma: int
    tcgen05: int
    imma: int
    igmma: int
    qmma: int
    qgmma: int
    wide_loads: int  # of 16 bytes a thread
    narrow_loads: int  # of less than 4 bytes a thread
    async_copies: int
    map_copies: int  # of them by tensor maps
    config: str
    block_m: int  # 0 where the kernel has none
    block_n: int
    block_k: int
    turn: pipes.Turn | None  # of the main loop, where it multiplies on matrix units

    @classmethod
    def read(cls, values: dict[str, Any]) -> Compiled:
        """From what `asdict` gives."""
        turn = values["turn"]
        return cls(**values | {"turn": pipes.Turn(**turn) if turn else None})


def cases() -> Iterator[Case]:
    """Every entry of the launch table; entries without a width of their own in both dtypes.

    And what the tuner may put into it: attention through tensor maps.
    """
    for head_dim in (64, 96, 128):
        yield Case("attention_step", head_dim, "bf16", 90, tensor_maps=True)
    for capability in launch.TABLE:
        yield from cases_of(capability, has_fp8=capability >= _OLDEST_FP8)


def cases_of(generation: int | str, has_fp8: bool) -> Iterator[Case]:
    """Every entry of a generation, products in fp8 only where it has them."""
    table: dict = launch.AMD if isinstance(generation, str) else launch.TABLE
    for key in table[generation]:
        kernel, _, rest = key.partition("/")
        if rest:
            head_dim, bits = rest.split("/")
            dtype = {"16": "bf16", "32": "fp32"}[bits]
            for form in CACHES if kernel == "attention_step_8bit" else ("",):
                yield Case(kernel, int(head_dim), dtype, generation, form=form)
        elif kernel == "quantise_cache_":
            for form in CACHES:
                yield Case(kernel, HEAD_DIM, "bf16", generation, form=form)
        elif kernel in _QUANTISED:
            for form in ("int8", "fp8") if has_fp8 else ("int8",):
                for added in (False, True) if kernel == "scaled_mm_" else (False,):
                    yield Case(kernel, 0, "bf16", generation, form=form, added=added)
        else:
            for dtype in _DTYPES:
                yield Case(kernel, 0, dtype, generation)


def _zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _arguments(case: Case) -> tuple:
    """The arguments of the operation with the full model's sizes, over few rows."""
    dtype, rows = _DTYPES[case.dtype], 4
    head_dim = case.head_dim or HEAD_DIM
    x = _zeros(rows, HIDDEN, dtype=dtype)
    vector = _zeros(HIDDEN, dtype=dtype)
    qkv = _zeros(rows, (HEADS + 2 * KV_HEADS) * head_dim, dtype=dtype)
    parts = qkv.unflatten(1, (-1, head_dim)).split((HEADS, KV_HEADS, KV_HEADS), 1)
    angles = _zeros(rows, head_dim // 2, dtype=torch.float32)
    cache = _zeros(rows, KV_HEADS, head_dim, dtype=dtype)
    places = torch.arange(rows)
    cu = torch.tensor([0, rows], dtype=torch.int32)
    one = torch.tensor([rows], dtype=torch.int32)
    if case.kernel == "rms_norm":
        return x, vector, 1e-5
    if case.kernel in ("quantise_cache_", "attention_step_8bit"):
        narrow = _zeros(rows, cache_width(KV_HEADS, head_dim), dtype=CACHES[case.form])
        if case.kernel == "quantise_cache_":
            return *parts[1:], narrow, narrow, places
        return *parts, narrow, narrow, cu, one, one, rows, None, angles, angles
    if case.form:
        form = FORMS[case.form]
        values, scales = _zeros(rows, HIDDEN, dtype=form), _zeros(rows, dtype=torch.float32)
        if case.kernel == "quantise_":
            return x, values, scales
        if case.kernel == "rms_norm_quantise_":
            return x, vector, 1e-5, values, scales
        if case.kernel == "swiglu_quantise_":
            inner = _zeros(rows, INNER, dtype=form)
            return _zeros(rows, 2 * INNER, dtype=dtype), inner, scales
        if case.kernel == "scaled_mm_":
            weight = _zeros(HIDDEN, HIDDEN, dtype=form)
            weight_scales = _zeros(HIDDEN, dtype=torch.float32)
            return values, scales, weight, weight_scales, x, case.added
    if case.kernel == "modulate":
        table = _zeros(50, HIDDEN, dtype=dtype)
        return x, table, table, torch.zeros(1, dtype=torch.int64), 1e-6
    if case.kernel == "swiglu":
        return (_zeros(rows, 2 * INNER, dtype=dtype),)
    if case.kernel.startswith("dequantise_"):
        weight = _zeros(rows, HIDDEN, dtype=dtype)
        form = case.kernel.removeprefix("dequantise_").removesuffix("_")
        return weight, *quantised("weight", weight, form).arguments
    if case.kernel == "rope_":
        return qkv, angles, angles, HEADS, KV_HEADS, True
    if case.kernel == "rope_cache_":
        return qkv, angles, angles, HEADS, KV_HEADS, cache, cache, places
    if case.kernel == "attention_step":
        return *parts, cache, cache, cu, one, one, rows, None, angles, angles
    if case.kernel == "join_segments":
        sums = _zeros(HEADS, rows, dtype=torch.float32).t()  # as FlashAttention has them
        joined = x.unflatten(1, (HEADS, head_dim))
        return joined, sums, joined, sums
    if case.kernel == "attention_prefill":
        return *parts, cu, places.int(), rows
    if case.kernel == "guidance_step_":
        return (
            _zeros(1, 4, 128, 128, dtype=torch.float32),
            _zeros(3, 4096, 16, dtype=dtype),
            _zeros(3, dtype=torch.float32),
            cu,
            torch.zeros(50),
            torch.zeros(1, dtype=torch.int64),
            2,
        )
    raise ValueError(f"no arguments for {case.kernel}")


class _Recorder:
    """Stands for a kernel and keeps how it is launched."""

    def __init__(self) -> None:
        self.args, self.kwargs = None, None

    def __getitem__(self, grid) -> Callable[..., None]:
        def launched(*args, **kwargs) -> None:
            self.args, self.kwargs = args, kwargs

        return launched


def _record(case: Case):
    """The kernel, its positional arguments and its constants and options as the launcher passes."""
    import importlib

    from omnigen_fast.kernels import ops

    module = importlib.import_module(f"omnigen_fast.kernels.{ops.OPERATIONS[case.kernel].module}")
    name = {"rope_cache_": "rope_kernel"}.get(case.kernel, f"{case.kernel.rstrip('_')}_kernel")
    head_dim = case.head_dim if case.is_attention else 0
    bits = 8 * _DTYPES[case.dtype].itemsize
    chosen = launch.lookup(case.kernel, case.capability, head_dim, bits)
    if case.tensor_maps:
        name = "attention_step_maps_kernel"
        warps = 8 if case.head_dim == 128 else 4  # with 4 the accumulator of 128 spills
        chosen = launch.Launch(warps, 3, 128, 64, tensor_maps=True)
    kernel, recorder = getattr(module, name), _Recorder()
    with (
        mock.patch.object(module, name, recorder),
        mock.patch.object(launch, "choose", return_value=chosen),
    ):
        getattr(module, case.kernel)(*_arguments(case))
    return kernel, recorder.args, recorder.kwargs


@dataclass(frozen=True)
class Source:
    """What Triton compiles of a case.

    Attributes:
        signature: the type of each parameter.
        constants: values of those that are compiled in.
        attributes: what is known of the others, by place.
        options: warps and stages.
        sizes: the constants by name.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]
    sizes: dict[str, Any]

    @property
    def config(self) -> str:
        """Tile, warps and stages in words."""
        blocks = [
            f"{name.lower()}={self.sizes[name]}"
            for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK")
            if name in self.sizes
        ]
        return " ".join([*blocks, *(f"{name}={value}" for name, value in self.options.items())])


def source_of(case: Case) -> Source:
    """A case as its launcher passes it, specialised as a launch does."""
    kernel, args, kwargs = _record(case)
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    signature, constants, attributes = {}, dict(kwargs), {}
    for place, (parameter, value) in enumerate(zip(kernel.params, args)):
        name = parameter.name
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned = not value.data_ptr() % 16 and not parameter.do_not_specialize_on_alignment
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None:  # as a launch does
            constants[name] = None
        elif hasattr(value, "block_shape"):
            assert value.base.dtype == torch.bfloat16
            signature[name] = f"tensordesc<bf16{value.block_shape}>"
        elif value == 1 and not parameter.do_not_specialize:  # as a launch does
            constants[name] = 1
        else:
            signature[name] = "i32"
            aligned = not value % 16 and not parameter.do_not_specialize
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {parameter.name: signature[parameter.name] for parameter in kernel.params}
    return Source(kernel, signature, constants, attributes, options, kwargs)


def compile_case(case: Case) -> Compiled:
    """Compiles one case for its generation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = source_of(case)
    compiled = triton.compile(
        ASTSource(source.kernel, source.signature, source.constants, source.attributes),
        target=GPUTarget("cuda", case.capability, 32),
        options=source.options,
    )
    return _read(compiled, case, source)


def _read(compiled, case: Case, source: Source) -> Compiled:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def read(tool: str, *options: str) -> str:
            command = [tools / tool, *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = read("cuobjdump", "--dump-resource-usage")
        # instructions alone, in half the time of `cuobjdump --dump-sass`
        code = read("nvdisasm", "--print-code", "--no-dataflow")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    assert isinstance(case.capability, int)
    limits = LIMITS[case.capability]
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    ctas = _ctas(limits, registers, warps, shared, columns)
    return Compiled(
        registers=registers,
        spills=max(stack, local, count(r"\b(?:LDL|STL)\b")),
        loop_spills=pipes.loop_spills(code),
        shared=shared,
        warps=warps,
        ctas=ctas,
        occupancy=ctas * warps / limits.warps,
        hmma=count(r"\bHMMA\b"),
        hgmma=count(r"\bHGMMA\b"),
        tcgen05=count(r"\bUTC[HIQ]MMA\b"),
        imma=count(r"\bIMMA\b"),
        igmma=count(r"\bIGMMA\b"),
        qmma=count(r"\bQMMA\b"),
        qgmma=count(r"\bQGMMA\b"),
        wide_loads=count(r"\bLDG\.E[.\w]*\.128\b|\bLDGSTS\.E[.\w]*\.128\b"),
        narrow_loads=count(r"\bLDG\.E[.\w]*\.[US](?:8|16)\b"),
        async_copies=count(r"\bLDGSTS\b|\bUTMALDG\b"),
        map_copies=count(r"\bUTMALDG\b"),
        config=source.config,
        block_m=source.sizes.get("BLOCK_M", 0),
        block_n=source.sizes.get("BLOCK_N", 0),
        block_k=source.sizes.get("BLOCK_K", 0),
        turn=pipes.main_turn(code) if case.is_bounded else None,
    )


def _ctas(limits: Limits, registers: int, warps: int, shared: int, columns: int) -> int:
    """Registers are given to warps in units of 256, shared memory has 1 KB of the system's.

    Args:
        columns: of tensor memory, which 10.x has 512 of.
    """
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        _REGISTERS // (per_warp * warps),
        limits.shared // (shared + 1024),
        limits.warps // warps,
        limits.blocks,
        _COLUMNS // max(1, columns),
    )


def report(cases: Iterable[Case], compile_case: Callable[[Case], Any]) -> None:
    """Compiles those cases that the command line names, or all; prints each as a line of JSON."""
    ids = sys.argv[1:]
    for case in cases:
        if ids and case.id not in ids:
            continue
        line: dict[str, Any] = {"id": case.id}
        try:
            line["compiled"] = asdict(compile_case(case))
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    report(cases(), compile_case)
