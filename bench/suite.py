"""Measures every size, column and setting, ours and the peers interleaved in the same run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omnigen_fast.kernels import ops
from torch import Tensor

from omnigen_fast.errors import OmniGenError

from . import peers
from .cases import COLUMNS, Setting, Size, Task
from .common import ROOT, machine
from .contenders import Contender, Start, Taken, make_start
from .counts import Picture, count
from .documented import documented
from .doubts import doubts, raise_limit
from .gpu.measure import Clock, datasheet_rate, described
from .gpu.run import first_line
from .kernels.workload import measure_limits
from .models import Model, check_model, load, write_checkpoint
from .record import Record, interruptible

OK, FAILED, MISSING, NOT_MEASURED = "ok", "failed", "not installed", "not measured"
# Largest allowed difference from ours, relative to how far the steps moved the latents
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-4, 5e-2
_CHECK_SIZE = Size(128, 128)
_CHECK_STEPS = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    model: str
    device: torch.device
    cells: tuple[tuple[Size, int], ...]  # each with its number of input images
    steps: int
    settings: tuple[Setting, ...] = ()
    peers: tuple[str, ...] = ()
    repeat: int = 3
    dtype: torch.dtype = torch.bfloat16
    original_python: Path | None = None
    cold_start: bool = True
    command: tuple[str, ...] = field(default=())

    @property
    def columns(self) -> list[int]:
        return sorted({images for _, images in self.cells})

    @property
    def first_size(self) -> Size:
        return self.cells[0][0]

    def tasks(self) -> list[Task]:
        """Sizes by the default setting, then settings at the first size."""
        tasks = [Task(size, images, self.steps) for size, images in self.cells]
        return tasks + [
            Task(self.first_size, images, self.steps, setting=setting)
            for setting in self.settings
            if str(setting) != "default"
            for images in self.columns
        ]


def run(plan: Plan, record: Record, say: Say) -> None:
    """Measures, and saves the record after every cell.

    Raises KeyboardInterrupt when interrupted, after saving.
    """
    result = record.result
    result |= {"state": "running", "command": list(plan.command), "machine": machine()}
    result |= {"model": plan.model, "steps": plan.steps, "repeat": plan.repeat}
    result |= {"dtype": str(plan.dtype).removeprefix("torch."), "device": _device_name(plan.device)}
    result |= {"peers": {}, "checks": [], "cells": []}
    contenders: dict[str, Contender] = {}
    try:
        with interruptible():
            say(f"loading {plan.model}")
            model = load(plan.model, plan.dtype, plan.device)
            result["parameters"] = model.parameters
            result["compiled"] = model.ours.pipe.compiled
            record.save()
            limits = measure_limits(plan.device, plan.dtype)
            result["limits"] = {
                "copy_bytes_per_second": limits.bytes_per_second,
                "product_flops_per_second": limits.flops_per_second,
                "datasheet_flops_per_second": datasheet_rate(plan.device),
            }
            record.save()
            contenders = {"omnigen_fast": model.ours}
            contenders |= _start_peers(plan, model, result, say)
            record.save()
            for task in plan.tasks():
                result["cells"].append(_steady_cell(plan, task, model, contenders, result, say))
                record.save()
            if plan.cold_start:
                result["cold_start"] = _cold_start(plan, model)
                result["vae"] = _vae(model, plan)
        result["state"] = "complete"
    except KeyboardInterrupt:
        result["state"] = "interrupted"
        raise
    finally:
        if result["state"] == "running":
            result["state"] = "failed"
        if "parameters" in result:  # else there was no model, and so no result
            record.save()
        for name, one in contenders.items():
            if name != "omnigen_fast":
                one.close()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{machine()['cpu']}, {torch.get_num_threads()} threads"


def _start_peers(
    plan: Plan, model: Model, result: dict[str, Any], say: Say
) -> dict[str, Contender]:
    """The peers that are installed and match our results in float32."""
    started: dict[str, Contender] = {}
    for name in plan.peers:
        status = result["peers"][name] = {"status": OK}
        try:
            checks = _check_in_float32(name, plan, model)
            result["checks"] += checks
            for check in checks:
                say(_said(check))
            if not all(check["passed"] for check in checks):
                status.update(status=FAILED, why="it computes something else; no time is shown")
                continue
            one = peers.make(
                name, model.config, model.weights, plan.dtype, plan.device, plan.original_python
            )
            started[name] = one
            status["versions"] = getattr(one, "versions", None)
        except peers.PeerMissing as error:
            status.update(status=MISSING, why=str(error))
        except Exception as error:  # of a library that is not ours
            status.update(status=FAILED, why=first_line(error))
        if "why" in status:
            say(f"{name}: {status['status']}: {status['why']}")
    return started


def difference(found: Tensor, expected: Tensor, noise: Tensor) -> float:
    """How much two results differ, relative to their distance from the noise."""
    return ((found - expected).norm() / (expected - noise).norm()).item()


def _said(check: dict[str, Any]) -> str:
    verdict = "passed" if check["passed"] else "FAILED"
    return (
        f"check {verdict}: {check['peer']}, {check['what']}: "
        f"{check['difference']:.1e} apart, at most {check['bound']:.0e}"
    )


def _check_in_float32(name: str, plan: Plan, model: Model) -> list[dict[str, Any]]:
    """Compares the first steps in float32 on a model of few layers, for every column.

    The original's KV cache leaves the noise tokens of its first step blind to one another. So its
    steps are compared without the cache, and with it from the second step on.
    """
    config, weights, ours = check_model(model.config, plan.device)
    arguments = (config, weights, torch.float32, plan.device, plan.original_python)
    other = peers.make(name, *arguments)
    widths = f"{config.num_layers} layers, {_CHECK_SIZE}"
    checks = []

    def compare(what: str, found: Taken, start: Start, expected: Taken) -> None:
        apart = difference(found.latents, expected.latents, start.noise)
        checks.append(
            {
                "peer": name,
                "what": f"float32, {widths}, {COLUMNS[start.task.images]}, {what}",
                "difference": apart,
                "bound": FLOAT32_BOUND,
                "passed": apart <= FLOAT32_BOUND,  # false for NaN
            }
        )

    try:
        for images in plan.columns:
            start = make_start(ours.pipe, Task(_CHECK_SIZE, images, 4))
            with ops.use("reference"):
                plain = ours.picture(start, _CHECK_STEPS)
                again = ours.picture(start, _CHECK_STEPS, restart=True)
            if name == "original":
                found = other.picture(start, _CHECK_STEPS, use_kv_cache=False)
                compare("steps 1 and 2 without its KV cache", found, start, plain)
                found = other.picture(start, _CHECK_STEPS, restart=True)
                compare("step 2 with its KV cache", found, start, again)
            else:
                compare("steps 1 and 2", other.picture(start, _CHECK_STEPS), start, plain)
    finally:
        other.close()
    return checks


def _steady_cell(
    plan: Plan,
    task: Task,
    model: Model,
    contenders: dict[str, Contender],
    result: dict[str, Any],
    say: Say,
) -> dict[str, Any]:
    """A cell, measured twice where the first time is doubtful; the less doubtful one stays."""
    cell = _cell(plan, task, model, contenders, result, say)
    warnings = doubts(cell)
    if warnings:
        say(f"warning: {'; '.join(warnings)}; measured again")
        if any("of the limit" in one for one in warnings):
            limits = measure_limits(plan.device, plan.dtype)
            raise_limit(result, limits.flops_per_second)
        again = _cell(plan, task, model, contenders, result, say)
        left = doubts(again)
        if len(left) <= len(warnings):
            cell, warnings = again, left
        cell["repeated"] = True
        if warnings:
            say(f"warning: still {'; '.join(warnings)}")
    cell["warnings"] = warnings
    return cell


def _cell(
    plan: Plan,
    task: Task,
    model: Model,
    contenders: dict[str, Contender],
    result: dict[str, Any],
    say: Say,
) -> dict[str, Any]:
    """One cell: warm-up with a check and the peak memory, then interleaved pictures."""
    column = COLUMNS[task.images]
    say(f"{task.size}, {task.setting}, {column}")
    cost = count(
        model.config, replace(task, setting=Setting())
    )  # switches move, they compute alike
    cell: dict[str, Any] = {
        "size": str(task.size),
        "side": task.size.output,
        "image_side": task.size.image,
        "setting": str(task.setting),
        "column": column,
        "tflop_per_step": cost.step.flops / 1e12,
        "tflop_of_prefill": cost.prefill.flops / 1e12,
        "launches_per_step": cost.launches,
        "documented": documented(result["device"], task),
        "contenders": {},
    }
    rows = cell["contenders"]
    for name in ("omnigen_fast", *plan.peers):
        why = result["peers"].get(name, {}).get("why")
        rows[name] = {"status": NOT_MEASURED, "why": why or "not reached"}
        if name not in contenders:
            rows[name]["status"] = result["peers"][name]["status"]
    running = [
        name
        for name in contenders
        # diffusers has no switches: it is in the rows of the default setting only
        if str(task.setting) == "default" or not name.startswith("diffusers")
    ]
    for name in set(contenders) - set(running):
        rows[name] = {"status": NOT_MEASURED, "why": "has no such switches"}
    start = make_start(model.ours.pipe, task)
    warm: dict[str, Taken] = {}
    for name in list(running):
        try:
            warm[name] = contenders[name].picture(start, 2, restart=True, track=True)
            peak = warm[name].peak_bytes
            rows[name]["peak_gb"] = None if peak is None else peak / 1e9
            if name == "omnigen_fast":
                continue
            apart = difference(warm[name].latents, warm["omnigen_fast"].latents, start.noise)
            rows[name] |= {"difference": apart, "bound": BFLOAT16_BOUND}
            if not apart <= BFLOAT16_BOUND:
                raise OmniGenError(f"results differ by {apart:.1e}; no time is shown")
            say(f"check passed: {name}, {rows[name]['difference']:.1e} apart in this cell's step 2")
        except Exception as error:  # out of memory, or a peer's own
            rows[name].update(status=FAILED, why=first_line(error))
            say(f"{name}: {rows[name]['why']}")
            running.remove(name)
            if name == "omnigen_fast":
                for other in running:
                    rows[other]["why"] = "ours failed, so there is nothing to compare with"
                return cell
    pictures: dict[str, list[Taken]] = {name: [] for name in running}
    for variant in range(plan.repeat):
        each = Task(task.size, task.images, task.steps, variant + 1, task.setting)
        start = make_start(model.ours.pipe, each)
        for name in list(pictures):
            try:
                pictures[name].append(contenders[name].picture(start))
            except Exception as error:
                rows[name].update(status=FAILED, why=first_line(error))
                del pictures[name]
    for name, taken in pictures.items():
        if taken:
            rows[name] = {key: rows[name].get(key) for key in ("peak_gb", "difference", "bound")}
            rows[name] |= _times(taken)
    _compare(rows, cost, task, result)
    say(_cell_line(cell))
    return cell


def _times(taken: Sequence[Taken]) -> dict[str, Any]:
    return {
        "status": OK,
        "picture": described([one.total for one in taken]),
        "prepare": described([one.prepare for one in taken]),
        "step": described([seconds for one in taken for seconds in one.steps[1:] or one.steps]),
    }


def _compare(rows: dict[str, Any], cost: Picture, task: Task, result: dict[str, Any]) -> None:
    """Ratios to ours, and our share of the limit: operations over the measured product rate."""
    ours = rows["omnigen_fast"]
    if ours["status"] != OK:
        return
    rate = result["limits"]["product_flops_per_second"]
    ours["share_of_limit"] = cost.flops(task.steps) / rate / ours["picture"]["seconds"]
    ours["share_of_limit_step"] = cost.step.flops / rate / ours["step"]["seconds"]
    for row in rows.values():
        if row["status"] == OK and row is not ours:
            for what in ("picture", "step"):
                row[f"{what}_ratio"] = row[what]["seconds"] / ours[what]["seconds"]


def _cell_line(cell: dict[str, Any]) -> str:
    said = []
    for name, row in cell["contenders"].items():
        if row["status"] != OK:
            said.append(f"{name} {row['status']}")
            continue
        ratio = f" ({row['picture_ratio']:.2f}x)" if "picture_ratio" in row else ""
        said.append(f"{name} {row['picture']['seconds']:.2f} s{ratio}")
    return "  " + ", ".join(said)


def _vae(model: Model, plan: Plan) -> dict[str, Any]:
    """Times encoding and decoding; every contender uses the same VAE."""
    if model.folder is None:
        return {"status": NOT_MEASURED, "why": "a random model has no VAE"}
    kept, clock = model.ours.pipe.vae, Clock(plan.device)
    task = Task(plan.first_size, 1, plan.steps)
    latents = torch.zeros(task.latent_shape, device=plan.device)
    (image,) = task.prompt().images
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for index in range(plan.repeat + 1):
        for name, work in (
            ("encode", lambda: kept.vae.encode(image)),
            ("decode", lambda: kept.vae.decode(latents)),
        ):
            begin = clock.wait()
            work()
            if index:
                seconds[name].append(clock.wait() - begin)
    return {"status": OK, "size": str(task.size)} | {
        name: described(taken) for name, taken in seconds.items()
    }


# A random model up to this size is written to disk to be loaded.
_WRITTEN_PARAMETERS = 1e9


def _cold_start(plan: Plan, model: Model) -> dict[str, Any]:
    """Time to load a checkpoint and make a first picture, in a separate process."""
    if model.folder is not None:
        return _load_and_run(plan, model.folder)
    if model.parameters > _WRITTEN_PARAMETERS:
        return {"status": NOT_MEASURED, "why": "needs a checkpoint; give --model FOLDER"}
    with tempfile.TemporaryDirectory(prefix="omnigen-bench-") as folder:
        write_checkpoint(model, Path(folder))
        return _load_and_run(plan, Path(folder))


def _load_and_run(plan: Plan, folder: Path) -> dict[str, Any]:
    side = plan.first_size.output
    command = [sys.executable, "-m", f"{__package__}.cold_start", str(folder)]
    command += ["--side", str(side), "--steps", str(plan.steps), "--device", str(plan.device)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"status": FAILED, "why": said[-1][:500]}
    found = {"status": OK, "size": f"{side} px, text", "seconds": time.perf_counter() - begin}
    return found | json.loads(done.stdout.splitlines()[-1])
