"""Checks every kernel, and a model of the real width, against higher precision."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from omnigen_fast.kernels import library, ops, reference
from omnigen_fast.kernels.contract import cache_width
from torch import Tensor

from omnigen_fast.forms import FORMS
from omnigen_fast.graph import StepGraphs
from omnigen_fast.pipeline import OmniGenPipeline
from omnigen_fast.quantised import quantised

from ..common import ROOT, random_weights
from ..kernels import workload
from .pictures import arguments_of, make_pipeline
from .run import FAILED, NO_GPU, NOT_MEASURED, OK, CheckFailed, Run, first_line

_DTYPES = (torch.bfloat16, torch.float32)
# Largest allowed ratio of a model's bfloat16 error to plain PyTorch's
_MODEL_BOUND = 1.5


def _numerics() -> ModuleType:
    """The tests' helpers, which are no package."""
    path = ROOT / "tests" / "kernels" / "numerics.py"
    spec = importlib.util.spec_from_file_location("_numerics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_kernels(run: Run) -> AbstractContextManager:
    """Triton or an error on a GPU; elsewhere the default."""
    return ops.use("triton", attention="triton") if run.on_gpu else nullcontext()


class _Maker:
    """Fresh random inputs."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def integers(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)


# A check: operation, arguments, which of them are written, and the shape of `out` if it has one.
_Check = tuple[str, tuple, tuple[int, ...], tuple[int, ...] | None]


def _row_checks(make: _Maker, tiny: bool) -> Iterator[_Check]:
    hidden, inner = (192, 256) if tiny else (3072, 8192)
    for rows in (0, 1, 63, 65) if tiny else (0, 1, 63, 65, 4097):
        x, weight = make.rows(rows, hidden), make.rows(hidden)
        yield "rms_norm", (x, weight, 1e-5), (), x.shape
        shift, scale = make.rows(5, hidden), make.rows(5, hidden)
        for steps in ((3,), (4, 0, 2)):
            if rows % len(steps) == 0:
                step = make.integers(steps, torch.int64)
                yield "modulate", (x, shift, scale, step, 1e-6), (), x.shape
        yield "swiglu", (make.rows(rows, 2 * inner),), (), (rows, inner)
        for heads, kv_heads, head_dim in ((2, 2, 96), (4, 1, 64), (2, 1, 128)):
            qkv = make.rows(rows, (heads + 2 * kv_heads) * head_dim)
            angles = make.rows(rows, head_dim // 2, dtype=torch.float32)
            rotary = (qkv, angles.cos(), angles.sin(), heads, kv_heads)
            for keys_only in (False, True):
                yield "rope_", (*rotary, keys_only), (0,), None
            caches = [make.rows(rows + 5, kv_heads, head_dim) for _ in range(2)]
            places = torch.randperm(rows + 5, device=make.device)[:rows]
            yield "rope_cache_", (*rotary, *caches, places), (0, 5, 6), None
            k, v = qkv.unflatten(1, (-1, head_dim))[:, -2 * kv_heads :].chunk(2, 1)
            width = cache_width(kv_heads, head_dim)
            for form in (torch.int8, torch.uint8):
                kept = [torch.ones(rows + 5, width, dtype=form, device=make.device) for _ in "kv"]
                yield "quantise_cache_", (k, v, *kept, places), (2, 3), None
    for rows, columns in ((1, 100), (63, 96), (65, hidden)):
        for form in FORMS:
            weight = make.rows(rows, columns)
            parts = quantised("weight", weight, form).arguments
            yield f"dequantise_{form}_", (weight, *parts), (0,), None
    yield from _quantised_checks(make, hidden, inner)
    for images, groups, height, width in ((1, (3,), 64, 48), (2, (3, 2), 6, 34)):
        latents = make.rows(images, 4, height, width, dtype=torch.float32)
        prediction = make.rows(sum(groups), height * width // 4, 16)
        coefficient = make.rows(sum(groups), dtype=torch.float32)
        starts = make.integers(accumulate(groups, initial=0))
        lengths = torch.linspace(0, 1, 51, device=make.device).square().diff()
        step = make.integers((3, 40)[:images], torch.int64)
        values = (latents, prediction, coefficient, starts, lengths, step, 2)
        yield "guidance_step_", values, (0,), None


def _quantised_checks(make: _Maker, hidden: int, inner: int) -> Iterator[_Check]:
    """In int8; the reference in float64 knows no float8."""

    def written(rows: int, width: int) -> tuple[Tensor, Tensor]:
        values = torch.zeros(rows, width, dtype=torch.int8, device=make.device)
        return values, make.rows(rows, dtype=torch.float32)

    for rows in (1, 63, 65):
        x, weight = make.rows(rows, hidden), make.rows(hidden)
        yield "quantise_", (x, *written(rows, hidden)), (1, 2), None
        yield "rms_norm_quantise_", (x, weight, 1e-5, *written(rows, hidden)), (3, 4), None
        gates = make.rows(rows, 2 * inner)
        yield "swiglu_quantise_", (gates, *written(rows, inner)), (1, 2), None
        factors = [
            torch.randint(-127, 128, (some, hidden), device=make.device).to(torch.int8)
            for some in (rows, inner)
        ]
        scales = [make.rows(some, dtype=torch.float32).abs() for some in (rows, inner)]
        product = (factors[0], scales[0], factors[1], scales[1], make.rows(rows, inner))
        for adds in (False, True):
            yield "scaled_mm_", (*product, adds), (4,), None


def _narrow(cache: Tensor, form: torch.dtype) -> Tensor:
    """A cache [rows, kv_heads, head_dim] in 8 bits."""
    rows, kv_heads, head_dim = cache.shape
    width = cache_width(kv_heads, head_dim)
    kept = [torch.zeros(rows, width, dtype=form, device=cache.device) for _ in "kv"]
    reference.quantise_cache_(cache, cache, *kept, torch.arange(rows, device=cache.device))
    return kept[0]


def _attention_checks(make: _Maker, tiny: bool) -> Iterator[_Check]:
    shapes = ((2, 1, 64), (2, 2, 96), (4, 1, 128))
    lengths, cached = ([1, 17, 33], [0, 5, 20]) if tiny else ([1, 63, 64, 65, 300], [0, 5, 64, 129])
    cached = (cached + [200])[: len(lengths)]
    for heads, kv_heads, head_dim in shapes:
        width = (heads + 2 * kv_heads) * head_dim
        parts = (heads, kv_heads, kv_heads)
        cu_rows = make.integers(accumulate(lengths, initial=0))
        q, k, v = make.rows(sum(lengths), width).unflatten(1, (-1, head_dim)).split(parts, 1)
        caches = [make.rows(sum(cached) + 7, kv_heads, head_dim) for _ in range(2)]
        starts = make.integers([3 + first for first in accumulate(cached, initial=0)][:-1])
        args = (q, k, v, *caches, cu_rows, starts, make.integers(cached), max(lengths))
        angles = make.rows(len(q), head_dim // 2, dtype=torch.float32)
        turned = (*args, None, angles.cos(), angles.sin())
        yield "attention_step", args, (), q.shape
        yield "attention_step", turned, (), q.shape
        a, b = make.rows(*q.shape), make.rows(*q.shape)
        lses = [4 * make.rows(*q.shape[:2], dtype=torch.float32) for _ in range(2)]
        lses[0][: len(a) // 2] = torch.inf
        yield "join_segments", (a, lses[0], b, lses[1]), (), q.shape
        for form in (torch.int8, torch.uint8):
            kept = [_narrow(cache, form) for cache in caches]
            yield "attention_step_8bit", (q, k, v, *kept, *turned[5:]), (), q.shape
        # causal text, an image whose tokens see one another, text, time tokens
        ends = []
        for length in lengths:
            first, stop = length // 4, max(length // 4, length // 2)
            own = list(range(1, length + 1))
            own[first:stop] = [stop] * (stop - first)
            own[length - length // 8 :] = [length - length // 8] * (length // 8)
            ends += own
        args = (q, k, v, cu_rows, make.integers(ends), max(lengths))
        yield "attention_prefill", args, (), q.shape


def _outcome(function: Callable, args: tuple, written: tuple[int, ...], **more) -> list[Tensor]:
    returned = function(*args, **more)
    results = ([] if returned is None else [returned]) + [args[i] for i in written]
    if function.__name__ == "quantise_cache_":  # as what the bytes stand for
        return [reference._dequantised(one, args[0].double()) for one in results]
    return results


def _copies(args: tuple, double: bool) -> tuple:
    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.double() if double and x.is_floating_point() else x.clone()

    return tuple(map(copy, args))


def _errors(found: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float, bool]:
    """Relative errors of a kernel and of plain PyTorch, and whether the first passes.

    It must be at most twice the second, in norm and at the worst element.
    """
    if not exact.numel():
        return 0.0, 0.0, True
    # between two integers, either is right
    tiny = 2 * torch.finfo(torch.float32).eps if exact.is_floating_point() else 1 / 127
    exact, earned, shown = exact.double(), True, []
    for norm in (torch.linalg.vector_norm, lambda x: x.abs().max()):
        size = norm(exact).item()
        kernel, reference_ = (norm(x.double() - exact).item() for x in (found, plain))
        earned &= kernel <= 2 * reference_ + tiny * size  # false for NaN
        shown.append((kernel / size, reference_ / size))
    return (*shown[0], earned)


def _check_one(check: _Check, dtype: torch.dtype, run: Run, inside: Callable) -> dict[str, Any]:
    name, args, written, shape = check
    row: dict[str, Any] = {
        "kernel": name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(args[0].shape),
    }
    function = getattr(reference, name)
    exact = _outcome(function, _copies(args, True), written)
    plain = _outcome(function, _copies(args, False), written)
    copies, more, untouched = list(_copies(args, False)), {}, []
    if shape is not None:
        nothing = torch.full(shape, torch.nan, dtype=dtype, device=run.device)
        more["out"], whole = inside(nothing)
        untouched.append(whole)
    for place in written:
        # latents must be contiguous, and so must one number a row
        if name != "guidance_step_" and copies[place].dim() > 1:
            copies[place], whole = inside(copies[place])
            untouched.append(whole)
    with by_kernels(run):
        found = _outcome(getattr(ops, name), tuple(copies), written, **more)
    compared = [_errors(*three) for three in zip(found, plain, exact)]
    row["error"] = max(one[0] for one in compared)
    row["plain_error"] = max(one[1] for one in compared)
    row["status"] = OK if all(one[2] for one in compared) else FAILED
    if not all(whole() for whole in untouched):
        row.update(status=FAILED, why="wrote outside its rows")
    return row


def kernels(run: Run, found: dict[str, Any]) -> None:
    """Each operation at awkward sizes, then at the real model's."""
    inside = _numerics().inside
    torch.manual_seed(0)
    rows = found["rows"] = []
    for dtype in _DTYPES:
        make = _Maker(run.device, dtype)
        for checks in (_row_checks, _attention_checks):
            for check in checks(make, run.tiny):
                rows.append(_tried(lambda c=check, d=dtype: _check_one(c, d, run, inside), check))
        run.save()
    for name in workload.CASES:
        row = {"kernel": name, "dtype": "bfloat16", "shape": "of the real model"}
        rows.append(row)
        if not run.on_gpu:
            row.update(status=NOT_MEASURED, why=NO_GPU)
            continue
        try:
            workload.check(workload.build(name, run.device, run.sizes.operations), workload.KERNELS)
            row["status"] = OK
        except Exception as error:
            row.update(status=FAILED, why=first_line(error))
        run.save()
    _judge(rows, "kernel")


def _tried(work: Callable[[], dict[str, Any]], check: _Check) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        shape = list(check[1][0].shape)
        return {"kernel": check[0], "shape": shape, "status": FAILED, "why": first_line(error)}


def _judge(rows: list[dict[str, Any]], label: str) -> None:
    """Raises CheckFailed if a row failed."""
    failed = [row for row in rows if row["status"] == FAILED]
    if failed:
        names = ", ".join(sorted({row[label] for row in failed}))
        raise CheckFailed(f"{len(failed)} of {len(rows)} checks failed: {names}")


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def model(run: Run, found: dict[str, Any]) -> None:
    """On a model of few layers: bfloat16 against float32, captured steps against eager ones."""
    rows = found["rows"] = []
    half = random_weights(run.sizes.check, torch.bfloat16, device=run.device)
    _check_precision(run, half, rows)
    run.save()
    _check_captures(run, half, rows)
    _judge(rows, "check")


def _check_precision(run: Run, half: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    side = run.sizes.check_side
    noise = torch.randn(1, 4, side // 8, side // 8, device=run.device).bfloat16().float()
    arguments = arguments_of(side, 1, 3) | {"seed": None, "latents": noise}

    def moved(pipe: OmniGenPipeline, choice: AbstractContextManager) -> Tensor:
        """How far three steps move the latents."""
        pipe.engine.graphs = StepGraphs()
        with choice:
            return pipe(**arguments) - noise

    wide = {name: value.float() for name, value in half.items()}
    exact = moved(make_pipeline(run.sizes.check, wide, run.device), ops.use("reference"))
    del wide

    def error(choice: AbstractContextManager) -> float:
        return _relative(moved(make_pipeline(run.sizes.check, half, run.device), choice), exact)

    plain = error(ops.use("reference"))
    for name, choice in (
        ("kernels, bfloat16", by_kernels(run)),
        ("library attention, bfloat16", ops.use(attention="library")),
        *((f"{one} attention, bfloat16", ops.use(attention=one)) for one in _libraries(run)),
    ):
        off = error(choice)
        good = math.isfinite(off) and off <= _MODEL_BOUND * plain
        row = {"check": name, "error": off, "plain_error": plain, "bound": _MODEL_BOUND}
        rows.append(row | {"status": OK if good else FAILED})


# Conditions of different lengths for the same shapes; the longest is not the first.
_PROMPTS = (
    "A cat on a mat.",
    "A dog that sleeps on a red sofa beside a tall window, in the warm light of an afternoon.",
    "A bird.",
)


class CountedGraphs(StepGraphs):
    """Counts how often a capture of a step is tried."""

    captures = 0

    def record(self, *given: Any) -> bool:
        """See `StepGraphs.record`."""
        self.captures += 1
        return super().record(*given)


def _libraries(run: Run) -> list[library.Library]:
    """That can compute a step's attention of the model that is checked."""
    head_dim = run.sizes.check.head_dim
    return [
        one
        for one in library.LIBRARIES
        if library.why_not(one, run.device, torch.bfloat16, head_dim) is None
    ]


def _check_captures(run: Run, half: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    _check_captures_of(run, half, rows, "")
    for one in _libraries(run) if run.on_gpu else []:
        with ops.use(attention=one):
            _check_captures_of(run, half, rows, f" by {one}")


def _check_captures_of(
    run: Run, half: dict[str, Tensor], rows: list[dict[str, Any]], by: str
) -> None:
    eager, captured = (make_pipeline(run.sizes.check, half, run.device) for _ in range(2))
    eager.engine.graphs = StepGraphs()
    graphs = captured.engine.graphs = CountedGraphs.on(run.device)
    if not graphs.possible():
        rows.append({"check": f"captured = eager{by}", "status": NOT_MEASURED, "why": NO_GPU})
        return
    for name, images, separate in (
        ("text", 0, False),
        ("one image", 1, False),
        ("one image, branches apart", 1, True),
    ):
        calls = []
        for number, prompt in enumerate(2 * _PROMPTS):
            if number == len(_PROMPTS):
                graphs.captures = 0  # from here on the cache holds all prompts
            given = arguments_of(run.sizes.check_side, images, 5)
            tags = given["prompt"].partition("</img>")
            given["prompt"] = (tags[0] + tags[1] if images else "") + prompt
            given |= {"guidance_scale": 2 + number / 2, "separate_cfg_infer": separate}
            given["seed"] = number
            calls.append((captured(**given), eager(**given)))
        row = {
            "check": f"captured = eager{by}, {name}",
            "calls": len(calls),
            "equal": [torch.equal(*pair) for pair in calls],
            "finite": all(bool(pair[1].isfinite().all()) for pair in calls),
            "captures_of_second_round": graphs.captures,
            "refused": graphs.refused,
        }
        if not all(row["equal"]):
            row["difference"] = max(_relative(*pair) for pair in calls)
        good = all(row["equal"]) and row["finite"] and not graphs.refused
        # what reads lengths on the host is captured anew for other conditions
        good &= not graphs.captures or ops.choice().attention in library.READS_SPANS
        row["status"] = OK if good else FAILED
        rows.append(row)
        run.save()
