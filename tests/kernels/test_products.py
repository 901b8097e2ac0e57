"""Rows in 8 bits and their product, against float64."""

from __future__ import annotations

import pytest
import torch
from golden_cases import relative_error
from numerics import DEVICE, DTYPES, assert_earned, double, inside, name, poisoned, random
from omnigen_fast.kernels import (
    contract,
    launch,
    ops,
    product,
    quantise,
    reference,
    rms_norm,
    swiglu,
)
from test_rows import ROWS

pytestmark = pytest.mark.early

FORMS = (torch.int8, torch.float8_e4m3fn)
forms = pytest.mark.parametrize("form", FORMS, ids=name)


class Rows:
    """Outputs of an operation that quantises, inside memory that it must leave alone."""

    def __init__(self, rows: int, width: int, form: torch.dtype) -> None:
        self._buffer = torch.full((rows + 2, width + 8), -128, dtype=torch.int8, device=DEVICE)
        self.values = self._buffer.view(form)[1:-1, 4:-4]
        scales, self._untouched = poisoned(1, rows, dtype=torch.float32)
        self.scales = scales[0]

    def untouched(self) -> bool:
        rest = self._buffer.clone()
        rest[1:-1, 4:-4] = -128
        return bool((rest == -128).all()) and self._untouched()

    def back(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The rows that values and scales stand for."""
        assert not self.scales.isnan().any() and (self.scales > 0).all()
        return self.values.float().mul(self.scales[:, None]).to(dtype)


def assert_quantised(found: Rows, plain: Rows, exact: torch.Tensor) -> None:
    """As `assert_earned`; and a row uses its form's whole range."""
    assert found.untouched()
    assert_earned(found.back(), plain.back(), exact)
    if len(exact):
        largest = found.values.float().abs().amax(1)
        wanted = contract.LARGEST[found.values.dtype]
        assert torch.equal(largest, torch.full_like(largest, wanted))
        torch.testing.assert_close(found.scales, plain.scales, rtol=1e-5, atol=0)


@pytest.mark.slow_for("[24]*7-*")
@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rows", ROWS)
def test_quantise(rows, dtype, form):
    x, _ = inside(random(rows, 96, dtype=dtype))
    found, plain = Rows(rows, 96, form), Rows(rows, 96, form)
    quantise.quantise_(x, found.values, found.scales)
    reference.quantise_(x, plain.values, plain.scales)
    assert_quantised(found, plain, x.double())


@pytest.mark.slow_for("[24]*7-*")
@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rows", ROWS)
def test_norms_that_quantise(rows, dtype, form):
    x, x_untouched = inside(random(rows, 96, dtype=dtype, seed=1), gap=5)
    weight = random(96, dtype=dtype, seed=2)
    found, plain = Rows(rows, 96, form), Rows(rows, 96, form)
    rms_norm.rms_norm_quantise_(x, weight, 1e-5, found.values, found.scales)
    reference.rms_norm_quantise_(x, weight, 1e-5, plain.values, plain.scales)
    assert x_untouched()
    assert_quantised(found, plain, reference.rms_norm(*double(x, weight), 1e-5))


@pytest.mark.slow_for("[24]*7-*")
@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("rows", "inner"), [*((rows, 96) for rows in ROWS), (3, 4500), (2, 1)])
def test_swiglu_that_quantises(rows, inner, dtype, form):
    gate_up, untouched = inside(4 * random(rows, 2 * inner, dtype=dtype))
    found, plain = Rows(rows, inner, form), Rows(rows, inner, form)
    swiglu.swiglu_quantise_(gate_up, found.values, found.scales)
    reference.swiglu_quantise_(gate_up, plain.values, plain.scales)
    assert untouched()
    assert_quantised(found, plain, reference.swiglu(*double(gate_up)))


# rows, columns, width: none, one, beside a tile's edge, several tiles and a rest of their depth
PRODUCTS = [
    (0, 32, 64),
    (1, 1, 1),
    (63, 65, 96),
    (64, 64, 128),
    (65, 129, 200),
    (257, 16, 64),
    (130, 260, 384),
]


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("rows", "columns", "width"), PRODUCTS)
def test_scaled_mm(rows, columns, width, dtype, form):
    x, weight = Rows(rows, width, form), Rows(columns, width, form)
    reference.quantise_(random(rows, width), x.values, x.scales)
    reference.quantise_(random(columns, width, seed=1), weight.values, weight.scales)
    operands = x.values, x.scales, weight.values, weight.scales
    result, untouched = poisoned(rows, columns, dtype=dtype)
    product.scaled_mm_(*operands, result)
    assert untouched()
    plain = torch.empty_like(result)
    reference.scaled_mm_(*operands, plain)
    exact = x.values.double() @ weight.values.double().t()
    exact *= x.scales.double()[:, None] * weight.scales.double()
    assert_earned(result, plain, exact)
    if form is torch.int8:  # whole numbers: the sums are exact in any order
        torch.testing.assert_close(
            result, plain, rtol=2**-7 if dtype == torch.bfloat16 else 3e-7, atol=0
        )
    # added to what is there, which is twenty times as large: rounded once
    there = 20 * random(rows, columns, dtype=dtype, seed=2)
    (result, untouched), plain = inside(there), there.clone()
    product.scaled_mm_(*operands, result, True)
    reference.scaled_mm_(*operands, plain, True)
    assert untouched()
    assert_earned(result, plain, exact + there.double())
    half = 2**-8 if dtype == torch.bfloat16 else 1e-6  # of the last place
    for one in (result, plain):
        torch.testing.assert_close(one.double(), exact + there.double(), rtol=half, atol=1e-4)


def test_sums_of_the_widest_rows_fit(monkeypatch):
    """The largest products of all, as many as the contract allows: no sum wraps round."""
    width = contract.MAX_DEPTH
    deep = launch.Launch(num_warps=4, block_m=16, block_n=16, block_k=8192)
    monkeypatch.setattr(launch, "choose", lambda *_: deep)
    values = torch.full((2, width), 127, dtype=torch.int8, device=DEVICE)
    values[1] = -127
    scales = torch.ones(2, device=DEVICE)
    for module in (reference, product):
        result = torch.full((2, 2), torch.nan, device=DEVICE)
        module.scaled_mm_(values, scales, values, scales, result)
        most = float(127 * 127 * width)
        assert result.tolist() == [[most, -most], [-most, most]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("kernels", ("reference", "triton"))
@forms
def test_nan_and_infinities_stay_visible(form, kernels):
    """In the results of their rows, and of no others."""
    x, weight = random(4, 64), random(48, 64, seed=1)
    x[1, 3], x[2, 60] = torch.nan, -torch.inf
    x[3] = 0
    rows, quantised = Rows(4, 64, form), Rows(48, 64, form)
    result, gate_up = torch.empty(4, 48, device=DEVICE), torch.cat([x, torch.ones_like(x)], 1)
    reference.quantise_(weight, quantised.values, quantised.scales)
    ones = torch.ones(64, device=DEVICE)
    with ops.use(kernels):
        for make in (
            lambda: ops.quantise_(x, rows.values, rows.scales),
            lambda: ops.swiglu_quantise_(-gate_up.abs(), rows.values, rows.scales),
            lambda: ops.rms_norm_quantise_(x, ones, 1e-5, rows.values, rows.scales),
        ):
            make()
            ops.scaled_mm_(rows.values, rows.scales, quantised.values, quantised.scales, result)
            assert result[0].isfinite().all() and result[1].isnan().all()
            assert result[3].isfinite().all()
        ops.quantise_(x, rows.values, rows.scales)
        ops.scaled_mm_(rows.values, rows.scales, quantised.values, quantised.scales, result)
        assert not result[2].isfinite().any() and not result[3].any()


@pytest.mark.parametrize("kernels", ("reference", "triton"))
@forms
def test_a_row_alone_is_that_of_all(form, kernels):
    """A row's values depend on no other row, so that packed branches are what each is alone."""
    x, weight = random(70, 64), Rows(40, 64, form)
    reference.quantise_(random(40, 64, seed=1), weight.values, weight.scales)

    def through(some: torch.Tensor) -> torch.Tensor:
        rows = Rows(len(some), 64, form)
        result = torch.empty(len(some), 40, device=DEVICE)
        ops.quantise_(some, rows.values, rows.scales)
        ops.scaled_mm_(rows.values, rows.scales, weight.values, weight.scales, result)
        return result

    with ops.use(kernels):
        together = through(x)
        for one in (x[:1], x[63:], x[5:69]):
            start = next(i for i in range(70) if torch.equal(x[i], one[0]))
            if form is torch.int8:
                assert torch.equal(through(one), together[start : start + len(one)])
            else:
                torch.testing.assert_close(through(one), together[start : start + len(one)])


@pytest.mark.parametrize("compute", ("int8", "fp8"))
def test_a_layer_through_the_kernels(load_pipe, compute):
    """Interpreted, in bfloat16: to the rounding of what is between its products."""
    model, rows = load_pipe(dtype="bfloat16", compute=compute).model, 5
    block, found = model.layers[1], {}
    for kernels in ("reference", "triton"):
        generator = torch.Generator().manual_seed(5)
        residual, attended = (
            torch.randn(rows, 192, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2)
        )
        space = model.workspace(rows, mlp_rows=3)
        with ops.use(kernels):
            qkv = block.project(residual, space).clone()
            block.finish(residual, attended.unflatten(1, (2, -1)), space)
        found[kernels] = qkv, residual
    for mine, theirs in zip(*found.values()):
        assert relative_error(mine, theirs) < 2**-7
