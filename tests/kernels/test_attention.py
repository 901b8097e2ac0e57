"""The attention kernels against their float64 specification, and that against explicit masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, DTYPES, assert_earned, double, inside, integers, name, poisoned, random
from omnigen_fast.kernels import attention, launch, reference, rope

pytestmark = pytest.mark.early

# Small blocks, so that short groups take several, whole and cut ones.
SMALL = launch.Launch(num_warps=4, block_m=32, block_n=16)


def split(rows, heads, kv_heads, head_dim, dtype, seed=0):
    """q, k and v as views of a fused product, NaN between its rows."""
    fused, _ = inside(random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=seed))
    return fused.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)


def step_arguments(lengths, cached, heads, kv_heads, head_dim, dtype, cache_rows=0):
    """Arguments of a step: `cached` has the first cache row and the number of rows of a group."""
    q, k, v = split(sum(lengths), heads, kv_heads, head_dim, dtype)
    cache_rows = max([cache_rows, *(start + length for start, length in cached)])
    seen = torch.zeros(cache_rows, dtype=torch.bool)
    for start, length in cached:
        seen[start : start + length] = True
    caches = []
    for seed in (1, 2):
        cache = random(cache_rows, kv_heads, head_dim, dtype=dtype, seed=seed)
        cache[~seen.to(DEVICE)] = torch.nan  # rows of nobody must not be read
        caches.append(inside(cache)[0])
    return (
        q,
        k,
        v,
        *caches,
        integers(*accumulate(lengths, initial=0)),
        integers(*(start for start, _ in cached)),
        integers(*(length for _, length in cached)),
        max(lengths, default=0),
    )


def prefill_arguments(groups, heads, kv_heads, head_dim, dtype):
    """Arguments of a prefill: each group lists its runs, ("text" | "image" | "times", length)."""
    ends, lengths = [], []
    for runs in groups:
        place = 0
        for kind, length in runs:
            if kind == "text":
                ends += range(place + 1, place + length + 1)
            elif kind == "image":
                ends += [place + length] * length
            else:
                ends += [place] * length
            place += length
        lengths.append(place)
    q, k, v = split(len(ends), heads, kv_heads, head_dim, dtype)
    cu_rows = integers(*accumulate(lengths, initial=0))
    return q, k, v, cu_rows, integers(*ends), max(lengths, default=0)


def turning(args):
    """A step's arguments with q still to be rotated."""
    cu_keys = args[9:] or (None,)
    angles = random(len(args[0]), args[0].shape[2] // 2, seed=7)
    return *args[:9], *cu_keys, *(inside(x)[0] for x in (angles.cos(), angles.sin()))


def turned(args, rope_):
    """And with q as `rope_` rotates it."""
    *rest, cos, sin = args
    q = rest[0]
    # as one key head of a product whose other parts are not looked at
    rows = torch.cat([q, q[:, :2]], 1).flatten(1)
    rope_(rows, cos, sin, q.shape[1], 1)
    return rows.unflatten(1, (-1, q.shape[2]))[:, : q.shape[1]], *rest[1:]


def check(kernel, plain, args):
    q, before = args[0], args[0].clone()
    out, untouched = poisoned(*q.shape, dtype=q.dtype)
    assert kernel(*args, out=out) is out
    assert untouched() and torch.equal(q, before)
    exact = [double(x)[0] if isinstance(x, torch.Tensor) else x for x in args]
    assert_earned(out, plain(*args), plain(*exact))


def check_step(*args):
    # what no group sees is NaN in the cache; the reference must not see it either
    check(attention.attention_step, reference.attention_step, args)


def check_prefill(*args):
    check(attention.attention_prefill, reference.attention_prefill, args)


def tiles(kernel):
    """(head_dim, block_m, block_n) of every configuration in 16 bits that ships."""
    keys = {f"{kernel}/{head_dim}/16": head_dim for head_dim in (64, 96, 128)}
    return sorted(
        {
            (head_dim, entries[key].block_m, entries[key].block_n)
            for entries in launch.TABLE.values()
            for key, head_dim in keys.items()
        }
    )


STEPS = {
    "one row": ([1], [(0, 1)]),
    "no cache": ([65], [(0, 0)]),
    "mixed": ([63, 1, 64, 65], [(0, 70), (70, 0), (70, 128), (3, 5)]),
    "shared": ([64, 64, 64], [(0, 100), (100, 33), (0, 100)]),
    "long": ([300, 1, 130], [(5, 300), (0, 256), (300, 7)]),
    "empty group": ([0, 10, 0], [(0, 4), (2, 9), (0, 0)]),
}


@pytest.mark.slow_except(
    "one row-*",
    "no cache-*-bfloat16",
    "mixed-*-bfloat16",
    "mixed-64-float32",
    "shared-128-bfloat16",
    "long-64-bfloat16",
    "empty group-96-float32",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", (64, 96, 128))
@pytest.mark.parametrize("case", STEPS)
def test_step(case, head_dim, dtype):
    check_step(*step_arguments(*STEPS[case], 2, 2, head_dim, dtype))


@pytest.mark.slow_except("mixed-96-bfloat16", "empty group-64-float32", "no cache-128-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", (64, 96, 128))
@pytest.mark.parametrize("case", STEPS)
def test_step_with_queries_to_be_rotated(case, head_dim, dtype):
    """As with queries that `rope_` has rotated; of the reference to the bit."""
    args = turning(step_arguments(*STEPS[case], 2, 2, head_dim, dtype))
    check_step(*args)
    expected = reference.attention_step(*turned(args, reference.rope_))
    assert torch.equal(reference.attention_step(*args), expected)
    found = attention.attention_step(*args)
    torch.testing.assert_close(found, attention.attention_step(*turned(args, rope.rope_)))


@pytest.mark.slow_except("4-2-96-*", "4-1-64-*", "3-3-128-*")
@pytest.mark.parametrize(("head_dim", "block_m", "block_n"), tiles("attention_step"))
@pytest.mark.parametrize(("heads", "kv_heads"), ((4, 1), (4, 2), (3, 3)))
def test_step_grouped_heads_and_every_tile(heads, kv_heads, head_dim, block_m, block_n):
    args = step_arguments([130, 64], [(0, 129), (7, 64)], heads, kv_heads, head_dim, torch.bfloat16)
    chosen = launch.Launch(num_warps=4, block_m=block_m, block_n=block_n)
    with mock.patch.object(launch, "choose", return_value=chosen):
        check_step(*args)


@pytest.mark.slow_except("96")
@pytest.mark.parametrize("head_dim", (64, 96, 128))
def test_step_through_tensor_maps(head_dim):
    """Whole blocks through maps, what is left through pointers; to the bit as without maps."""
    args = step_arguments(*STEPS["mixed"], 4, 2, head_dim, torch.bfloat16)
    plain = launch.Launch(num_warps=8, block_m=64, block_n=32)
    maps = replace(plain, tensor_maps=True)
    args = turning(args)
    with (
        mock.patch.object(launch, "choose", return_value=maps),
        mock.patch.object(attention, "attention_step_kernel", None),  # not the one that runs
    ):
        if DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
            check_step(*args)
            found = attention.attention_step(*args)
        else:
            pytest.skip("tensor maps need compute capability 9.0")
    with mock.patch.object(launch, "choose", return_value=plain):
        torch.testing.assert_close(found, attention.attention_step(*args), rtol=0, atol=0)


def test_step_without_maps_where_rows_are_not_aligned():
    q, k, v, *rest = step_arguments(*STEPS["mixed"], 2, 2, 64, torch.bfloat16)
    k, v = (inside(x, gap=3)[0] for x in (k, v))
    assert not attention._mappable(k)
    maps = launch.Launch(num_warps=8, block_m=64, block_n=32, tensor_maps=True)
    with (
        mock.patch.object(launch, "choose", return_value=maps),
        mock.patch.object(attention, "attention_step_maps_kernel", None),
    ):
        check_step(q, k, v, *rest)


def some_rows(args, parts):
    """A step's arguments for a run of every group's rows, whose keys are those of all."""
    q, k, v, k_cache, v_cache, cu_rows, starts, cached, _ = args
    picked = [
        torch.arange(first + start, first + stop)
        for first, (start, stop) in zip(cu_rows.tolist(), parts)
    ]
    rows, counts = torch.cat(picked).to(q.device), [len(one) for one in picked]
    bounds = integers(*accumulate(counts, initial=0))
    return q[rows], k, v, k_cache, v_cache, bounds, starts, cached, max(counts), cu_rows


PARTS = [(20, 63), (0, 1), (0, 0), (64, 65)]


@pytest.mark.slow_except("96-bfloat16", "64-float32")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", (64, 96, 128))
def test_step_of_some_rows(head_dim, dtype):
    args = some_rows(step_arguments(*STEPS["mixed"], 4, 2, head_dim, dtype), PARTS)
    check_step(*args)
    check_step(*turning(args))


def test_step_of_some_rows_through_tensor_maps():
    args = some_rows(step_arguments(*STEPS["mixed"], 4, 2, 96, torch.bfloat16), PARTS)
    maps = launch.Launch(num_warps=8, block_m=64, block_n=32, tensor_maps=True)
    with (
        mock.patch.object(launch, "choose", return_value=maps),
        mock.patch.object(attention, "attention_step_kernel", None),  # not the one that runs
    ):
        if DEVICE != "cpu" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("tensor maps need compute capability 9.0")
        check_step(*args)


def test_step_no_rows():
    args = step_arguments([], [], 2, 2, 64, torch.float32, cache_rows=3)
    assert attention.attention_step(*args).shape == (0, 2, 64)
    args = step_arguments([0, 0], [(0, 1), (1, 2)], 2, 2, 64, torch.float32)
    assert attention.attention_step(*args).shape == (0, 2, 64)


def test_step_large_scores():
    """Scores of several hundred: the running maximum must keep every exponential finite."""
    q, *rest = step_arguments([70], [(0, 90)], 2, 2, 64, torch.float32)
    check_step(q * 100, *rest)


GROUPS = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 70)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(GROUPS, st.sampled_from((64, 96)), st.sampled_from(DTYPES))
def test_step_any_lengths(groups, head_dim, dtype):
    lengths = [rows for rows, _ in groups]
    cached = [(7 * place, length) for place, (_, length) in enumerate(groups)]
    with mock.patch.object(launch, "choose", return_value=SMALL):
        check_step(*step_arguments(lengths, cached, 2, 1, head_dim, dtype))


PREFILLS = {
    "one row": [[("text", 1)]],
    "text": [[("text", 65)]],
    "image": [[("text", 10), ("image", 100), ("text", 30)]],
    "times": [[("text", 20), ("times", 50)]],
    "one image": [[("image", 64)]],
    "branches": [
        [("text", 21), ("image", 128), ("text", 9), ("image", 64), ("text", 40), ("times", 10)],
        [("text", 63), ("times", 1)],
        [("text", 1)],
        [("image", 129), ("times", 70)],
    ],
    "only times": [[("times", 3)]],
    "empty group": [[], [("text", 7)]],
}


@pytest.mark.slow_except(
    "one row-*",
    "text-64-*",
    "image-96-bfloat16",
    "times-128-bfloat16",
    "one image-64-float32",
    "branches-96-bfloat16",
    "only times-*",
    "empty group-*",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", (64, 96, 128))
@pytest.mark.parametrize("case", PREFILLS)
def test_prefill(case, head_dim, dtype):
    check_prefill(*prefill_arguments(PREFILLS[case], 2, 2, head_dim, dtype))


@pytest.mark.slow_except("4-2-96-*", "4-1-64-*", "3-3-128-*")
@pytest.mark.parametrize(("head_dim", "block_m", "block_n"), tiles("attention_prefill"))
@pytest.mark.parametrize(("heads", "kv_heads"), ((4, 1), (4, 2), (3, 3)))
def test_prefill_grouped_heads_and_every_tile(heads, kv_heads, head_dim, block_m, block_n):
    args = prefill_arguments(PREFILLS["image"], heads, kv_heads, head_dim, torch.bfloat16)
    chosen = launch.Launch(num_warps=4, block_m=block_m, block_n=block_n)
    with mock.patch.object(launch, "choose", return_value=chosen):
        check_prefill(*args)


@pytest.mark.slow_except("image-bfloat16", "one row-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", PREFILLS)
def test_prefill_in_one_loop(case, dtype):
    """To the bit as with a loop of their own for blocks that are masked."""
    args, found = prefill_arguments(PREFILLS[case], 2, 1, 96, dtype), []
    for one_loop in (False, True):
        chosen = replace(SMALL, one_loop=one_loop)
        with mock.patch.object(launch, "choose", return_value=chosen):
            found.append(attention.attention_prefill(*args))
    assert torch.equal(*found)
    with mock.patch.object(launch, "choose", return_value=chosen):
        check_prefill(*args)


@pytest.mark.slow_except("0-bfloat16", "64-float32", "110-bfloat16", "140-*")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("first", (0, 1, 64, 110, 139, 140))
def test_prefill_behind_shared_rows(first, dtype):
    """Rows before `first` are keys only: NaN for their queries changes nothing, none is written."""
    q, *rest = prefill_arguments(PREFILLS["image"], 2, 2, 96, dtype)
    plain = reference.attention_prefill(q, *rest)
    exact = reference.attention_prefill(
        *(x if isinstance(x, int) else double(x)[0] for x in (q, *rest))
    )
    q = q.clone()
    q[:first] = torch.nan
    for attend in (attention.attention_prefill, reference.attention_prefill):
        out, untouched = poisoned(*q.shape, dtype=dtype)
        attend(q, *rest, first, out=out)
        assert untouched() and out[:first].isnan().all()
        assert_earned(out[first:], plain[first:], exact[first:])


def test_prefill_no_rows():
    assert attention.attention_prefill(*prefill_arguments([], 2, 2, 64, torch.float32)).shape == (
        0,
        2,
        64,
    )


def test_prefill_keeps_kv_end_inside_the_group():
    """A kv_end behind the group's end must not reach the next group's rows."""
    q, k, v, cu_rows, kv_end, longest = prefill_arguments(
        [[("image", 20)], [("image", 30)]], 2, 2, 64, torch.float32
    )
    out, _ = poisoned(*q.shape, dtype=q.dtype)
    attention.attention_prefill(q, k, v, cu_rows, kv_end + 1000, longest, out=out)
    assert torch.equal(out, attention.attention_prefill(q, k, v, cu_rows, kv_end, longest))


RUNS = st.lists(
    st.tuples(st.sampled_from(("text", "image", "times")), st.integers(1, 40)),
    min_size=1,
    max_size=5,
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.lists(RUNS, min_size=1, max_size=3), st.sampled_from((64, 96)), st.sampled_from(DTYPES))
def test_prefill_any_runs(groups, head_dim, dtype):
    with mock.patch.object(launch, "choose", return_value=SMALL):
        check_prefill(*prefill_arguments(groups, 2, 1, head_dim, dtype))


def masked(q, k, v, visible):
    """Softmax attention under a mask [rows, keys], a score matrix and all."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def test_specification_of_the_step():
    args = step_arguments(*STEPS["mixed"], 4, 2, 64, torch.float64)
    q, k, v, k_cache, v_cache, cu_rows, starts, cached, _ = args
    found = reference.attention_step(*args)
    for group, (first, stop) in enumerate(pairwise(cu_rows.tolist())):
        rows = slice(first, stop)
        seen = slice(starts[group], starts[group] + cached[group])
        keys = torch.cat([k_cache[seen], k[rows]])
        values = torch.cat([v_cache[seen], v[rows]])
        visible = torch.ones(stop - first, len(keys), dtype=torch.bool, device=q.device)
        torch.testing.assert_close(found[rows], masked(q[rows], keys, values, visible))


def test_specification_of_some_rows():
    """As of all rows, which every row's own result does not depend on."""
    args = step_arguments(*STEPS["mixed"], 4, 2, 64, torch.float64)
    whole, bounds = reference.attention_step(*args), args[5].tolist()
    picked = [whole[first + a : first + b] for first, (a, b) in zip(bounds, PARTS)]
    torch.testing.assert_close(reference.attention_step(*some_rows(args, PARTS)), torch.cat(picked))


@pytest.mark.parametrize("block", (7, 64, 1024))
@pytest.mark.parametrize("first", (0, 1, 20))
def test_specification_of_the_prefill(first, block, monkeypatch):
    monkeypatch.setattr(reference, "_PREFILL_BLOCK", block)
    args = prefill_arguments(PREFILLS["branches"], 4, 2, 64, torch.float64)
    q, k, v, cu_rows, kv_end, _ = args
    place = torch.arange(len(q), device=q.device)
    group = torch.bucketize(place, cu_rows[1:], right=True)
    start = cu_rows[group]
    visible = (group == group[:, None]) & (place >= start[:, None])
    visible &= (place < (start + kv_end)[:, None]) | torch.eye(len(q), device=q.device).bool()
    out, untouched = poisoned(*q.shape, dtype=q.dtype)
    reference.attention_prefill(*args, first, out=out)
    wanted = place >= start + first
    assert untouched() and out[~wanted].isnan().all()
    torch.testing.assert_close(out[wanted], masked(q, k, v, visible)[wanted])


@pytest.mark.parametrize("scores", (1, 3 * 2 * 50, 3 * 2 * 50 * 8, 1 << 20))
def test_specification_of_attention_without_a_fused_kernel(scores, monkeypatch):
    """In blocks of rows, so that no more scores than allowed are there at once, but for one row."""
    monkeypatch.setattr(reference, "_PLAIN_SCORES", scores)
    q, k, v = (random(3, 2, rows, 64, seed=i).double() for i, rows in enumerate((20, 50, 50)))
    sizes, softmax = [], torch.softmax
    monkeypatch.setattr(
        torch, "softmax", lambda x, dim: sizes.append(x.numel()) or softmax(x, dim=dim)
    )
    found, lse = reference._plain_attend(q, k, v)
    expected, expected_lse = reference._attend(q, k, v)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lse, expected_lse)
    rows = min(max(1, scores // 300), 20)
    assert sizes[0] == max(sizes) == rows * 300 and sum(sizes) == 20 * 300


def test_specification_of_attention_without_keys():
    """Which weighs nothing beside other keys."""
    q, k, v = (random(3, 2, rows, 64) for rows in (5, 0, 0))
    out, lse = reference._attend(q, k, v)
    assert not out.any() and (lse == -torch.inf).all()
