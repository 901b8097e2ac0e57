"""How much the pictures of two configurations differ, for plans and for inexact modes.

Both run on the same seeds. PSNR and SSIM are of the pictures in [0, 1]; a random model has no VAE,
so its latents are shown as colours.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omnigen_fast.kernels import ops
from torch import Tensor

from omnigen_fast.errors import RequestError
from omnigen_fast.fewer_steps import QUALITIES, REUSES
from omnigen_fast.forms import CACHES, FORMS, PRODUCTS
from omnigen_fast.model_defaults import defaults_of
from omnigen_fast.solvers import SOLVERS

from .cases import SWITCHES, Size, Task
from .common import machine
from .contenders import Start, make_start
from .models import Model, load
from .report import aligned

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_ATTENTIONS = ("library", "flash", "cudnn")
_KERNELS = ("reference", "triton", *_ATTENTIONS)
_COMPUTES = {f"compute-{name}": name for name in PRODUCTS}
_CACHES = {f"cache-{name}": name for name in CACHES}
_NO_KV, _JOINT = "no-kv", "joint"
_REUSES = tuple(f"reuse-{name}" for name in REUSES)


@dataclass(frozen=True)
class Configuration:
    """One way to run."""

    name: str
    dtype: torch.dtype
    storage: str | None  # of the weights, if it is not the dtype
    compute: str | None  # of the layers' products, likewise
    cache: str | None  # of keys and values, likewise
    kernels: str | None
    arguments: dict[str, Any]  # memory switches, solver, reuse; or a quality and its steps

    def choice(self) -> AbstractContextManager:
        """Selects its kernels inside a `with` block."""
        if self.kernels in _ATTENTIONS:
            return ops.use(attention=self.kernels)
        return ops.use(self.kernels)


def parse_configuration(text: str) -> Configuration:
    """Words joined by +; see `compare --help`.

    Raises:
        RequestError: an unknown word, or two that contradict one another.
    """
    words = text.split("+")
    stored = [place for place, word in enumerate(words) if word in FORMS]
    if len(stored) == 2 and words[stored[1]] in PRODUCTS:
        words[stored[1]] = f"compute-{words[stored[1]]}"
    known = (
        *(*_DTYPES, *FORMS, *_COMPUTES, *_CACHES, *_KERNELS, *SWITCHES, _NO_KV, _JOINT),
        *(*QUALITIES, *SOLVERS, *_REUSES),
    )
    unknown = [word for word in words if word not in known]
    if unknown:
        raise RequestError(f"{text!r}: {unknown[0]!r} is not known; there are {', '.join(known)}")
    alternatives = (
        _DTYPES,
        FORMS,
        _COMPUTES,
        _CACHES,
        _KERNELS,
        ("kv", _NO_KV),
        ("separate", _JOINT),
    )
    for some in (*alternatives, QUALITIES, SOLVERS, _REUSES):
        both = [word for word in words if word in some]
        if len(both) > 1:
            raise RequestError(f"{text!r}: {' and '.join(both)} contradict one another")
    arguments: dict[str, Any] = {SWITCHES[word]: True for word in words if word in SWITCHES}
    if _NO_KV in words:
        arguments["use_kv_cache"] = False
    if _JOINT in words:
        arguments["separate_cfg_infer"] = False
    named = {"quality": QUALITIES, "solver": SOLVERS, "reuse": _REUSES}
    for argument, names in named.items():
        for word in set(words) & set(names):
            arguments[argument] = word.removeprefix("reuse-")
    dtype = next((word for word in words if word in _DTYPES), "bfloat16")
    kernels = next((word for word in words if word in _KERNELS), None)
    storage = next((word for word in words if word in FORMS), None)
    compute = next((_COMPUTES[word] for word in words if word in _COMPUTES), None)
    cache = next((_CACHES[word] for word in words if word in _CACHES), None)
    return Configuration(text, _DTYPES[dtype], storage, compute, cache, kernels, arguments)


def psnr(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; infinite where they are equal."""
    error = F.mse_loss(found.double(), expected.double()).item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(found: Tensor, expected: Tensor) -> float:
    """Structural similarity (Wang et al., 2004) of pictures [n, channels, height, width] in [0, 1].

    Gaussian window of 11 pixels and sigma 1.5, constants 0.01^2 and 0.03^2, mean over all places
    where the window fits.
    """
    side = min(11, *found.shape[2:])
    places = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    line /= line.sum()
    x, y = (one.double().cpu().flatten(0, 1).unsqueeze(1) for one in (found, expected))

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_x * mean_y + c1) * (2 * shared + c2)
    value = value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return value.mean().item()


def shown(latents: Tensor) -> Tensor:
    """[n, 3, height, width] in [0, 1] of latents: three of their channels, four deviations wide."""
    return (latents[:, :3] / 8 + 0.5).clamp(0, 1)


def compare(
    model: str,
    device: torch.device,
    pair: tuple[Configuration, Configuration],
    size: Size,
    images: int,
    steps: int,
    seeds: int,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Makes pictures with both configurations and measures how much they differ.

    Args:
        model: see `models.load`. Random weights have bfloat16 values in both dtypes.
        device: where to run.
        pair: the configuration to compare with, and the one to judge.
        size: of the pictures and their input images.
        images: how many input images.
        steps: of a picture.
        seeds: how many pictures, each of its own noise and prompt.
        sheet: where a PNG with both and their difference goes.

    Raises:
        RequestError, CheckpointError: the model can't be loaded.
    """
    known = defaults_of(model).vocabulary is not None
    tasks = [Task(size, images, steps, seed % 26, known=known) for seed in range(seeds)]
    taken = []
    starts: list[Start] = []
    for one in pair:
        loaded = _load(model, one, device)
        if not starts:
            starts = [make_start(loaded.ours.pipe, task) for task in tasks]
        taken.append([_picture(loaded, one, start) for start in starts])
        del loaded
    rows = []
    for start, (first, image_a), (second, image_b) in zip(starts, *taken):
        moved = (first - start.noise).norm()
        ratio = psnr(image_b, image_a)
        rows.append(
            {
                "seed": start.task.variant,
                "latent_error": ((second - first).norm() / first.norm()).item(),
                "latent_error_of_the_way": ((second - first).norm() / moved).item(),
                "psnr_db": ratio if math.isfinite(ratio) else None,  # JSON has no infinity
                "ssim": ssim(image_b, image_a),
                "max_pixel_difference": round((image_b - image_a).abs().max().item() * 255, 3),
            }
        )
    result = {
        "machine": machine(),
        "model": model,
        "device": str(device),
        "size": str(size),
        "images": images,
        "steps": steps,
        "a": pair[0].name,
        "b": pair[1].name,
        "pictures": "decoded" if _has_vae(model) else "latents shown as colours",
        "rows": rows,
    }
    if sheet is not None:
        pictures = [[image for _, image in some] for some in taken]
        _draw_sheet(sheet, pair, pictures, rows)
        result["sheet"] = str(sheet)
    return result


def _has_vae(model: str) -> bool:
    return not model.startswith("random:")


def _load(name: str, one: Configuration, device: torch.device) -> Model:
    """Random weights in float32 have bfloat16 values, so that both run the same model."""
    if _has_vae(name) or one.dtype == torch.bfloat16:
        return load(name, one.dtype, device, one.storage, one.compute, one.cache)
    return load(name, torch.bfloat16, device).widened(one.storage, one.compute, one.cache)


@torch.no_grad()
def _picture(model: Model, one: Configuration, start: Start) -> tuple[Tensor, Tensor]:
    """Final latents, and the picture [1, 3, height, width] in [0, 1]; both on the CPU."""
    pipe = model.ours.pipe
    arguments = start.task.arguments() | one.arguments
    if "quality" in arguments:
        del arguments["num_inference_steps"]  # it has its own
    with one.choice():
        latents = pipe(**arguments, latents=start.noise).float()
        image = pipe.vae.decode(latents) if _has_vae(model.name) else shown(latents)
    pipe.clear_cache()
    return latents.cpu(), image.float().cpu()


def lines(result: dict[str, Any]) -> list[str]:
    """The table."""
    head = ["seed", "latent error", "of the way", "PSNR", "SSIM", "largest pixel difference"]
    rows = [head]
    for row in result["rows"]:
        rows.append(
            [
                str(row["seed"]),
                f"{row['latent_error']:.2e}",
                f"{row['latent_error_of_the_way']:.2e}",
                _decibels(row),
                f"{row['ssim']:.5f}",
                f"{row['max_pixel_difference']:.2f} of 255",
            ]
        )
    said = [
        f"{result['b']} against {result['a']}: {result['model']}, {result['size']}, "
        f"{result['images']} input images, {result['steps']} steps, {result['pictures']}",
        *aligned(rows),
    ]
    said += [
        "latent error: the difference as a share of A's latents; of the way: of A's way from the",
        "noise. PSNR, SSIM and the largest pixel difference are of the pictures",
    ]
    if "sheet" in result:
        said.append(f"wrote {result['sheet']}")
    return said


def _decibels(row: dict[str, Any]) -> str:
    return "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"


def _draw_sheet(
    path: Path,
    pair: tuple[Configuration, Configuration],
    pictures: list[list[Tensor]],
    rows: list[dict[str, Any]],
) -> None:
    """A row for each seed: both pictures, and their difference made visible."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    side = max(192, pictures[0][0].shape[3])
    margin, head = 12, 30
    most = max((b - a).abs().max().item() for a, b in zip(*pictures)) or 1.0
    gain = min(255.0, 1 / most)
    titles = (f"A: {pair[0].name}", f"B: {pair[1].name}", f"difference, {gain:.0f} times")
    width = 3 * side + 4 * margin
    height = head + len(rows) * (side + head + margin)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((margin + column * (side + margin), 8), title, fill="black", font=font)
    for index, (a, b, row) in enumerate(zip(*pictures, rows)):
        top = head + index * (side + head + margin)
        for column, image in enumerate((a, b, ((b - a).abs() * gain).clamp(0, 1))):
            pixels = (image[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            tall = round(side * pixels.shape[0] / pixels.shape[1])
            drawn = Image.fromarray(pixels).resize((side, tall), Image.Resampling.NEAREST)
            canvas.paste(drawn, (margin + column * (side + margin), top))
        said = (
            f"seed {row['seed']}: PSNR {_decibels(row)}, SSIM {row['ssim']:.4f}, latent "
            f"error {row['latent_error']:.1e}, largest difference "
            f"{row['max_pixel_difference']:.1f} of 255"
        )
        draw.text((margin, top + side + 6), said, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
