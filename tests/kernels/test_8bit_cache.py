"""The condition cache in 8 bits: rows as they are written, and attention over them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, DTYPES, assert_earned, double, inside, name, poisoned
from omnigen_fast.kernels import attention_8bit, contract, launch, quantise, reference, rope
from test_attention import (
    GROUPS,
    PARTS,
    SMALL,
    STEPS,
    some_rows,
    split,
    step_arguments,
    tiles,
    turned,
    turning,
)

pytestmark = pytest.mark.early

FORMS = {torch.int8: torch.int8, torch.uint8: torch.float8_e4m3fn}
forms = pytest.mark.parametrize("form", FORMS, ids={torch.int8: "int8", torch.uint8: "fp8"}.get)


def narrow(x: torch.Tensor, form: torch.dtype) -> torch.Tensor:
    """A cache [rows, kv_heads, head_dim] in 8 bits, gaps between its rows; NaN where it is."""
    rows, kv_heads, head_dim = x.shape
    cache = torch.zeros(rows, contract.cache_width(kv_heads, head_dim), dtype=form, device=x.device)
    places = torch.arange(rows, device=x.device)
    reference.quantise_cache_(x, x, cache, cache.clone(), places)
    return inside(cache)[0]


def expanded(cache: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Its values in float64, by PyTorch's own conversions."""
    values, scales = contract.cache_parts(cache, kv_heads, head_dim)
    values = values.contiguous().view(FORMS[cache.dtype])
    return values.double() * scales.double().unsqueeze(2)


class TestRows:
    @forms
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("shape", [(0, 2, 64), (1, 1, 96), (65, 5, 96), (7, 2, 20)], ids=str)
    def test_as_rows_of_products_are(self, shape, dtype, form):
        """Of every head the scale to the bit, the values to where rounding is a tie."""
        rows, kv_heads, head_dim = shape
        _, k, v = split(rows, kv_heads, kv_heads, head_dim, dtype)
        width = contract.cache_width(kv_heads, head_dim)
        places = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(0))[:rows]
        made = []
        for run in (quantise.quantise_cache_, reference.quantise_cache_):
            blank = torch.full((rows + 3, width), 77, dtype=form, device=DEVICE)
            caches, untouched = zip(*(inside(blank) for _ in range(2)))
            run(k, v, *caches, places.to(DEVICE))
            assert all(one() for one in untouched)
            others = torch.ones(rows + 3, dtype=torch.bool)
            others[places] = False
            assert all((cache[others.to(DEVICE)] == 77).all() for cache in caches)
            made.append(caches)
        unit = {torch.int8: 1.0, torch.uint8: 32.0}[form]  # of the largest values
        for x, found, plain in zip((k, v), *made):
            _values, scales = contract.cache_parts(found[places], kv_heads, head_dim)
            _, plain_scales = contract.cache_parts(plain[places], kv_heads, head_dim)
            largest = contract.LARGEST[FORMS[form]]
            assert torch.equal(scales, x.float().abs().amax(2) * (1 / largest))
            assert torch.equal(scales, plain_scales)
            exact = x.double()
            bound = 0.505 * unit * scales.double().unsqueeze(2)
            for cache in (found, plain):
                error = (expanded(cache[places], kv_heads, head_dim) - exact).abs()
                assert bool((error <= bound).all())
            assert_earned(
                expanded(found[places], kv_heads, head_dim).float(),
                expanded(plain[places], kv_heads, head_dim).float(),
                exact,
            )

    @forms
    def test_what_its_values_hold_is_held_exactly(self, form):
        """All 255 or 253 of them, subnormal ones too."""
        held = torch.arange(-127, 128, device=DEVICE).float()
        if form == torch.uint8:
            bits = torch.arange(256, device=DEVICE, dtype=torch.uint8)
            held = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn).float()
        x = torch.zeros(1, 1, 256, device=DEVICE)
        x[0, 0, : len(held)] = held * 2.0**-5
        for run in (quantise.quantise_cache_, reference.quantise_cache_):
            cache = torch.zeros(1, contract.cache_width(1, 256), dtype=form, device=DEVICE)
            run(x, x, cache, cache.clone(), torch.zeros(1, dtype=torch.int64, device=DEVICE))
            assert torch.equal(expanded(cache, 1, 256), x.double())

    @forms
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_no_number_stays_none(self, form, value):
        x = torch.ones(2, 3, 64, device=DEVICE)
        x[1, 2, 5] = value
        for run in (quantise.quantise_cache_, reference.quantise_cache_):
            cache = torch.zeros(2, contract.cache_width(3, 64), dtype=form, device=DEVICE)
            run(x, x, cache, cache.clone(), torch.arange(2, device=DEVICE))
            found = reference._dequantised(cache, x)
            bad = (~found.isfinite()).any(2).tolist()
            assert bad == [[False] * 3, [False, False, True]]

    @forms
    def test_zeros(self, form):
        x = torch.zeros(1, 2, 96, device=DEVICE)
        for run in (quantise.quantise_cache_, reference.quantise_cache_):
            cache = torch.full((1, contract.cache_width(2, 96)), 7, dtype=form, device=DEVICE)
            run(x, x, cache, cache.clone(), torch.zeros(1, dtype=torch.int64, device=DEVICE))
            assert not reference._dequantised(cache, x).any()


def quantised_step(lengths, cached, heads, kv_heads, head_dim, dtype, form):
    """Arguments of a step whose cache is in 8 bits; rows of nobody are NaN there too."""
    q, k, v, *caches, cu_rows, starts, counts, longest = step_arguments(
        lengths, cached, heads, kv_heads, head_dim, dtype
    )
    return q, k, v, *(narrow(one, form) for one in caches), cu_rows, starts, counts, longest


def check_step(*args):
    q = args[0]
    out, untouched = poisoned(*q.shape, dtype=q.dtype)
    assert attention_8bit.attention_step_8bit(*args, out=out) is out
    assert untouched()
    plain = reference.attention_step_8bit
    exact = [double(x)[0] if isinstance(x, torch.Tensor) else x for x in args]
    assert_earned(out, plain(*args), plain(*exact))


class TestStep:
    @pytest.mark.slow_except(
        "one row-*",
        "no cache-*-bfloat16-*",
        "mixed-*-bfloat16-*",
        "mixed-64-float32-fp8",
        "shared-128-bfloat16-int8",
        "long-64-bfloat16-fp8",
        "empty group-96-float32-*",
    )
    @forms
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("head_dim", (64, 96, 128))
    @pytest.mark.parametrize("case", STEPS)
    def test_any_groups(self, case, head_dim, dtype, form):
        check_step(*quantised_step(*STEPS[case], 2, 2, head_dim, dtype, form))

    @pytest.mark.slow_except("4-2-96-*-fp8", "4-1-64-*-int8")
    @forms
    @pytest.mark.parametrize(("head_dim", "block_m", "block_n"), tiles("attention_step_8bit"))
    @pytest.mark.parametrize(("heads", "kv_heads"), ((4, 1), (4, 2), (3, 3)))
    def test_grouped_heads_and_every_tile(self, heads, kv_heads, head_dim, block_m, block_n, form):
        groups = [130, 64], [(0, 129), (7, 64)]
        args = quantised_step(*groups, heads, kv_heads, head_dim, torch.bfloat16, form)
        chosen = launch.Launch(num_warps=4, block_m=block_m, block_n=block_n)
        with mock.patch.object(launch, "choose", return_value=chosen):
            check_step(*args)

    @pytest.mark.slow_except("64-*")
    @forms
    @pytest.mark.parametrize("head_dim", (64, 96, 128))
    def test_some_rows(self, head_dim, form):
        args = quantised_step(*STEPS["mixed"], 4, 2, head_dim, torch.bfloat16, form)
        check_step(*some_rows(args, PARTS))
        check_step(*turning(some_rows(args, PARTS)))

    @pytest.mark.slow_except("mixed-96-int8", "long-64-fp8")
    @forms
    @pytest.mark.parametrize("head_dim", (64, 96, 128))
    @pytest.mark.parametrize("case", STEPS)
    def test_queries_to_be_rotated(self, case, head_dim, form):
        """As with queries that `rope_` has rotated; of the reference to the bit."""
        args = turning(quantised_step(*STEPS[case], 2, 2, head_dim, torch.bfloat16, form))
        if len(args[0]) > 1:  # the worst roundings of a single row are chance
            check_step(*args)
        plain, kernel = reference.attention_step_8bit, attention_8bit.attention_step_8bit
        assert torch.equal(plain(*args), plain(*turned(args, reference.rope_)))
        torch.testing.assert_close(kernel(*args), kernel(*turned(args, rope.rope_)))

    @forms
    def test_large_scores(self, form):
        """Scores of several hundred: the running maximum must keep every exponential finite."""
        q, *rest = quantised_step([70], [(0, 90)], 2, 2, 64, torch.float32, form)
        check_step(q * 100, *rest)

    @forms
    def test_no_rows(self, form):
        for groups in (([], []), ([0, 0], [(0, 1), (1, 2)])):
            args = quantised_step(*groups, 2, 2, 64, torch.float32, form)
            assert attention_8bit.attention_step_8bit(*args).shape == (0, 2, 64)

    @pytest.mark.slow
    @settings(max_examples=20, deadline=None)
    @given(GROUPS, st.sampled_from((64, 96)), st.sampled_from(DTYPES), st.sampled_from(list(FORMS)))
    def test_any_lengths(self, groups, head_dim, dtype, form):
        lengths = [rows for rows, _ in groups]
        cached = [(7 * place, length) for place, (_, length) in enumerate(groups)]
        with mock.patch.object(launch, "choose", return_value=SMALL):
            check_step(*quantised_step(lengths, cached, 2, 1, head_dim, dtype, form))

    @forms
    def test_specification(self, form):
        """A plain step over what the cache stands for."""
        args = quantised_step(*STEPS["mixed"], 4, 2, 64, torch.float64, form)
        q, k, v, *caches, cu_rows, starts, counts, longest = args
        wide = [expanded(cache, 2, 64) for cache in caches]
        expected = reference.attention_step(q, k, v, *wide, cu_rows, starts, counts, longest)
        assert torch.equal(reference.attention_step_8bit(*args), expected)
