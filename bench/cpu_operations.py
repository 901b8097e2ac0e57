"""The CPU's operations in C++ against PyTorch's: each alone, and in whole pictures.

    python -m bench.cpu_operations [--threads N] [--rounds 9]

Both run in turns in one process, and the shortest time of each counts, in seconds of the processor
rather than of the clock: the ratios hold on a machine that is shared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from omnigen_fast.kernels import cpu, ops

from omnigen_fast.compilation import compiler, folder
from omnigen_fast.config import ModelConfig

from .cases import COLUMNS, Task
from .common import full_config, machine, small_config
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
    x, residual = (torch.randn(_ROWS, width).to(_DTYPE) for _ in range(2))
    weight, out = torch.ones(width, dtype=_DTYPE), torch.empty_like(x)
    qkv = torch.randn(_ROWS, config.qkv_width).to(_DTYPE)
    angles = torch.rand(_ROWS, config.head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    gate_up = torch.randn(_ROWS, 2 * config.intermediate_size).to(_DTYPE)
    heads = (config.num_heads, config.num_kv_heads)
    gate = gate_up[:, : config.intermediate_size]
    # x is zero, so that the residual stays as it is round by round
    zero = torch.zeros_like(x)
    return {
        "rms_norm": lambda: ops.rms_norm(x, weight, config.rms_norm_eps, out=out),
        "add_rms_norm": lambda: ops.add_rms_norm(
            residual, zero, weight, config.rms_norm_eps, out=out
        ),
        "rope_": lambda: ops.rope_(qkv, cos, sin, *heads),
        "swiglu": lambda: ops.swiglu(gate_up, out=gate),
    }


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
    rows += pictures(arguments.pictures) if arguments.pictures else []
    for row in rows:
        seconds = {kernels: row[kernels] for kernels in ("reference", "cpp")}
        said = ", ".join(f"{name} {1e3 * one:.2f} ms" for name, one in seconds.items())
        if "flops" in row:
            share = row["flops"] / row["cpp"] / rate
            said += f", {share:.0%} of the products' rate"
        print(f"{row['name']}: {said}, {row['reference'] / row['cpp']:.2f}x")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
