"""Batch files, runs of them on a small model, and what they leave."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from golden_cases import GOLDEN, TINY
from PIL import Image

from omnigen_fast.cli.main import main

CAT = GOLDEN / "images/cat.png"
EDIT = "<img><|image_1|></img> at night"
MODEL = ["--model", str(TINY), "--device", "cpu", "--dtype", "float32"]
SMALL = [*MODEL, "--height", "32", "--width", "48", "--steps", "1"]
SMALL += ["--max-input-image-size", "32", "--quiet"]
CALL = {
    "height": 32,
    "width": 48,
    "num_inference_steps": 1,
    "max_input_image_size": 32,
    "progress": False,
}


def write(*lines: Any, name: str = "in.jsonl") -> str:
    """A batch file; what is no bytes is written as JSON."""
    texts = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    Path(name).write_bytes(b"\n".join(texts) + b"\n")
    return name


def run(*options: str, name: str = "in.jsonl", out: str = "out"):
    return CliRunner().invoke(main, ["batch", name, out, *SMALL, *options])


def made(*options: str, code: int = 0) -> str:
    """Runs the batch; returns its one line."""
    result = run(*options)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    (line,) = result.output.splitlines()
    return line


def entries(out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def by_id(out: str = "out") -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in entries(out)}


def pictures(out: str = "out") -> list[str]:
    return sorted(name for name in os.listdir(out) if name != "results.jsonl")


def pixels(path: str) -> np.ndarray:
    return np.array(Image.open(path))


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Cat {i}.", "seed": i} for i in range(count)]


def defaults(**changes: Any) -> dict[str, Any]:
    """What the command's options give to `Source`."""
    values: dict[str, Any] = dict.fromkeys(("prompt", "negative_prompt", "latents", "seed"))
    values |= dict.fromkeys(("use_kv_cache", "offload_kv_cache"))
    values |= dict.fromkeys(("offload_model", "separate_cfg_infer"))
    values |= dict.fromkeys(("guidance_interval", "image_guidance_interval", "timesteps"))
    values |= {"mask_image": None, "mask_blur": 0, "strength": 1.0}
    values |= {"solver": "euler", "time_shift": 1.0}
    values |= {
        "input_images": (),
        "height": 32,
        "width": 48,
        "num_inference_steps": 1,
        "guidance_scale": 3.0,
        "use_img_guidance": True,
        "img_guidance_scale": 1.6,
        "max_input_image_size": 32,
        "use_input_image_size_as_output": False,
        "num_images_per_prompt": 1,
        "dtype": "float32",
        "output_type": "pil",
        "memory": "auto",
    }
    return values | changes
