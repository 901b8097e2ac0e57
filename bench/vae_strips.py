"""Memory and time of the autoencoder in strips, compared with the whole image at once.

    python -m bench.vae_strips [--side 512] [--rounds 3] [--bytes-side 1024]

A random autoencoder of SDXL's size. Peaks (beyond weights and input) are counted on meta tensors by
`bench.tracker`, to the byte; seconds are medians of interleaved rounds on this machine's CPU.
Refuses to report where strips and whole differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omnigen_fast.images import InputImage
from omnigen_fast.memory import autoencoder as vae_cost
from omnigen_fast.vae import strips
from omnigen_fast.vae.vae import Vae

from .common import interleave, machine, spread, write_result
from .full_size import VAE
from .tracker import MemoryTracker

# name: arguments of decode and encode
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "strips of 8": {"strip_rows": 8},
    "strips of 2": {"strip_rows": 2},
    "strips of 8, recompute": {"strip_rows": 8, "recompute": True},
    "strips of 8, on the host": {"strip_rows": 8, "store": torch.device("cpu")},
    "strips of 2, on the host": {"strip_rows": 2, "store": torch.device("cpu")},
}
TIMED = ("whole", "strips of 8", "strips of 2", "strips of 8, recompute")


def random_autoencoder(config: dict[str, Any], device: str = "cpu", seed: int = 0) -> Vae:
    """An autoencoder with random weights, biases and norms included."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    with torch.device(device), torch.no_grad():
        autoencoder = AutoencoderKL.from_config(config)
        for parameter in autoencoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return Vae(autoencoder)


def random_image(height: int, width: int, seed: int = 0) -> InputImage:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return InputImage(pixels)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Lets meta tensors stand for a GPU's: fused attention keeps no scores.

    Strips that are stored on the host take no memory here.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return torch.empty_like(query)

    def put(self: strips.Stored, strip: Tensor) -> None:
        if self.moments is not None:
            self.moments.add(strip)
        host = self._store.type != "meta"
        self._strips.append(torch.empty(1).expand(strip.shape) if host else strip)

    with (
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(strips.Stored, "put", put),
    ):
        yield


def peak_bytes(vae: Vae, run: Callable[[], Any], *inputs: Tensor) -> int:
    """Peak bytes of meta tensors during a run, beyond weights and inputs."""
    with MemoryTracker([*vae.autoencoder.parameters(), *inputs]) as tracker:
        before = tracker.live_bytes
        run()
        return tracker.peak_bytes - before


def decode_peak(vae: Vae, height: int, width: int, **way: Any) -> int:
    latents = torch.empty(1, 4, height // 8, width // 8, device="meta")
    with as_on_a_gpu():
        return peak_bytes(vae, lambda: vae.decode(latents, **way), latents)


def encode_peak(vae: Vae, height: int, width: int, **way: Any) -> int:
    image = random_image(height, width)
    with as_on_a_gpu():
        return peak_bytes(vae, lambda: vae.encode(image, **way))


def measure_bytes(side: int) -> dict[str, dict[str, int]]:
    """Counted and estimated peaks of each variant."""
    vae, shape = random_autoencoder(VAE, "meta"), vae_cost.VaeShape.from_config(VAE)
    result = {}
    for name, way in WAYS.items():
        estimated = {key: value for key, value in way.items() if key != "store"}
        if way:
            estimated["host_store"] = "store" in way
        result[name] = {
            "decode": decode_peak(vae, side, side, **way),
            "decode_estimate": vae_cost.decode_bytes(shape, side, side, **estimated),
            "encode": encode_peak(vae, side, side, **way),
            "encode_estimate": vae_cost.encode_bytes(shape, side, side, **estimated),
        }
        values = "  ".join(f"{key} {value / 1e6:8.1f} MB" for key, value in result[name].items())
        print(f"{side} px  {name:26s} {values}")
    return result


def measure_seconds(side: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of each variant, and its error relative to the whole image's result."""
    vae = random_autoencoder(VAE)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side // 8, side // 8, generator=generator) * 0.13
    image = random_image(side, side)
    result: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[dict[str, Any]], Tensor]] = {
        "decode": lambda way: vae.decode(latents, **way),
        "encode": lambda way: vae.encode(image, **way),
    }
    for job in calls:
        outputs: dict[str, Tensor] = {}

        def run(name: str, job: str = job, outputs: dict[str, Tensor] = outputs) -> None:
            outputs[name] = calls[job](WAYS[name])

        variants = {name: (lambda name=name: run(name)) for name in TIMED}
        seconds = interleave(variants, rounds, warm_up=0)
        for name in TIMED:
            whole = outputs["whole"]
            error = float((outputs[name] - whole).norm() / whole.norm())
            if error > 1e-5:
                raise SystemExit(f"{job} in {name}: {error:.1e} from the whole; nothing reported")
            result.setdefault(name, {})[job] = {
                "median_s": statistics.median(seconds[name]),
                "all_s": seconds[name],
                "relative_error": error,
            }
            print(f"{side} px  {job} {name:26s} {spread(seconds[name])}  error {error:.1e}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="pixels of the image that is timed")
    parser.add_argument(
        "--bytes-side", type=int, default=1024, help="pixels of the image whose memory is counted"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    result = {
        **machine(),
        "note": "other work ran on this machine: medians of interleaved rounds",
        "bytes_side": args.bytes_side,
        "peak_bytes": measure_bytes(args.bytes_side),
        "side": args.side,
        "seconds": measure_seconds(args.side, args.rounds),
    }
    write_result("vae-strips", result)


if __name__ == "__main__":
    main()
