"""Loads a full-size random checkpoint on the CPU, makes a small picture, and reports the memory.

    python -m bench.full_size FOLDER [--stream] [--side 256] [--steps 2] [--keep]

Writes 3.8 B random parameters (bfloat16, original layout, 8.1 GB with the VAE) into FOLDER unless
they are there, then loads them and makes one picture in a process of its own. The peak resident set
counts mapped pages of the files too; it must stay below the checkpoint's size + 0.6 GB.

With --stream every layer passes through a ring, read from the file as it is needed, and the VAE
works in strips. Then the peak of memory that is the process's own must stay below 3 GB; mapped
pages, which the kernel drops when it needs the room, are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from omnigen_fast.weights.names import ORIGINAL, layout_sources

from .common import TOKENIZER, full_config, machine, write_result
from .peers.model_files import phi3_config

ALLOWED_OVERHEAD = 0.6e9
STREAMED_LIMIT = 3e9
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.13025,
}


def write_checkpoint(folder: Path) -> None:
    """Writes the checkpoint tensor by tensor: it need not fit into memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = full_config()
    shutil.copy(TOKENIZER, folder)
    (folder / "config.json").write_text(json.dumps(phi3_config(config)))
    header, offset, tensors = {}, 0, []
    for parameter, parts in layout_sources(config, ORIGINAL).items():
        for part in parts:
            size = 2 * torch.Size(part.shape).numel()
            header[part.name] = {
                "dtype": "BF16",
                "shape": part.shape,
                "data_offsets": [offset, offset + size],
            }
            offset += size
            tensors.append((parameter, part.shape))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    partial = folder / "model.safetensors.partial"
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter, shape in tensors:
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
            if parameter.endswith("norm"):
                values.mul_(0.1).add_(1)
            elif parameter.endswith("bias") or parameter == "pos_embed":
                values.mul_(0.02)
            elif parameter != "embed_tokens":
                values.mul_(values[0].numel() ** -0.5)
            file.write(values.view(torch.uint8).numpy())
    from diffusers import AutoencoderKL

    AutoencoderKL.from_config(VAE).save_pretrained(folder / "vae")
    partial.rename(folder / "model.safetensors")


class ResidentSet(threading.Thread):
    """Watches this process's memory, from /proc.

    Attributes:
        own_bytes: peak of what is not a file's.
        mapped_bytes: peak of mapped files' pages.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own_bytes = self.mapped_bytes = 0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.01):
            self._look()

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()
        self._look()

    def _look(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line[:3] == "Rss"}
        self.own_bytes = max(self.own_bytes, 1024 * int(kilobytes["RssAnon"]))
        self.mapped_bytes = max(self.mapped_bytes, 1024 * int(kilobytes["RssFile"]))


def run_picture(folder: Path, side: int, steps: int, stream: bool) -> None:
    """In a process of its own: loads, makes a picture, prints peaks and times as JSON."""
    from omnigen_fast import OmniGenPipeline
    from omnigen_fast.memory.plan import MemoryPlan

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    streamed = MemoryPlan.plain(layers=0)
    streamed = replace(streamed, strip_rows=4)
    watch = ResidentSet()
    watch.start()
    start = time.perf_counter()
    memory = streamed if stream else "auto"
    pipe = OmniGenPipeline.from_pretrained(folder, device="cpu", memory=memory)
    loaded, loaded_peak = time.perf_counter() - start, peak()
    start = time.perf_counter()
    (image,) = pipe(
        "A curly-haired man in a red shirt is drinking tea.",
        height=side,
        width=side,
        num_inference_steps=steps,
        seed=0,
    )
    watch.stop()
    assert image.size == (side, side)
    print(
        json.dumps(
            {
                "load_seconds": loaded,
                "load_peak_gb": loaded_peak,
                "picture_seconds": time.perf_counter() - start,
                "peak_gb": peak(),
                "own_peak_gb": watch.own_bytes / 1e9,
                "mapped_peak_gb": watch.mapped_bytes / 1e9,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=256, help="pixels of the picture")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--stream", action="store_true", help="no layer stays in memory")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.child:
        run_picture(folder, arguments.side, arguments.steps, arguments.stream)
        return
    if not (folder / "model.safetensors").exists():
        write_checkpoint(folder)
    sizes = {
        name: os.path.getsize(folder / name) / 1e9
        for name in ("model.safetensors", "vae/diffusion_pytorch_model.safetensors")
    }
    command = [sys.executable, "-m", "bench.full_size", str(folder), "--child"]
    command += ["--side", str(arguments.side), "--steps", str(arguments.steps)]
    if arguments.stream:
        command.append("--stream")
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(child.stdout.splitlines()[-1])
    print(
        f"model file {sizes['model.safetensors']:.3f} GB, with the VAE {sum(sizes.values()):.3f} GB"
    )
    print(f"peak resident set after loading {measured['load_peak_gb']:.3f} GB")
    print(f"of the picture {measured['peak_gb']:.3f} GB: at most {measured['own_peak_gb']:.3f} GB")
    print(f"the process's own, {measured['mapped_peak_gb']:.3f} GB mapped pages of files")
    if arguments.stream:
        name, peak, limit = "full-size-cpu-streamed", "own_peak_gb", STREAMED_LIMIT / 1e9
    else:
        name, peak = "full-size-cpu", "peak_gb"
        limit = sum(sizes.values()) + ALLOWED_OVERHEAD / 1e9
    holds = measured[peak] < limit
    print(f"{peak} {measured[peak]:.3f}, limit {limit:.3f}: {holds}")
    result = {"machine": machine(), "side": arguments.side, "steps": arguments.steps}
    write_result(name, {**result, "file_gb": sizes, "limit_gb": limit, **measured})
    if not arguments.keep:
        shutil.rmtree(folder)
    if not holds:
        sys.exit("the peak resident set is over its limit")


if __name__ == "__main__":
    main()
