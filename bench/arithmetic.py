"""What products in 8 bits gain and cost.

    python -m bench.arithmetic step [--rounds 7]
    python -m bench.arithmetic errors [--model shapes] [--prompts 8] [--side 64] [--compute int8]

`step` times a step at full width (hidden 3072, 2 layers, a picture of 512 px from text) on this
CPU, with products in bfloat16, in int8, and in bfloat16 of weights stored in int8, one after the
other in every round. `errors` computes
the products of a layer in 8 bits, each kind alone and all together, and measures what that adds to
the latents; `forms.COMPUTED` says which of them `compute=` takes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from omnigen_fast import OmniGenPipeline, forms
from omnigen_fast.memory.plan import MemoryPlan
from omnigen_fast.running import Running

from .common import full_config, interleave, machine, random_weights, spread, write_result
from .models import TOKENIZER
from .peers.model_files import write_original

VARIANTS: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "int8": {"compute": "int8"},
    "int8 weights": {"weights": "int8"},
}
TARGET = 1.5  # of a step's time in bfloat16 over that in int8, where a CPU has VNNI or AMX
SLOWER = 0.05  # share of a step that expanding resident weights may take
_STEPS = 20  # of a picture whose error is measured
_AGREE = 0.05  # relative error of the latents above which no time is reported
PROMPTS = (
    "a large red circle at the top left",
    "a small blue square in the middle",
    "two green triangles",
    "a yellow star below a purple ring",
)


def step(rounds: int) -> int:
    """Times a step of each variant; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        _write_wide(Path(folder))
        runs = {name: _started(folder, one, rounds + 2) for name, one in VARIANTS.items()}
    seconds = interleave(
        {name: lambda one=one: one[0].engine.step(one[1]) for name, one in runs.items()}, rounds
    )
    exact, *others = (running.latents for _, running in runs.values())
    error = max(_error(found, exact) for found in others)
    if not error < _AGREE:
        print(f"the latents differ by {error:.4f}: no time is reported")
        return 1
    for name, one in seconds.items():
        print(f"{name:<14}{spread(one)}")
    middles = {name: statistics.median(one) for name, one in seconds.items()}
    ratio = middles["bfloat16"] / middles["int8"]
    slower = middles["int8 weights"] / middles["bfloat16"] - 1
    print(
        f"int8 is {ratio:.2f}x as fast (target {TARGET}x), weights in int8 take {slower:.1%} "
        f"longer (target {SLOWER:.0%}); the latents differ by {error:.4f}"
    )
    found = {"ratio": ratio, "slower": slower, "difference": error}
    write_result("arithmetic-step", {"machine": machine(), "seconds": seconds, **found})
    return 0 if ratio >= TARGET and slower <= SLOWER else 1


def _write_wide(folder: Path) -> None:
    """A random checkpoint of full width and two layers, with the tests' small autoencoder."""
    import shutil

    config = replace(full_config(), num_layers=2, vocab_size=640, pos_embed_size=64)
    shutil.copy(TOKENIZER, folder)
    shutil.copytree(TOKENIZER.parent / "vae", folder / "vae")
    write_original(folder, config, random_weights(config, torch.bfloat16))


def _started(folder: str, options: dict[str, str], steps: int) -> tuple[OmniGenPipeline, Running]:
    """A pipeline with these options, and a call of 512 px before its first step."""
    pipe = OmniGenPipeline.from_pretrained(folder, device="cpu", **options)
    call = pipe.make_call(
        PROMPTS[0], height=512, width=512, num_inference_steps=steps, seed=0, output_type="latent"
    )
    return pipe, pipe.engine.start(call, MemoryPlan.plain(pipe.config.num_layers))


def errors(model: str, prompts: int, side: int, compute: str) -> dict[str, dict[str, float]]:
    """The relative error of latents by each kind of product in 8 bits: mean and worst.

    Against products in float32, with everything else in float32 too; "bfloat16" is what bfloat16
    arithmetic itself adds, without any product in 8 bits.
    """
    requests = [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "height": side,
            "width": side,
            "num_inference_steps": _STEPS,
            "seed": i,
            "output_type": "latent",
            "progress": False,
        }
        for i in range(prompts)
    ]

    def latents(names: tuple[str, ...], dtype: str) -> list[Tensor]:
        with computed(compute, names):
            pipe = OmniGenPipeline.from_pretrained(
                model, device="cpu", dtype=dtype, compute=compute if names else None
            )
            return [pipe(**one) for one in requests]

    exact = latents((), "float32")
    kinds: dict[str, tuple[tuple[str, ...], str]] = {"bfloat16": ((), "bfloat16")}
    kinds |= {name: ((name,), "float32") for name in forms.QUANTISED}
    kinds["all"] = (forms.QUANTISED, "float32")
    kinds[f"compute={compute}"] = (forms.COMPUTED[compute], "bfloat16")
    table = {}
    for label, (names, dtype) in kinds.items():
        found = [_error(one, other) for one, other in zip(latents(names, dtype), exact)]
        table[label] = {"mean": statistics.fmean(found), "worst": max(found)}
        print(f"{label:<14}{table[label]['mean']:.4f}  worst {table[label]['worst']:.4f}")
    return table


@contextmanager
def computed(compute: str, names: tuple[str, ...]) -> Iterator[None]:
    """Makes `compute=` take other products, of pipelines that are loaded and used inside."""
    with mock.patch.dict(forms.COMPUTED, {compute: names}):
        yield


def _error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.double(), exact.double()
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def main(arguments: list[str] | None = None) -> int:
    """Measures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("step", help="time a step on this CPU")
    one.add_argument("--rounds", type=int, default=7)
    one = commands.add_parser("errors", help="measure what each product in 8 bits adds")
    one.add_argument("--model", default="shapes")
    one.add_argument("--prompts", type=int, default=8)
    one.add_argument("--side", type=int, default=64, help="of a picture, in pixels")
    one.add_argument("--compute", choices=tuple(forms.PRODUCTS), default="int8")
    given: Any = parser.parse_args(arguments)
    if given.command == "step":
        return step(given.rounds)
    found = errors(given.model, given.prompts, given.side, given.compute)
    result = {"machine": machine(), "model": given.model, "errors": found}
    write_result(f"arithmetic-errors-{given.compute}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
