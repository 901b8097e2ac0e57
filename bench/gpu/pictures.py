"""Whole pictures with a random model of full size: prefill, steps, memory; and diffusers beside it.

No checkpoint is needed: weights and the latents of input images are drawn on the device. Pictures
end as latents, so no VAE runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from omnigen_fast.kernels import ops
from torch import Tensor

from omnigen_fast.config import PATCH, TOKEN_PIXELS, ModelConfig
from omnigen_fast.engine import Engine
from omnigen_fast.linear import Weight
from omnigen_fast.memory.plan import MemoryPlan
from omnigen_fast.model import Transformer
from omnigen_fast.pipeline import OmniGenPipeline
from omnigen_fast.precision import Precision
from omnigen_fast.processor import Processor
from omnigen_fast.running import Running
from omnigen_fast.sequence import EncodedBranch
from omnigen_fast.vae.vae import Vae
from omnigen_fast.weights.checkpoint import stored

from ..cases import COLUMNS, PROMPTS
from ..common import TOKENIZER, random_weights
from ..contenders import KeptVae
from .measure import Clock, clocks, datasheet_rate, described
from .run import FAILED, NO_GPU, NO_TIME, NOT_MEASURED, OK, NotMeasured, Run, first_line

# Largest allowed difference from diffusers in each dtype; float32 is checked on the small model
_PEER_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class HeldWeights:
    """Weights in memory, read as those of a `Checkpoint` are."""

    config: ModelConfig
    sources: Mapping[str, Tensor]  # by our names

    def read_stored(
        self, precision: Precision, device: torch.device, names: Iterable[str]
    ) -> dict[str, Weight]:
        """See `Checkpoint.read_stored`."""
        return {name: stored(name, self.sources[name].to(device), precision) for name in names}


def make_pipeline(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    device: torch.device,
    condition_cache_bytes: int = 2 << 30,
    vae: Vae | None = None,
    precision: Precision | None = None,
) -> OmniGenPipeline:
    """A pipeline without a checkpoint, everything on the device; without a VAE latents are drawn.

    Args:
        config: sizes of the model.
        weights: by our names, on the device.
        device: where to run.
        condition_cache_bytes: how much memory to keep for the conditions of earlier calls.
        vae: on the device.
        precision: None for the dtype of the weights in everything.
    """
    checkpoint = HeldWeights(config, weights)
    precision = precision or Precision.of(weights["norm"].dtype)
    engine = Engine.of(
        Transformer(config, checkpoint.read_stored(precision, device, weights)),
        checkpoint,
        KeptVae(device) if vae is None else vae,
        condition_cache_bytes,
        precision,
    )
    processor = Processor.from_file(TOKENIZER, config)
    return OmniGenPipeline(engine, processor, memory=plain_plan(engine, capture=True))


def plain_plan(engine: Engine, capture: bool) -> MemoryPlan:
    """Everything on the device and at once."""
    return MemoryPlan.plain(engine.config.num_layers, engine.cache_bytes, capture)


def arguments_of(side: int, images: int, steps: int) -> dict[str, Any]:
    """A call of the pipeline, with input images of the output's size."""
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(images)]
    return {
        "prompt": PROMPTS[images],
        "input_images": pixels or None,
        "height": side,
        "width": side,
        "max_input_image_size": side,
        "num_inference_steps": steps,
        "guidance_scale": 2.5,
        "img_guidance_scale": 1.6,
        "seed": 1,
        "output_type": "latent",
        "progress": False,
    }


@dataclass
class Taken:
    """A picture that was made, and its times in seconds."""

    latents: Tensor
    branches: list[EncodedBranch]
    prepare: float  # everything before the first step
    steps: list[float]
    total: float


@torch.no_grad()
def take(
    pipe: OmniGenPipeline, arguments: dict[str, Any], clock: Clock, captured: bool, most: int
) -> Taken:
    """Makes a picture's latents, its parts timed, with at most so many steps.

    Args:
        pipe: of `make_pipeline`.
        arguments: of the call.
        clock: of the pipeline's device.
        captured: whether steps may be captured and replayed.
        most: steps to take.
    """
    engine = pipe.engine
    begin = clock.wait()
    call = pipe.make_call(**arguments)
    running = engine.start(call, plain_plan(engine, captured))
    try:
        prepare = clock.wait() - begin
        marks = [clock.mark()]
        while not running.finished and call.steps_done < most:
            engine.step(running)
            marks.append(clock.mark())
        latents = engine.finish(running)
        total = clock.wait() - begin
    finally:
        engine.drop(running)
    steps = [clock.between(*pair) for pair in pairwise(marks)]
    branches = [branch for branch, _ in call.pictures[0]]
    return Taken(latents, branches, prepare, steps, total)


def again(running: Running) -> None:
    """Rewinds to the first step; the latents stay as they are."""
    assert running.loop is not None
    running.call.steps_done, running.call.finished = 0, False
    running.loop.values.seek(0)


def _layer_flops(config: ModelConfig) -> tuple[int, int]:
    """Operations per row of a layer's QKV product, and of its other products."""
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return 2 * hidden * qkv, 2 * (hidden**2 + 3 * hidden * inner)


def step_flops(config: ModelConfig, noise: int, cached: Sequence[int]) -> int:
    """Matrix operations of a step, given the number of cached keys of each branch."""
    layer = sum(_layer_flops(config)) * noise * len(cached)
    layer += 4 * config.hidden_size * noise * sum(noise + one for one in cached)
    ends = 2 * 2 * PATCH**2 * 4 * config.hidden_size * noise * len(cached)
    return config.num_layers * layer + ends


def prefill_flops(config: ModelConfig, branches: Sequence[EncodedBranch], steps: int) -> int:
    """Matrix operations of the layers; the last one computes only keys and values."""
    qkv, rest = _layer_flops(config)
    rows = sum(branch.length + steps for branch in branches)
    seen = sum(int(one.kv_end.sum()) + steps * (one.length + 1) for one in branches)
    layers = config.num_layers
    return layers * rows * qkv + (layers - 1) * (rows * rest + 4 * config.hidden_size * seen)


def _full_model(run: Run) -> dict[str, Tensor]:
    return run.keep(
        "weights",
        lambda: random_weights(run.sizes.config, torch.bfloat16, device=run.device),
    )


def _pipeline(run: Run) -> OmniGenPipeline:
    weights = _full_model(run)
    return run.keep("pipeline", lambda: make_pipeline(run.sizes.config, weights, run.device))


def _fresh(run: Run, pipe: OmniGenPipeline) -> None:
    """Frees everything but the weights and resets the peaks."""
    pipe.clear_cache()
    if run.on_gpu:
        gc.collect()
        torch.cuda.synchronize(run.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)


def _cases(run: Run) -> list[tuple[int, int]]:
    return [(side, images) for side in run.sizes.sides for images in range(len(COLUMNS))]


def pictures(run: Run, found: dict[str, Any]) -> None:
    """Every size and kind of request: eager, then captured, then once more."""
    clock, rows = Clock(run.device), found.setdefault("rows", [])
    start = clock.wait()
    pipe = _pipeline(run)
    found["weights_seconds"] = clock.wait() - start
    found["parameters"] = sum(one.numel() for one in _full_model(run).values())
    for side, images in _cases(run):
        row: dict[str, Any] = {
            "case": f"{side} px, {COLUMNS[images]}",
            "status": NOT_MEASURED,
            "why": NO_TIME,
        }
        rows.append(row)
        try:
            _picture(run, pipe, clock, side, images, row)
        except Exception as error:  # memory, most likely: others may fit
            row.update(status=FAILED, why=first_line(error))
        run.save()
    failed = [row["case"] for row in rows if row["status"] == FAILED]
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")
    if all(row.get("why") == NO_TIME for row in rows):
        raise NotMeasured(NO_TIME)


def _picture(
    run: Run, pipe: OmniGenPipeline, clock: Clock, side: int, images: int, row: dict[str, Any]
) -> None:
    config, steps, few = run.sizes.config, run.sizes.steps, run.sizes.eager_steps
    noise = (side // TOKEN_PIXELS) ** 2
    # a first guess: a step reaches half of the measured matrix rate
    branches = 3 if images else 2
    cached = [images * noise + 200] * branches
    guess = 2 * step_flops(config, noise, cached) / run.limits.flops_per_second
    fixed = 3 if run.on_gpu else 0
    steps_run = min(steps, int((run.left() - fixed) / guess - few - 10) // 2)
    if steps_run < min(steps, 8):
        return
    arguments = arguments_of(side, images, steps)
    # the first picture compiles
    prepares, eager = [], None
    for _ in range(3):
        eager = None
        _fresh(run, pipe)
        eager = take(pipe, arguments, clock, captured=False, most=few + 2)
        prepares.append(eager.prepare)
    flops = step_flops(config, noise, [branch.length + 1 for branch in eager.branches])
    early = prefill_flops(config, eager.branches, steps)
    row.update(
        side=side,
        images=images,
        noise_tokens=noise,
        condition_tokens=[branch.length for branch in eager.branches],
        tflop_per_step=flops / 1e12,
        prefill_tflop=early / 1e12,
        prefill=described(prepares[1:]),
        first_prefill_seconds=prepares[0],  # with compilation, where this case is the first
        eager_step=described(eager.steps[2:]),
        eager_peaks=_peaks(run),
        clocks=clocks(run.device),
    )
    _fresh(run, pipe)
    first = take(pipe, arguments, clock, captured=True, most=steps_run)
    row["peaks"] = _peaks(run)
    row.update(steps_of_a_picture=steps, steps_run=steps_run)
    row["captured"] = pipe.engine.graphs.captured
    if row["captured"]:
        row["captured_step"] = described(first.steps[2:])  # one eager, one with the capture
    else:
        refused = pipe.engine.graphs.refused
        row["why_not_captured"] = "the capture was refused" if refused else NO_GPU
    step = row["captured_step" if row["captured"] else "eager_step"]["seconds"]
    row["share_of_measured_rate"] = flops / step / run.limits.flops_per_second
    peak = datasheet_rate(run.device)
    row["share_of_datasheet_peak"] = flops / step / peak if peak else None
    key = "picture_seconds" if steps_run == steps else "seconds_of_the_steps_run"
    row[key] = first.total
    second = take(pipe, arguments | {"seed": 2}, clock, captured=True, most=steps_run)
    median = described(second.steps)["seconds"]
    row["second_picture"] = {
        "seconds": second.total,
        "prepare_seconds": second.prepare,
        "overhead_seconds": second.total - steps_run * median,
        "overhead_share": (second.total - steps_run * median) / (steps_run * median),
    }
    finite = all(bool(one.latents.isfinite().all()) for one in (eager, first, second))
    if not finite:
        row.update(status=FAILED, why="latents that are not finite")
    elif run.on_gpu and not row["captured"]:
        row.update(status=FAILED, why=row["why_not_captured"])
    else:
        row["status"] = OK
        del row["why"]


def _peaks(run: Run) -> dict[str, float] | None:
    """Bytes since the case began, weights included."""
    if not run.on_gpu:
        return None
    return {
        "allocated_gb": torch.cuda.max_memory_allocated(run.device) / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved(run.device) / 1e9,
    }


def peer(run: Run, found: dict[str, Any]) -> None:
    """diffusers' transformer, eager, on the same weights, its steps interleaved with ours."""
    if find_spec("diffusers") is None:
        raise NotMeasured("diffusers is not installed")
    found["small_model_difference"] = _agreement(run)
    run.save()
    clock, pipe, rows = Clock(run.device), _pipeline(run), found.setdefault("rows", [])
    for side, images in _cases(run):
        row: dict[str, Any] = {"case": f"{side} px, {COLUMNS[images]}"}
        rows.append(row)
        try:
            row.update(_beside(run, pipe, clock, side, images))
        except Exception as error:
            row.update(status=FAILED, why=first_line(error))
        run.save()
    failed = [row["case"] for row in rows if row["status"] == FAILED]
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _agreement(run: Run) -> float:
    """Difference of the first velocities of both in float32, in the small model."""
    from ..peers.diffusers import DiffusersTransformer

    config = run.sizes.check
    weights = random_weights(config, torch.float32, device=run.device)
    pipe = make_pipeline(config, weights, run.device)
    with ops.use("reference"):
        other = DiffusersTransformer(config, weights, torch.float32)
        difference = _first_difference(run, pipe, other, run.sizes.check_side, 1)
    if not difference <= _PEER_BOUNDS[torch.float32]:
        raise RuntimeError(f"diffusers computes something else: {difference:.1e} apart")
    return difference


def _start(
    run: Run, pipe: OmniGenPipeline, other: Any, side: int, images: int
) -> tuple[Running, Tensor]:
    """Starts the same picture in both; returns ours and its noise."""
    noise = torch.randn(1, 4, side // 8, side // 8, device=run.device).bfloat16().float()
    arguments = arguments_of(side, images, run.sizes.steps) | {"seed": None, "latents": noise}
    call, engine = pipe.make_call(**arguments), pipe.engine
    running = engine.start(call, plain_plan(engine, capture=True))
    latents = {digest: found for (digest, _), found in engine.image_latents.items()}
    other.start(call.pictures[0], latents, noise, call.schedule.tensor())
    return running, noise


@torch.no_grad()
def _first_difference(run: Run, pipe: OmniGenPipeline, other: Any, side: int, images: int) -> float:
    """Difference of the latents after one step, relative to how far it moves them."""
    running, noise = _start(run, pipe, other, side, images)
    try:
        pipe.engine.step(running)
        ours = running.latents - noise
    finally:
        pipe.engine.drop(running)
    theirs = other.run_step(0) - noise
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def _beside(
    run: Run, pipe: OmniGenPipeline, clock: Clock, side: int, images: int
) -> dict[str, Any]:
    from ..peers.diffusers import DiffusersTransformer

    if run.left() < (10 if run.on_gpu else 0):
        return {"status": NOT_MEASURED, "why": NO_TIME}
    _fresh(run, pipe)
    other = run.keep(
        "peer",
        lambda: DiffusersTransformer(run.sizes.config, _full_model(run), torch.bfloat16),
    )
    difference = _first_difference(run, pipe, other, side, images)
    if not difference <= _PEER_BOUNDS[torch.bfloat16]:
        why = f"results differ by {difference:.1e}; no times are reported"
        return {"status": FAILED, "why": why, "difference": difference}
    running, _ = _start(run, pipe, other, side, images)
    ours: list[float] = []
    theirs: list[float] = []
    try:
        for index in range(6):
            again(running)
            marks = [clock.mark()]
            pipe.engine.step(running)
            marks.append(clock.mark())
            other.run_step(0)
            marks.append(clock.mark())
            if index > 2:  # one eager, one with the capture, and the first replay
                ours.append(clock.between(*marks[:2]))
                theirs.append(clock.between(*marks[1:]))
    finally:
        pipe.engine.drop(running)
    result = {"status": OK, "difference": difference}
    result |= {"ours": described(ours), "diffusers": described(theirs)}
    result["captured"] = pipe.engine.graphs.captured
    return result | {"ratio": result["diffusers"]["seconds"] / result["ours"]["seconds"]}
