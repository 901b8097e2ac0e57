"""The CPU's operations against PyTorch's in bfloat16: each alone, and in whole pictures.

    python -m bench.cpu_operations [--threads N] [--rounds 9] [--pictures 3] [--inductor]

Both run in turns in one process, and the shortest time of each counts, in seconds of the processor
rather than of the clock: the ratios hold on a machine that is shared. "reference" is plain PyTorch
in bfloat16, "cpp" what is in C++ or, for products, in the faster dtype. `--inductor` adds a layer
whose row operations torch.compile fuses. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from omnigen_fast.kernels import cpu, ops, widened
from torch import Tensor

from omnigen_fast.compilation import compiler, folder
from omnigen_fast.config import ModelConfig
from omnigen_fast.linear import linear

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


@contextmanager
def _plain() -> Iterator[None]:
    """PyTorch's operations, all in the dtype of their arguments."""
    with ops.use("reference"), mock.patch.object(widened, "faster", lambda dtype: False):
        yield


def in_turns(work: Work, rounds: int) -> dict[str, float]:
    """Shortest processor seconds of some work, with PyTorch's operations and with those here."""
    shortest: dict[str, float] = {}
    for index in range(rounds + 1):
        for kernels, chosen in (("reference", _plain()), ("cpp", ops.use("cpp"))):
            with chosen:
                start = time.process_time()
                work()
                taken = time.process_time() - start
            if index:
                shortest[kernels] = min(taken, shortest.get(kernels, taken))
    return shortest


def product_rate(rounds: int) -> float:
    """Operations per processor second of a large matrix product, in the faster dtype."""
    rows, inner, columns = 2048, 3072, 4096
    dtype = widened.fastest(_DTYPE)
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
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


def products(config: ModelConfig, rounds: int) -> dict[str, float]:
    """Shortest processor seconds of a layer's widest product: in bfloat16, and as layers do it."""
    width, inner = config.hidden_size, config.intermediate_size
    x, weight = torch.randn(_ROWS, width).to(_DTYPE), torch.randn(2 * inner, width).to(_DTYPE)
    out = torch.empty(_ROWS, 2 * inner, dtype=_DTYPE)
    return in_turns(lambda: linear(x, weight, out=out), rounds)


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
        (torch.randn(shape) * shape[1] ** -0.5).to(_DTYPE) for shape in shapes
    )
    norm = torch.ones(width, dtype=_DTYPE)
    residual, normed = (torch.randn(_ROWS, width).to(_DTYPE) for _ in range(2))
    qkv = torch.empty(_ROWS, config.qkv_width, dtype=_DTYPE)
    gate_up = torch.empty(_ROWS, 2 * inner, dtype=_DTYPE)
    angles = torch.rand(_ROWS, half)
    cos, sin = angles.cos(), angles.sin()

    def ours() -> None:
        ops.rms_norm(residual, norm, eps, out=normed)
        linear(normed, qkv_proj, out=qkv)
        ops.rope_(qkv, cos, sin, heads, config.num_kv_heads)
        normed.copy_(qkv[:, :width])
        linear(normed, o_proj, out=residual, accumulate=True)
        ops.rms_norm(residual, norm, eps, out=normed)
        linear(normed, gate_up_proj, out=gate_up)
        inside = ops.swiglu(gate_up, out=gate_up[:, :inner])
        linear(inside, down_proj, out=residual, accumulate=True)

    def normalised(x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale).to(_DTYPE) * norm

    def graph(residual: Tensor) -> None:
        product = F.linear(normalised(residual), qkv_proj).unflatten(1, (-1, 2 * half))
        rotated = product[:, : heads + config.num_kv_heads]
        a, b = rotated[..., :half].float(), rotated[..., half:].float()
        c, s = cos[:, None], sin[:, None]
        rotated = torch.cat([a * c - b * s, b * c + a * s], -1).to(_DTYPE)
        total = torch.addmm(residual, rotated[:, :heads].flatten(1), o_proj.t())
        gate, up = F.linear(normalised(total), gate_up_proj).chunk(2, 1)
        residual.copy_(torch.addmm(total, F.silu(gate) * up, down_proj.t()))

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
                with nullcontext() if active else _plain():
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
            cpu.prepare(cpu.Builder.of_this_cpu(command, folder()), config.head_dim)
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
        flops = 4.0 * _ROWS * config.hidden_size * config.intermediate_size
        name = f"a product of {_ROWS} rows, hidden {config.hidden_size}"
        rows.append({"name": name, "flops": flops, **products(config, arguments.rounds)})
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
