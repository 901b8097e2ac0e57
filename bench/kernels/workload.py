"""What the micro-benchmarks and the tuner time: each operation at the sizes of the real model.

Every contender of a case computes the same thing; `check` says so before anything is timed. Limits
are measured where the case runs: bytes over the bandwidth of a copy, operations over the rate of
the fastest of some large matrix products, the larger of the two times.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.attention
import torch.nn.functional as F
from omnigen_fast.kernels import ops, reference, widened, winners
from omnigen_fast.kernels.contract import cache_width
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnigen_fast.graph import capture_cuda
from omnigen_fast.quantised import quantised

KERNELS, REFERENCE, COMPILED = "kernels", "reference", "reference, compiled"
# A step's attention by a library through our own door, by its name there.
LIBRARIES = {"flash": "flash, joined", "cudnn": "cuDNN, joined"}
UNAVAILABLE = ("No available kernel", "can't run on")  # what errors of absent libraries say


@dataclass(frozen=True)
class Size:
    """Sizes of one step.

    Attributes:
        noise: noise tokens of a branch.
        cached: cache rows that each branch sees.
    """

    noise: int
    cached: tuple[int, ...]
    heads: int
    hidden: int
    inner: int

    @property
    def rows(self) -> int:
        return self.noise * len(self.cached)


# One 1024 px image edited at 1024 px: prompt and image, negative prompt, image alone.
FULL = Size(4096, (4181, 121, 4125), 32, 3072, 8192)
# What a CPU does in a moment.
SMALL = Size(256, (300, 40, 280), 4, 384, 1024)


@dataclass
class Case:
    """One operation, its contenders and its limits.

    Attributes:
        contenders: run the operation and return the tensor by which it is judged.
        exact: the same tensor in float64, or rows of it; takes nothing.
        rows: which rows of a contender's tensor `exact` has; None for all.
        bytes: least traffic with memory.
        flops: matrix operations.
        unequal: contenders that need inputs which would have to be made first, so that they
            are limits rather than alternatives.
        reset: undoes what a run in place has done.
    """

    name: str
    contenders: dict[str, Callable[[], Tensor]]
    exact: Callable[[], Tensor]
    bytes: int
    flops: int = 0
    rows: Tensor | None = None
    unequal: frozenset[str] = field(default_factory=frozenset)
    reset: Callable[[], object] = lambda: None


def check(case: Case, contender: str) -> None:
    """Raises an AssertionError unless a contender is as exact as the reference, within twice."""

    def error(name: str) -> tuple[Tensor, Tensor]:
        case.reset()
        found = case.contenders[name]().clone()
        found = found if case.rows is None else found[case.rows]
        return (found.double() - exact).norm(), exact.norm()

    case.reset()
    exact = case.exact()
    found, size = error(contender)
    plain, _ = error(REFERENCE)
    tiny = 2 * torch.finfo(torch.float32).eps
    assert found <= 2 * plain + tiny * size, (
        f"{case.name}: {contender} is off by {(found / size).item():.1e}, "
        f"the reference by {(plain / size).item():.1e}"
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timer_of(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device."""

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    return now


def seconds(run: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """Median time of a run, several in a row per measurement, for about `budget` seconds.

    On a GPU the runs of a measurement are captured in one graph where that is possible: launched
    one by one, short kernels would be as slow as Python.
    """
    now = timer_of(device)
    run()
    start = now()
    run()
    repeats = max(1, min(50, int(0.02 / max(1e-7, now() - start))))

    def several() -> None:
        for _ in range(repeats):
            run()

    launch: Callable[[], object] = several
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # some contenders wait for the device
            launch = capture_cuda(several, device)
    launch()
    times: list[float] = []
    begin = now()
    while len(times) < 5 or now() - begin < budget:
        start = now()
        launch()
        times.append((now() - start) / repeats)
    return sorted(times)[len(times) // 2]


@dataclass(frozen=True)
class Limits:
    """Measured on the device, in this process."""

    bytes_per_second: float  # copied: read and written both count
    flops_per_second: float  # of the fastest of some large products

    def floor(self, case: Case) -> float:
        """Seconds under which no version of the case goes."""
        return max(case.bytes / self.bytes_per_second, case.flops / self.flops_per_second)


def _copy(nbytes: int, device: torch.device) -> tuple[Callable[[], object], int]:
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), source.nbytes


# rows, inputs and outputs of linear layers
_PRODUCTS = {
    "cpu": [(1024, 1024, 1024), (2048, 2048, 2048), (3072, 3072, 3072), (2048, 768, 2304)],
    "cuda": [(4096, 4096, 4096), (8192, 8192, 8192), (4096, 3072, 8192)],
}


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """What a copy and products reach now; a product's rate depends on its size, so several run.

    On a CPU, they are in the dtype that `linear` computes them in.
    """
    on_gpu = device.type == "cuda"
    copy, nbytes = _copy(1 << 30 if on_gpu else 1 << 26, device)
    bandwidth = 2 * nbytes / seconds(copy, device)
    del copy
    if device.type == "cpu":
        dtype = widened.fastest(dtype)
    rates = []
    for m, k, n in _PRODUCTS["cuda" if on_gpu else "cpu"]:
        x, weight = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
        rates.append(2 * m * k * n / seconds(partial(F.linear, x, weight), device))
        del x, weight
    return Limits(bandwidth, max(rates))


class _Maker:
    """Random inputs, drawn anew for every case."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def steps(self, count: int) -> Tensor:
        """Different places in a table of 50 steps."""
        return torch.arange(7, 7 + count, device=self.device)


# These read lengths on the host, which breaks a graph.
_NOT_COMPILED = (
    "guidance_step_",
    "attention_step",
    "attention_step_8bit",
    "attention_prefill",
)


def contenders_of(name: str, on_gpu: bool) -> list[str]:
    """Names of a case's contenders, without building it."""
    names = [KERNELS, REFERENCE]
    if name not in _NOT_COMPILED:
        names.append(COMPILED)
    if name == "rms_norm":
        names.append("F.rms_norm")
    if name == "attention_step":
        names += [label for one, label in LIBRARIES.items() if on_gpu or one == "flash"]
        for label in _backends(on_gpu):
            names += [f"concatenate, {label}", f"ready K/V, {label}"]
    return names


def _both(
    name: str, *args, result: int | Callable[[], Tensor] | None = None
) -> dict[str, Callable[[], Tensor]]:
    """An operation by the kernels, by the reference, and by the compiled reference.

    Args:
        result: place among `args` of the tensor that the operation changes, or what makes one of
            them; None where it returns one.
    """

    def run(function: Callable) -> Tensor:
        returned = function(*args)
        if result is None:
            return returned
        return args[result] if isinstance(result, int) else result()

    def by_kernels() -> Tensor:
        with ops.use("triton"):
            return run(getattr(ops, name))

    plain = getattr(reference, name)
    contenders = {KERNELS: by_kernels, REFERENCE: lambda: run(plain)}
    if name not in _NOT_COMPILED:
        fused = torch.compile(plain, dynamic=False)
        contenders[COMPILED] = lambda: run(fused)
    return contenders


def rms_norm(size: Size, make: _Maker) -> Case:
    x, weight = make.random(size.rows, size.hidden), make.random(size.hidden)
    contenders = _both("rms_norm", x, weight, 1e-5)
    contenders["F.rms_norm"] = lambda: F.rms_norm(x, weight.shape, weight, 1e-5)
    return Case(
        "rms_norm",
        contenders,
        lambda: reference.rms_norm(x.double(), weight.double(), 1e-5),
        2 * x.nbytes,
    )


def modulate(size: Size, make: _Maker) -> Case:
    x = make.random(size.rows, size.hidden)
    shift, scale = make.random(50, size.hidden), make.random(50, size.hidden)
    step = make.steps(len(size.cached))
    return Case(
        "modulate",
        _both("modulate", x, shift, scale, step, 1e-6),
        lambda: reference.modulate(x.double(), shift.double(), scale.double(), step, 1e-6),
        2 * x.nbytes,
    )


def swiglu(size: Size, make: _Maker) -> Case:
    gate_up = make.random(size.rows, 2 * size.inner)
    return Case(
        "swiglu",
        _both("swiglu", gate_up),
        lambda: reference.swiglu(gate_up.double()),
        gate_up.nbytes * 3 // 2,
    )


def _dequantise(form: str) -> Callable[[Size, _Maker], Case]:
    """Of the largest matrix of a layer."""

    def build(size: Size, make: _Maker) -> Case:
        weight = make.random(2 * size.inner, size.hidden)
        parts = quantised("weight", weight, form).arguments
        name = f"dequantise_{form}_"

        def exact() -> Tensor:
            expanded = torch.empty_like(weight, dtype=torch.float64)
            getattr(reference, name)(expanded, *parts)
            return expanded

        moved = weight.nbytes + sum(part.nbytes for part in parts)
        return Case(name, _both(name, weight, *parts, result=0), exact, moved)

    return build


def _rows_in_8_bits(name: str) -> Callable[[Size, _Maker], Case]:
    """What writes rows in int8: judged by what they stand for."""

    def build(size: Size, make: _Maker) -> Case:
        width = size.inner if name == "swiglu_quantise_" else size.hidden
        x = make.random(size.rows, 2 * width if name == "swiglu_quantise_" else width)
        weight = make.random(width)
        values = torch.zeros(size.rows, width, dtype=torch.int8, device=make.device)
        scales = make.random(size.rows, dtype=torch.float32)
        plain: dict[str, tuple[tuple, Callable[[], Tensor]]] = {
            "quantise_": ((x,), lambda: x.double()),
            "rms_norm_quantise_": (
                (x, weight, 1e-5),
                lambda: reference.rms_norm(x.double(), weight.double(), 1e-5),
            ),
            "swiglu_quantise_": ((x,), lambda: reference.swiglu(x.double())),
        }
        args, exact = plain[name]
        contenders = _both(name, *args, values, scales, result=lambda: values * scales.unsqueeze(1))
        return Case(name, contenders, exact, x.nbytes + values.nbytes)

    return build


def product(size: Size, make: _Maker) -> Case:
    """The largest of a layer, gate and up, in int8."""
    rows, columns, width = size.rows, 2 * size.inner, size.hidden

    def factor(count: int) -> tuple[Tensor, Tensor]:
        values = torch.randint(-127, 128, (count, width), dtype=torch.int8, device=make.device)
        return values, make.random(count, dtype=torch.float32).abs()

    x, weight = factor(rows), factor(columns)
    result = make.random(rows, columns)
    sampled = torch.tensor([0, rows // 2, rows - 1], device=make.device)

    def exact() -> Tensor:
        found = x[0][sampled].double() @ weight[0].double().t()
        return found * x[1][sampled].double().unsqueeze(1) * weight[1].double()

    moved = x[0].nbytes + weight[0].nbytes + result.nbytes
    # products in 8 bits run at twice the rate of bfloat16's or more
    flops = rows * columns * width
    contenders = _both("scaled_mm_", *x, *weight, result, result=4)
    return Case("scaled_mm_", contenders, exact, moved, flops, sampled)


def _narrow(x: Tensor) -> Tensor:
    """Rows [rows, heads, head_dim] of a cache in int8."""
    rows, heads, head_dim = x.shape
    width = cache_width(heads, head_dim)
    caches = [torch.zeros(rows, width, dtype=torch.int8, device=x.device) for _ in range(2)]
    reference.quantise_cache_(x, x, *caches, torch.arange(rows, device=x.device))
    return caches[0]


def quantise_cache(size: Size, make: _Maker) -> Case:
    head_dim = size.hidden // size.heads
    qkv = make.random(size.rows, 3 * size.hidden)
    k, v = qkv.unflatten(1, (-1, head_dim)).split(size.heads, 1)[1:]
    caches = [_narrow(torch.ones_like(k)) for _ in range(2)]
    places = torch.randperm(size.rows, device=make.device)
    args = (k, v, *caches, places)

    def kept() -> Tensor:
        return reference._dequantised(caches[0], k)

    def exact() -> Tensor:
        return torch.empty_like(k, dtype=torch.float64).index_copy_(0, places, k.double())

    moved = 2 * k.numel() * k.element_size() + sum(one.nbytes for one in caches)
    return Case("quantise_cache_", _both("quantise_cache_", *args, result=kept), exact, moved)


def _rotary(size: Size, make: _Maker) -> tuple[Tensor, Tensor, Tensor]:
    qkv = make.random(size.rows, 3 * size.hidden)
    angles = make.random(size.rows, size.hidden // size.heads // 2, dtype=torch.float32)
    return qkv, angles.cos(), angles.sin()


def rope(size: Size, make: _Maker) -> Case:
    qkv, cos, sin = _rotary(size, make)
    original = qkv.clone()

    def exact() -> Tensor:
        turned = original.double()
        reference.rope_(turned, cos.double(), sin.double(), size.heads, size.heads)
        return turned

    contenders = _both("rope_", qkv, cos, sin, size.heads, size.heads, result=0)
    # q and k, two thirds of the product, both ways
    return Case("rope_", contenders, exact, 4 * qkv.nbytes // 3, reset=lambda: qkv.copy_(original))


def rope_cache(size: Size, make: _Maker) -> Case:
    qkv, cos, sin = _rotary(size, make)
    original = qkv.clone()
    head_dim = size.hidden // size.heads
    caches = [make.random(size.rows, size.heads, head_dim) for _ in range(2)]
    places = torch.randperm(size.rows, device=make.device)
    args = (qkv, cos, sin, size.heads, size.heads, *caches, places)

    def exact() -> Tensor:
        turned = original.double()
        cache = [torch.zeros_like(one, dtype=torch.float64) for one in caches]
        reference.rope_cache_(
            turned, cos.double(), sin.double(), size.heads, size.heads, *cache, places
        )
        return cache[0]

    return Case(
        "rope_cache_",
        _both("rope_cache_", *args, result=5),
        exact,
        4 * qkv.nbytes // 3 + qkv.nbytes,  # q and k both ways; v in, k and v out
        reset=lambda: qkv.copy_(original),
    )


def guidance(size: Size, make: _Maker) -> Case:
    side = 2 * int(size.noise**0.5)
    latents = make.random(1, 4, side, side, dtype=torch.float32)
    prediction = make.random(len(size.cached), size.noise, 16)
    coefficient = make.random(len(size.cached), dtype=torch.float32)
    groups = make.integers(0, len(size.cached))
    lengths = torch.full((50,), 0.02, device=make.device)
    step = make.steps(1)
    original = latents.clone()
    args = (latents, prediction, coefficient, groups, lengths, step, 2)

    def exact() -> Tensor:
        moved = original.double()
        reference.guidance_step_(moved, prediction.double(), coefficient, groups, lengths, step, 2)
        return moved

    return Case(
        "guidance_step_",
        _both("guidance_step_", *args, result=0),
        exact,
        prediction.nbytes + 2 * latents.nbytes,
        reset=lambda: latents.copy_(original),
    )


def _sampled(q: Tensor, keys: list[Tensor], values: list[Tensor], starts: list[int]) -> Callable:
    """Exact attention of one row of every group, [groups, heads, head_dim] float64."""

    def exact() -> Tensor:
        outs = []
        for start, k, v in zip(starts, keys, values):
            row, k, v = q[start].double(), k.double(), v.double()
            weights = torch.einsum("hd,khd->hk", row, k).div(q.shape[2] ** 0.5).softmax(-1)
            outs.append(torch.einsum("hk,khd->hd", weights, v))
        return torch.stack(outs)

    return exact


def _backends(on_gpu: bool) -> dict[str, list[SDPBackend]]:
    if not on_gpu:
        return {"SDPA": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]}
    return {
        "flash": [SDPBackend.FLASH_ATTENTION],
        "cuDNN": [SDPBackend.CUDNN_ATTENTION],
        "memory-efficient": [SDPBackend.EFFICIENT_ATTENTION],
    }


def attention_step(size: Size, make: _Maker) -> Case:
    head_dim, groups = size.hidden // size.heads, len(size.cached)
    qkv = make.random(size.rows, 3 * size.hidden)
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split(size.heads, 1)
    caches = [make.random(sum(size.cached), size.heads, head_dim) for _ in range(2)]
    firsts = list(accumulate(size.cached, initial=0))[:-1]
    cu_rows = make.integers(*range(0, size.rows + 1, size.noise))
    args = (q, k, v, *caches, cu_rows, make.integers(*firsts), make.integers(*size.cached))
    contenders = _both("attention_step", *args, size.noise)
    spans: list[int] = []
    for group, (first, count) in enumerate(zip(firsts, size.cached)):
        own = [group * size.noise, (group + 1) * size.noise]
        spans += [*own, *own, first, first + count]
    on_gpu = make.device.type == "cuda"

    def by_library(name: str) -> Tensor:
        with ops.use("triton" if on_gpu else None, attention=name):
            return ops.attention_step(*args, size.noise, spans=spans)

    for one, label in LIBRARIES.items():
        if on_gpu or one == "flash":
            contenders[label] = partial(by_library, one)

    def joined(part: Tensor, cache: Tensor, group: int) -> Tensor:
        rows = slice(group * size.noise, (group + 1) * size.noise)
        return torch.cat([cache[firsts[group] : firsts[group] + size.cached[group]], part[rows]])

    keys = [joined(k, caches[0], group) for group in range(groups)]
    values = [joined(v, caches[1], group) for group in range(groups)]

    def by_head(x: Tensor) -> Tensor:
        return x.transpose(0, 1).unsqueeze(0)

    ready = [tuple(by_head(x).contiguous() for x in pair) for pair in zip(keys, values)]

    def library(backends: list[SDPBackend], concatenate: bool) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        with sdpa_kernel(backends):
            for group in range(groups):
                rows = slice(group * size.noise, (group + 1) * size.noise)
                pair = ready[group]
                if concatenate:
                    pair = [by_head(joined(x, c, group)) for x, c in zip((k, v), caches)]
                by_head(out[rows]).copy_(F.scaled_dot_product_attention(by_head(q[rows]), *pair))
        return out

    for label, backend in _backends(on_gpu).items():
        contenders[f"concatenate, {label}"] = lambda one=backend: library(one, True)
        contenders[f"ready K/V, {label}"] = lambda one=backend: library(one, False)
    starts = [group * size.noise for group in range(groups)]
    flops = sum(4 * size.hidden * size.noise * (size.noise + cached) for cached in size.cached)
    moved = 4 * q.numel() * q.element_size() + sum(x.nbytes for x in caches)
    return Case(
        "attention_step",
        contenders,
        _sampled(q, keys, values, starts),
        moved,
        flops,
        torch.tensor(starts, device=make.device),
        frozenset(name for name in contenders if name.startswith("ready")),
    )


def join_segments(size: Size, make: _Maker) -> Case:
    shape = size.rows, size.heads, size.hidden // size.heads
    a, b = make.random(*shape), make.random(*shape)
    # as FlashAttention has them, heads first
    a_lse, b_lse = (make.random(*shape[1::-1], dtype=torch.float32).t() for _ in "ab")
    args = a, a_lse, b, b_lse
    return Case(
        "join_segments",
        _both("join_segments", *args),
        lambda: reference.join_segments(*(x.double() for x in args)),
        3 * a.nbytes + 2 * a_lse.nbytes,
    )


def attention_step_8bit(size: Size, make: _Maker) -> Case:
    head_dim, groups = size.hidden // size.heads, len(size.cached)
    qkv = make.random(size.rows, 3 * size.hidden)
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split(size.heads, 1)
    plain = [make.random(sum(size.cached), size.heads, head_dim) for _ in range(2)]
    caches = [_narrow(one) for one in plain]
    firsts = list(accumulate(size.cached, initial=0))[:-1]
    cu_rows = make.integers(*range(0, size.rows + 1, size.noise))
    args = (q, k, v, *caches, cu_rows, make.integers(*firsts), make.integers(*size.cached))

    def joined(part: Tensor, cache: Tensor, group: int) -> Tensor:
        rows = slice(group * size.noise, (group + 1) * size.noise)
        kept = cache[firsts[group] : firsts[group] + size.cached[group]]
        return torch.cat([reference._dequantised(kept, part.double()), part[rows].double()])

    starts = [group * size.noise for group in range(groups)]
    return Case(
        "attention_step_8bit",
        _both("attention_step_8bit", *args, size.noise),
        _sampled(
            q,
            [joined(k, caches[0], group) for group in range(groups)],
            [joined(v, caches[1], group) for group in range(groups)],
            starts,
        ),
        4 * q.numel() * q.element_size() + sum(x.nbytes for x in caches),
        sum(4 * size.hidden * size.noise * (size.noise + cached) for cached in size.cached),
        torch.tensor(starts, device=make.device),
    )


def attention_prefill(size: Size, make: _Maker) -> Case:
    head_dim, length = size.hidden // size.heads, size.cached[0]
    text = length // 50
    ends = list(range(1, text + 1)) + [length] * (length - text)
    qkv = make.random(length, 3 * size.hidden)
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split(size.heads, 1)
    args = (q, k, v, make.integers(0, length), make.integers(*ends), length)
    contenders = _both("attention_prefill", *args)
    starts = [0, text - 1, length - 1]
    return Case(
        "attention_prefill",
        contenders,
        _sampled(q, [k[: ends[i]] for i in starts], [v[: ends[i]] for i in starts], starts),
        4 * q.numel() * q.element_size(),
        4 * size.hidden * sum(ends),
        torch.tensor(starts, device=make.device),
    )


CASES = {
    "rms_norm": rms_norm,
    "rope_": rope,
    "rope_cache_": rope_cache,
    "swiglu": swiglu,
    "modulate": modulate,
    "quantise_": _rows_in_8_bits("quantise_"),
    "rms_norm_quantise_": _rows_in_8_bits("rms_norm_quantise_"),
    "swiglu_quantise_": _rows_in_8_bits("swiglu_quantise_"),
    "scaled_mm_": product,
    "quantise_cache_": quantise_cache,
    "dequantise_int8_": _dequantise("int8"),
    "dequantise_fp8_": _dequantise("fp8"),
    "dequantise_nf4_": _dequantise("nf4"),
    "guidance_step_": guidance,
    "attention_step": attention_step,
    "join_segments": join_segments,
    "attention_step_8bit": attention_step_8bit,
    "attention_prefill": attention_prefill,
}


def build(name: str, device: torch.device, size: Size | None = None) -> Case:
    """A case with fresh random inputs in bfloat16: of full size on a GPU, small elsewhere."""
    size = size or (FULL if device.type == "cuda" else SMALL)
    return CASES[name](size, _Maker(device, torch.bfloat16))


@dataclass(frozen=True)
class Raced:
    """A contender of a race, held to float64 and then timed twice."""

    seconds: tuple[float, float] | None  # None where it did not run
    why: str = ""

    @property
    def best(self) -> float:
        return float("inf") if self.seconds is None else min(self.seconds)

    @property
    def noise(self) -> float:
        return 0.0 if self.seconds is None else abs(self.seconds[0] - self.seconds[1])


def race(device: torch.device, size: Size | None = None) -> dict[str, Raced]:
    """A step's attention by Triton and each library, and FlashAttention 3 and 4 where installed.

    Contenders alternate, so that a clock that changes is the same for all. One that is wrong does
    not run.
    """
    case = build("attention_step", device, size)
    named = {"triton": KERNELS, **LIBRARIES}
    runs = {one: (label, None) for one, label in named.items() if label in case.contenders}
    if device.type == "cuda":
        impls = torch.nn.attention.list_flash_attention_impls()
        runs |= {f"flash, {one}": (LIBRARIES["flash"], one) for one in impls}
    else:
        del runs["triton"]  # in the interpreter
    found: dict[str, Raced] = {}
    times: dict[str, list[float]] = {one: [] for one in runs}
    for turn in range(2):
        for one, (label, impl) in runs.items():
            if one in found:
                continue
            try:
                with _flash_by(impl):
                    if not turn:
                        check(case, label)
                    times[one].append(seconds(case.contenders[label], device))
            except Exception as error:  # absent, refused, or wrong: each is a reason
                found[one] = Raced(None, str(error).partition("\n")[0] or type(error).__name__)
    for one, took in times.items():
        if one not in found:
            found[one] = Raced((took[0], took[1]))
    return {one: found[one] for one in runs}


@contextlib.contextmanager
def _flash_by(impl: str | None) -> Iterator[None]:
    """Makes an implementation PyTorch's flash attention inside; None for the one that is."""
    if impl is None:
        yield
        return
    torch.nn.attention.activate_flash_attention_impl(impl)
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def fastest(raced: dict[str, Raced]) -> str | None:
    """Who of `winners` is fastest, by more than noise if it isn't Triton; None without Triton.

    FlashAttention 3 and 4 are no choice: they are PyTorch's flash attention where the caller
    activates them.
    """
    triton = raced.get("triton", Raced(None))
    if triton.seconds is None:
        return None
    best = min(LIBRARIES, key=lambda one: raced.get(one, Raced(None)).best)
    faster = raced.get(best, Raced(None))
    noise = max(triton.noise, faster.noise)
    return best if faster.best < triton.best - noise else "triton"


_BEGIN, _END = "# winners: begin\n", "# winners: end\n"


def with_winners(text: str, table: dict[str, dict[int, str]]) -> str:
    """The text of `winners.py` with another table."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    head = "WINNERS: dict[str, dict[int, str]] = {"
    lines = [head] if table else [head + "}"]
    for card, found in sorted(table.items()):
        entries = ", ".join(f'{head_dim}: "{one}"' for head_dim, one in sorted(found.items()))
        lines.append(f'    "{card}": {{{entries}}},')
    lines += ["}"] * bool(table)
    return before + _BEGIN + "\n".join(lines) + "\n" + _END + after


def keep_winners(card: str, found: dict[int, str]) -> Path:
    """Writes a card's winners into the package, which `attention="auto"` follows."""
    path = Path(winners.__file__)
    table = winners.WINNERS | {card: winners.WINNERS.get(card, {}) | found}
    path.write_text(with_winners(path.read_text(), table))
    return path
