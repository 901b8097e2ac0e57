"""What the benchmarks share: random models, interleaved timing, the machine in words."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnigen_fast.config import ModelConfig, released_sizes
from omnigen_fast.parameters import parameter_shapes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
TOKENIZER = ROOT / "tests" / "golden" / "tiny" / "tokenizer.json"


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Weights that keep activations near one, as trained ones do; drawn on the device.

    Products are N(0, 1 / inputs), norms near one, biases and the position table small.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        values = torch.randn(shape, generator=generator, device=device)
        if name.endswith("norm"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values *= 0.02
        elif name == "pos_embed":
            values *= 0.3
        elif name != "embed_tokens":
            values *= values[0].numel() ** -0.5
        weights[name] = values.to(dtype)
    return weights


def long_rope(head_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Short and long factors of the size that the released model has."""
    half = head_dim // 2
    short = tuple(1.05 + 1.7 * i / (half - 1) for i in range(half))
    long = tuple(1 + 63.8 * (i / (half - 1)) ** 1.5 for i in range(half))
    return short, long


def full_config() -> ModelConfig:
    """Sizes of the released model."""
    short, long = long_rope(96)
    return replace(released_sizes(), short_factor=short, long_factor=long)


def small_config() -> ModelConfig:
    """A model that two CPU cores run in a moment."""
    return replace(
        full_config(),
        hidden_size=768,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        intermediate_size=2048,
        vocab_size=640,
        pos_embed_size=64,
    )


def tiny_config() -> ModelConfig:
    """What the tests of the benches themselves run."""
    return replace(
        full_config(),
        hidden_size=192,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=256,
        vocab_size=640,
        pos_embed_size=16,
    )


def interleave(
    variants: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each round of each variant, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(warm_up + rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: Sequence[float]) -> str:
    """Median, and the lowest and highest."""
    middle = statistics.median(seconds)
    return f"{middle:8.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
            cpu = names[0] if names else cpu
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version_of(name) for name in ("torch", "diffusers")},
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes a result below bench/results and prints it as the last line."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return path
