"""The CPU's operations in C++ against PyTorch's: each alone, and in whole pictures.

    python -m bench.cpu_operations [--threads N] [--rounds 9] [--pictures 3] [--inductor]

Both run in turns in one process, and the shortest time of each counts, in seconds of the processor
rather than of the clock: the ratios hold on a machine that is shared. `--inductor` adds a layer
whose row operations torch.compile fuses. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from omnigen_fast.kernels import cpu, ops
from torch import Tensor

from omnigen_fast.compilation import compiler, folder
from omnigen_fast.config import ModelConfig

from .cases import COLUMNS, Task
from .common import full_config, machine, small_config, write_result
from .contenders import make_start
from .cpu_peer import TARGETS
from .models import load
from .suite import BFLOAT16_BOUND, difference

_HEADS = 8  # of the attention that is timed
# Queries, and cached keys: text, and with an input image.
_ATTENTIONS = ((1024, 100), (1024, 1200), (256, 1200), (4096, 4300))
_ROWS = 2048
_STEPS = 3  # of a picture
_DTYPE = torch.bfloat16

Work = Callable[[], Any]


def in_turns(work: Work, rounds: int) -> dict[str, float]:
    """Shortest processor seconds of some work, with PyTorch's operations and with those in C++."""
    shortest: dict[str, float] = {}
    for index in range(rounds + 1):
        for kernels in ("reference", "cpp"):
            with ops.use(kernels):
                start = time.process_time()
                work()
                taken = time.process_time() - start
            if index:
                shortest[kernels] = min(taken, shortest.get(kernels, taken))
    return shortest


def product_rate(rounds: int) -> float:
    """Operations per processor second of a large matrix product."""
    rows, inner, columns = 2048, 3072, 4096
    x, weight = torch.randn(rows, inner).to(_DTYPE), torch.randn(columns, inner).to(_DTYPE)
    out = torch.empty(rows, columns, dtype=_DTYPE)
    seconds = in_turns(lambda: torch.mm(x, weight.t(), out=out), rounds)
    return 2 * rows * inner * columns / min(seconds.values())


def attention(queries: int, cached: int, head_dim: int) -> tuple[Work, float]:
    """One group's attention of a step, and its operations."""
    q, k, v = torch.randn(queries, 3 * _HEADS, head_dim).to(_DTYPE).split(_HEADS, 1)
    caches = [torch.randn(cached, _HEADS, head_dim).to(_DTYPE) for _ in range(2)]
    integers = [torch.tensor(one, dtype=torch.int32) for one in ([0, queries], [0], [cached])]
    out = torch.empty(q.shape, dtype=_DTYPE)
    flops = 4.0 * queries * (queries + cached) * _HEADS * head_dim
    return lambda: ops.attention_step(q, k, v, *caches, *integers, queries, out=out), flops


def row_operations(config: ModelConfig) -> dict[str, Work]:
    """Those of a layer on `_ROWS` rows."""
    width = config.hidden_size
    x = torch.randn(_ROWS, width).to(_DTYPE)
    weight, out = torch.ones(width, dtype=_DTYPE), torch.empty_like(x)
    qkv = torch.randn(_ROWS, config.qkv_width).to(_DTYPE)
    angles = torch.rand(_ROWS, config.head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    gate_up = torch.randn(_ROWS, 2 * config.intermediate_size).to(_DTYPE)
    heads = (config.num_heads, config.num_kv_heads)
    gate = gate_up[:, : config.intermediate_size]
    return {
        "rms_norm": lambda: ops.rms_norm(x, weight, config.rms_norm_eps, out=out),
        "rope_": lambda: ops.rope_(qkv, cos, sin, *heads),
        "swiglu": lambda: ops.swiglu(gate_up, out=gate),
    }


def layers(config: ModelConfig, rounds: int) -> dict[str, float]:
    """A layer without its attention: PyTorch's row operations, those in C++, and inductor's.

    "inductor" is one graph, which plans its own memory; "compile" is the time that it takes to
    compile by the clock, if nothing is cached.
    """
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads
    half, eps = config.head_dim // 2, config.rms_norm_eps
    shapes = ((config.qkv_width, width), (width, width), (2 * inner, width), (width, inner))
    qkv_proj, o_proj, gate_up_proj, down_proj = (
        (torch.randn(shape) * shape[1] ** -0.5).to(_DTYPE).t() for shape in shapes
    )
    norm = torch.ones(width, dtype=_DTYPE)
    residual, normed = (torch.randn(_ROWS, width).to(_DTYPE) for _ in range(2))
    qkv = torch.empty(_ROWS, config.qkv_width, dtype=_DTYPE)
    gate_up = torch.empty(_ROWS, 2 * inner, dtype=_DTYPE)
    angles = torch.rand(_ROWS, half)
    cos, sin = angles.cos(), angles.sin()

    def ours() -> None:
        ops.rms_norm(residual, norm, eps, out=normed)
        torch.mm(normed, qkv_proj, out=qkv)
        ops.rope_(qkv, cos, sin, heads, config.num_kv_heads)
        normed.copy_(qkv[:, :width])
        torch.addmm(residual, normed, o_proj, out=residual)
        ops.rms_norm(residual, norm, eps, out=normed)
        torch.mm(normed, gate_up_proj, out=gate_up)
        inside = ops.swiglu(gate_up, out=gate_up[:, :inner])
        torch.addmm(residual, inside, down_proj, out=residual)

    def normalised(x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale).to(_DTYPE) * norm

    def graph(residual: Tensor) -> None:
        product = torch.mm(normalised(residual), qkv_proj).unflatten(1, (-1, 2 * half))
        rotated = product[:, : heads + config.num_kv_heads]
        a, b = rotated[..., :half].float(), rotated[..., half:].float()
        c, s = cos[:, None], sin[:, None]
        rotated = torch.cat([a * c - b * s, b * c + a * s], -1).to(_DTYPE)
        total = torch.addmm(residual, rotated[:, :heads].flatten(1), o_proj)
        gate, up = torch.mm(normalised(total), gate_up_proj).chunk(2, 1)
        residual.copy_(torch.addmm(total, F.silu(gate) * up, down_proj))

    with torch.no_grad():
        found = in_turns(ours, rounds)
        compiled = torch.compile(graph, fullgraph=True, dynamic=True)
        begin = time.perf_counter()
        compiled(residual)
        found["compile"] = time.perf_counter() - begin
        for _ in range(rounds):
            start = time.process_time()
            compiled(residual)
            taken = time.process_time() - start
            found["inductor"] = min(taken, found.get("inductor", taken))
    return found


def pictures(rounds: int) -> list[dict[str, Any]]:
    """Whole pictures of the small random model, shown only if both are as one up to rounding."""
    ours, found = load("random:small", _DTYPE, torch.device("cpu")).ours, []
    compilation = ours.pipe.engine.compilation
    for size, images, _ in TARGETS:
        start = make_start(ours.pipe, Task(size, images, _STEPS))
        shortest: dict[bool, float] = {}
        latents = {}
        for _ in range(rounds):
            for active in (False, True):
                compilation.active = active
                ours.pipe.clear_cache()
                begin = time.process_time()
                latents[active] = ours.picture(start, _STEPS).latents
                taken = time.process_time() - begin
                shortest[active] = min(taken, shortest.get(active, taken))
        apart = difference(latents[True], latents[False], start.noise)
        if not apart <= BFLOAT16_BOUND:
            raise SystemExit(f"{size}, {COLUMNS[images]}: {apart:.1e} apart; no time is shown")
        name = f"{size}, {COLUMNS[images]}"
        found.append({"name": name, "reference": shortest[False], "cpp": shortest[True]})
    return found


def main() -> int:
    """Measures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads")
    parser.add_argument("--rounds", type=int, default=9, help="of each operation")
    parser.add_argument("--pictures", type=int, default=3, help="of each side; 0 for none")
    parser.add_argument("--inductor", action="store_true", help="a layer by torch.compile, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    command = compiler()
    try:
        if command is None:
            raise cpu.Unavailable("there is no C++ compiler")
        for config in (small_config(), full_config()):
            cpu.prepare(cpu.Builder(command, folder()), config.head_dim)
    except cpu.Unavailable as error:
        print(f"nothing can be compiled here: {error}", file=sys.stderr)
        return 1
    rate = product_rate(arguments.rounds)
    result: dict[str, Any] = {"machine": machine(), "product_flops_per_processor_second": rate}
    result["operations"] = rows = []
    for queries, cached in _ATTENTIONS:
        work, flops = attention(queries, cached, small_config().head_dim)
        name = f"attention of {queries} queries and {cached} cached keys"
        rows.append({"name": name, "flops": flops, **in_turns(work, arguments.rounds)})
    for config in (small_config(), full_config()):
        for name, work in row_operations(config).items():
            name = f"{name}, {_ROWS} rows, hidden {config.hidden_size}"
            rows.append({"name": name, **in_turns(work, arguments.rounds)})
    if arguments.inductor:
        for config in (small_config(), full_config()):
            name = f"a layer without attention, {_ROWS} rows, hidden {config.hidden_size}"
            rows.append({"name": name, **layers(config, arguments.rounds)})
    rows += pictures(arguments.pictures) if arguments.pictures else []
    for row in rows:
        seconds = {kernels: row[kernels] for kernels in ("reference", "cpp")}
        said = ", ".join(f"{name} {1e3 * one:.2f} ms" for name, one in seconds.items())
        if "inductor" in row:
            said += f", inductor {1e3 * row['inductor']:.2f} ms, compiled in {row['compile']:.0f} s"
        if "flops" in row:
            share = row["flops"] / row["cpp"] / rate
            said += f", {share:.0%} of the products' rate"
        print(f"{row['name']}: {said}, {row['reference'] / row['cpp']:.2f}x")
    write_result("cpu-operations", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
