"""Measures what work can be left out of a picture, with the bundled model and the checker.

    python -m examples.shapes.fewer_steps profile    # how fast velocities bend; sets `reuse`
    python -m examples.shapes.fewer_steps distance   # latents against those of many steps
    python -m examples.shapes.fewer_steps scores     # pictures of every configuration
    python -m examples.shapes.fewer_steps confirm    # more pictures, of the presets alone

Results go to bench/results/fewer-steps.json, from which `python -m bench.docs` writes the tables of
docs/fewer-steps.md, and `plot` draws docs/fewer-steps.png. Pictures are kept in
fewer-steps-output: a run that was interrupted, or one with a larger --count, makes only those that
are missing. The presets themselves, in omnigen_fast/fewer_steps.json, are chosen by hand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.common import ROOT, machine
from bench.quality import psnr, ssim
from omnigen_fast import OmniGenPipeline, fewer_steps
from omnigen_fast.memory.seconds import product_flops, steps_flops

from . import checker
from .checker import Score
from .evaluate import GUIDANCE, IMAGE_GUIDANCE, prompts
from .scenes import SIDE, render
from .tasks import KINDS, Task

RESULT = ROOT / "bench" / "results" / "fewer-steps.json"
PLOT = ROOT / "docs" / "fewer-steps.png"
TABLE = ROOT / "omnigen_fast" / "fewer_steps.json"
PICTURES = ROOT / "fewer-steps-output"
_BATCH = 10
_REFERENCE = "exact"
Words = tuple[Task, str, bool]


def _interval(start: float, stop: float) -> dict[str, Any]:
    return dict.fromkeys(("guidance_interval", "image_guidance_interval"), (start, stop))


PRESETS: dict[str, dict[str, Any]] = {name: {"quality": name} for name in fewer_steps.QUALITIES}
GRID: dict[str, dict[str, Any]] = {
    **PRESETS,
    "euler 25": {"num_inference_steps": 25},
    "ab2 25": {"num_inference_steps": 25, "solver": "ab2"},
    "dpmpp2m 25": {"num_inference_steps": 25, "solver": "dpmpp2m"},
    "midpoint 12": {"num_inference_steps": 12, "solver": "midpoint"},
    "ab2 25, fitted": {"timesteps": fewer_steps.fitted_timesteps(25), "solver": "ab2"},
    "ab2 12": {"num_inference_steps": 12, "solver": "ab2"},
    "ab2 50, reuse fast": {"reuse": "fast", "solver": "ab2"},
    "ab2 50, reuse 0.004": {"reuse": 0.004, "solver": "ab2"},
    "euler 50, reuse 0.004": {"reuse": 0.004},
    "high, guided to 0.6": {"quality": "high", **_interval(0, 0.6)},
    "high, guided from 0.05": {"quality": "high", **_interval(0.05, 1)},
}
SOLVED: dict[str, dict[str, Any]] = {
    "euler 50": {},
    "ab2 25": GRID["ab2 25"],
    "ab2 25, fitted": GRID["ab2 25, fitted"],
    "ab2 50, reuse fast": GRID["ab2 50, reuse fast"],
    "ab2 12": GRID["ab2 12"],
    "high": PRESETS["high"],
    "fast": PRESETS["fast"],
}

# What latents are compared with. The first is several times nearer to the flow than the second, at
# a quarter of its work.
REFERENCES: dict[str, dict[str, Any]] = {
    "ab2 90, fitted": {"timesteps": fewer_steps.fitted_timesteps(90), "solver": "ab2"},
    "euler 400": {"num_inference_steps": 400},
}


def call(some: Sequence[Words], **options: Any) -> dict[str, Any]:
    """The arguments of a call that makes the pictures of some prompts."""
    return {
        "prompt": [words for _, words, _ in some],
        "input_images": [[render(scene) for scene in task.inputs] for task, _, _ in some],
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": GUIDANCE,
        "img_guidance_scale": IMAGE_GUIDANCE,
        "progress": False,
        **options,
    }


def mixed(count: int) -> list[Words]:
    """Prompts of all tasks in turns."""
    each = -(-count // len(KINDS))
    drawn = [prompts(kind, each) for kind in KINDS]
    return [one for some in zip(*drawn) for one in some][:count]


def load(dtype: str) -> OmniGenPipeline:
    return OmniGenPipeline.from_pretrained("shapes", dtype=dtype, device="cpu")


# ---------------------------------------------------------------- profile


def profile(count: int, steps: int = 50) -> dict[str, Any]:
    """How much velocities bend over time, relative to their size, and what that depends on.

    Beside it, how much of the variance of the change of the first layer's output the time explains,
    in logarithms: what it does not would be the gain of deciding for each picture.
    """
    pipe = load("float32")
    bends, changes, firsts = [], [], []
    for first in range(0, count, _BATCH):
        some = mixed(count)[first : first + _BATCH]
        request = call(some, seed=first, num_inference_steps=steps, output_type="latent")
        seen = [pipe.make_call(**request).latents]
        with _first_layer(pipe) as found:
            pipe(
                **request,
                callback_on_step_end=lambda _, step, at, kept, seen=seen: seen.append(
                    kept["latents"]
                ),
            )
        v = torch.stack(seen).diff(dim=0) * steps
        size = v.abs().flatten(2).mean(2)
        bends.append(v.diff(n=2, dim=0).abs().flatten(2).mean(2) / size[1:-1] * steps**2)
        changes.append((v.diff(dim=0).abs().flatten(2).mean(2) / size[:-1])[1:])
        firsts.append(torch.stack(found)[1:])
    bend, change, first_layer = (torch.cat(one, dim=1) for one in (bends, changes, firsts))
    mean = bend.mean(1).tolist()
    of_pictures = [one.log() - one.log().mean(1, keepdim=True) for one in (first_layer, change)]
    return {
        "prompts": count,
        "times": [step / steps for step in range(steps + 1)],
        "curvatures": [round(one, 2) for one in (mean[0], *mean, mean[-1])],
        "first_layer_explained_by_time": _explained(first_layer),
        "velocity_explained_by_time": _explained(change),
        "first_layer_against_velocity": torch.corrcoef(
            torch.stack([one.flatten() for one in of_pictures])
        )[0, 1].item(),
    }


class _first_layer:
    """Collects the relative L1 change of the first layer's residual, [pictures] for each step."""

    def __init__(self, pipe: OmniGenPipeline) -> None:
        self._model, self._found = pipe.model, list[Tensor]()

    def __enter__(self) -> list[Tensor]:
        plain, last = self._model._step_layer, list[Tensor]()

        def step_layer(block: Any, passes: Any, keys: Tensor, values: Tensor) -> None:
            is_first = block is self._model.block(0)
            before = [one.residual.clone() for one in passes] if is_first else []
            plain(block, passes, keys, values)
            if not is_first:
                return
            pictures = torch.tensor([place for one in passes for place in one.pictures])
            now = torch.cat(
                [
                    (one.residual - old).view(len(one.pictures), -1)
                    for one, old in zip(passes, before)
                ]
            )
            if last:
                change = (now - last[0]).abs().sum(1) / last.pop().abs().sum(1)
                total = torch.zeros(int(pictures.max()) + 1).index_add_(0, pictures, change)
                self._found.append(total / pictures.bincount())
            last.append(now)

        self._model._step_layer = step_layer  # type: ignore[method-assign]
        return self._found

    def __exit__(self, *_: object) -> None:
        del self._model._step_layer


def _explained(values: Tensor) -> float:
    """The share of the variance of logarithms [times, pictures] that the time explains."""
    logs = values.log()
    return 1 - (logs.var(1).mean() / logs.var()).item()


# ---------------------------------------------------------------- distance


def distance(count: int, reference: str) -> dict[str, Any]:
    """How far latents are from those of a reference, relative to their norm: means."""
    pipe = load("float32")
    errors: dict[str, list[Tensor]] = {name: [] for name in SOLVED}
    computed = {}
    for first in range(0, count, _BATCH):
        some = mixed(count)[first : first + _BATCH]

        def made(some=some, first=first, **options: Any) -> Tensor:
            return pipe(**call(some, seed=first, output_type="latent", **options)).flatten(1)

        expected = made(**REFERENCES[reference])
        for name, options in SOLVED.items():
            errors[name].append((made(**options) - expected).norm(dim=1) / expected.norm(dim=1))
            report = pipe.last_report
            assert report is not None and report.steps is not None
            computed[name] = report.steps.computed
    return {
        "prompts": count,
        "reference": reference,
        "rows": {
            name: {"computed": computed[name], "error": torch.cat(one).mean().item()}
            for name, one in errors.items()
        },
    }


# ---------------------------------------------------------------- scores


def make(pipe: OmniGenPipeline, name: str, kind: str, count: int) -> dict[str, np.ndarray]:
    """Pictures [count, SIDE, SIDE, 3] of a configuration and the seconds that each took, kept."""
    path = PICTURES / f"{name.replace(' ', '-')}-{kind}.npz"
    kept: dict[str, np.ndarray] = dict(np.load(path)) if path.is_file() else {}
    there = len(kept["pictures"]) if kept else 0
    tasks = prompts(kind, count)
    for first in range(there, count, _BATCH):
        some = tasks[first : min(first + _BATCH, count)]
        start = time.process_time()
        images = pipe(**call(some, seed=first, **GRID[name]))
        seconds = (time.process_time() - start) / len(some)
        new = {
            "pictures": np.stack([np.asarray(one) for one in images]),
            "seconds": np.full(len(some), seconds),
        }
        kept = {what: np.concatenate([*([kept[what]] if kept else []), new[what]]) for what in new}
        PICTURES.mkdir(exist_ok=True)
        np.savez(path, **kept)
    return {what: value[:count] for what, value in kept.items()}


def counted(pipe: OmniGenPipeline, name: str, kind: str) -> int:
    """Operations of one picture, from its input images to its pixels, counted as they run.

    Of matrix products and convolutions: attention, a few percent here, is not counted.
    """
    pipe.clear_cache()
    request = call(prompts(kind, 1), seed=0, **GRID[name])
    with FlopCounterMode(display=False) as counter:
        pipe(**request)
    return counter.get_total_flops()


def operations(pipe: OmniGenPipeline, name: str, kind: str) -> int:
    """Operations of one picture's prefill and steps, by their sizes."""
    request = call(prompts(kind, 1), seed=0, **GRID[name])
    config, workload = pipe.config, pipe.make_call(**request).workload()
    prefill = config.num_layers * product_flops(config, workload.cache_rows())
    return prefill + steps_flops(config, workload)


def scores(names: Sequence[str], kinds: Sequence[str], count: int) -> dict[str, Any]:
    """A row for each configuration, over some tasks."""
    pipe = load("bfloat16")
    for kind in kinds:  # task by task: what is there is whole for all configurations
        for name in dict.fromkeys((_REFERENCE, *names)):
            make(pipe, name, kind, count)
            print(f"{name}: {kind}", flush=True)
    return {
        "pictures_per_task": count,
        "tasks": list(kinds),
        "rows": {name: _row(pipe, name, kinds, count) for name in names},
    }


def _row(pipe: OmniGenPipeline, name: str, kinds: Sequence[str], count: int) -> dict[str, Any]:
    found, similar, seconds = [], [], 0.0
    for kind in kinds:
        made = make(pipe, name, kind, count)
        expected = _pixels(make(pipe, _REFERENCE, kind, count)["pictures"])
        for picture, (task, _, _) in zip(made["pictures"], prompts(kind, count)):
            found.append(checker.score(checker.read(picture), task.target, task.sizes_stated))
        for one, other in zip(_pixels(made["pictures"]), expected):
            # equal pictures: as near as 8 bits can tell
            similar.append((min(psnr(one, other), 60.0), ssim(one[None], other[None])))
        seconds += made["seconds"].sum()
    total = reduce(add, found, Score(0, 0))
    ratio, likeness = np.mean(similar, axis=0)
    return {
        "options": GRID[name],
        "pictures": len(found),
        "attributes": total.right / total.asked,
        "whole": sum(one.all_right for one in found) / len(found),
        "psnr": ratio,
        "ssim": likeness,
        "flops": sum(operations(pipe, name, kind) for kind in kinds) / len(kinds),
        "seconds": seconds / len(found),
    }


def _pixels(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255


# ---------------------------------------------------------------- plot


def plot(result: Mapping[str, Any], path: Path = PLOT) -> None:
    """Quality against work, with the presets marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    where = result["grid"]
    rows = dict(where["rows"])
    most = rows.pop(_REFERENCE)["flops"]
    figure, axis = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for place, (name, row) in enumerate(sorted(rows.items(), key=lambda item: item[1]["psnr"])):
        point, preset = (row["flops"] / most, row["psnr"]), name in PRESETS
        axis.plot(
            *point,
            marker="*" if preset else "o",
            markersize=14 if preset else 6,
            color="#e08e45" if preset else "#1b6ca8",
        )
        axis.annotate(
            name,
            point,
            xytext=(9 if place % 2 else -9, 0),
            textcoords="offset points",
            ha="left" if place % 2 else "right",
            va="center",
            fontsize=8,
            weight="bold" if preset else "normal",
        )
    axis.set_xlabel("operations of a picture, as a share of the exact picture's")
    axis.set_ylabel("PSNR against the exact picture, dB")
    axis.set_xlim(0, 0.75)
    axis.grid(color="#e5e5e5")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"the bundled model, {where['pictures_per_task']} prompts of each of "
        f"{len(where['tasks'])} tasks; stars: presets; {where['date']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _write(path: Path, part: str, found: Mapping[str, Any]) -> None:
    whole = json.loads(path.read_text()) if path.is_file() else {}
    whole[part] = {**found, **_world()}
    path.write_text(json.dumps(whole, indent=1) + "\n")


def _world() -> dict[str, Any]:
    world = machine()
    return {"date": world["date"], "processor": world["cpu"], "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("profile", "distance", "scores", "confirm", "plot"))
    parser.add_argument("--count", type=int, help="prompts; of each task for scores and confirm")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--reference", choices=list(REFERENCES), default="ab2 90, fitted")
    parser.add_argument("--only", nargs="+", choices=list(GRID), help="configurations of scores")
    arguments = parser.parse_args()
    count = arguments.count
    if arguments.part == "profile":
        table = json.loads(TABLE.read_text())
        table["reuse"]["profile"] = {**profile(count or 30), **_world()}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    elif arguments.part == "distance":
        _write(RESULT, "distance", distance(count or 100, arguments.reference))
    elif arguments.part == "scores":
        found = scores(arguments.only or list(GRID), arguments.kinds, count or 20)
        _write(RESULT, "grid", found)
    elif arguments.part == "confirm":
        found = scores(list(PRESETS), arguments.kinds, count or 100)
        _write(RESULT, "presets", found)
    else:
        plot(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
