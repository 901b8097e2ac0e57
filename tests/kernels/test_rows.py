"""Kernels that take each row alone, against their float64 specification."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from numerics import (
    DEVICE,
    DTYPES,
    assert_earned,
    double,
    inside,
    integers,
    name,
    poisoned,
    random,
)
from omnigen_fast.kernels import (
    dequantise,
    guidance,
    modulate,
    ops,
    reference,
    rms_norm,
    rope,
    swiglu,
)

from omnigen_fast.forms import FORMS
from omnigen_fast.quantised import quantised

pytestmark = pytest.mark.early

# a row is a program: in the interpreter each takes a millisecond
ROWS = (0, 1, 63, 64, 65, 4097 if DEVICE == "cuda" else 257)


@pytest.mark.slow_for("[24]*7-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows, dtype):
    x, _ = inside(random(rows, 96, dtype=dtype))
    weight = random(96, dtype=dtype, seed=1)
    out, untouched = poisoned(rows, 96, dtype=dtype)
    assert rms_norm.rms_norm(x, weight, 1e-5, out=out) is out
    assert untouched()
    exact = reference.rms_norm(*double(x, weight), 1e-5)
    assert_earned(out, reference.rms_norm(x, weight, 1e-5), exact)


@pytest.mark.parametrize("hidden", (1, 64, 100, 3072))
def test_norms_of_any_width(hidden):
    x, weight = random(3, hidden), random(hidden, seed=1)
    shift, scale = random(3, hidden, seed=2), random(3, hidden, seed=3)
    step = torch.tensor([1, 2, 0], device=DEVICE)
    out, untouched = poisoned(3, hidden, dtype=x.dtype, gap=0)
    rms_norm.rms_norm(x, weight, 1e-5, out=out)
    assert untouched()
    exact = reference.rms_norm(*double(x, weight), 1e-5)
    assert_earned(out, reference.rms_norm(x, weight, 1e-5), exact)
    out, untouched = poisoned(3, hidden, dtype=x.dtype, gap=0)
    modulate.modulate(x, shift, scale, step, 1e-6, out=out)
    assert untouched()
    exact = reference.modulate(*double(x, shift, scale), step, 1e-6)
    assert_earned(out, reference.modulate(x, shift, scale, step, 1e-6), exact)


# rows, and the step of each group
GROUPS = [
    *((rows, (3,)) for rows in ROWS),
    (0, (1, 4)),
    (64, (4, 0)),
    (65, (0, 1, 2, 3, 4)),
    (63, (2, 4, 2)),
    (5, (1, 0, 3, 2, 1)),
]


@pytest.mark.slow_for("[24]*7-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("rows", "steps"), GROUPS, ids=str)
def test_modulate(rows, steps, dtype):
    # far from zero, where a variance from the mean of squares would cancel
    x, _ = inside(random(rows, 96, dtype=dtype) + 100)
    # halves of one table, as the time's embedding returns them
    table = random(6, 2 * 96, dtype=dtype, seed=1)
    table[[one for one in range(6) if one not in steps]] = torch.nan
    shift, scale = table.chunk(2, dim=1)
    step = torch.tensor(steps, device=DEVICE)
    out, untouched = poisoned(rows, 96, dtype=dtype)
    modulate.modulate(x, shift, scale, step, 1e-6, out=out)
    assert untouched()
    exact = reference.modulate(*double(x, shift, scale), step, 1e-6)
    assert_earned(out, reference.modulate(x, shift, scale, step, 1e-6), exact)


@pytest.mark.slow_for("[24]*7-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("rows", "inner"), [*((rows, 96) for rows in ROWS), (3, 4500), (2, 1)])
def test_swiglu(rows, inner, dtype):
    gate_up, _ = inside(4 * random(rows, 2 * inner, dtype=dtype))
    out, untouched = poisoned(rows, inner, dtype=dtype)
    swiglu.swiglu(gate_up, out=out)
    assert untouched()
    assert_earned(out, reference.swiglu(gate_up), reference.swiglu(*double(gate_up)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 96), (1, 1), (5, 64), (65, 96), (2, 3072), (3, 4130)]
)
def test_dequantise(rows, columns, form, dtype):
    """Of values of every size: small ones are subnormal in e4m3, and some rows are 0."""
    size = torch.logspace(-8, 4, rows, dtype=torch.float64).unsqueeze(1).to(DEVICE)
    weight = (random(rows, columns) * size).float()
    weight[1:2] = 0
    operation = f"dequantise_{form}_"
    parts = quantised("weight", weight, form).arguments
    out, untouched = poisoned(rows, columns, dtype=dtype)
    getattr(dequantise, operation)(out, *parts)
    assert untouched()
    plain = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
    exact = torch.empty_like(plain, dtype=torch.float64)
    getattr(reference, operation)(plain, *parts)
    getattr(reference, operation)(exact, *parts)
    # the same roundings everywhere: what a CPU has expanded is what a GPU expands
    assert torch.equal(out, plain)
    assert_earned(out, plain, exact)


def rotation(rows: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 100 * random(rows, head_dim // 2, seed=7)
    return angles.cos(), angles.sin()


ROTARY = [
    *((rows, 2, 1, 96) for rows in (0, 1, 63, 64, 65)),
    (65, 3, 3, 64),
    (65, 4, 2, 128),
    (5, 32, 32, 96),  # several blocks of pairs
    (5, 1, 1, 34),
    (ROWS[-1], 1, 1, 64),
]


@pytest.mark.slow_for("[24]*7-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), ROTARY)
def test_rope(rows, heads, kv_heads, head_dim, dtype):
    qkv, untouched = inside(random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype))
    cos, sin = rotation(rows, head_dim)
    plain, exact = qkv.clone(), qkv.double()
    reference.rope_(plain, cos, sin, heads, kv_heads)
    reference.rope_(exact, *double(cos, sin), heads, kv_heads)
    values = qkv[:, (heads + kv_heads) * head_dim :].clone()
    rope.rope_(qkv, cos, sin, heads, kv_heads)
    assert untouched()
    assert torch.equal(qkv[:, (heads + kv_heads) * head_dim :], values)
    assert_earned(qkv, plain, exact)
    for rotate in (rope.rope_, reference.rope_):
        both, keys = (qkv.clone() for _ in range(2))
        rotate(both, cos, sin, heads, kv_heads)
        rotate(keys, cos, sin, heads, kv_heads, True)
        assert torch.equal(keys[:, : heads * head_dim], qkv[:, : heads * head_dim])
        assert torch.equal(keys[:, heads * head_dim :], both[:, heads * head_dim :])


@pytest.mark.slow_for("[24]*7-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), ROTARY)
def test_rope_cache(rows, heads, kv_heads, head_dim, dtype):
    qkv, untouched = inside(random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype))
    cos, sin = inside(rotation(rows, head_dim)[0])[0], rotation(rows, head_dim)[1]
    keys, keys_untouched = poisoned(rows + 7, kv_heads, head_dim, dtype=dtype)
    values, values_untouched = poisoned(rows + 7, kv_heads, head_dim, dtype=dtype, gap=0)
    places = torch.randperm(rows + 7, generator=torch.Generator().manual_seed(3))
    places, free = places[:rows].to(DEVICE), places[rows:].to(DEVICE)
    same = qkv.clone()
    rope.rope_cache_(qkv, cos, sin, heads, kv_heads, keys, values, places)
    assert untouched() and keys_untouched() and values_untouched()
    assert keys[free].isnan().all() and values[free].isnan().all()
    # the cache holds exactly what qkv holds, and qkv what `rope_` makes of it
    by_head = qkv.unflatten(1, (-1, head_dim))
    assert torch.equal(keys[places], by_head[:, heads : heads + kv_heads])
    assert torch.equal(values[places], by_head[:, heads + kv_heads :])
    rope.rope_(same, cos, sin, heads, kv_heads)
    assert torch.equal(qkv, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("cu_groups", "channels", "height", "width", "patch"),
    [
        ((0, 2), 4, 2, 2, 2),
        ((0, 3), 4, 18, 14, 2),
        ((0, 3, 5), 4, 16, 10, 2),
        ((0, 1, 1, 5), 4, 6, 8, 2),  # an image without a branch stays as it is
        ((0, 2), 3, 9, 6, 3),  # 27 values: not a power of two
        ((0, 2), 4, 8, 8, 1),
    ],
    ids=str,
)
def test_guidance_step(cu_groups, channels, height, width, patch, dtype):
    images, groups = len(cu_groups) - 1, cu_groups[-1]
    tokens, values = height * width // patch**2, patch * patch * channels
    latents, untouched = inside(random(images, channels, height, width), gap=0)
    wide = random(groups, tokens, values + 8, dtype=dtype, seed=1)
    wide[:, :, values:] = torch.nan
    prediction = wide[:, :, :values]
    coefficient = random(groups, seed=2)
    # each image takes a different step; none takes the first or the last
    lengths = torch.tensor([torch.nan, 0.02, 8.0, 0.3, torch.nan], device=DEVICE)
    step = torch.tensor([3, 1, 2][:images], device=DEVICE)
    rest = (coefficient, integers(*cu_groups), lengths, step, patch)
    plain, exact = latents.clone(), latents.double()
    reference.guidance_step_(plain, prediction, *rest)
    reference.guidance_step_(exact, prediction.double(), *rest)
    guidance.guidance_step_(latents, prediction, *rest)
    assert untouched()
    for image in zip(latents, plain, exact):
        assert_earned(*image)


BOTH = pytest.mark.parametrize("kernels", ("reference", "triton"))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_modulate_of_groups_is_that_of_each_alone(dtype, kernels):
    x, shift, scale = (random(n, 96, dtype=dtype, seed=n) for n in (12, 5, 5))
    for steps in ((4, 0, 4, 1), (3, 3, 3)):
        step = torch.tensor(steps, device=DEVICE)
        with ops.use(kernels):
            together = ops.modulate(x, shift, scale, step, 1e-6)
            alone = [
                ops.modulate(rows, shift, scale, one, 1e-6)
                for rows, one in zip(x.chunk(len(steps)), step.split(1))
            ]
            assert torch.equal(together, torch.cat(alone))
            if len(set(steps)) == 1:
                assert torch.equal(together, ops.modulate(x, shift, scale, step[:1], 1e-6))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_guidance_of_images_is_that_of_each_alone(dtype, kernels):
    cu_groups, steps = (0, 3, 4, 6), (2, 0, 2)
    latents, prediction = random(3, 4, 8, 6), random(6, 12, 16, dtype=dtype, seed=1)
    coefficient, lengths = random(6, seed=2), random(3, seed=3)
    step = torch.tensor(steps, device=DEVICE)
    together = latents.clone()
    with ops.use(kernels):
        ops.guidance_step_(
            together, prediction, coefficient, integers(*cu_groups), lengths, step, 2
        )
        for i, (start, stop) in enumerate(pairwise(cu_groups)):
            ops.guidance_step_(
                latents[i : i + 1],
                prediction[start:stop],
                coefficient[start:stop],
                integers(0, stop - start),
                lengths,
                step[i : i + 1],
                2,
            )
    assert torch.equal(together, latents)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((5, 1 << 18), 1),
        ((5, 1 << 19), 1),
        ((8, 1 << 16), 4),
        ((8, 2, 1 << 15), 4),
        ((3, 10), 3),
        ((0, 10), 0),
        ((4, 0), 4),
    ],
    ids=str,
)
def test_reference_takes_blocks_of_a_mebibyte_on_a_cpu(shape, rows):
    x = torch.empty(1, device="cpu").expand(shape)
    assert reference._block_rows(x) == rows
    assert reference._block_rows(x.to("meta")) == shape[0]


@pytest.mark.parametrize("rows", (0, 1, 7))
def test_reference_in_blocks_is_that_of_all_rows(rows, monkeypatch):
    """In blocks of three rows, of one norm's width and of what else has other widths."""

    def everything() -> list[torch.Tensor]:
        x, weight = random(rows, 64), random(64, seed=2)
        qkv = random(rows, 5 * 32, seed=3)
        q, k, v = random(rows, 4 * 16, seed=4).unflatten(1, (4, 16)).split((2, 1, 1), 1)
        caches = random(5, 1, 16, seed=5), random(5, 1, 16, seed=6)
        places = integers(0, rows), integers(1), integers(4), rows
        results = [reference.rms_norm(x, weight, 1e-5)]
        reference.rope_(qkv, *rotation(rows, 32), 3, 1)
        results += [qkv, reference.swiglu(x), reference.attention_step(q, k, v, *caches, *places)]
        turning = *places, None, *rotation(rows, 16)
        return [*results, reference.attention_step(q, k, v, *caches, *turning)]

    monkeypatch.setattr(reference, "_CPU_BLOCK_VALUES", 3 * 64)
    blocks = everything()
    monkeypatch.setattr(reference, "_CPU_BLOCK_VALUES", 1 << 18)
    for one, other in zip(blocks, everything(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
